"""What every quantizer takes and returns."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from model_zoo.ops.index_backprop import IndexBackprop


class Quantized(NamedTuple):
    """A quantized feature map and the terms that train it. The terms are unweighted means over all elements.

    quantized_bdhw: code vectors, differentiable towards encoder and codebook as the quantizer defines.
    index_bhw: int64 codes.
    double_quantization: |z_q - z|^2 with the gradient-carrying z_q (paper eq. 12, first term); None for VQ.
    commitment: |z - sg[C[i]]|^2, moves the features to their codes.
    codebook: |sg[z] - C[i]|^2, moves the codes to their features.
    sample_entropy, average_probability_k: see `model_zoo.ops.IndexBackprop`; None where not asked for.
    """

    quantized_bdhw: Tensor
    index_bhw: Tensor
    double_quantization: Tensor | None
    commitment: Tensor
    codebook: Tensor
    sample_entropy: Tensor | None = None
    average_probability_k: Tensor | None = None


class Quantizer(nn.Module):
    """A codebook and the rule that picks its codes. Always computes in fp32, whatever autocast says around it:
    in bf16 near ties flip and half of a large codebook dies.
    """

    # Whether the gradient comes through a soft assignment: only then are there entropies, and a double quantization
    # term (with a straight-through z_q it would have no gradient towards the codes).
    soft_assignment: bool = False

    def __init__(self, codebook_size: int, code_dim: int, init_std: float = 1.0):
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, code_dim)
        nn.init.normal_(self.embedding.weight, std=init_std)

    def assign(self, z_nd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
        """Picks a code for each fp32 token ``z_nd``."""
        raise NotImplementedError

    def nearest(self, z_nd: Tensor) -> Tensor:
        """int64 codes ``(n,)`` of fp32 tokens, without gradients."""
        raise NotImplementedError

    def forward(self, z_bdhw: Tensor, entropy_temperature: float | None = None) -> Quantized:
        """Quantizes a feature map; ``entropy_temperature`` asks for the entropy terms, where the quantizer has any."""
        b, _, h, w = z_bdhw.shape
        with torch.autocast(z_bdhw.device.type, enabled=False):
            z_nd = rearrange(z_bdhw.float(), "b d h w -> (b h w) d")
            out = self.assign(z_nd, entropy_temperature)
            return Quantized(
                quantized_bdhw=rearrange(out.quantized_nd, "(b h w) d -> b d h w", b=b, h=h, w=w),
                index_bhw=out.index_n.view(b, h, w),
                double_quantization=(out.quantized_nd - z_nd).square().mean() if self.soft_assignment else None,
                commitment=(z_nd - out.code_nd.detach()).square().mean(),
                codebook=(z_nd.detach() - out.code_nd).square().mean(),
                sample_entropy=out.sample_entropy,
                average_probability_k=out.average_probability_k,
            )

    @torch.no_grad()
    def tokenize(self, z_bdhw: Tensor) -> Tensor:
        """Features ``(b, d, h, w)`` -> int64 codes ``(b, h, w)``."""
        b, _, h, w = z_bdhw.shape
        with torch.autocast(z_bdhw.device.type, enabled=False):
            return self.nearest(rearrange(z_bdhw.float(), "b d h w -> (b h w) d")).view(b, h, w)

    def lookup(self, index_bhw: Tensor) -> Tensor:
        """Codes ``(b, h, w)`` -> code vectors ``(b, d, h, w)``."""
        return rearrange(self.embedding(index_bhw), "b h w d -> b d h w")
