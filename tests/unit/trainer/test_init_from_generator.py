"""Generators that start from another one: its weights, its grids, and what does not fit."""

from dataclasses import replace

import pytest
import torch
from comparing import refusal
from model_checks import tokenizer_of, write_run
from support import GENERATOR, equal, generator_of, generator_run, write_generator_run
from tokens import write_tokens
from torch import Tensor

from model_zoo.conditions import trained_from
from trainer import TrainerError
from trainer.config import EngineConfig, InitFromConfig
from trainer.init_from import read_init_record, save_init_record
from trainer.jobs.export import export
from trainer.parallel import World, start_world
from trainer.start_plan import plan_batch
from trainer.tasks import generator as task_module
from trainer.tasks.generator import GeneratorTask

FINGERPRINT, OTHER = "a" * 16, "b" * 16
CLASSES = torch.tensor([0, 5, 6])


def task_of(world: World, source, weights: str | None = "raw", **changes) -> GeneratorTask:
    """changes: of the model GENERATOR, except engine, vocabulary_parallel, fingerprint and tokenizer's source."""
    engine, parallel = changes.pop("engine", EngineConfig()), changes.pop("parallel", 1)
    fingerprint, tokenizer = changes.pop("fingerprint", None), changes.pop("tokenizer", None)
    config = generator_run(replace(GENERATOR, **changes))
    config.trainer.precision, config.seed, config.ema.decay = "fp32", 9, 0.5
    config.optimizer.epsilon = 1e-3  # so that Adam does not amplify rounding
    config.engine, config.vocabulary_parallel = engine, parallel
    config.tokenizer.fingerprint, config.tokenizer.source = fingerprint, tokenizer
    config.init_from = InitFromConfig(str(source), weights)
    return GeneratorTask(config, world, *plan_batch(config, world))


def codes(count: int) -> Tensor:
    return torch.randint(GENERATOR.vocabulary, (3, count), generator=torch.Generator().manual_seed(0))


def loss_of(transformer, grid) -> Tensor:
    with torch.no_grad():
        return transformer.eval().loss(codes(grid[0] * grid[1]), CLASSES, impl="dense", grid=grid).loss


@pytest.fixture
def one_grid(tmp_path):
    """The run of a generator with one grid, 2 x 3, that was trained on two classes."""
    generator = generator_of(4)
    generator.trained_c = trained_from("1,3", 6)
    return write_generator_run(tmp_path / "run", generator)


def test_a_generator_of_several_grids_begins_as_that_of_one(world, one_grid, tmp_path):
    task = task_of(world, one_grid, grids=["3x2", "2x3"])
    record = task.load_initial_weights()
    expected = generator_of(4)
    assert task.transformer.grid_emb.weight.abs().max() == 0
    assert loss_of(task.transformer, (2, 3)) == loss_of(expected, (2, 3))
    assert loss_of(task.transformer, (3, 2)) == loss_of(generator_of(4, grid=[3, 2]), (3, 2))
    assert task.transformer.trained_c.nonzero().flatten().tolist() == [1, 3]
    assert task.transformer.trained_g.tolist() == [False, True]  # with a row of zeros it is the source
    averages = {shard.name: shard.values for shard in task.state.tensors() if shard.name.startswith("generator_ema/")}
    for name, value in expected.state_dict().items():
        assert torch.equal(averages[f"generator_ema/{name}"].view(value.shape), value)
    assert record.grids == "embeddings of grids: 3x2, 2x3 start at zero (the source has 2x3)"
    assert str(record).startswith(f"initialized from {one_grid}") and "discriminator" not in str(record)
    save_init_record(tmp_path, record)
    assert read_init_record(tmp_path) == record._asdict()


@pytest.mark.parametrize("exported", [False, True])
def test_embeddings_are_those_of_the_same_grids(world, tmp_path, exported):
    generator = generator_of(4, grids=["1x5", "2x3", "3x2"])
    source = write_generator_run(tmp_path / "run", generator)
    if exported:
        export(source, tmp_path / "export")
    task = task_of(world, tmp_path / ("export" if exported else "run"), grids=["3x2", "2x2", "2x3", "1x5"])
    record = task.load_initial_weights()
    found_gw, source_gw = task.transformer.grid_emb.weight.detach(), generator.grid_emb.weight
    assert torch.equal(found_gw[[0, 2, 3]], source_gw[[2, 1, 0]]) and found_gw[1].abs().max() == 0
    for grid in ((3, 2), (2, 3), (1, 5)):
        assert loss_of(task.transformer, grid) == loss_of(generator, grid)
    assert record.grids == (
        "embeddings of grids: 3x2, 2x3, 1x5 of the source, 2x2 start at zero (the source has 1x5, 2x3, 3x2)"
    )


