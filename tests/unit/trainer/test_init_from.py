"""Initialising from any source of weights, with all or a part of them frozen; a tiny model on one process."""

import json
import shutil
from functools import partial

import model_checks
import pytest
import support
import torch
from comparing import refusal
from support import as_float, equal, gradients, single_world, tokenizer_run, tokenizer_task, watch

from model_zoo import load_tokenizer
from model_zoo.io.sharded_tensors import ShardedTensors, save_shards
from trainer import TrainerError
from trainer.config import GeneratorRun, TokenizerInitFromConfig
from trainer.init_from import InitRecord, read_init_record, read_initial_weights, save_init_record
from trainer.jobs.export import export
from trainer.loop import resume
from trainer.recipes import load_recipe, load_run_config, save_config
from trainer.reports.report import write_report
from trainer.tasks.building import FROZEN

# Images of 16 x 16, 8 x 8 tokens.
SETTINGS = dict(
    trainer__global_batch_size=4,
    model__channels=8,
    model__channel_multipliers=[1, 2],
    model__attention_factors=[2],
    model__patch_size=1,
    discriminator__layers=1,
    discriminator__norm="batch",
    optimizer__lr=1e-2,
    optimizer__epsilon=1e-8,
    optimizer__weight_decay=0.1,
)


tiny_config = partial(tokenizer_run, **SETTINGS)
images = partial(support.images, count=4)


@pytest.fixture
def build(world):
    return partial(tokenizer_task, world, **SETTINGS)


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
    with single_world() as world:
        task = tokenizer_task(world, **SETTINGS, seed=7)
        for step in range(3):
            task.step([images(step)], step)
        run = write_run(task, folder / "run")
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


def held(task, kind):
    """What a checkpoint of the task holds of its tokenizer."""
    named = {shard.name: shard for shard in task.state.tensors() if shard.name.startswith(f"{kind}/")}
    return {name.removeprefix(f"{kind}/"): shard.values.view(shard.shape).clone() for name, shard in named.items()}


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", ["run", "checkpoint", "published", "export"])
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_weights_come_from_every_source_and_the_average_begins_with_them(build, sources, kind, weights):
    expected = load_tokenizer(sources["run"], weights)
    other = load_tokenizer(sources["run"], "raw" if weights == "ema" else "ema")
    assert not equal(expected.state_dict(), other.state_dict())
    task = build(init_from=TokenizerInitFromConfig(str(sources[kind]), weights))
    record = task.load_initial_weights()
    assert record.fingerprint == expected.fingerprint()
    assert str(sources[kind]) in record.origin and weights in record.origin
    for found in (held(task, "tokenizer"), held(task, "tokenizer_ema"), task.tokenizer.state_dict()):
        assert equal(found, expected.state_dict())


def test_the_first_loss_is_that_of_the_loaded_weights(build, run):
    task = build(init_from=TokenizerInitFromConfig(str(run)))
    task.load_initial_weights()
    scalars = task.step([images(9)], 0).scalars
    with torch.no_grad():
        reconstruction_bchw = load_tokenizer(run)(as_float(images(9))).reconstruction_bchw
    by_hand = (reconstruction_bchw - as_float(images(9))).abs().mean().item()
    assert float(scalars["loss/reconstruction"]) == pytest.approx(by_hand, rel=1e-5)


