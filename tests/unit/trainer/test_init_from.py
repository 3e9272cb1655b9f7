"""Initialising from any source of weights, with all or a part of them frozen; a tiny model on one process."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch

from model_zoo import TokenizerConfig, load_tokenizer
from model_zoo.config import EntropyLoss, LossConfig, PerceptualLoss
from model_zoo.io.sharded_tensors import ShardedTensors, save_shards
from trainer import TrainerError
from trainer.config import (
    DiscriminatorConfig,
    EmaConfig,
    GeneratorRun,
    InitFromConfig,
    TokenizerOptimizerConfig,
    TokenizerRun,
    TokenizerTrainerConfig,
)
from trainer.init_from import InitRecord, read_init_record, read_initial_weights, save_init_record
from trainer.jobs.export import export
from trainer.loop import resume
from trainer.parallel import start_world, stop_world
from trainer.recipes import load_recipe, load_run_config, save_config
from trainer.reports.report import write_report
from trainer.start_plan import plan_batch
from trainer.tasks.tokenizer import FROZEN, TokenizerTask

MODEL = TokenizerConfig(
    codebook_size=24,
    code_dim=6,
    channels=8,
    channel_multipliers=[1, 2],
    num_res_blocks=1,
    attention_factors=[2],
    latent_channels=12,
    codebook_init_std=0.5,
)


def tiny_config(seed=0, **changes) -> TokenizerRun:
    """Images of 16 x 16, 8 x 8 tokens."""
    settings = dict(
        seed=seed,
        trainer=TokenizerTrainerConfig(max_steps=20, global_batch_size=4, precision="fp32"),
        model=MODEL,
        discriminator=DiscriminatorConfig(channels=8, layers=1),
        loss=LossConfig(perceptual=PerceptualLoss(weight=0.0), entropy=EntropyLoss(temperature=0.5)),
        optimizer=TokenizerOptimizerConfig(lr=1e-2, weight_decay=0.1),
        ema=EmaConfig(decay=0.9),
    )
    return TokenizerRun(**{**settings, **changes})


def build_in(world, **changes) -> TokenizerTask:
    config = tiny_config(**changes)
    return TokenizerTask(config, world, *plan_batch(config, world))


@pytest.fixture
def build(world):
    return partial(build_in, world)


def images(seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)


def write_run(task, folder):
    """A run's folder with this task as its checkpoint."""
    checkpoint = folder / "checkpoints/step_00000003"
    checkpoint.mkdir(parents=True)
    save_config(task.config, folder / "config.yaml")
    # Copies, as `Checkpoints` takes them: what is frozen is weight and average at once.
    shards = [shard._replace(values=shard.values.clone()) for shard in task.state.tensors()]
    save_shards(checkpoint / "rank_00000.safetensors", shards)
    (checkpoint / "state.json").write_text(json.dumps({"step": 3, "task": task.state.numbers()}))
    (folder / "checkpoints/latest").write_text(checkpoint.name)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A run of three steps whose averages and weights differ, and the same weights in other forms. Tests only read
    them."""
    folder = tmp_path_factory.mktemp("sources")
    with pytest.MonkeyPatch.context() as environment:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            environment.delenv(name, raising=False)
        environment.setenv("DS_ACCELERATOR", "cpu")  # start_world sets it; so it is taken back afterwards
        task = build_in(start_world("cpu"), seed=7)
        for step in range(3):
            task.step([images(step)], step)
        run = write_run(task, folder / "run")
        stop_world()
    export(run, folder / "exported")
    return {
        "run": run,
        "checkpoint": run / "checkpoints/step_00000003",
        "published": write_published(run, folder / "published.ckpt"),
        "export": folder / "exported",
    }


def write_published(run, path):
    """The same weights in the published layout."""
    files = ShardedTensors(run / "checkpoints/step_00000003")
    averages = {f"model_ema.{name.replace('.', '')}": t for name, t in files.tensors("tokenizer_ema/").items()}
    beside = {f"loss.discriminator.{name}": tensor for name, tensor in files.tensors("discriminator/").items()}
    torch.save({"state_dict": {**files.tensors("tokenizer/"), **averages, **beside}}, path)
    return path


@pytest.fixture
def run(sources, tmp_path):
    """A copy of the run, which the test may change."""
    return shutil.copytree(sources["run"], tmp_path / "run")


@pytest.fixture
def published(sources, tmp_path):
    """A copy of the published file, which the test may change."""
    return shutil.copy(sources["published"], tmp_path / "published.ckpt")


def equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def held(task, kind):
    """What a checkpoint of the task holds of its tokenizer."""
    named = {shard.name: shard for shard in task.state.tensors() if shard.name.startswith(f"{kind}/")}
    return {name.removeprefix(f"{kind}/"): shard.values.view(shard.shape).clone() for name, shard in named.items()}


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", ["run", "checkpoint", "published", "export"])
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_weights_come_from_every_source_and_the_average_begins_with_them(build, sources, kind, weights):
    expected = load_tokenizer(sources["run"], weights)
    assert not equal(
        expected.state_dict(), load_tokenizer(sources["run"], "raw" if weights == "ema" else "ema").state_dict()
    )
    task = build(init_from=InitFromConfig(str(sources[kind]), weights))
    record = task.load_initial_weights()
    assert record.fingerprint == expected.fingerprint()
    assert str(sources[kind]) in record.origin and weights in record.origin
    for found in (held(task, "tokenizer"), held(task, "tokenizer_ema"), task.tokenizer.state_dict()):
        assert equal(found, expected.state_dict())


def test_the_first_loss_is_that_of_the_loaded_weights(build, run):
    task = build(init_from=InitFromConfig(str(run)))
    task.load_initial_weights()
    scalars = task.step([images(9)], 0).scalars
    images_bchw = images(9).float() / 127.5 - 1
    with torch.no_grad():
        reconstruction_bchw = load_tokenizer(run)(images_bchw).reconstruction_bchw
    by_hand = (reconstruction_bchw - images_bchw).abs().mean().item()
    assert float(scalars["loss/reconstruction"]) == pytest.approx(by_hand, rel=1e-5)


def test_all_but_the_weights_begins_anew(build, run):
    task, scratch = build(init_from=InitFromConfig(str(run))), build()
    task.load_initial_weights()
    assert task.state.numbers() == scratch.state.numbers()
    engines = [network.engine for network in task.state.trained.values()]
    assert not any(values.any() for engine in engines for values in engine.moments("exp_avg"))
    found, fresh = ({name: value for name, value in of.state.buffers().items()} for of in (task, scratch))
    for name in fresh:
        assert name.startswith("discriminator/") or torch.equal(found[name], fresh[name])


def test_without_a_source_nothing_is_loaded(build):
    task = build()
    before = held(task, "tokenizer")
    assert task.load_initial_weights() is None
    assert equal(held(task, "tokenizer"), before)


# ----------------------------------------------------------------------------------------------------- discriminator


@pytest.mark.parametrize("kind", ["run", "published", "export"])
def test_the_discriminator_is_the_sources_with_its_statistics(build, sources, kind):
    task = build(init_from=InitFromConfig(str(sources[kind])))
    assert task.load_initial_weights().discriminator == "the source's"
    saved = ShardedTensors(sources["run"] / "checkpoints/step_00000003").tensors("discriminator/")
    assert any("running_mean" in name for name in saved)
    assert equal(task.adversary.engine.module.state_dict(), saved)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"discriminator": DiscriminatorConfig(channels=16, layers=1)}, "holds main.0.weight of shape [8, 3, 4, 4]"),
        ({"discriminator": DiscriminatorConfig(channels=8, layers=1, norm="group")}, "holds main.3.running_mean"),
        ({"init_from": {"discriminator": False}}, "init_from.discriminator=false"),
    ],
)
def test_another_discriminator_starts_from_random_weights_and_it_is_said(build, run, changes, said):
    init_from = InitFromConfig(str(run), **changes.pop("init_from", {}))
    task = build(init_from=init_from, **changes)
    fresh = build(**changes).adversary.engine.module.state_dict()
    found = task.load_initial_weights().discriminator
    assert found.startswith("random weights") and said in found
    assert equal(task.adversary.engine.module.state_dict(), fresh)


def test_a_source_without_a_discriminator_is_said_to_have_none(build, run, published):
    state = torch.load(published)["state_dict"]
    torch.save({"state_dict": {n: t for n, t in state.items() if "discriminator" not in n}}, published)
    task = build(init_from=InitFromConfig(str(published)))
    assert task.load_initial_weights().discriminator == "random weights (the source has none)"


# ----------------------------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize(
    ("freeze", "quantizer", "batch"),
    [
        ("encoder", "ibq", {"micro_batch_size": 2}),
        ("encoder", "vq", {}),
        ("decoder", "ibq", {}),
        ("decoder", "vq", {"micro_batch_size": 2}),
    ],
)
def test_what_is_frozen_stays_to_the_bit_and_the_rest_learns(build, run, freeze, quantizer, batch):
    source = write_run(build(model=replace(MODEL, quantizer=quantizer)), run.parent / "source")
    trainer = TokenizerTrainerConfig(max_steps=20, global_batch_size=4, precision="fp32", **batch)
    task = build(
        model=replace(MODEL, quantizer=quantizer), trainer=trainer, init_from=InitFromConfig(str(source), freeze=freeze)
    )
    task.load_initial_weights()
    before = held(task, "tokenizer")
    for step in range(3):
        task.step(list(images(step).chunk(2)) if batch else [images(step)], step)
    for kind in ("tokenizer", "tokenizer_ema"):
        after = held(task, kind)
        assert after.keys() == before.keys()
        for name, tensor in after.items():
            stays = name.startswith(FROZEN[freeze]) or name.endswith(".k.bias")  # whose gradient is 0
            assert stays or not torch.equal(tensor, before[name]), name
            assert not name.startswith(FROZEN[freeze]) or torch.equal(tensor, before[name]), name
    names = [shard.name for shard in task.state.tensors()]
    with_moments = {name.split("/")[1] for name in names if name.startswith("tokenizer.exp_avg/")}
    assert with_moments == {name for name in before if not name.startswith(FROZEN[freeze])}


def test_a_frozen_encoder_costs_no_assignment_no_graph_and_no_term_of_the_quantizer(build, run, monkeypatch):
    task = build(init_from=InitFromConfig(str(run), freeze="encoder"))
    task.load_initial_weights()
    quantizer = task.tokenizer.quantize

    def refuse(*_):
        raise AssertionError("the soft assignment was computed")

    monkeypatch.setattr(quantizer, "assign", refuse)
    output = task._forward(images().float() / 127.5 - 1)
    assert not output.quantized.quantized_bdhw.requires_grad and output.reconstruction_bchw.requires_grad
    scalars = task.step([images()], 0).scalars
    assert not any("entropy" in name or "codebook" in name or "double" in name for name in scalars)
    total = float(scalars["loss/reconstruction"]) + 0.1 * float(scalars["loss/generator"])
    assert float(scalars["loss/total"]) == pytest.approx(total, rel=1e-5)
    # The codes, and their distance from the features, are those of the whole model.
    whole = load_tokenizer(run)(images().float() / 127.5 - 1)
    assert torch.equal(output.quantized.index_bhw, whole.quantized.index_bhw)
    torch.testing.assert_close(output.reconstruction_bchw, whole.reconstruction_bchw)
    assert float(scalars["loss/commitment"]) == pytest.approx(whole.quantized.commitment.item(), rel=1e-5)
    assert task.scalars(0)["codebook/usage"] > 0


def test_a_frozen_encoder_leaves_the_decoder_the_gradient_that_it_has_in_the_whole_model(build, run):
    gradients = []
    for freeze in (None, "encoder"):
        task = build(init_from=InitFromConfig(str(run), freeze=freeze))
        task.load_initial_weights()
        step, seen = task.main_engine.step, {}

        def look(*arguments, task=task, step=step, seen=seen):
            seen |= {name: p.grad.clone() for name, p in task.tokenizer.decoder.named_parameters()}
            return step(*arguments)

        task.main_engine.step = look
        task.step([images()], 0)
        gradients.append(seen)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_lfq_which_has_no_codebook_can_be_frozen_too(build, tmp_path):
    model = replace(MODEL, quantizer="lfq", codebook_size=64)
    source = write_run(build(model=model, seed=3), tmp_path / "source")
    task = build(model=model, init_from=InitFromConfig(str(source), freeze="encoder"))
    task.load_initial_weights()
    before = load_tokenizer(source)
    task.step([images()], 0)
    assert task.tokenizer.fingerprint() == before.fingerprint()
    assert not torch.equal(task.tokenizer.decoder.conv_out.weight, before.decoder.conv_out.weight)


def test_a_checkpoint_with_frozen_parts_is_a_whole_tokenizer_and_resumes(build, run, tmp_path):
    settings = dict(init_from=InitFromConfig(str(run), freeze="encoder"))
    task = build(**settings)
    task.load_initial_weights()
    task.step([images(1)], 0)
    folder = write_run(task, tmp_path / "tuned")
    assert load_tokenizer(folder).fingerprint() == load_tokenizer(run).fingerprint()
    resumed = build(**settings)
    files, numbers = ShardedTensors(folder / "checkpoints/step_00000003"), json.dumps(task.state.numbers())
    resumed.state.load(files, json.loads(numbers))
    for of in (task, resumed):
        of.step([images(2)], 1)
    first, second = ({shard.name: shard.values for shard in of.state.tensors()} for of in (task, resumed))
    assert equal(first, second)


def test_what_is_frozen_is_counted_as_such(build, run):
    task = build(init_from=InitFromConfig(str(run), freeze="encoder"))
    frozen = [p for name, p in task.tokenizer.named_parameters() if name.startswith(FROZEN["encoder"])]
    assert task.frozen_bytes() == {"encoder, frozen": sum(p.nbytes for p in frozen)}
    assert "encoder frozen" in task.describe() and "codebook" not in task.state.trained


def test_few_codes_of_a_frozen_encoder_are_no_alarm(build, run):
    task = build(init_from=InitFromConfig(str(run), freeze="encoder"))
    task.health.alarm = "it collapses"
    assert task.alarm is None


# ---------------------------------------------------------------------------------------------------------- bad input


def refused(function, *arguments) -> str:
    with pytest.raises(TrainerError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_source_that_is_missing_or_holds_no_such_weights(build, run, tmp_path):
    message = refused(read_initial_weights, tiny_config(init_from=InitFromConfig(str(tmp_path / "nowhere"))))
    assert "init_from.source=" in message and "nowhere" in message
    (tmp_path / "empty").mkdir()
    empty = tiny_config(init_from=InitFromConfig(str(tmp_path / "empty")))
    assert "not a run folder" in refused(read_initial_weights, empty)
    bare = write_run(build(ema=EmaConfig(decay=0.0)), tmp_path / "bare")
    message = refused(read_initial_weights, tiny_config(init_from=InitFromConfig(str(bare))))
    assert "init_from.weights=ema" in message and "raw" in message
    generator = tmp_path / "generator"
    (generator / "checkpoints/step_00000001").mkdir(parents=True)
    save_config(GeneratorRun(), generator / "config.yaml")
    (generator / "checkpoints/latest").write_text("step_00000001")
    shard = build().state.tensors()[0]._replace(name="generator/head.weight")
    save_shards(generator / "checkpoints/step_00000001/rank_00000.safetensors", [shard])
    assert "is from a generator run" in refused(
        read_initial_weights, tiny_config(init_from=InitFromConfig(str(generator)))
    )


def test_the_source_may_have_any_shape_but_that_of_the_recipe_and_the_mend_is_what_to_type(run, published):
    other = replace(MODEL, codebook_size=32, channel_multipliers=[1, 1, 2], attention_factors=[], quantizer="vq")
    message = refused(read_initial_weights, tiny_config(model=other, init_from=InitFromConfig(str(run))))
    assert "model.codebook_size is 24 there and 32 here" in message
    fix = message.partition("; use ")[2]
    for change in ("model.codebook_size=24", "'model.channel_multipliers=[1,2]'", "'model.attention_factors=[2]'"):
        assert change in fix
    assert "model.quantizer=ibq" in fix and "init_std" not in message
    changes = [change.strip("'") for change in fix.split()]
    assert load_recipe("debug", changes).model.channel_multipliers == [1, 2]
    # A published file does not say which rule its codes are picked by, so that is the recipe's affair.
    assert "quantizer" not in refused(
        read_initial_weights, tiny_config(model=other, init_from=InitFromConfig(str(published)))
    )


def test_a_shape_that_the_configuration_does_not_tell(run):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("code_dim: 6", "code_dim: 5"))
    message = refused(
        read_initial_weights, tiny_config(model=replace(MODEL, code_dim=5), init_from=InitFromConfig(str(run)))
    )
    assert "holds quant_conv.weight of shape [6, 12, 1, 1], expected [5, 12, 1, 1]" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["init_from.freeze=quantizer"], "init_from.freeze=quantizer is unknown: choose one of null, encoder, decoder"),
        (["init_from.freeze=encoder"], "init_from.freeze=encoder would freeze random weights"),
        (["init_from.weights=best", "init_from.source=runs/a"], "choose one of ema, raw"),
        (["init_from.from=runs/a"], "unknown key init_from.from"),
    ],
)
def test_settings_that_mean_nothing(changes, said):
    assert said in refused(load_recipe, "debug", changes)
    assert load_recipe("debug", ["init_from.source=runs/a", "init_from.freeze=encoder"]).init_from.freeze == "encoder"


def test_the_source_cannot_be_changed_by_resuming(run):
    before = (run / "config.yaml").read_text()
    message = refused(resume, run, ["init_from.freeze=encoder"])
    assert "cannot be changed by resuming" in message and "init_from.source=RUN" in message
    assert (run / "config.yaml").read_text() == before


def test_runs_from_before_init_from_existed_are_read(run):
    config = run / "config.yaml"
    lines = config.read_text().splitlines()
    first = lines.index("init_from:")
    config.write_text("\n".join(lines[:first] + lines[first + 5 :]))
    assert load_run_config(run, []).init_from == InitFromConfig()


# ------------------------------------------------------------------------------------------------------------- report


RECORD = InitRecord("runs/a/checkpoints/step_00000003 (ema weights)", "0123456789abcdef", "encoder", "the source's")


def test_the_record_has_the_first_and_the_last_validation(run):
    assert read_init_record(run) is None
    save_init_record(run, RECORD)
    assert read_init_record(run) == RECORD._asdict()
    lines = [
        {"step": 0, "val/psnr": 20.0, "val/l1": 0.2, "val/usage": 0.5},
        {"step": 5, "loss/total": 1.0},
        {"step": 10, "val/psnr": 21.5, "val/l1": 0.1, "val/usage": 0.5},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_init_record(run)["validation"] == {
        "start": {"step": 0, "psnr": 20.0, "l1": 0.2, "usage": 0.5},
        "now": {"step": 10, "psnr": 21.5, "l1": 0.1, "usage": 0.5},
    }
    page = write_report(run).read_text()
    for text in ("Initial weights", RECORD.origin, RECORD.fingerprint, "stay valid", "20.00", "21.50", "0.1000"):
        assert text in page


def test_a_run_from_scratch_has_no_such_section_and_one_without_validation_says_so(run):
    assert "Initial weights" not in write_report(run).read_text()
    save_init_record(run, RECORD)
    assert "There was no validation" in write_report(run).read_text()


@pytest.mark.parametrize("name", ["init_from.json", "start.json"])
def test_a_damaged_record_is_one_line(run, name):
    (run / name).write_text('{"origin": 3')
    assert f"{name} is damaged" in refused(read_init_record, run)


def test_the_record_of_a_former_run_is_read_until_there_is_a_new_one(run):
    save_init_record(run, RECORD)
    (run / "init_from.json").rename(run / "start.json")
    assert read_init_record(run) == RECORD._asdict()
    save_init_record(run, RECORD._replace(freeze=None))
    assert read_init_record(run)["freeze"] is None
