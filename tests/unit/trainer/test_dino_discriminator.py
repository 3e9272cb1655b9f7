"""The discriminator on a frozen encoder in a step of tokenizer training; a tiny model on one process."""

import copy
import json
from functools import partial

import pytest
import torch
from comparing import refusal
from encoders import ENCODER, write_encoder
from support import as_float, equal, images, tokenizer_run, tokenizer_task, weights
from torch.nn import functional as F

from data.config import DataConfig
from model_zoo import ModelError
from model_zoo.io.hashing import sha256_of
from model_zoo.io.sharded_tensors import ShardedTensors, save_shards
from trainer import TrainerError
from trainer.changes import changes_since, settings_of
from trainer.jobs.export import export
from trainer.recipes import load_recipe, save_config
from trainer.start_plan import Source, check_inputs

DINO = dict(discriminator__kind="dino", discriminator__encoder=ENCODER, discriminator__size=64)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "weights.safetensors")


@pytest.fixture
def build(world, file):
    return partial(tokenizer_task, world, **{"discriminator__weights": str(file), **DINO})


def logits_by_hand(task, images_bchw):
    heads = task.adversary.engine.module.heads
    tokens = task.adversary.encoder(images_bchw)
    return torch.cat([head(tokens_bdn) for head, tokens_bdn in zip(heads, tokens, strict=True)], dim=1)