def test_all_but_the_weights_begins_anew(build, run):
    task, scratch = build(init_from=TokenizerInitFromConfig(str(run))), build()
    task.load_initial_weights()
    assert task.state.numbers() == scratch.state.numbers()
    engines = [network.engine for network in task.state.trained.values()]
    assert not any(values.any() for engine in engines for values in engine.moments("exp_avg"))
    found, fresh = task.state.buffers(), scratch.state.buffers()
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
    task = build(init_from=TokenizerInitFromConfig(str(sources[kind])))
    assert task.load_initial_weights().discriminator == "the source's"
    saved = ShardedTensors(sources["run"] / "checkpoints/step_00000003").tensors("discriminator/")
    assert any("running_mean" in name for name in saved)
    assert equal(task.adversary.engine.module.state_dict(), saved)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"discriminator__channels": 16}, "holds main.0.weight of shape [8, 3, 4, 4]"),
        ({"discriminator__norm": "group"}, "holds main.3.running_mean"),
        ({"init_from__discriminator": False}, "init_from.discriminator=false"),
    ],
)
def test_another_discriminator_starts_from_random_weights_and_it_is_said(build, run, changes, said):
    task = build(init_from__source=str(run), **changes)
    fresh = build(**changes).adversary.engine.module.state_dict()
    found = task.load_initial_weights().discriminator
    assert found.startswith("random weights") and said in found
    assert equal(task.adversary.engine.module.state_dict(), fresh)


def test_a_source_without_a_discriminator_is_said_to_have_none(build, run, published):
    state = torch.load(published)["state_dict"]
    torch.save({"state_dict": {n: t for n, t in state.items() if "discriminator" not in n}}, published)
    task = build(init_from=TokenizerInitFromConfig(str(published)))
    assert task.load_initial_weights().discriminator == "random weights (the source has none)"


# ----------------------------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize(
    ("freeze", "quantizer", "micro_batch_size"),
    [("encoder", "ibq", 2), ("encoder", "vq", 4), ("decoder", "ibq", 4), ("decoder", "vq", 2)],
)
def test_what_is_frozen_stays_to_the_bit_and_the_rest_learns(build, run, freeze, quantizer, micro_batch_size):
    source = write_run(build(model__quantizer=quantizer), run.parent / "source")
    init_from = TokenizerInitFromConfig(str(source), freeze=freeze)
    task = build(model__quantizer=quantizer, trainer__micro_batch_size=micro_batch_size, init_from=init_from)
    task.load_initial_weights()
    before = held(task, "tokenizer")
    for step in range(3):
        task.step(list(images(step).split(micro_batch_size)), step)
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
    task = build(init_from=TokenizerInitFromConfig(str(run), freeze="encoder"))
    task.load_initial_weights()
    monkeypatch.setattr(task.tokenizer.quantize, "assign", lambda *_: pytest.fail("the assignment was computed"))
    output = task._forward(as_float(images()))
    assert not output.quantized.quantized_bdhw.requires_grad and output.reconstruction_bchw.requires_grad
    scalars = task.step([images()], 0).scalars
    assert not any("entropy" in name or "codebook" in name or "double" in name for name in scalars)
    total = float(scalars["loss/reconstruction"]) + 0.1 * float(scalars["loss/generator"])
    assert float(scalars["loss/total"]) == pytest.approx(total, rel=1e-5)
    # The codes, and their distance from the features, are those of the whole model.
    whole = load_tokenizer(run)(as_float(images()))
    assert torch.equal(output.quantized.index_bhw, whole.quantized.index_bhw)
    torch.testing.assert_close(output.reconstruction_bchw, whole.reconstruction_bchw)
    assert float(scalars["loss/commitment"]) == pytest.approx(whole.quantized.commitment.item(), rel=1e-5)
    assert task.scalars(0)["codebook/usage"] > 0