def test_a_grid_that_the_source_never_trained_is_new(world, tmp_path):
    generator = generator_of(4, grids=["1x5", "2x3", "3x2"])
    generator.trained_g = torch.tensor([True, False, True])
    task = task_of(world, write_generator_run(tmp_path / "run", generator), grids=["3x2", "2x2", "2x3"])
    record = task.load_initial_weights()
    assert task.transformer.trained_g.tolist() == [True, False, False]
    assert "3x2 of the source, 2x2, 2x3 start at zero" in record.grids


@pytest.mark.parametrize(("grid", "said"), [([2, 3], None), ([4, 4], "grid 4x4, of the source 2x3")])
def test_a_generator_of_one_grid_may_have_another_one_than_its_source(world, one_grid, grid, said):
    task = task_of(world, one_grid, grid=grid, dropout=0.1, gate_init=0.5)
    assert task.load_initial_weights().grids == said
    assert equal(task.transformer.state_dict(), generator_of(4).state_dict())


def test_which_classes_were_trained_is_assumed_where_the_source_does_not_say(world, tmp_path):
    run = write_run(tmp_path / "run", {"model": GENERATOR, "loss": {"label_dropout": 0}}, generator=generator_of(4))
    task = task_of(world, run)
    task.load_initial_weights()
    assert task.transformer.trained_c.tolist() == [True] * 6 + [False]


def test_without_a_choice_the_averages_are_taken_if_there_are_any(world, one_grid, tmp_path):
    assert "(raw weights)" in task_of(world, one_grid, None).load_initial_weights().origin
    models = {"generator": generator_of(4), "generator_ema": generator_of(5)}
    averaged = write_run(tmp_path / "averaged", generator_run(models["generator"].config), **models)
    task = task_of(world, averaged, None)
    assert "(ema weights)" in task.load_initial_weights().origin
    assert equal(task.transformer.state_dict(), generator_of(5).state_dict())


def test_classes_that_the_data_number_otherwise_are_refused(world, one_grid, tmp_path):
    (one_grid / "classes.json").write_text('{"cat": 0, "dog": 1}')
    tokens = write_tokens(tmp_path / "tokens", count=4, grid=(2, 3), vocabulary=GENERATOR.vocabulary)
    task = task_of(world, one_grid)
    task.config.data.train = str(tokens)
    for same in ('{"cat": 0, "dog": 1}', '{"cat": 0, "cow": 2}'):
        (tokens / "classes.json").write_text(same)
        task.load_initial_weights()
    (tokens / "classes.json").write_text('{"dog": 0, "cat": 1}')
    message = refusal(TrainerError, task.load_initial_weights)
    assert "class 0 is cat in init_from.source" in message and "dog in the data" in message
    task.config.loss.label_dropout = 1
    task.load_initial_weights()


