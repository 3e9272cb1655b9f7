import re

import pytest
import torch
import torch.nn.functional as F
from model_checks import refused
from torch import nn

from model_zoo import ModelError
from model_zoo.autoencoder import AttentionBlock, Decoder, Downsample, Encoder, checkpoint_activations, group_norm

PUBLISHED = dict(channels=128, channel_multipliers=(1, 1, 2, 2, 4), attention_factors=(16,), latent_channels=256)
TINY = dict(channels=16, channel_multipliers=[1, 2, 2], num_res_blocks=1, attention_factors=[4], latent_channels=8)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("num_res_blocks", "encoder_parameters", "decoder_parameters"),
    [(4, 46_752_256, 59_903_875), (2, 29_298_176, 42_449_795), (1, 20_571_136, 33_722_755)],
)
def test_parameter_counts_are_the_published_ones(num_res_blocks, encoder_parameters, decoder_parameters):
    with torch.device("meta"):
        encoder = Encoder(**PUBLISHED, num_res_blocks=num_res_blocks)
        decoder = Decoder(**PUBLISHED, num_res_blocks=num_res_blocks)
    assert parameter_count(encoder) == encoder_parameters
    assert parameter_count(decoder) == decoder_parameters


def names(prefix: str, *layers: str) -> set[str]:
    return {f"{prefix}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_state_dict_names_are_the_published_ones():
    block, attention = ("norm1", "conv1", "norm2", "conv2"), ("norm", "q", "k", "v", "proj_out")
    mid = names("mid.block_1", *block) | names("mid.attn_1", *attention) | names("mid.block_2", *block)
    ends = {f"{layer}.{kind}" for layer in ("conv_in", "norm_out", "conv_out") for kind in ("weight", "bias")}

    encoder = ends | mid | names("down.0", "downsample.conv") | names("down.1", "downsample.conv")
    for level in range(3):
        encoder |= names(f"down.{level}.block.0", *block)
    encoder |= names("down.1.block.0", "nin_shortcut") | names("down.2.attn.0", *attention)
    assert set(Encoder(**TINY).state_dict()) == encoder

    decoder = ends | mid | names("up.1", "upsample.conv") | names("up.2", "upsample.conv")
    for level in range(3):
        for index in range(2):
            decoder |= names(f"up.{level}.block.{index}", *block)
    # Level 0 comes last and takes level 1's 32 channels.
    decoder |= names("up.0.block.0", "nin_shortcut")
    decoder |= names("up.2.attn.0", *attention) | names("up.2.attn.1", *attention)
    assert set(Decoder(**TINY).state_dict()) == decoder


@pytest.mark.parametrize(("patch_size", "factor", "attention"), [(1, 4, 4), (4, 16, 16), (3, 12, 6)])
def test_shapes_and_gradients(patch_size, factor, attention):
    config = {**TINY, "patch_size": patch_size, "attention_factors": [attention]}
    encoder, decoder = Encoder(**config), Decoder(**config)
    images_bchw = torch.randn(2, 3, 4 * factor, 2 * factor)
    latents_bchw = encoder(images_bchw)
    assert latents_bchw.shape == (2, 8, 4, 2)
    assert encoder.downsampling_factor == factor
    reconstruction_bchw = decoder(latents_bchw)
    assert reconstruction_bchw.shape == images_bchw.shape
    reconstruction_bchw.square().mean().backward()
    for parameter in [*encoder.parameters(), *decoder.parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all()


def test_attention_is_placed_by_downsampling_factor():
    encoder = Encoder(**{**TINY, "patch_size": 4, "attention_factors": [4, 16], "num_res_blocks": 2})
    assert [len(level.attn) for level in encoder.down] == [2, 0, 2]
    decoder = Decoder(**{**TINY, "patch_size": 4, "attention_factors": [8]})
    assert [len(level.attn) for level in decoder.up] == [0, 2, 0]


def test_patches_of_the_last_convolution_become_pixels():
    decoder = Decoder(**{**TINY, "patch_size": 4, "attention_factors": []})
    with torch.no_grad():
        decoder.conv_out.weight.zero_()
        decoder.conv_out.bias.copy_(torch.arange(48.0))
        image_chw = decoder(torch.randn(1, 8, 2, 2))[0]
    # Channel major, then row, then column of the patch, in every patch alike.
    patch_chw = torch.arange(48.0).view(3, 4, 4)
    assert torch.equal(image_chw, patch_chw.repeat(1, 8, 8))


def test_attention_equals_its_equation():
    torch.manual_seed(0)
    attention = AttentionBlock(32)
    x_bchw = torch.randn(2, 32, 3, 5)
    q, k, v = (layer(attention.norm(x_bchw)).flatten(2) for layer in (attention.q, attention.k, attention.v))
    weights_bqk = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / 32**0.5, dim=-1)
    attended_bchw = torch.einsum("bqk,bck->bcq", weights_bqk, v).reshape(x_bchw.shape)
    torch.testing.assert_close(attention(x_bchw), x_bchw + attention.proj_out(attended_bchw), rtol=1e-5, atol=1e-5)


def test_downsampling_pads_at_the_bottom_and_right_only():
    downsample = Downsample(1)
    with torch.no_grad():
        downsample.conv.weight.fill_(1.0)
        downsample.conv.bias.zero_()
        sums = downsample(torch.ones(1, 1, 4, 4))[0, 0]
    assert sums.tolist() == [[9.0, 6.0], [6.0, 4.0]]


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(128, 32), (512, 32), (32, 32), (16, 4), (48, 12), (24, 6), (100, 25), (6, 1), (7, 1), (3, 1)],
)
def test_group_norm_groups(channels, groups):
    norm = group_norm(channels)
    assert norm.num_groups == groups
    assert norm.eps == 1e-6


