import hashlib
from pathlib import Path

import lpips
import pytest
import torch
import torch.nn.functional as F

from model_zoo import ModelError, perceptual
from model_zoo.perceptual import VGG16_FILE, VGG16_SHA256, Perceptual

WIDTHS = [64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512]


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory) -> Path:
    """A file like torchvision's, its trunk random, its classifier cut down to one tensor."""
    generator = torch.Generator().manual_seed(0)
    state, index, in_channels = {"classifier.0.weight": torch.zeros(1)}, 0, 3
    for width in WIDTHS:
        if width == "pool":
            index += 1
            continue
        weight = torch.empty(width, in_channels, 3, 3).normal_(std=(2 / (9 * in_channels)) ** 0.5, generator=generator)
        state[f"features.{index}.weight"] = weight
        state[f"features.{index}.bias"] = torch.empty(width).normal_(std=0.1, generator=generator)
        index, in_channels = index + 2, width
    path = tmp_path_factory.mktemp("vgg16") / VGG16_FILE
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def loss(vgg16_file) -> Perceptual:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perceptual, "VGG16_SHA256", hashlib.sha256(vgg16_file.read_bytes()).hexdigest())
        return Perceptual(str(vgg16_file))


def lpips_by_hand(vgg16_file: Path, x_bchw: torch.Tensor, y_bchw: torch.Tensor) -> torch.Tensor:
    state = torch.load(vgg16_file, weights_only=True)
    heads_file = Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"
    heads = list(torch.load(heads_file, map_location="cpu", weights_only=True).values())
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def features(images_bchw):
        hidden, index = (images_bchw - shift.view(3, 1, 1)) / scale.view(3, 1, 1), 0
        for width in [*WIDTHS, "pool"]:
            if width == "pool":
                yield hidden / hidden.norm(dim=1, keepdim=True)
                hidden, index = F.max_pool2d(hidden, 2), index + 1
            else:
                weight, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
                hidden, index = F.conv2d(hidden, weight, bias, padding=1).relu(), index + 2

    return sum(
        F.conv2d((a - b).square(), head).mean(dim=(1, 2, 3))
        for a, b, head in zip(features(x_bchw), features(y_bchw), heads, strict=True)
    )


def test_value_of_each_pair_equals_the_definition(loss, vgg16_file):
    torch.manual_seed(0)
    x_bchw, y_bchw = torch.rand(2, 3, 3, 32, 48) * 2 - 1
    y_bchw[1] = x_bchw[1]
    value_b = loss(x_bchw, y_bchw)
    assert value_b.shape == (3,)
    assert value_b[0] > 0 and value_b[1] == 0
    torch.testing.assert_close(value_b, lpips_by_hand(vgg16_file, x_bchw, y_bchw), rtol=1e-4, atol=1e-6)


def test_frozen_and_out_of_checkpoints(loss):
    assert not list(loss.parameters())
    assert not loss.state_dict()
    parent = torch.nn.ModuleDict({"loss": loss, "other": torch.nn.Linear(2, 2)})
    parent.load_state_dict(torch.nn.ModuleDict({"other": torch.nn.Linear(2, 2)}).state_dict(), strict=True)
    parent.train()
    assert not any(module.training for module in loss.modules())
    assert loss.to(torch.float64)(*torch.rand(2, 1, 3, 16, 16, dtype=torch.float64)).dtype == torch.float64
    loss.to(torch.float32)


def test_gradient_reaches_the_image(loss):
    x_bchw, y_bchw = torch.rand(2, 1, 3, 32, 32)
    y_bchw.requires_grad_()
    loss(x_bchw, y_bchw).sum().backward()
    assert y_bchw.grad.isfinite().all() and y_bchw.grad.abs().sum() > 0


def test_construction_is_silent_and_draws_no_random_numbers(vgg16_file, monkeypatch, capfd, recwarn):
    monkeypatch.setattr(perceptual, "VGG16_SHA256", hashlib.sha256(vgg16_file.read_bytes()).hexdigest())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(vgg16_file.parent / "hub"))
    cached = vgg16_file.parent / "hub" / "checkpoints" / VGG16_FILE
    cached.parent.mkdir(parents=True)
    cached.symlink_to(vgg16_file)
    state = torch.get_rng_state()
    Perceptual()
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_missing_file_names_file_place_and_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    place = tmp_path / "checkpoints" / VGG16_FILE
    with pytest.raises(ModelError) as error:
        Perceptual()
    for part in (f"no such file at {place}", VGG16_FILE, "loss.perceptual.weight=0"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match=r"no such file at .*mine\.pth"):
        Perceptual(str(tmp_path / "mine.pth"))


def test_wrong_hash_names_file_and_hash(vgg16_file):
    with pytest.raises(ModelError) as error:
        Perceptual(str(vgg16_file))
    for part in (str(vgg16_file), hashlib.sha256(vgg16_file.read_bytes()).hexdigest(), VGG16_SHA256):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_expected_hash_is_the_one_in_the_file_name():
    assert f"vgg16-{VGG16_SHA256[:8]}.pth" == VGG16_FILE


def test_bad_images(loss):
    with pytest.raises(ModelError, match="one shape"):
        loss(torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))
    with pytest.raises(ModelError, match="at least 16 pixels"):
        loss(torch.zeros(1, 3, 8, 32), torch.zeros(1, 3, 8, 32))