def test_a_frozen_encoder_leaves_the_decoder_the_gradient_that_it_has_in_the_whole_model(build, run):
    seen = []
    for freeze in (None, "encoder"):
        task = build(init_from=TokenizerInitFromConfig(str(run), freeze=freeze))
        task.load_initial_weights()
        seen.append(watch(task.main_engine, lambda decoder=task.tokenizer.decoder: gradients(decoder)))
        task.step([images()], 0)
    (whole,), (frozen,) = seen
    torch.testing.assert_close(frozen, whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("quantizer", ["lfq", "bsq", "fsq"])
def test_quantizers_without_a_codebook_can_be_frozen_too(build, tmp_path, quantizer):
    settings = dict(model__quantizer=quantizer, model__codebook_size=64, model__levels=[2] * 6)
    source = write_run(build(**settings, seed=3), tmp_path / "source")
    # Groups only matter for the entropy.
    task = build(**settings, model__groups=2, init_from=TokenizerInitFromConfig(str(source), freeze="encoder"))
    task.load_initial_weights()
    before = load_tokenizer(source)
    task.step([images()], 0)
    assert task.tokenizer.fingerprint() == before.fingerprint()
    assert not torch.equal(task.tokenizer.decoder.conv_out.weight, before.decoder.conv_out.weight)


def test_a_checkpoint_with_frozen_parts_is_a_whole_tokenizer_and_resumes(build, run, tmp_path):
    settings = dict(init_from=TokenizerInitFromConfig(str(run), freeze="encoder"))
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
    task = build(init_from=TokenizerInitFromConfig(str(run), freeze="encoder"))
    frozen = [p for name, p in task.tokenizer.named_parameters() if name.startswith(FROZEN["encoder"])]
    assert task.frozen_bytes() == {"encoder, frozen": sum(p.nbytes for p in frozen)}
    assert "encoder frozen" in task.describe() and "codebook" not in task.state.trained


def test_few_codes_of_a_frozen_encoder_are_no_alarm(build, run):
    task = build(init_from=TokenizerInitFromConfig(str(run), freeze="encoder"))
    task.health.alarm = "it collapses"
    assert task.alarm is None


# ---------------------------------------------------------------------------------------------------------- bad input


refused = partial(refusal, TrainerError)


def refused_source(source, **changes) -> str:
    return refused(read_initial_weights, tiny_config(init_from__source=str(source), **changes))


def test_a_source_that_is_missing_or_holds_no_such_weights(build, run, tmp_path):
    message = refused_source(tmp_path / "nowhere")
    assert "init_from.source=" in message and "nowhere" in message
    (tmp_path / "empty").mkdir()
    assert "not a run folder" in refused_source(tmp_path / "empty")
    bare = write_run(build(ema__decay=0.0), tmp_path / "bare")
    message = refused_source(bare, init_from__weights="ema")
    assert "holds no ema weights" in message and "init_from.weights=raw" in message
    generator = model_checks.write_run(tmp_path / "generator", GeneratorRun(), generator=torch.nn.Linear(2, 2))
    assert "is from a generator run" in refused_source(generator)


def test_the_source_may_have_any_shape_but_that_of_the_recipe_and_the_mend_is_what_to_type(run, published):
    other = dict(model__codebook_size=32, model__channel_multipliers=[1, 1, 2], model__attention_factors=[])
    other["model__quantizer"] = "vq"
    message = refused_source(run, **other)
    assert "model.codebook_size is 24 there and 32 here" in message
    fix = message.partition("; use ")[2]
    for change in ("model.codebook_size=24", "'model.channel_multipliers=[1,2]'", "'model.attention_factors=[2]'"):
        assert change in fix
    assert "model.quantizer=ibq" in fix and "init_std" not in message
    changes = [change.strip("'") for change in fix.split()]
    assert load_recipe("debug", changes).model.channel_multipliers == [1, 2]
    # A published file does not say which rule its codes are picked by, so that is the recipe's affair.
    assert "quantizer" not in refused_source(published, **other)


def test_a_shape_that_the_configuration_does_not_tell(run):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("code_dim: 6", "code_dim: 5"))
    message = refused_source(run, model__code_dim=5)
    assert "holds quant_conv.weight of shape [6, 12, 1, 1], expected [5, 12, 1, 1]" in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["init_from.freeze=encoder"], "init_from.freeze=encoder would freeze random weights"),
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
    assert load_run_config(run, []).init_from == TokenizerInitFromConfig()


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


def test_usage_of_groups_at_the_start_and_now_is_named_as_such(run):
    save_init_record(run, RECORD)
    lines = [{"step": step, "val/psnr": 20.0, "val/l1": 0.2, "val/group_usage": 0.5} for step in (0, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(run).read_text()
    assert "usage of groups" in page and "50.0%" in page and "codebook usage" not in page


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
