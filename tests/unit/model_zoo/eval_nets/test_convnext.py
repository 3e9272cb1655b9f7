"""The distance of ConvNeXt's logits, by every layer's formula; a small network of the same layers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from model_checks import refused
from random_networks import accepted, small_convnext, write_convnext
from torch import Tensor
from torch.nn import functional as F

from model_zoo.eval_nets.convnext import MEAN, STD, ConvNextDistance, convnext_on_meta
from model_zoo.eval_nets.weights import WEIGHTS_FILES


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_convnext(tmp_path_factory.mktemp("convnext"))


@pytest.fixture
def file(written, monkeypatch) -> Iterator[Path]:
    """A file like torchvision's, which passes for it, as the small network does."""
    monkeypatch.setattr(torchvision.models, "convnext_small", small_convnext)
    with accepted(written.parent):
        yield written


def bilinear(length: int, size: int) -> Tensor:
    """The matrix ``(size, length)`` that resizes a row of pixels: triangles around the centres of the new pixels, which
    are wider where the row shrinks."""
    scale = length / size
    centres, pixels = (torch.arange(size).double() + 0.5) * scale, torch.arange(length).double() + 0.5
    weights = (1 - (pixels - centres[:, None]).abs() / max(scale, 1.0)).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


def norm(x_bchw: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Of the channels of each position."""
    centred = x_bchw - x_bchw.mean(dim=1, keepdim=True)
    scale = (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    return centred / scale * state[f"{name}.weight"].view(-1, 1, 1) + state[f"{name}.bias"].view(-1, 1, 1)


def logits_by_hand(state: dict[str, Tensor], images_bchw: Tensor, size: tuple[int, int]) -> Tensor:
    """In float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    rows, columns = (bilinear(*each) for each in zip(images_bchw.shape[2:], size, strict=True))
    unit = (rows @ images_bchw.double() @ columns.T + 1) / 2
    x = (unit - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)
    x = norm(F.conv2d(x, state["features.0.0.weight"], state["features.0.0.bias"], stride=4), state, "features.0.1")
    for stage in range(1, 1 + max(int(name.split(".")[1]) for name in state if name.startswith("features"))):
        if stage % 2 == 0:
            x = norm(x, state, f"features.{stage}.0")
            x = F.conv2d(x, state[f"features.{stage}.1.weight"], state[f"features.{stage}.1.bias"], stride=2)
            continue
        for number in range(len({name.split(".")[2] for name in state if name.startswith(f"features.{stage}.")})):
            prefix = f"features.{stage}.{number}."
            block = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            y = F.conv2d(x, block["block.0.weight"], block["block.0.bias"], padding=3, groups=x.shape[1])
            y = norm(y, block, "block.2").movedim(1, -1) @ block["block.3.weight"].T + block["block.3.bias"]
            y = y * (1 + torch.erf(y / 2**0.5)) / 2
            y = (y @ block["block.5.weight"].T + block["block.5.bias"]).movedim(-1, 1)
            x = x + block["layer_scale"] * y
    pooled = norm(x.mean(dim=(2, 3), keepdim=True), state, "classifier.0").flatten(1)
    return pooled @ state["classifier.2.weight"].T + state["classifier.2.bias"]


def noise(shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, *shape, generator=generator, dtype=torch.float64) * 2.4 - 1.2  # beyond [-1, 1] too


@pytest.mark.parametrize(
    ("shape", "size"),
    [((224, 224), (224, 224)), ((40, 40), (224, 224)), ((300, 300), (224, 224)), ((60, 120), (160, 320))],
)
def test_value_and_gradient_equal_float64_by_hand(file, shape, size):
    state = torch.load(file, weights_only=True)
    fake, real = noise(shape, 1).requires_grad_(), noise(shape, 2).requires_grad_()
    expected_b = (logits_by_hand(state, fake, size) - logits_by_hand(state, real, size)).square().mean(dim=1)
    (expected_gradient,) = torch.autograd.grad(expected_b.mean(), fake)
    distance_b = ConvNextDistance(str(file)).double()(fake, real)
    torch.testing.assert_close(distance_b, expected_b, rtol=1e-6, atol=0)  # its mean and deviation are single
    distance_b.mean().backward()
    torch.testing.assert_close(
        fake.grad, expected_gradient, rtol=1e-5, atol=1e-6 * expected_gradient.abs().max().item()
    )
    assert real.grad is None  # only the reconstruction learns
    assert expected_b.min() > 1e-3
    single_b = ConvNextDistance(str(file))(fake.float(), real.float())
    torch.testing.assert_close(single_b.double(), expected_b, rtol=1e-3, atol=0)


def test_equal_pictures_have_no_distance(file):
    picture = noise((64, 64), 1).float()
    assert not ConvNextDistance(str(file))(picture, picture).any()


def test_nothing_of_it_is_trained_or_saved(file):
    distance = ConvNextDistance(str(file)).train()
    assert not list(distance.parameters()) and not distance.state_dict()
    assert not any(module.training for module in distance.modules())
    state = torch.get_rng_state()
    ConvNextDistance(str(file))
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_torchvisions_network_with_its_normalization():
    """By number of parameters, and by what torchvision publishes with these weights."""
    assert sum(parameter.numel() for parameter in convnext_on_meta().parameters()) == 50_223_688
    published = torchvision.models.ConvNeXt_Small_Weights.IMAGENET1K_V1
    assert WEIGHTS_FILES["convnext_small"].url == published.url
    preset = published.transforms()
    assert (tuple(preset.mean), tuple(preset.std), preset.crop_size) == (MEAN, STD, [224])


def test_another_or_no_file_is_one_line(file, tmp_path):
    missing = refused(ConvNextDistance, str(tmp_path / "none.pth"))
    for part in ("none.pth does not exist", "convnext_small-0c510722.pth", "loss.perceptual.convnext_weights=FILE"):
        assert part in missing
    (tmp_path / "half.pth").write_bytes(b"half a download")
    assert "not the published convnext_small-0c510722.pth" in refused(ConvNextDistance, str(tmp_path / "half.pth"))


def test_shapes_that_differ_are_refused(file):
    pictures = noise((32, 32), 1).float(), noise((32, 64), 1).float()
    assert "images of equal shape" in refused(ConvNextDistance(str(file)), *pictures)
