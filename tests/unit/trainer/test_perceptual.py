"""The kinds of loss.perceptual in a step of tokenizer training; a tiny model on one process."""

from functools import partial

import pytest
import torch
import torchvision
from comparing import refusal
from random_networks import accepted, small_convnext, write_convnext
from support import as_float, images, tokenizer_task

from model_zoo import ModelError
from model_zoo.eval_nets.convnext import ConvNextDistance
from trainer import TrainerError
from trainer.recipes import load_recipe
from trainer.tasks import perceptual as perceptual_module


class Squares(torch.nn.Module):
    """Takes the place of LPIPS."""

    def __init__(self, file):
        super().__init__()

    def forward(self, x_bchw, y_bchw):
        return (x_bchw - y_bchw).square().mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_convnext(tmp_path_factory.mktemp("convnext"))


@pytest.fixture
def build(world, file, monkeypatch):
    monkeypatch.setattr(torchvision.models, "convnext_small", small_convnext)
    monkeypatch.setattr(perceptual_module, "Perceptual", Squares)
    # Large, so that they count beside the other terms.
    changes = dict(loss__perceptual__weight=2.0, loss__perceptual__convnext_factor=30.0)
    with accepted(file.parent):
        yield partial(tokenizer_task, world, loss__perceptual__convnext_weights=str(file), **changes)


def distances(task):
    """LPIPS's replacement and ConvNeXt's distance of the first reconstruction."""
    with torch.no_grad():
        reconstruction_bchw = task.tokenizer(as_float(images())).reconstruction_bchw
    difference = reconstruction_bchw - as_float(images())
    return difference.square().mean().item(), ConvNextDistance(task.config.loss.perceptual.convnext_weights)(
        reconstruction_bchw, as_float(images())
    ).mean().item()


@pytest.mark.parametrize("kind", ["convnext", "lpips+convnext"])
def test_terms_are_logged_without_weights_and_weighed_in_the_loss(build, kind):
    without = build(loss__perceptual__weight=0.0, loss__perceptual__kind=kind)
    assert without.perceptual.lpips is None and without.perceptual.convnext is None
    task = build(loss__perceptual__kind=kind)
    lpips, convnext = distances(task)
    scalars, others = task.step([images()], 0).scalars, without.step([images()], 0).scalars
    assert not {"loss/perceptual", "loss/convnext"} & others.keys()
    assert float(scalars["loss/convnext"]) == pytest.approx(convnext, rel=1e-5)
    expected = 2 * 30 * convnext
    if kind == "convnext":
        assert "loss/perceptual" not in scalars
    else:
        assert float(scalars["loss/perceptual"]) == pytest.approx(lpips, rel=1e-5)
        expected += 2 * lpips
    assert float(scalars["loss/total"] - others["loss/total"]) == pytest.approx(expected, rel=1e-3)


def test_convnext_lowers_its_distance_and_counts_as_a_term_of_the_image(build):
    """Also in half precision: the distance is computed in single."""
    changes = dict(loss__perceptual__kind="convnext", loss__generator__weight=0.0, optimizer__lr=1e-2)
    task = build(**changes, trainer__precision="bf16", trainer__max_steps=100, loss__reconstruction__weight=0.0)
    seen = []
    task.perceptual.convnext.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    steps = [task.step([images()], step) for step in range(10)]
    found = [float(step.scalars["loss/convnext"]) for step in steps]
    print(found)
    assert sum(found[-3:]) < 0.7 * sum(found[:3])
    assert steps[0].warning is None  # the image has a share of the gradient
    assert seen and not any(seen)


def test_the_kind_may_change_while_a_run_is_resumed(build):
    """Nothing of these networks is in checkpoints."""
    names = [{shard.name for shard in build(loss__perceptual__kind=kind).state.tensors()}
             for kind in ("lpips+convnext", "convnext")]  # fmt: skip
    assert names[0] == names[1] == {shard.name for shard in build(loss__perceptual__weight=0.0).state.tensors()}


def test_pictures_smaller_than_lpips_takes_are_refused_only_with_lpips(build):
    build(loss__perceptual__kind="convnext", data__image_size=8, discriminator__layers=1).check_settings()
    both = build(loss__perceptual__kind="lpips+convnext", data__image_size=8, discriminator__layers=1)
    assert "data.image_size=8 must be at least 16 for LPIPS" in refusal(TrainerError, both.check_settings)


def test_bytes_are_counted(build, file):
    held = build(loss__perceptual__kind="convnext").frozen_bytes()
    weights = sum(tensor.nbytes for tensor in torch.load(file, weights_only=True).values())
    assert held == {"ConvNeXt-S, frozen": weights + 6 * 4}  # mean and deviation of the pixels


def test_a_missing_file_is_one_line_that_names_the_alternative(build, tmp_path):
    changes = dict(
        loss__perceptual__kind="lpips+convnext", loss__perceptual__convnext_weights=str(tmp_path / "none.pth")
    )
    message = refusal(ModelError, build, **changes)
    assert "none.pth does not exist" in message and message.endswith(
        "loss.perceptual.kind=lpips trains without ConvNeXt"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["loss.perceptual.kind=vgg"], "kind=vgg is unknown: choose one of lpips, convnext, lpips+convnext"),
        (["loss.perceptual.convnext_factor=1"], "is for loss.perceptual.kind=convnext or lpips+convnext, not lpips"),
        (["loss.perceptual.convnext_weights=a.pth"], "convnext_weights is for loss.perceptual.kind=convnext"),
        (["loss.perceptual.kind=convnext", "loss.perceptual.vgg16_weights=a.pth"], "vgg16_weights is for"),
        (["loss.perceptual.kind=convnext", "loss.perceptual.convnext_factor=0"], "convnext_factor=0.0 must be above 0"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(changes, said):
    assert said in refusal(TrainerError, load_recipe, "debug", changes)


def test_a_kind_with_weight_0_is_no_mistake():
    for kind in ("lpips", "convnext", "lpips+convnext"):
        assert load_recipe("debug", [f"loss.perceptual.kind={kind}"]).loss.perceptual.weight == 0
