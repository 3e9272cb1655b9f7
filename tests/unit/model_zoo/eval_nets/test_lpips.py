from collections.abc import Iterator
from pathlib import Path

import lpips
import pytest
import torch
import torch.nn.functional as F
from model_checks import refused
from random_networks import accepted, write_trunk

from model_zoo.eval_nets.lpips import SMALLEST_SIDE, TRUNKS, Perceptual

# torchvision's layers: convolutions as (width, kernel, stride, padding), each with a ReLU, and max-pools as (kernel,).
# A trunk's features are those of the convolutions before its pools (VGG16), or of every convolution (AlexNet).
LAYERS = {
    "vgg": [
        *[(64, 3, 1, 1)] * 2, (2,), *[(128, 3, 1, 1)] * 2, (2,), *[(256, 3, 1, 1)] * 3, (2,),
        *[(512, 3, 1, 1)] * 3, (2,), *[(512, 3, 1, 1)] * 3,
    ],
    "alex": [(64, 11, 4, 2), (3,), (192, 5, 1, 2), (3,), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)],
}  # fmt: skip
FEATURES_AFTER = {"vgg": (1, 4, 8, 12, 16), "alex": (0, 2, 4, 5, 6)}


@pytest.fixture(scope="module")
def trunk_files(tmp_path_factory) -> Iterator[dict[str, Path]]:
    """Files like torchvision's, which pass for them."""
    folder = tmp_path_factory.mktemp("trunks")
    files = {net: write_trunk(folder, TRUNKS[net]) for net in LAYERS}
    with accepted(folder):
        yield files


@pytest.fixture(params=["vgg", "alex"])
def net(request) -> str:
    return request.param


@pytest.fixture
def loss(trunk_files, net) -> Perceptual:
    return Perceptual(str(trunk_files[net]), net)


def lpips_by_hand(net: str, trunk_file: Path, x_bchw: torch.Tensor, y_bchw: torch.Tensor) -> torch.Tensor:
    """In float64."""
    state = {name: tensor.double() for name, tensor in torch.load(trunk_file, weights_only=True).items()}
    heads_file = Path(lpips.__file__).parent / f"weights/v0.1/{net}.pth"
    heads = [head.double() for head in torch.load(heads_file, map_location="cpu", weights_only=True).values()]
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def features(images_bchw):
        hidden, index = (images_bchw.double() - shift.view(3, 1, 1)) / scale.view(3, 1, 1), 0
        for number, (width, *window) in enumerate(LAYERS[net]):
            if not window:  # then the "width" is the pool's kernel
                hidden, index = F.max_pool2d(hidden, width, stride=2), index + 1
            else:
                weight, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
                hidden, index = F.conv2d(hidden, weight, bias, stride=window[1], padding=window[2]).relu(), index + 2
            if number in FEATURES_AFTER[net]:
                yield hidden / hidden.norm(dim=1, keepdim=True).clamp(min=1e-10)

    return sum(
        F.conv2d((a - b).square(), head).mean(dim=(1, 2, 3))
        for a, b, head in zip(features(x_bchw), features(y_bchw), heads, strict=True)
    )


def test_value_of_each_pair_equals_the_definition(loss, net, trunk_files):
    torch.manual_seed(0)
    x_bchw, y_bchw = torch.rand(2, 3, 3, 32, 48) * 2 - 1
    y_bchw[1] = x_bchw[1]
    value_b = loss(x_bchw, y_bchw)
    assert value_b.shape == (3,)
    assert value_b[0] > 0 and value_b[1] == 0
    wanted_b = lpips_by_hand(net, trunk_files[net], x_bchw, y_bchw)
    torch.testing.assert_close(value_b.double(), wanted_b, rtol=1e-4, atol=1e-6)


def test_frozen_and_out_of_checkpoints(loss):
    assert not list(loss.parameters())
    assert not loss.state_dict()
    parent = torch.nn.ModuleDict({"loss": loss, "other": torch.nn.Linear(2, 2)})
    parent.load_state_dict(torch.nn.ModuleDict({"other": torch.nn.Linear(2, 2)}).state_dict(), strict=True)
    parent.train()
    assert not any(module.training for module in loss.modules())
    assert loss.to(torch.float64)(*torch.rand(2, 1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


def test_gradient_reaches_the_image(loss):
    x_bchw, y_bchw = torch.rand(2, 1, 3, 32, 32)
    y_bchw.requires_grad_()
    loss(x_bchw, y_bchw).sum().backward()
    assert y_bchw.grad.isfinite().all() and y_bchw.grad.abs().sum() > 0


def test_construction_is_silent_and_draws_no_random_numbers(trunk_files, net, capfd, recwarn):
    state = torch.get_rng_state()
    Perceptual(str(trunk_files[net]), net)
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_a_trunk_with_other_layers_is_refused(tmp_path, trunk_files, net):
    state = torch.load(trunk_files[net], weights_only=True)
    state["features.0.weight"] = state["features.0.weight"][:32]
    other = tmp_path / trunk_files[net].name
    torch.save(state, other)
    with accepted(tmp_path), pytest.raises(RuntimeError, match="size mismatch"):
        Perceptual(str(other), net)


def test_the_file_is_that_of_the_trunk(trunk_files):
    assert "not the published alexnet" in refused(Perceptual, str(trunk_files["vgg"]), "alex")


def test_the_smallest_side_is_the_least_that_the_trunk_takes(loss, net):
    side = SMALLEST_SIDE[net]
    assert loss(*torch.rand(2, 1, 3, side, side)).isfinite().all()
    with pytest.raises(RuntimeError):  # the trunk itself, without our own check
        loss.lpips(*torch.rand(2, 1, 3, side - 1, side - 1))


def test_bad_images(loss, net):
    assert "equal shape" in refused(loss, torch.zeros(1, 3, 32, 32), torch.zeros(2, 3, 32, 32))
    assert f"at least {SMALLEST_SIDE[net]} pixels" in refused(loss, torch.zeros(1, 3, 8, 32), torch.zeros(1, 3, 8, 32))
