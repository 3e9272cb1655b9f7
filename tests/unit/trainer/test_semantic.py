"""The semantic term in a step of tokenizer training; a tiny model on one process."""

import copy
from functools import partial

import pytest
import torch
from comparing import refusal
from encoders import ENCODER, features_by_hand, random_encoder, write_encoder
from support import as_float, equal, images, tokenizer_run, tokenizer_task, weights

from data.config import DataConfig
from model_zoo import ModelError
from trainer import TrainerError
from trainer.changes import changes_since, settings_of
from trainer.recipes import load_recipe, recipe_paths
from trainer.start_plan import Source, check_inputs

WEIGHT = 0.7
SEMANTIC = dict(
    loss__semantic__weight=WEIGHT,
    loss__semantic__encoder=ENCODER,
    loss__semantic__size=64,
    loss__semantic__width=12,
    loss__semantic__depth=2,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "weights.safetensors")


@pytest.fixture
def build(world, file):
    return partial(tokenizer_task, world, loss__semantic__weights=str(file), **SEMANTIC)


def by_hand(task, images_bchw, weight=WEIGHT):
    """Value without weight and gradient of the weighted term, for features before quantization and the head, in
    float64. The codes' gradient is straight-through in VQ."""
    tokenizer = copy.deepcopy(task.tokenizer).double()
    head = copy.deepcopy(task.semantic.engine.module).double()
    z_bdhw = tokenizer.encode(images_bchw.double()).detach().requires_grad_()
    codes_bdhw = tokenizer.quantize.lookup(tokenizer.quantize.tokenize(z_bdhw.float())).double()
    codes_bdhw = z_bdhw + (codes_bdhw - z_bdhw).detach()
    (first, second) = (layer for layer in head.layers if hasattr(layer, "weight"))
    hidden = torch.einsum("bdhw,kd->bhwk", codes_bdhw, first.weight) + first.bias
    hidden = hidden * hidden.sigmoid()
    projected = hidden @ second.weight.T + second.bias
    targets = features_by_hand(random_encoder(), images_bchw, (4, 4)).movedim(1, -1)
    cosines = (projected * targets).sum(-1) / (projected.norm(dim=-1) * targets.norm(dim=-1))
    distance = (1 - cosines).mean()
    gradients = torch.autograd.grad(weight * distance, [z_bdhw, *head.parameters()])
    return distance, gradients[0], gradients[1:]


def test_value_and_gradients_equal_float64_by_hand(build):
    task = build(model__quantizer="vq", loss__generator__weight=0.0, trainer__log_gradient_balance=True,
                 trainer__log_every_steps=1)  # fmt: skip
    distance, of_features, of_head = by_hand(task, as_float(images()))
    seen = {}
    engine = task.semantic.engine
    engine.step = lambda *_: seen.update({name: p.grad.clone() for name, p in engine.parameters.items()})
    scalars = task.step([images()], 0).scalars
    assert float(scalars["loss/semantic"]) == pytest.approx(distance.item(), rel=1e-5)
    for gradient, expected in zip(seen.values(), of_head, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-6)
    assert scalars["gradient/features/semantic"] == pytest.approx(of_features.norm().item(), rel=1e-4)
    assert scalars["gradient/encoder/semantic"] > 0


def test_it_is_part_of_the_loss(build):
    task = build(loss__generator__weight=0.0)
    scalars = task.step([images()], 0).scalars
    without = build(loss__generator__weight=0.0, loss__semantic__weight=0.0).step([images()], 0).scalars
    assert "loss/semantic" not in without
    expected = without["loss/total"] + WEIGHT * scalars["loss/semantic"]
    assert float(scalars["loss/total"]) == pytest.approx(float(expected), rel=1e-6)


def test_without_weight_there_is_no_file_no_head_and_the_same_start(world, build):
    on, off = build(), tokenizer_task(world, loss__semantic__weights="nowhere")
    assert off.semantic.engine is None and "semantic_head" not in off.state.trained and off.frozen_bytes() == {}
    for name in ("tokenizer", "discriminator"):
        assert equal(*(weights(task.state.trained[name].engine.module) for task in (on, off)))


def test_micro_batches_give_the_gradient_of_the_whole_batch(build):
    whole, halves = (build(model__quantizer="vq", loss__generator__weight=0.0, trainer__micro_batch_size=size)
                     for size in (8, 4))  # fmt: skip
    values = [whole.step([images()], 0).scalars, halves.step([*images().chunk(2)], 0).scalars]
    assert float(values[1]["loss/semantic"]) == pytest.approx(float(values[0]["loss/semantic"]), rel=1e-5)
    heads = [weights(task.semantic.engine.module) for task in (whole, halves)]
    for name, value in heads[0].items():
        torch.testing.assert_close(heads[1][name], value, rtol=1e-4, atol=1e-6)


