"""One step of generator training: a tiny model on one process."""

import math
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from comparing import refusal
from model_checks import tokenizer_of
from support import averages, equal, weights
from torch.nn import functional as F

import data
from data import Batch
from data.reader import SampleInfo
from data.sampler import SamplePosition
from model_zoo import Sampling, Tokenizer
from model_zoo.io.sharded_tensors import ShardedTensors, save_shards
from model_zoo.transformer import flops_per_token
from trainer import TrainerError
from trainer.parallel import start_world
from trainer.recipes import load_recipe
from trainer.start_plan import plan_batch
from trainer.tasks import generator as task_module
from trainer.tasks.generator import Codes, GeneratorTask

VOCABULARY, TOKENS, GRID = 24, 16, (4, 4)
TINY = ["model.vocabulary=24", "model.grid=[4,4]", "model.depth=1", "model.classes=3", "trainer.device=cpu"]
CODEBOOK = ["model.embedding=codebook", "model.code_dim=6", "tokenizer.source=any"]


@pytest.fixture
def build(world):
    def build(*overrides: str) -> GeneratorTask:
        keys = [override.partition("=")[0] for override in overrides]
        tiny = [override for override in TINY if override.partition("=")[0] not in keys]
        config = load_recipe("ar_debug", [*tiny, *overrides])
        task = GeneratorTask(config, world, *plan_batch(config, world))
        task.check()
        return task

    return build


@pytest.fixture
def tokenizer(monkeypatch) -> Tokenizer:
    """What every source gives: 16 x 16 pixels to 4 x 4 of 24 codes."""
    made = tokenizer_of(3, codebook_size=VOCABULARY, code_dim=6).eval()
    monkeypatch.setattr(task_module, "load_tokenizer", lambda source: made)
    return made


def codes(seed: int = 0, count: int = 8) -> Codes:
    random = torch.Generator().manual_seed(seed)
    return Codes(torch.randint(VOCABULARY, (count, TOKENS), generator=random), torch.arange(count) % 3, GRID)


