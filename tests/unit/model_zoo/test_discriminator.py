import math

import numpy as np
import pytest
import torch
from model_checks import refused
from torch import nn

from model_zoo.discriminator import PatchDiscriminator, TokenDiscriminator


def test_parameter_count_is_the_published_one():
    assert sum(parameter.numel() for parameter in PatchDiscriminator().parameters()) == 2_765_633


def test_state_dict_names_and_shapes_are_the_published_ones():
    shapes = {name: tuple(tensor.shape) for name, tensor in PatchDiscriminator().state_dict().items()}
    expected = {"main.0.weight": (64, 3, 4, 4), "main.0.bias": (64,)}
    for index, (in_channels, out_channels) in zip((2, 5, 8), ((64, 128), (128, 256), (256, 512)), strict=True):
        expected[f"main.{index}.weight"] = (out_channels, in_channels, 4, 4)
        for name in ("weight", "bias", "running_mean", "running_var"):
            expected[f"main.{index + 1}.{name}"] = (out_channels,)
        expected[f"main.{index + 1}.num_batches_tracked"] = ()
    expected |= {"main.11.weight": (1, 512, 4, 4), "main.11.bias": (1,)}
    assert shapes == expected


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_initialization(norm):
    torch.manual_seed(0)
    for module in PatchDiscriminator(norm=norm).requires_grad_(False).main:
        if isinstance(module, nn.Conv2d):
            assert abs(module.weight.mean()) < 0.002
            assert module.weight.std() == pytest.approx(0.02, rel=0.05)
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            assert module.weight.mean() == pytest.approx(1.0, abs=0.01)
            assert module.weight.std() == pytest.approx(0.02, rel=0.2)
            assert not module.bias.any()
            assert module.eps == 1e-5
        else:
            assert module.negative_slope == 0.2


def test_logit_map_of_256_pixels():
    with torch.device("meta"):
        assert PatchDiscriminator()(torch.empty(2, 3, 256, 256)).shape == (2, 1, 30, 30)


def test_receptive_field_is_70_pixels():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=4).eval()
    images_bchw = torch.randn(1, 3, 128, 128, requires_grad=True)
    discriminator(images_bchw)[0, 0, 7, 7].backward()
    seen = images_bchw.grad[0].abs().sum(dim=0).nonzero()
    assert (seen.amax(dim=0) - seen.amin(dim=0) + 1).tolist() == [70, 70]


def test_group_norm_judges_real_and_fake_in_one_forward():
    torch.manual_seed(0)
    real_bchw, fake_bchw = torch.randn(2, 3, 32, 32), 3 + 2 * torch.randn(2, 3, 32, 32)

    def together_and_apart(discriminator):
        together = discriminator(torch.cat([real_bchw, fake_bchw]))
        return together, torch.cat([discriminator(real_bchw), discriminator(fake_bchw)])

    together, apart = together_and_apart(PatchDiscriminator(channels=8, norm="group"))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    together, apart = together_and_apart(PatchDiscriminator(channels=8, norm="batch"))
    assert not torch.allclose(together, apart, atol=1e-2)


@pytest.mark.parametrize("layers", [2, 3])
def test_images_too_small_name_the_smallest_side(layers):
    discriminator = PatchDiscriminator(channels=4, layers=layers)
    smallest = 3 * 2**layers
    assert discriminator(torch.randn(2, 3, smallest, smallest)).shape == (2, 1, 1, 1)
    assert f"at least {smallest} pixels" in refused(discriminator, torch.randn(2, 3, smallest, smallest - 1))


def test_unknown_norm_names_the_choices():
    assert "'layer': choose one of batch, group" in refused(PatchDiscriminator, norm="layer")


def tokens_of(dim: int = 8, count: int = 15) -> list[torch.Tensor]:
    return [torch.randn(2, dim, count, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1)]


def head_by_hand(head, x_bdn):
    """In float64, with the singular values of numpy's decomposition, and the circle by rolled copies."""

    def convolution(layer, x_bdn):
        matrix = layer.weight.detach()
        matrix = matrix / np.linalg.svd(matrix.flatten(1).numpy(), compute_uv=False)[0]
        reach = matrix.shape[2] // 2
        moved = (matrix[:, :, reach + step] @ x_bdn.roll(-step, dims=2) for step in range(-reach, reach + 1))
        return sum(moved) + layer.bias[:, None]

    def block(layers, x_bdn):
        x_bdn = convolution(layers[0], x_bdn)
        grouped = x_bdn.unflatten(1, (layers[1].num_groups, -1)).flatten(2)
        mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, unbiased=False)
        x_bdn = ((grouped - mean) / (variance + 1e-5).sqrt()).view_as(x_bdn)
        x_bdn = x_bdn * layers[1].weight[:, None] + layers[1].bias[:, None]
        return torch.where(x_bdn > 0, x_bdn, 0.2 * x_bdn)

    x_bdn = block(head.point, x_bdn)
    x_bdn = (x_bdn + block(head.neighbours, x_bdn)) / math.sqrt(2)
    return convolution(head.logit, x_bdn)[:, 0]


def converged_heads(dim: int = 8, heads: int = 2) -> TokenDiscriminator:
    torch.manual_seed(0)
    discriminator = TokenDiscriminator(dim, heads).double().requires_grad_(False)
    for norm in (module for module in discriminator.modules() if isinstance(module, nn.GroupNorm)):
        norm.weight.normal_(1, 0.3)
        norm.bias.normal_(0, 0.3)
    for _ in range(300):
        discriminator.after_update()
    return discriminator


def test_logits_of_the_heads_equal_float64_by_hand():
    discriminator, tokens = converged_heads(), tokens_of()
    expected = torch.cat([head_by_hand(*each) for each in zip(discriminator.heads, tokens, strict=True)], dim=1)
    assert expected.shape == (2, 30)
    torch.testing.assert_close(discriminator(tokens), expected, rtol=1e-6, atol=1e-8)


def test_heads_have_the_published_size():
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in TokenDiscriminator(384, 5).parameters())
    assert round(parameters / 1e6, 2) == 7.39  # what vaex prints


def test_a_forward_changes_nothing_and_an_update_follows_the_weight():
    discriminator, tokens = converged_heads(), tokens_of()
    layer = discriminator.heads[0].neighbours[0]
    before = layer.u.clone()
    first = discriminator(tokens)
    assert torch.equal(discriminator(tokens), first) and torch.equal(layer.u, before)
    layer.weight.normal_()
    for _ in range(300):
        discriminator.after_update()
    largest = np.linalg.svd(layer.weight.flatten(1).numpy(), compute_uv=False)[0]
    matrix = layer.weight.flatten(1)
    assert (layer.u @ matrix).norm().item() == pytest.approx(largest, rel=1e-6)


def test_heads_take_real_and_fake_images_in_one_forward():
    discriminator, tokens = converged_heads(), tokens_of()
    alone = torch.cat([discriminator([block[image : image + 1] for block in tokens]) for image in range(2)])
    torch.testing.assert_close(discriminator(tokens), alone, rtol=1e-9, atol=1e-12)