def test_the_distance_falls(build):
    task = build(optimizer__lr=1e-2, trainer__max_steps=40)
    found = [float(task.step([images()], step).scalars["loss/semantic"]) for step in range(40)]
    assert sum(found[-5:]) < 0.8 * sum(found[:5])


def test_a_distance_that_is_not_finite_updates_nothing(build):
    task = build()
    before = weights(task.semantic.engine.module) | weights(task.tokenizer)
    task.semantic.encoder.mean_c11.fill_(torch.nan)
    assert "tokenizer" in task.step([images()], 0).skipped
    assert equal(before, weights(task.semantic.engine.module) | weights(task.tokenizer))


def test_the_head_is_in_checkpoints_and_the_encoder_is_not(build):
    names = {shard.name for shard in build().state.tensors()}
    assert {name for name in names if name.startswith("semantic_head/")} == {
        f"semantic_head/layers.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias")
    }
    assert "semantic_head.exp_avg/layers.0.weight" in names
    assert not [name for name in names if "vit" in name or name.startswith("semantic_head_ema")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(loss__reconstruction__weight=8.0), None),
        (dict(loss__reconstruction__weight=8.0, loss__semantic__weight=1e4), "lower loss.semantic.weight"),
        (dict(loss__reconstruction__weight=1e-4), "raise loss.reconstruction.weight"),
        # The semantic term must not hide that the quantizer's losses drown the image.
        (dict(loss__reconstruction__weight=1e-4, loss__semantic__weight=1e4), "raise loss.reconstruction.weight"),
    ],
)
def test_the_warning_names_what_drowns_the_image(build, changes, said):
    task = build(loss__generator__weight=0.0, trainer__max_steps=100, **changes)
    warning = task.step([images()], 0).warning
    assert warning is None if said is None else said in warning


def test_the_run_keeps_the_hash_and_refuses_another_file(file, tmp_path):
    config = tokenizer_run(loss__semantic__weights=str(file), **SEMANTIC, run=str(tmp_path / "run"))
    config.data = DataConfig(train="bundled:train")
    check_inputs(config, Source())
    digest = config.loss.semantic.sha256
    assert len(digest) == 64
    config.loss.semantic.weights = str(write_encoder(tmp_path / "other.safetensors", seed=1))
    assert digest in refusal(ModelError, check_inputs, config, Source())


def saved(**changes):
    return settings_of(tokenizer_run(**SEMANTIC, loss__semantic__sha256="0" * 64, **changes))


@pytest.mark.parametrize(
    "change",
    [dict(loss__semantic__sha256="1" * 64), dict(loss__semantic__width=13), dict(loss__semantic__depth=1),
     dict(loss__semantic__encoder="vit_base_patch14_dinov2.lvd142m")],
)  # fmt: skip
def test_a_resumed_run_keeps_encoder_and_head(change):
    now = tokenizer_run(**{**SEMANTIC, "loss__semantic__sha256": "0" * 64, **change})
    (key,) = (key.replace("__", ".") for key in change)
    assert f"{key} was " in refusal(TrainerError, changes_since, saved(), now, 5)


def test_a_resumed_run_may_change_the_weight_or_leave_the_term_but_not_begin_it():
    now = tokenizer_run(**{**SEMANTIC, "loss__semantic__sha256": "0" * 64, "loss__semantic__weight": 0.1})
    assert [change.key for change in changes_since(saved(), now, 5)] == ["loss.semantic.weight"]
    off = tokenizer_run()
    assert "loss.semantic.weight" in [change.key for change in changes_since(saved(), off, 5)]
    assert "has no head" in refusal(TrainerError, changes_since, settings_of(off), now, 5)
    assert changes_since(settings_of(off), now, 0)  # nothing is saved yet


@pytest.mark.parametrize("name", [name for name in recipe_paths(["tokenizer"]) if name.endswith("_semantic")])
def test_a_semantic_recipe_differs_by_this_term_alone(name):
    ours, theirs = (settings_of(load_recipe(name, [])) for name in (name, name.removesuffix("_semantic")))
    differing = {key for key in ours if ours[key] != theirs[key]}
    assert "loss.semantic.weight" in differing and all(key.startswith("loss.semantic.") for key in differing)


def test_all_other_recipes_have_no_such_term():
    others = [name for name in recipe_paths(["tokenizer"]) if not name.endswith("_semantic")]
    assert len(others) > 20
    assert not any(load_recipe(name, []).loss.semantic.weight for name in others)


def test_frozen_codes_are_refused():
    said = refusal(
        TrainerError, load_recipe, "debug_semantic", ["init_from.source=x", "init_from.freeze=encoder"]
    )  # fmt: skip
    assert "loss.semantic.weight=0.5 needs codes that are trained" in said
