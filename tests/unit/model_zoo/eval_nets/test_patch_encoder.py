"""Frozen encoders of patches: their features, and the files that are refused."""

import hashlib
import sys

import pytest
import torch
from encoders import ENCODER, features_by_hand, random_encoder, tokens_by_hand, write_encoder
from model_checks import refused
from safetensors.torch import save_file
from torch.nn import functional as F

from model_zoo.config import DISCRIMINATOR_ENCODERS, ENCODERS
from model_zoo.eval_nets.patch_encoder import (
    BlockEncoder,
    PatchEncoder,
    checked_encoder,
    encoder_file,
    patch_encoder_on_meta,
)

OTHER = "vit_tiny_patch16_224.augreg_in21k"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "weights.safetensors")


def noise(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(2, 3, height, width, generator=generator, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize(
    ("shape", "size", "grid"),
    [
        ((160, 160), None, (10, 10)),  # nothing is resized
        ((40, 40), None, (10, 10)),
        ((64, 64), 64, (4, 4)),  # the position embedding is interpolated
        ((32, 72), 64, (3, 6)),  # a ratio of 4 : 9, 16 patches
        ((90, 30), 64, (7, 2)),
    ],
)
def test_features_equal_float64_by_hand(file, shape, size, grid):
    encoder = PatchEncoder(ENCODER, str(file), None, size).double()
    images_bchw = noise(*shape)
    expected = features_by_hand(random_encoder(), images_bchw, grid)
    features = encoder(images_bchw)
    assert features.shape == (2, encoder.dim, *grid)
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)
    assert expected.std(dim=(2, 3)).min() > 0.01  # patches differ
    single = PatchEncoder(ENCODER, str(file), None, size)(images_bchw.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-4)


def test_nothing_of_it_is_trained_or_saved(file):
    encoder = PatchEncoder(ENCODER, str(file)).train()
    assert not list(encoder.parameters()) and not encoder.state_dict() and not encoder.vit.training
    assert not encoder(noise(32, 32).float().requires_grad_()).requires_grad


def test_other_forms_of_the_file_give_the_same_features(file, tmp_path):
    """As a .pth, without a classifier, with DINOv2's mask token."""

    def change(state):
        del state["head.weight"], state["head.bias"]
        state["mask_token"] = torch.zeros(1, 64)

    other = write_encoder(tmp_path / "weights.pth", change=change)
    images_bchw = noise(40, 40).float()
    assert torch.equal(*(PatchEncoder(ENCODER, str(path))(images_bchw) for path in (file, other)))


def test_half_precision_is_read_as_single(file, tmp_path):
    half = {key: tensor.half() for key, tensor in random_encoder().items()}
    save_file(half, tmp_path / "half.safetensors")
    features = PatchEncoder(ENCODER, str(tmp_path / "half.safetensors"))(noise(40, 40).float())
    expected = features_by_hand(half, noise(40, 40), (10, 10))
    torch.testing.assert_close(features.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ENCODERS)
def test_timm_builds_every_encoder_with_square_patches(name):
    encoder = PatchEncoder.on_meta(name)
    vit = encoder.vit
    assert vit.patch_embed.patch_size == (encoder.patch,) * 2
    assert encoder.side**2 == vit.pos_embed.shape[1] - vit.num_prefix_tokens * (not vit.no_embed_class)
    assert encoder.grid(512, 512) == (encoder.side,) * 2


def test_a_file_is_found_by_its_names(tmp_path, monkeypatch):
    name = "vit_base_patch14_dinov2.lvd142m"
    monkeypatch.setenv("IBQ_WEIGHTS", str(tmp_path))
    (tmp_path / "dinov2_vitb14_pretrain.pth").write_bytes(b"as Meta publishes it")
    assert checked_encoder(name, None, None)[0].name == "dinov2_vitb14_pretrain.pth"
    (tmp_path / f"{name}.safetensors").write_bytes(b"as timm publishes it")
    path, digest = checked_encoder(name, None, None)
    assert path.name == f"{name}.safetensors" and digest == hashlib.sha256(b"as timm publishes it").hexdigest()


def test_a_missing_file_is_one_line_with_places_and_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("IBQ_WEIGHTS", str(tmp_path))
    message = refused(PatchEncoder, ENCODER)
    for part in (
        f"{tmp_path / ENCODER}.safetensors",
        "loss.semantic.weights=FILE",
        "IBQ_WEIGHTS",
        "huggingface.co/timm",
    ):
        assert part in message
    assert "dl.fbaipublicfiles.com" in encoder_file("vit_base_patch14_dinov2.lvd142m").url


def test_another_hash_is_one_line_with_both(file):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert checked_encoder(ENCODER, str(file), digest.upper()) == (file, digest)
    message = refused(PatchEncoder, ENCODER, str(file), "0" * 64)
    assert digest in message and "0" * 64 in message and "loss.semantic.weights=FILE" in message


def test_another_encoder_is_one_line_with_both_names(tmp_path, monkeypatch):
    monkeypatch.setitem(ENCODERS, OTHER, None)
    path = write_encoder(tmp_path / "other.safetensors", name=OTHER)
    message = refused(PatchEncoder, ENCODER, str(path))
    assert f"holds the weights of {OTHER}, not of {ENCODER}" in message and f"loss.semantic.encoder={OTHER}" in message


def test_unknown_weights_are_one_line_with_what_differs(tmp_path):
    path = write_encoder(tmp_path / "w.safetensors", change=lambda state: state.pop("norm.bias"))
    assert f"does not hold the weights of {ENCODER}: it lacks norm.bias" in refused(PatchEncoder, ENCODER, str(path))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    path = write_encoder(tmp_path / "w.safetensors", change=lambda state: state["norm.bias"][3].fill_(torch.nan))
    assert "norm.bias with NaN" in refused(PatchEncoder, ENCODER, str(path))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_damaged_file_is_refused(tmp_path, name):
    path = write_encoder(tmp_path / name)
    path.write_bytes(path.read_bytes()[:1000])
    assert "download it again" in refused(PatchEncoder, ENCODER, str(path))
    path.write_bytes(b"")
    assert "download it again" in refused(PatchEncoder, ENCODER, str(path))


def test_a_checkpoint_of_more_than_weights_is_refused(tmp_path):
    torch.save({"model": random_encoder(), "epoch": 3}, tmp_path / "w.pth")
    assert "save the state dict alone" in refused(PatchEncoder, ENCODER, str(tmp_path / "w.pth"))


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(file):
    assert "must be a multiple of 16" in refused(PatchEncoder, ENCODER, str(file), None, 100)


def test_without_timm_the_extra_is_named(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'ibq[semantic]'" in refused(PatchEncoder, ENCODER, str(file))
    assert "loss.semantic.weight=0" in refused(patch_encoder_on_meta, ENCODER)


@pytest.mark.parametrize(("shape", "size", "grid"), [((160, 160), None, (10, 10)), ((40, 90), 64, (3, 6))])
def test_tokens_of_blocks_and_their_gradient_equal_float64_by_hand(file, shape, size, grid):
    """Before the first of 6 blocks, and after the 2nd, 3rd, 5th and 6th."""
    encoder = BlockEncoder(ENCODER, str(file), None, size).double()
    images_bchw = (1.2 * noise(*shape)).requires_grad_()  # not clamped
    resized = F.interpolate(images_bchw, tuple(16 * side for side in grid), mode="bilinear", antialias=True)
    of_blocks = tokens_by_hand(random_encoder(), resized, grid)
    expected = [(of_blocks[block][:, 1:] + of_blocks[block][:, :1]).mT for block in (0, 2, 3, 5, 6)]
    found = encoder(images_bchw)
    assert len(found) == encoder.outputs
    for tokens_bdn, wanted in zip(found, expected, strict=True):
        assert tokens_bdn.shape == (2, encoder.dim, grid[0] * grid[1])
        torch.testing.assert_close(tokens_bdn, wanted, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(sum(t.square().mean() for t in of), images_bchw)[0] for of in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
    assert gradients[0].abs().min() > 0
    assert not list(encoder.parameters()) and not encoder.state_dict()


@pytest.mark.parametrize("name", DISCRIMINATOR_ENCODERS)
def test_timm_builds_every_encoder_of_the_discriminator(name):
    encoder = BlockEncoder.on_meta(name)
    assert len(encoder.last_blocks) == 4 and max(encoder.last_blocks) == len(encoder.vit.blocks)
    if name.endswith(".dino"):
        assert encoder.last_blocks == {3, 6, 9, 12} and (encoder.dim, encoder.side) == (384, 14)


def test_messages_name_the_section_of_the_discriminator(file, tmp_path, monkeypatch):
    missing = refused(BlockEncoder, ENCODER, str(tmp_path / "none"))
    assert "discriminator.weights=FILE" in missing and "discriminator.kind=dino" in missing
    assert "discriminator.size=100 must be a multiple" in refused(BlockEncoder, ENCODER, str(file), None, 100)
    assert "discriminator.size=32 must be at least 48" in refused(BlockEncoder, ENCODER, str(file), None, 32)
    assert "discriminator.sha256=" in refused(BlockEncoder, ENCODER, str(file), "0" * 64)
    other = refused(BlockEncoder, "vit_small_patch16_224.dino", str(file))
    assert f"holds the weights of {ENCODER}" in other and f"discriminator.encoder={ENCODER}" in other
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "discriminator.kind=patchgan" in refused(BlockEncoder, ENCODER, str(file))