@pytest.mark.parametrize("kinds", [("hinge", "linear"), ("vanilla", "non_saturating")])
def test_the_heads_learn_hinge_and_lecam_and_the_tokenizer_plays_against_them(build, kinds):
    task = build(loss__discriminator__kind=kinds[0], loss__generator__kind=kinds[1])
    real_bchw = as_float(images())
    with torch.no_grad():
        fake_bchw = task.tokenizer(real_bchw).reconstruction_bchw
        real, fake = logits_by_hand(task, real_bchw), logits_by_hand(task, fake_bchw)
    scalars = task.step([images()], 0).scalars
    if kinds[0] == "hinge":
        loss = ((1 - real).relu().mean() + (1 + fake).relu().mean()) / 2
    else:
        loss = (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
    assert float(scalars["loss/discriminator"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(scalars["loss/lecam"]) == pytest.approx(
        float(real.relu().square().mean() + (-fake).relu().square().mean()), rel=1e-5
    )
    assert task.adversary.lecam.mean_real == pytest.approx(0.001 * float(real.mean()), rel=1e-4)
    with torch.no_grad():  # the updated heads
        fake = logits_by_hand(task, fake_bchw)
    expected = -fake.mean() if kinds[1] == "linear" else F.softplus(-fake.mean(dim=1)).mean()
    # The largest singular value has been estimated once more since.
    assert float(scalars["loss/generator"]) == pytest.approx(float(expected), rel=1e-2)


def test_the_encoder_stays_as_it_is_and_gradients_reach_the_tokenizer(build):
    task = build()
    encoder = {name: value.clone() for name, value in task.adversary.encoder.named_buffers()}
    heads, decoder = weights(task.adversary.engine.module), weights(task.tokenizer.decoder)
    for step in range(3):
        task.step([images(step)], step)
    assert equal(encoder, dict(task.adversary.encoder.named_buffers()))
    same = [name for name, value in weights(task.adversary.engine.module).items() if torch.equal(value, heads[name])]
    assert same == [f"heads.{number}.logit.u" for number in range(5)]  # one number, of one row of weights
    assert not equal(decoder, weights(task.tokenizer.decoder))
    reconstruction_bchw = task.tokenizer(as_float(images())).reconstruction_bchw
    loss = task.adversary.logits(reconstruction_bchw).mean()
    (gradient,) = torch.autograd.grad(loss, reconstruction_bchw)
    assert gradient.abs().min() > 0


def test_the_heads_tell_real_from_fake(build):
    """They alone learn: the reconstructions stay poor."""
    task = build(optimizer__lr=0.0, optimizer__discriminator_lr=1e-2, trainer__max_steps=12, loss__lecam__weight=0.0)
    found = [task.step([images(step)], step).scalars for step in range(12)]
    gaps = [float(of["discriminator/logits_real"] - of["discriminator/logits_fake"]) for of in found]
    print(gaps)
    assert sum(gaps[-3:]) / 3 > 1.0 > abs(gaps[0])


def test_a_step_does_not_depend_on_how_the_batch_is_split(build):
    whole, halves = (build(trainer__micro_batch_size=size) for size in (8, 4))
    for step in range(3):
        scalars = [
            task.step(batches, step).scalars
            for task, batches in ((whole, [images(step)]), (halves, [*images(step).chunk(2)]))
        ]
        for name in ("loss/discriminator", "loss/generator", "loss/lecam"):
            assert float(scalars[1][name]) == pytest.approx(float(scalars[0][name]), rel=1e-4), (step, name)
    both = [weights(task.adversary.engine.module) for task in (whole, halves)]
    for name, value in both[0].items():
        torch.testing.assert_close(both[1][name], value, rtol=1e-3, atol=1e-4)


def test_the_adaptive_weight_compares_gradients_at_the_last_layer(build):
    task = build(loss__generator__adaptive=True)
    tokenizer = copy.deepcopy(task.tokenizer)
    task.adversary.after_update = lambda logits_mean: None  # so that the same heads remain
    scalars = task.step([images()], 0).scalars
    reconstruction_bchw = tokenizer(as_float(images())).reconstruction_bchw
    terms = (
        (reconstruction_bchw - as_float(images())).abs().mean(),
        F.softplus(-logits_by_hand(task, reconstruction_bchw).mean(dim=1)).mean(),
    )
    norms = [
        torch.autograd.grad(term, tokenizer.decoder.conv_out.weight, retain_graph=True)[0].norm() for term in terms
    ]
    expected = 0.1 * norms[0] / (norms[1] + 1e-4)
    assert float(scalars["weight/generator"]) == pytest.approx(float(expected), rel=1e-3)


def test_checkpoints_hold_the_heads_alone_and_training_is_continued_bit_for_bit(build, tmp_path):
    task = build()
    for step in range(2):
        task.step([images(step)], step)
    save_shards(tmp_path / "rank_00000.safetensors", task.state.tensors())
    files, numbers = ShardedTensors(tmp_path), json.loads(json.dumps(task.state.numbers()))
    heads = {name for name in files.names() if name.startswith("discriminator/")}
    assert heads == {f"discriminator/{name}" for name in task.adversary.engine.module.state_dict()}
    assert "discriminator/heads.4.logit.u" in heads and "discriminator.exp_avg/heads.4.logit.weight" in files.names()
    assert not [name for name in files.names() if "vit" in name or "mean_c11" in name or "discriminator_ema" in name]
    resumed = build(seed=9)
    resumed.state.load(files, numbers)
    for step in (2, 3):
        one, other = (dict(it.step([images(step)], step).scalars) for it in (task, resumed))
        assert {name: float(value) for name, value in one.items()} == {name: float(other[name]) for name in other}
    assert equal(*(weights(it.adversary.engine.module) for it in (task, resumed)))


def test_a_loss_that_is_not_finite_updates_no_head(build):
    task = build()
    before = weights(task.adversary.engine.module)
    task.adversary.encoder.mean_c11.fill_(torch.nan)
    assert task.step([images()], 0).skipped == ["discriminator", "tokenizer"]
    assert equal(before, weights(task.adversary.engine.module))


def test_without_an_adversarial_term_there_is_no_file_and_no_encoder(world):
    task = tokenizer_task(world, **DINO, discriminator__weights="nowhere", loss__generator__weight=0.0)
    assert task.adversary.engine is None and task.adversary.encoder is None and task.frozen_bytes() == {}


def test_bytes_of_the_encoder_are_counted(build):
    ((title, count),) = build().frozen_bytes().items()
    assert title == "test_vit, 0.3 M parameters, frozen, of the discriminator" and count == 306_240 * 4


def test_pictures_smaller_than_a_patch_are_refused(build):
    build(data__image_size=16).check_settings()
    said = refusal(TrainerError, build(data__image_size=12).check_settings)
    assert said == "data.image_size=12 must be at least 16 for the discriminator (a patch of its encoder)"


def test_the_run_keeps_the_hash_and_refuses_another_file(file, tmp_path):
    config = tokenizer_run(discriminator__weights=str(file), **DINO, run=str(tmp_path / "run"))
    config.data = DataConfig(train="bundled:train")
    check_inputs(config, Source())
    digest = config.discriminator.sha256
    assert len(digest) == 64
    config.discriminator.weights = str(write_encoder(tmp_path / "other.safetensors", seed=1))
    assert digest in refusal(ModelError, check_inputs, config, Source())


def source_of(task, folder):
    """A run's folder with this task as its checkpoint."""
    checkpoint = folder / "checkpoints/step_00000003"
    checkpoint.mkdir(parents=True)
    save_config(task.config, folder / "config.yaml")
    save_shards(checkpoint / "rank_00000.safetensors", task.state.tensors())
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    return folder


@pytest.mark.parametrize("exported", [False, True])
def test_heads_start_from_those_of_the_same_encoder_only(build, file, tmp_path, exported):
    digest, other_file = sha256_of(file), write_encoder(tmp_path / "other.safetensors", seed=1)
    trained = build(discriminator__sha256=digest, ema__decay=0.0)
    folder = source_of(trained, tmp_path / "run")
    if exported:
        export(folder, tmp_path / "export")
        folder = tmp_path / "export"
    source = dict(init_from__source=str(folder), seed=9)
    same = build(**source, discriminator__sha256=digest)
    assert same.load_initial_weights().discriminator == "the source's"
    assert equal(*(weights(task.adversary.engine.module) for task in (same, trained)))
    of_other = dict(discriminator__weights=str(other_file), discriminator__sha256=sha256_of(other_file))
    other = build(**source, **of_other)
    before = weights(other.adversary.engine.module)
    found = other.load_initial_weights().discriminator
    assert found.startswith(f"random weights (the source's heads belong to {ENCODER}, sha256 {digest}; here it is ")
    assert equal(before, weights(other.adversary.engine.module))
    about = folder / "config.yaml"
    about.write_text(about.read_text().replace(digest, "null").replace(f"{ENCODER}, sha256 null", "null"))
    found = build(**source, discriminator__sha256=digest).load_initial_weights().discriminator
    assert found == "random weights (the source does not say which encoder its heads belong to)"


def saved(**changes):
    return settings_of(tokenizer_run(**DINO, discriminator__sha256="0" * 64, **changes))


@pytest.mark.parametrize(
    "change", [dict(discriminator__sha256="1" * 64), dict(discriminator__size=80), dict(discriminator__kind="patchgan")]
)
def test_a_resumed_run_keeps_its_discriminator(change):
    now = tokenizer_run(**{**DINO, "discriminator__sha256": "0" * 64, **change})
    (key,) = (key.replace("__", ".") for key in change)
    assert f"{key} was " in refusal(TrainerError, changes_since, saved(), now, 5)


def test_the_file_may_be_moved():
    now = tokenizer_run(**DINO, discriminator__sha256="0" * 64, discriminator__weights="elsewhere")
    assert [change.key for change in changes_since(saved(), now, 5)] == ["discriminator.weights"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["discriminator.kind=clip"], "discriminator.kind=clip is unknown: choose one of patchgan, dino"),
        (["discriminator.kind=dino", "discriminator.encoder=resnet50"], "discriminator.encoder=resnet50 is unknown"),
        (["discriminator.weights=a"], "discriminator.weights is for discriminator.kind=dino, not patchgan"),
        (["discriminator.size=224"], "discriminator.size is for discriminator.kind=dino, not patchgan"),
    ],
)
def test_mistakes_are_one_line(changes, said):
    assert said in refusal(TrainerError, load_recipe, "debug", changes)
