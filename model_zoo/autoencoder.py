"""The convolutional encoder and decoder of VQGAN (arXiv 2012.09841), with its parameter names.

Published tokenizers load by name: `down.I.block.J.conv1`, `up.I.upsample.conv` and so on, levels numbered from the
finest. `patch_size` > 1 is our addition: the first and last convolution work on patches, so that small models need no
expensive fine levels.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model_zoo.errors import ModelError


def group_norm(channels: int, eps: float = 1e-6) -> nn.GroupNorm:
    """GroupNorm with VQGAN's 32 groups if they divide `channels`, else with as many groups as possible of at least 4
    channels.

    VQGAN's narrowest layers have 4 channels per group (128 / 32). Groups of one channel are instance norm, which
    removes the mean of every channel; 32 channels have such groups, so small models should use 64 channels.
    """
    if channels % 32 == 0:
        groups = 32
    else:
        groups = max(g for g in range(1, 32) if channels % g == 0 and (g == 1 or channels // g >= 4))
    return nn.GroupNorm(groups, channels, eps=eps)


class PositionNorm(nn.LayerNorm):
    """Layer norm over the channels of each position. Unlike GroupNorm it uses no statistics over the image."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        return super().forward(x_bchw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """Two (norm, SiLU, 3x3 convolution) with a residual connection: a 1x1 convolution if the width changes."""

    def __init__(self, in_channels: int, out_channels: int, local: bool = False):
        super().__init__()
        norm = PositionNorm if local else group_norm
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        hidden_bchw = self.conv1(F.silu(self.norm1(x_bchw)))
        hidden_bchw = self.conv2(F.silu(self.norm2(hidden_bchw)))
        return self.nin_shortcut(x_bchw) + hidden_bchw


class AttentionBlock(nn.Module):
    """Single-head self-attention over all h*w positions, with a residual connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        normed_bchw = self.norm(x_bchw)
        # (b, one head, tokens, channels); in channels_last memory these are views.
        q, k, v = (layer(normed_bchw).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        attended_bnc = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x_bchw + self.proj_out(attended_bnc.transpose(1, 2).unflatten(2, x_bchw.shape[2:]))


class Downsample(nn.Module):
    """Halves height and width: a 3x3 convolution of stride 2, with one row of zeros at the bottom, one column right."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x_bchw, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x_bchw, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by an attention block if `attention` is set."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, attention: bool, local: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_res_blocks
        self.block = nn.ModuleList(ResBlock(a, b, local) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(out_channels) for _ in range(num_res_blocks if attention else 0))

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.block):
            x_bchw = block(x_bchw)
            if self.attn:
                x_bchw = self.attn[index](x_bchw)
        return x_bchw


class DownLevel(Level):
    """A level of the encoder; all but the coarsest end with a `Downsample`."""

    def __init__(
        self, in_channels: int, out_channels: int, num_res_blocks: int, attention: bool, local: bool, coarsest: bool
    ):
        super().__init__(in_channels, out_channels, num_res_blocks, attention, local)
        self.downsample = nn.Identity() if coarsest else Downsample(out_channels)

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        return self.downsample(super().forward(x_bchw))


class UpLevel(Level):
    """A level of the decoder; all but the finest end with an `Upsample`."""

    def __init__(
        self, in_channels: int, out_channels: int, num_res_blocks: int, attention: bool, local: bool, finest: bool
    ):
        super().__init__(in_channels, out_channels, num_res_blocks, attention, local)
        self.upsample = nn.Identity() if finest else Upsample(out_channels)

    def forward(self, x_bchw: torch.Tensor) -> torch.Tensor:
        return self.upsample(super().forward(x_bchw))


def middle(channels: int, local: bool) -> nn.Sequential:
    """Residual block, attention (unless `local`), residual block, at the coarsest resolution."""
    blocks = OrderedDict(block_1=ResBlock(channels, channels, local))
    if not local:
        blocks["attn_1"] = AttentionBlock(channels)
    blocks["block_2"] = ResBlock(channels, channels, local)
    return nn.Sequential(blocks)


def levels_with_attention(
    attention_factors: Sequence[int], patch_size: int, channel_multipliers: Sequence[int], local: bool
) -> list[bool]:
    """For each level, whether its downsampling factor `patch_size * 2^level` is among `attention_factors`.

    Raises ModelError for a factor that no level has, and for any factor if the model is `local`.
    """
    if local and attention_factors:
        raise ModelError(f"a local model has no attention: set attention_factors=[], not {list(attention_factors)}")
    factors = [patch_size * 2**level for level in range(len(channel_multipliers))]
    unknown = sorted(set(attention_factors) - set(factors))
    if unknown:
        raise ModelError(
            f"attention_factors {unknown} match no level: with patch_size {patch_size} and {len(factors)}"
            f" channel_multipliers the levels have factors {factors}; choose among these, or [] for attention in the"
            " middle only"
        )
    return [factor in attention_factors for factor in factors]


def checkpoint_activations(module: nn.Module) -> None:
    """Discards the activations inside each residual and attention block and recomputes them in the backward pass (Chen
    et al., arXiv 1604.06174)."""
    for block in module.modules():
        if isinstance(block, ResBlock | AttentionBlock):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class Encoder(nn.Module):
    """Images to latents (VQGAN's encoder).

    Args:
        channels: base width, multiplied by each entry of `channel_multipliers`.
        channel_multipliers: one per level, finest first; each level but the last halves height and width.
        num_res_blocks: residual blocks per level.
        attention_factors: downsampling factors (`patch_size * 2^level`) of the levels that have attention.
        latent_channels: channels of the output.
        patch_size: side of the first convolution's patches; 1 is VQGAN, whose first convolution is 3x3.
        local: each position depends only on its neighbourhood: layer norm over each position's channels instead of
            GroupNorm over the image, and no attention. Small models trained on few images then see absolute colours,
            and work at image sizes other than those of training.

    Raises:
        ModelError: for an attention factor that no level has, or any with `local`; in `forward`, for height or width
            that is not a multiple of the downsampling factor.
    """

    def __init__(
        self,
        *,
        channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        attention_factors: Sequence[int],
        latent_channels: int,
        patch_size: int = 1,
        local: bool = False,
    ):
        super().__init__()
        widths = [channels * multiplier for multiplier in channel_multipliers]
        attention = levels_with_attention(attention_factors, patch_size, channel_multipliers, local)
        coarsest = len(widths) - 1
        self.downsampling_factor = patch_size * 2**coarsest

        if patch_size == 1:
            self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        else:
            self.conv_in = nn.Conv2d(3, channels, patch_size, stride=patch_size)
        self.down = nn.ModuleList(
            DownLevel(in_channels, out_channels, num_res_blocks, attention[level], local, level == coarsest)
            for level, (in_channels, out_channels) in enumerate(pairwise([channels, *widths]))
        )
        self.mid = middle(widths[-1], local)
        self.norm_out = (PositionNorm if local else group_norm)(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], latent_channels, 3, padding=1)

    def forward(self, images_bchw: torch.Tensor) -> torch.Tensor:
        """(b, 3, h, w) -> (b, latent_channels, h / factor, w / factor)."""
        height, width = images_bchw.shape[2:]
        factor = self.downsampling_factor
        if height % factor or width % factor:
            fitting = " x ".join(str(max(side // factor, 1) * factor) for side in (height, width))
            raise ModelError(
                f"images of {height} x {width} do not divide into tokens of {factor} x {factor} pixels:"
                f" resize or crop them, for instance to {fitting}"
            )
        hidden_bchw = self.conv_in(images_bchw)
        for level in self.down:
            hidden_bchw = level(hidden_bchw)
        hidden_bchw = self.mid(hidden_bchw)
        return self.conv_out(F.silu(self.norm_out(hidden_bchw)))


class Decoder(nn.Module):
    """Latents to images (VQGAN's decoder): the mirror of `Encoder`, with one more residual block per level.

    Arguments and errors are those of `Encoder`. With `patch_size` > 1 the last convolution outputs the pixels of each
    patch as channels, and a pixel shuffle arranges them.
    """

    def __init__(
        self,
        *,
        channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        attention_factors: Sequence[int],
        latent_channels: int,
        patch_size: int = 1,
        local: bool = False,
    ):
        super().__init__()
        widths = [channels * multiplier for multiplier in channel_multipliers]
        attention = levels_with_attention(attention_factors, patch_size, channel_multipliers, local)

        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], local)
        # Numbered by resolution like the encoder's and run in reverse: each takes the output of the next coarser level.
        self.up = nn.ModuleList(
            UpLevel(in_channels, out_channels, num_res_blocks + 1, attention[level], local, level == 0)
            for level, (in_channels, out_channels) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = (PositionNorm if local else group_norm)(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3 * patch_size**2, 3, padding=1)
        self.pixel_shuffle = nn.PixelShuffle(patch_size)

    def forward(self, latents_bchw: torch.Tensor) -> torch.Tensor:
        """(b, latent_channels, h, w) -> (b, 3, h * factor, w * factor), not clamped."""
        hidden_bchw = self.mid(self.conv_in(latents_bchw))
        for level in reversed(self.up):
            hidden_bchw = level(hidden_bchw)
        return self.pixel_shuffle(self.conv_out(F.silu(self.norm_out(hidden_bchw))))