def test_channels_last_gives_the_same_images():
    torch.manual_seed(0)
    encoder, decoder = Encoder(**TINY), Decoder(**TINY)
    images_bchw = torch.randn(2, 3, 16, 24)
    expected_bchw = decoder(encoder(images_bchw))
    encoder, decoder = encoder.to(memory_format=torch.channels_last), decoder.to(memory_format=torch.channels_last)
    actual_bchw = decoder(encoder(images_bchw.to(memory_format=torch.channels_last)))
    assert actual_bchw.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual_bchw, expected_bchw, rtol=1e-4, atol=1e-5)


def test_bf16_autocast():
    encoder, decoder = Encoder(**TINY), Decoder(**TINY)
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction_bchw = decoder(encoder(torch.randn(1, 3, 8, 8)))
    F.mse_loss(reconstruction_bchw.float(), torch.zeros(1, 3, 8, 8)).backward()
    assert encoder.conv_in.weight.grad.isfinite().all()


def test_sides_that_do_not_divide_name_the_mend():
    message = refused(Encoder(**TINY), torch.randn(1, 3, 10, 17))
    assert re.search("10 x 17 .* tokens of 4 x 4 .* to 8 x 16", message)


def test_attention_factor_without_a_level_names_the_choices():
    with pytest.raises(ModelError, match=r"\[16\] match no level.*\[1, 2, 4\]"):
        Decoder(**{**TINY, "attention_factors": [4, 16]})


def test_a_local_tokenizer_sees_its_neighbourhood_only():
    shape = {**TINY, "attention_factors": [], "patch_size": 4, "channel_multipliers": [1], "local": True}
    torch.manual_seed(0)
    encoder, decoder = Encoder(**shape), Decoder(**shape)
    images = torch.randn(1, 3, 128, 128)
    changed = images.clone()
    changed[..., :4, :4] += 10  # one patch in the corner
    with torch.no_grad():
        latents, moved = encoder(images), encoder(changed)
        assert not torch.equal(latents[..., :2, :2], moved[..., :2, :2])
        torch.testing.assert_close(latents[..., -8:, -8:], moved[..., -8:, -8:], rtol=0, atol=0)
        assert not torch.equal(decoder(latents)[..., :8, :8], decoder(moved)[..., :8, :8])
        torch.testing.assert_close(decoder(latents)[..., -8:, -8:], decoder(moved)[..., -8:, -8:], rtol=0, atol=0)
    assert not any(isinstance(module, (AttentionBlock, torch.nn.GroupNorm)) for module in encoder.modules())


def test_a_local_model_with_attention_is_refused():
    assert "no attention" in refused(Encoder, **{**TINY, "attention_factors": [1], "local": True})


def test_checkpointed_activations_change_neither_outputs_nor_gradients_and_are_not_kept():
    kept, results = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        encoder = Encoder(**TINY)
        names = list(encoder.state_dict())
        if checkpointed:
            checkpoint_activations(encoder)
        assert list(encoder.state_dict()) == names
        images_bchw = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, held=held: held.append(x.numel()) or x, lambda x: x):
            latent_bchw = encoder(images_bchw)
        latent_bchw.square().sum().backward()
        kept.append(sum(held))
        results.append([latent_bchw, *(parameter.grad for parameter in encoder.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert kept[1] < kept[0] / 2