def randomize(task: GeneratorTask) -> None:
    """The head starts at zero, and a model whose logits are zero tells classes by nothing."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in task.transformer.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random))


def test_the_loss_is_the_cross_entropy_of_each_code_and_the_z_loss(build):
    task = build("loss.label_dropout=0", "loss.z_weight=0.1")
    randomize(task)
    index_bt, class_b, _ = codes()
    with torch.no_grad():
        logits_btv = task.transformer(index_bt[:, :-1], class_b)
    scalars = task.step([codes()], 0).scalars
    expected = F.cross_entropy(logits_btv.flatten(0, 1), index_bt.flatten())
    z = logits_btv.logsumexp(-1).square().mean()
    assert float(scalars["loss/cross_entropy"]) == pytest.approx(float(expected), rel=1e-5)
    assert float(scalars["loss/z"]) == pytest.approx(float(z), rel=1e-5)
    assert float(scalars["loss/total"]) == pytest.approx(float(expected + 0.1 * z), rel=1e-5)


def test_classes_are_left_out_as_often_as_the_recipe_says(build, monkeypatch):
    task = build("loss.label_dropout=0.25")
    loss = Mock(wraps=task.transformer.loss)
    monkeypatch.setattr(task.transformer, "loss", loss)
    torch.manual_seed(0)
    for step in range(100):
        task.step([codes()], step)
    seen = torch.stack([call.args[1] for call in loss.call_args_list])
    dropped = seen == 3
    assert 0.2 < dropped.double().mean() < 0.3
    assert torch.equal(seen[~dropped], (torch.arange(8) % 3).expand(100, 8)[~dropped])


def test_accumulating_changes_nothing(build):
    whole, cut = build("loss.label_dropout=0"), build("loss.label_dropout=0", "trainer.micro_batch_size=2")
    index_bt, class_b, _ = codes()
    for step in range(3):
        one = whole.step([codes()], step)
        many = cut.step([Codes(index_bt[n : n + 2], class_b[n : n + 2], GRID) for n in range(0, 8, 2)], step)
        assert float(one.scalars["loss/total"]) == pytest.approx(float(many.scalars["loss/total"]), rel=1e-6)
    torch.testing.assert_close(weights(whole.transformer), weights(cut.transformer), atol=1e-6, rtol=1e-5)


def test_a_loss_that_is_no_number_leaves_everything_as_it_was(build):
    task = build("ema.decay=0.9")
    task.step([codes()], 0)
    before, average = weights(task.transformer), averages(task.state.ema, task.main_engine)
    with torch.no_grad():
        task.transformer.head.weight[0, 0] = math.nan
    result = task.step([codes()], 1)
    assert result.skipped == ["generator"]
    after = {**weights(task.transformer), "head.weight": before["head.weight"]}
    assert equal(before, after)
    assert equal(average, averages(task.state.ema, task.main_engine))
    assert task.main_engine.updates == 1


@pytest.mark.usefixtures("tokenizer")
def test_a_checkpoint_holds_all_that_a_run_goes_on_from(build, tmp_path):
    overrides = [*CODEBOOK, "ema.decay=0.9", "loss.label_dropout=0", "data.image_size=16"]
    task = build(*overrides)
    task.step([codes(0)], 0)
    save_shards(tmp_path / "rank.safetensors", task.state.tensors())
    state = task.state.numbers()
    other = build(*overrides, "seed=9")
    other.transformer.tok_emb.codebook_vd.zero_()
    other.state.load(ShardedTensors(tmp_path), state)
    for each in (task, other):
        each.step([codes(1)], 1)
    assert equal(weights(task.transformer), weights(other.transformer))
    assert equal(*(averages(each.state.ema, each.main_engine) for each in (task, other)))
    names = set(ShardedTensors(tmp_path).names())
    assert {"generator/tok_emb.codebook_vd", "generator_ema/tok_emb.codebook_vd"} <= names


@pytest.mark.usefixtures("tokenizer")
def test_an_average_begins_from_a_checkpoint_without_one_beside_a_codebook(build, tmp_path):
    task = build(*CODEBOOK, "ema.decay=0")
    task.step([codes(0)], 0)
    save_shards(tmp_path / "rank.safetensors", task.state.tensors())
    other = build(*CODEBOOK, "ema.decay=0.9", "seed=9")
    other.state.load(ShardedTensors(tmp_path), task.state.numbers())
    saved = {shard.name: shard.values for shard in other.state.tensors()}
    for name, value in weights(task.transformer).items():
        assert torch.equal(saved[f"generator_ema/{name}"], value.flatten())


def test_the_codebook_is_the_embedding_and_is_not_trained(build, tokenizer):
    task = build(*CODEBOOK)
    codebook = tokenizer.quantize.embedding.weight
    assert torch.equal(task.transformer.tok_emb.codebook_vd, codebook)
    assert task.config.tokenizer.fingerprint == tokenizer.fingerprint()
    randomize(task)
    task.step([codes()], 0)
    assert torch.equal(task.transformer.tok_emb.codebook_vd, codebook)


@pytest.mark.usefixtures("tokenizer")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.vocabulary=25"], "model.vocabulary=25, but the tokenizer any has 24 codes"),
        (["model.embedding=codebook"], "model.code_dim=256, but the codes of"),
        (
            [f"tokenizer.fingerprint={'e' * 16}"],
            f"did not make these codes ({'e' * 16} did): give the right one with "
            "tokenizer.source=RUN, or tokenizer.source=RUN/checkpoints/step_NNNNNNNN if RUN was trained on since",
        ),
        (["data.content=images", "data.image_size=32"], "data.image_size=32 gives a grid of 8x8 codes"),
        (["data.content=images", "data.image_size=18"], "data.image_size=18"),
    ],
)
def test_what_does_not_fit_the_tokenizer_is_refused(build, overrides, said):
    assert said in refusal(TrainerError, build, "tokenizer.source=any", *overrides)


@pytest.mark.usefixtures("tokenizer")
def test_a_tokenizer_that_may_be_trained_on_is_named_at_the_start(build, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_00000004").mkdir(parents=True)
    (note,) = build(f"tokenizer.source={tmp_path}/run").notes()
    assert note.startswith(f"tokenizer.source={tmp_path}/run names no step: ") and "/checkpoints/step_NNNNNNNN" in note
    for source in ("run/checkpoints/step_00000004", "export", "tokenizer.ckpt"):
        assert build(f"tokenizer.source={tmp_path}/{source}").notes() == []
    assert build().notes() == []


def batch(values: np.ndarray, labels: list[int | None]) -> Batch:
    places = [(f"key{n}", "a.tar", SamplePosition(0, 0, n)) for n in range(len(labels))]
    infos = [SampleInfo("set", *place, None, label) for place, label in zip(places, labels, strict=True)]
    return Batch(torch.from_numpy(values), infos, {}, [], data.Size(*GRID) if values.ndim == 2 else None)


def test_images_are_tokenized_on_the_way(build, tokenizer):
    task = build("data.content=images", "data.image_size=16", "tokenizer.source=any")
    images = np.random.default_rng(0).integers(256, size=(2, 3, 16, 16), dtype=np.uint8)
    found = task.inputs(batch(images, [2, 0]))
    expected = tokenizer.tokenize(torch.from_numpy(images).float() / 127.5 - 1)
    assert torch.equal(found.index_bt, expected.flatten(1)) and found.class_b.tolist() == [2, 0]


def test_labels_that_cannot_be_are_refused_unless_there_are_to_be_none(build):
    values = np.zeros((2, TOKENS), np.int32)
    task = build()
    task.check_batch(batch(values, [0, 2]))
    for labels, said in (([0, None], "key1 in a.tar has no class"), ([3, 0], "key0 in a.tar has class 3")):
        with pytest.raises(TrainerError, match=said):
            task.check_batch(batch(values, labels))
    without = build("loss.label_dropout=1")
    without.check_batch(batch(values, [None, None]))
    assert without.inputs(batch(values, [None, None])).class_b.tolist() == [3, 3]


def test_speed_is_told_in_tokens_and_as_a_share_of_a_plain_product(build):
    task = build()
    task.rate = 1e9
    task.step([codes()], 0)
    speed = task.speed(10.0)
    assert speed["tokens_per_second"] == 160
    assert speed["mfu"] == pytest.approx(3 * flops_per_token(task.config.model) * 160 / 1e9)


def test_validation_weighs_every_image_alike(build, monkeypatch):
    """Eleven images in micro-batches of eight."""
    index_bt, class_b, _ = codes(7, 20)
    images = [SimpleNamespace(key=str(n), index_t=index_bt[n], label=int(class_b[n]), grid=GRID) for n in range(20)]
    monkeypatch.setattr(task_module.data, "evaluation_tokens", lambda *_, **options: iter(images))
    task = build("data.val=anything", "trainer.validation_images=11", "ema.decay=0")
    randomize(task)
    found = task.validate(lambda: None)
    with torch.no_grad():
        logits_btv = task.transformer.eval()(index_bt[:11, :-1], class_b[:11])
    expected = F.cross_entropy(logits_btv.flatten(0, 1), index_bt[:11].flatten())
    share_v = torch.bincount(index_bt[:11].flatten(), minlength=VOCABULARY).double() / (11 * TOKENS)
    assert found.scalars["val/loss"] == pytest.approx(float(expected), rel=1e-5)
    assert found.scalars["val/unigram_entropy"] == pytest.approx(float(-torch.xlogy(share_v, share_v).sum()))
    assert found.pictures == {}


@pytest.mark.usefixtures("tokenizer")
def test_pictures_are_drawn_where_the_tokenizer_is_known(build, monkeypatch):
    monkeypatch.setattr(task_module.data, "evaluation_tokens", lambda *_, **options: iter([]))
    task = build("data.val=anything", "tokenizer.source=any")
    task.step([codes()], 0)
    first, second = task.validate(lambda: None), task.validate(lambda: None)
    assert first.scalars == {}
    (picture,) = first.pictures.values()
    assert picture.dtype == torch.uint8 and picture.shape[0] == 3
    assert torch.equal(picture, second.pictures["samples"])  # the same numbers each time
    assert task.transformer.training


@pytest.mark.usefixtures("tokenizer")
def test_pictures_that_cannot_be_drawn_are_said_and_end_nothing(build, monkeypatch):
    monkeypatch.setattr(task_module.data, "evaluation_tokens", lambda *_, **options: iter([]))
    task = build("data.val=anything", "tokenizer.source=any")
    task.step([codes()], 0)
    with torch.no_grad():
        task.transformer.head.weight.fill_(math.inf)
    found = task.validate(lambda: None)
    assert found.pictures == {} and "not finite" in found.notes[0]


@pytest.mark.usefixtures("tokenizer")
def test_pictures_use_no_guidance_and_no_classes_that_were_not_trained(build, monkeypatch):
    monkeypatch.setattr(task_module.data, "evaluation_tokens", lambda *_, **options: iter([]))
    task = build("data.val=anything", "tokenizer.source=any", "loss.label_dropout=0", "sampling.guidance=2")
    task.step([Codes(codes().index_bt[:8], torch.full((8,), 1), GRID)], 0)
    (note,) = task.validate(lambda: None).notes
    assert "guidance 2 needs a generator that was also trained without a class" in note
    task.config.sampling = Sampling()
    sample = Mock(wraps=task_module.Sampler.sample)
    monkeypatch.setattr(task_module.Sampler, "sample", lambda *arguments: sample(*arguments))
    task.validate(lambda: None)
    assert sample.call_args.args[1].tolist() == [1] * 8


def test_what_was_trained_is_kept_in_the_checkpoint(build, tmp_path):
    """Of three classes and none: class 1 never came, and step 2 updated nothing."""
    task = build("loss.label_dropout=0")
    index_bt = codes().index_bt
    task.step([Codes(index_bt[:4], torch.tensor([0, 2, 2, 0]), GRID)], 0)
    before = weights(task.transformer)
    with torch.no_grad():
        task.transformer.head.weight.fill_(math.nan)
    task.step([codes()], 1)
    assert task.transformer.trained_c.tolist() == [True, False, True, False]
    task.transformer.load_state_dict(before)
    save_shards(tmp_path / "rank.safetensors", task.state.tensors())
    other = build("loss.label_dropout=1")
    other.state.load(ShardedTensors(tmp_path), task.state.numbers())
    assert other.transformer.trained_c.tolist() == [True, False, True, False]
    other.step([Codes(index_bt[:1], torch.tensor([1]), GRID)], 2)
    assert other.transformer.trained_c.tolist() == [True, False, True, True]


def test_a_checkpoint_that_does_not_say_what_was_trained_is_judged_by_the_recipe(build, tmp_path):
    task = build("loss.label_dropout=0")
    shards = [shard for shard in task.state.tensors() if shard.name.startswith("generator")]
    save_shards(tmp_path / "rank.safetensors", shards)
    for dropout, expected in ((0, [1, 1, 1, 0]), (0.1, [1, 1, 1, 1]), (1, [0, 0, 0, 1])):
        other = build(f"loss.label_dropout={dropout}")
        other.state.load(ShardedTensors(tmp_path), task.state.numbers())
        assert other.transformer.trained_c.int().tolist() == expected


@pytest.mark.parametrize(("label", "said"), [(3, "data.val: odd has class 3"), (None, "data.val: odd has no class")])
def test_classes_of_validation_images_are_checked_before_training(build, monkeypatch, label, said):
    images = [SimpleNamespace(key="odd", index_t=codes().index_bt[0], label=label)]
    monkeypatch.setattr(task_module.data, "evaluation_tokens", lambda *_, **options: iter(images))
    with pytest.raises(TrainerError, match=said):
        build("data.val=anything")
    build("data.val=anything", "loss.label_dropout=1")


def test_without_classes_validation_uses_none(build, monkeypatch):
    """Not their rows of the embedding, which were never trained."""
    images = [SimpleNamespace(key=str(n), index_t=codes().index_bt[n], label=n, grid=GRID) for n in range(8)]
    monkeypatch.setattr(task_module.data, "evaluation_tokens", lambda *_, **options: iter(images))
    task = build("data.val=anything", "loss.label_dropout=1")
    loss = Mock(wraps=task.transformer.loss)
    monkeypatch.setattr(task.transformer, "loss", loss)
    task.validate(lambda: None)
    assert torch.equal(torch.cat([call.args[1] for call in loss.call_args_list]), torch.full((8,), 3))


def test_measuring_the_device_draws_no_random_number(build):
    task = build()
    task.step([codes()], 0)
    before = torch.get_rng_state()
    task.speed(1.0)
    assert torch.equal(before, torch.get_rng_state())


SHAPES = {(4, 4): 8, (2, 8): 8, (4, 6): 4}  # grid -> images in a step
WIDE = ["model.grids=[4x4,2x8,4x6]", "trainer.validation_images=18", "ema.decay=0", "loss.label_dropout=0"]


def codes_of(grid: tuple[int, int], count: int, seed: int = 0) -> Codes:
    random = torch.Generator().manual_seed(seed)
    index_bt = torch.randint(VOCABULARY, (count, math.prod(grid)), generator=random)
    return Codes(index_bt, torch.arange(count) % 3, grid)


def test_a_step_of_any_grid_trains_on_its_loss(build):
    task = build(*WIDE)
    randomize(task)
    for step, (grid, count) in enumerate(SHAPES.items()):
        given = codes_of(grid, count)
        with torch.no_grad():
            logits_btv = task.transformer(given.index_bt[:, :-1], given.class_b, grid)
        expected = F.cross_entropy(logits_btv.flatten(0, 1), given.index_bt.flatten())
        scalars = task.step([given], step).scalars
        assert float(scalars["loss/cross_entropy"]) == pytest.approx(float(expected), rel=1e-5)
        name = "{}x{}".format(*grid)
        assert [key for key in scalars if key.startswith("loss/cross_entropy/")] == [f"loss/cross_entropy/{name}"]


def test_trained_grids_are_kept_in_the_checkpoint(build, tmp_path, monkeypatch):
    """Of three: 4x6 never came, and the step of 4x4 updated nothing."""
    task = build(*WIDE)
    task.step([codes_of((2, 8), 8)], 0)
    before = weights(task.transformer)
    with torch.no_grad():
        task.transformer.head.weight.fill_(math.nan)
    task.step([codes_of((4, 4), 8)], 1)
    assert task.transformer.trained_g.tolist() == [False, True, False]
    task.transformer.load_state_dict(before)
    shards = task.state.tensors()
    save_shards(tmp_path / "rank.safetensors", shards)
    other = build(*WIDE)
    other.state.load(ShardedTensors(tmp_path), task.state.numbers())
    assert other.transformer.trained_g.tolist() == [False, True, False]
    older = tmp_path / "older"  # without the record
    older.mkdir()
    save_shards(older / "rank.safetensors", [shard for shard in shards if shard.name != "conditions/trained_g"])
    other.state.load(ShardedTensors(older), task.state.numbers())
    assert other.transformer.trained_g.tolist() == [True] * 3


@pytest.mark.usefixtures("tokenizer")
def test_pictures_of_a_grid_that_was_never_trained_are_a_note(build, monkeypatch):
    monkeypatch.setattr(task_module.data, "evaluation_tokens", lambda *_, **options: iter([]))
    task = build(*WIDE, "tokenizer.source=any")
    task.step([codes_of((2, 8), 8)], 0)
    found = task.validate(lambda: None)
    assert not found.pictures and "never trained on the grid 4x4: choose among 2x8" in found.notes[0]
    task.step([codes_of((4, 4), 8)], 1)
    assert task.validate(lambda: None).pictures


def test_speed_counts_the_tokens_of_each_grid(build):
    task = build(*WIDE)
    task.rate = 1e9
    for step, (grid, count) in enumerate(SHAPES.items()):
        task.step([codes_of(grid, count)], step)
    tokens = {grid: count * math.prod(grid) for grid, count in SHAPES.items()}
    speed = task.speed(10.0)
    assert speed["tokens_per_second"] == pytest.approx(10 * sum(tokens.values()) / sum(SHAPES.values()))
    flops = sum(count * flops_per_token(task.config.model, grid) for grid, count in tokens.items())
    assert speed["mfu"] == pytest.approx(3 * flops / sum(SHAPES.values()) * 10 / 1e9)


def of_all_grids() -> tuple[list[SimpleNamespace], list[Codes]]:
    """Eighteen images for validation, those of the grids among one another; and the same as a batch of each grid."""
    batches = [codes_of(grid, 6, seed) for seed, grid in enumerate(SHAPES)]
    images = [
        SimpleNamespace(key=f"{grid}", index_t=index_bt[n], label=int(class_b[n]), grid=grid)
        for n in range(6)
        for index_bt, class_b, grid in batches
    ]
    return images, batches


def validated(task: GeneratorTask, monkeypatch, shard: tuple[int, int] = (0, 1)) -> dict[str, float]:
    images = of_all_grids()[0][shard[0] :: shard[1]]
    monkeypatch.setattr(task_module.data, "evaluation_tokens", lambda *_, **options: iter(images))
    return task.validate(lambda: None).scalars


def test_validation_weighs_every_code_alike_and_tells_each_grid(build, monkeypatch):
    monkeypatch.setattr(task_module.data, "evaluation_tokens", lambda *_, **options: iter([]))
    task = build(*WIDE, "data.val=anything", "trainer.micro_batch_size=4")
    randomize(task)
    found = validated(task, monkeypatch)
    losses, total = {}, 0.0
    for index_bt, class_b, grid in of_all_grids()[1]:
        with torch.no_grad():
            losses[grid] = float(task.transformer.eval().loss(index_bt, class_b, grid=grid).cross_entropy)
        total += losses[grid] * math.prod(grid)
        assert found["val/loss/{}x{}".format(*grid)] == pytest.approx(losses[grid], rel=1e-5)
    assert found["val/loss"] == pytest.approx(total / sum(map(math.prod, losses)), rel=1e-5)


def validated_on_ranks(parallel: int) -> tuple[dict[str, float], dict[str, float]]:
    """What a validation finds, and the losses of a step of each grid."""
    world = start_world("cpu")
    overrides = [*TINY, *WIDE, "data.val=anything", f"vocabulary_parallel={parallel}", "trainer.global_batch_size=8"]
    config = load_recipe("ar_debug", overrides)
    task = GeneratorTask(config, world, *plan_batch(config, world))
    losses = {}
    for step, (grid, count) in enumerate(SHAPES.items()):
        index_bt, class_b, _ = codes_of(grid, count)
        share = slice(world.rank, None, world.size)
        scalars = task.step([Codes(index_bt[share], class_b[share], grid)], step).scalars
        losses[grid] = float(scalars["loss/total"])
    with pytest.MonkeyPatch.context() as patch:
        return validated(task, patch, (world.rank, world.size)), losses


@pytest.mark.ranks
def test_ranks_that_share_a_head_validate_and_train_on_all_grids(ranks):
    ((one, losses),) = ranks.call(1, validated_on_ranks, 1, join=False)
    for found, of_rank in ranks.call(2, validated_on_ranks, 2, join=False):
        assert found == pytest.approx(one, rel=1e-5)
        assert of_rank == pytest.approx(losses, rel=1e-5)


@pytest.mark.usefixtures("tokenizer")
def test_images_of_buckets_are_tokenized_to_their_grids(build):
    images = ["data.content=images", "tokenizer.source=any"]
    task = build(*WIDE, *images, "data.buckets=[16x16,8x32]")
    values = np.zeros((2, 3, 8, 32), np.uint8)
    assert task.inputs(batch(values, [2, 0])).grid == (2, 8)
    said = refusal(TrainerError, build, *WIDE, *images, "data.buckets=[16x16,32x16]")
    assert "the buckets give grids of 8x4 codes" in said and "set model.grids=[4x4,2x8,4x6,8x4]" in said
    assert "bucket 18x16 must be a multiple of 4" in refusal(
        TrainerError, build, *WIDE, *images, "data.buckets=[18x16]"
    )


def classes_trained_on_two_ranks() -> list[bool]:
    """Rank r trains class r only."""
    world = start_world("cpu")
    config = load_recipe("ar_debug", [*TINY, "loss.label_dropout=0", "trainer.global_batch_size=2"])
    task = GeneratorTask(config, world, *plan_batch(config, world))
    task.step([Codes(codes().index_bt[:1], torch.tensor([world.rank]), GRID)], 0)
    task.scalars(0)
    return task.transformer.trained_c.tolist()


def test_what_any_rank_has_trained_was_trained(ranks):
    assert ranks.call(2, classes_trained_on_two_ranks, join=False) == [[True, True, False, False]] * 2