def test_without_a_source_nothing_is_loaded(world):
    task = task_of(world, None)
    task.config.init_from.source = None
    before = {name: value.clone() for name, value in task.transformer.state_dict().items()}
    assert task.load_initial_weights() is None
    assert equal(before, task.transformer.state_dict())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": 2}, "its model is not the recipe's: model.depth is 1 there and 2 here; use model.depth=1"),
        ({"vocabulary": 33, "grids": ["2x3"]}, "model.vocabulary is 32 there and 33 here"),
        ({"fingerprint": OTHER}, f"it was trained on codes of the tokenizer {FINGERPRINT}, and the codes here are of"),
        ({"weights": "ema"}, "holds no ema weights of a generator; ask for the raw weights"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(world, one_grid, changes, said):
    config = one_grid / "config.yaml"
    config.write_text(config.read_text().replace("fingerprint: null", f"fingerprint: {FINGERPRINT}"))
    task_of(world, one_grid, fingerprint=FINGERPRINT).load_initial_weights()
    message = refusal(TrainerError, task_of(world, one_grid, **changes).load_initial_weights)
    assert message.startswith(f"init_from.source={one_grid} (init_from.weights=") and said in message


def test_an_export_keeps_the_tokenizer_of_its_codes(world, one_grid, tmp_path):
    former = export(one_grid, tmp_path / "former").out  # of a run that did not know it
    task_of(world, former, fingerprint=OTHER).load_initial_weights()
    config = one_grid / "config.yaml"
    config.write_text(config.read_text().replace("fingerprint: null", f"fingerprint: {FINGERPRINT}"))
    exported = export(one_grid, tmp_path / "exported").out
    task_of(world, exported, fingerprint=FINGERPRINT).load_initial_weights()
    message = refusal(TrainerError, task_of(world, exported, fingerprint=OTHER).load_initial_weights)
    assert f"it was trained on codes of the tokenizer {FINGERPRINT}, and the codes here are of {OTHER}" in message
    config = exported / "config.yaml"
    config.write_text(config.read_text().replace(f"codes_of_tokenizer: {FINGERPRINT}", "codes_of_tokenizer: 12"))
    message = refusal(TrainerError, task_of(world, exported, fingerprint=FINGERPRINT).load_initial_weights)
    assert "codes_of_tokenizer: 12 is not a fingerprint" in message


def test_embeddings_of_grids_need_a_place(world, tmp_path):
    run = write_generator_run(tmp_path / "run", generator_of(4, grids=["2x3", "3x2"]))
    message = refusal(TrainerError, task_of(world, run).load_initial_weights)
    assert "it has embeddings of the grids 2x3, 3x2: give model.grids" in message
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("  - 3x2\n", ""))
    message = refusal(TrainerError, task_of(world, run, grids=["2x3", "3x2"]).load_initial_weights)
    assert "holds grid_emb.weight of shape [2, 16], expected [1, 16]" in message


def test_a_codebook_of_another_tokenizer_is_refused(world, tmp_path, monkeypatch):
    codebook = {"embedding": "codebook", "code_dim": 4}
    run = write_generator_run(tmp_path / "run", generator := generator_of(4, **codebook))
    tokenizer = tokenizer_of(1)
    monkeypatch.setattr(task_module, "load_tokenizer", lambda source: tokenizer)
    monkeypatch.setattr(task_module, "check_together", lambda *_: None)
    message = refusal(TrainerError, task_of(world, run, tokenizer="any", **codebook).load_initial_weights)
    assert "its code vectors are not those of tokenizer.source=any" in message
    tokenizer.quantize.embedding.weight.data.copy_(generator.tok_emb.codebook_vd)
    task = task_of(world, run, tokenizer="any", grids=["2x3", "3x2"], **codebook)
    task.load_initial_weights()
    assert loss_of(task.transformer, (2, 3)) == loss_of(generator, (2, 3))


def loss_on_ranks(source: str, engine: EngineConfig, parallel: int) -> list[float]:
    """Of one grid: that of the source, and that after a step with this grid."""
    task = task_of(start_world("cpu"), source, engine=engine, parallel=parallel, grids=["2x3", "3x2"])
    record = task.load_initial_weights()
    losses = []
    for _ in range(2):
        out = task.main_engine.run(task.transformer.loss, codes(6), CLASSES, 0.0, "auto", (3, 2))
        losses.append(float(out.loss))
        task.main_engine.backward(out.loss, last=True)
        engines = [network.engine for network in task.state.trained.values()]
        for each in engines:
            each.grad_norm()
            each.step(1e-2)
    return [*losses, record.fingerprint]


@pytest.mark.parametrize(
    ("engine", "parallel"),
    [
        (EngineConfig(), 2),
        (EngineConfig("deepspeed", "zero3"), 1),
        (EngineConfig("fsdp2"), 1),
    ],
    ids=["head", "zero3", "fsdp2"],
)
def test_every_engine_begins_with_the_source_and_trains_the_grid(ranks, tmp_path, engine, parallel):
    run = write_generator_run(tmp_path / "run", generator_of(4, grids=["3x2", "2x3", "1x5"]))
    (expected,) = ranks.call(1, loss_on_ranks, str(run), EngineConfig(), 1, join=False)
    for found in ranks.call(2, loss_on_ranks, str(run), engine, parallel, join=False):
        assert found[:2] == pytest.approx(expected[:2], rel=1e-5) and found[2] == expected[2]
    assert expected[1] < expected[0]
