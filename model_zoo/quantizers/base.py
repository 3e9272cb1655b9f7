"""What every quantizer takes and returns."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.ops import CodebookShard, IndexBackprop, lookup_code

INITIAL_BLOCK = 2**14  # codes drawn at a time
FLOOR = 1e-3  # of the features' mean variance
# How long codes among the features are, where the assignment is softmax(z C^T): features and codes draw each other to
# one length, and its square decides how sharp the assignment becomes. Longer codes leave more of them unused; of 0.46
# narrow ones did not learn to reconstruct (docs/LOG.md, 2026-11-27).
LENGTH = 1.25
RELATIVE_LENGTH = 0.5  # of the features' root mean square, where the assignment is by distance


class Quantized(NamedTuple):
    """A quantized feature map and the terms that train it. The terms are unweighted means over all elements.

    quantized_bdhw: code vectors, differentiable towards encoder and codebook as the quantizer defines.
    index_bhw: int64 codes.
    double_quantization: |z_q - z|^2 with the gradient-carrying z_q (paper eq. 12, first term); None where the
        assignment is not soft.
    commitment: |z - sg[C[i]]|^2, moves the features to their codes.
    codebook: |sg[z] - C[i]|^2, moves the codes to their features; None where there is no codebook to move.
    sample_entropy, average_probability_k: see `model_zoo.ops.IndexBackprop`; None where not asked for.
    features_nd: the features that were quantized, without gradient.
    shard: the quantizer's; average_probability_k then holds this rank's codes alone.
    """

    quantized_bdhw: Tensor
    index_bhw: Tensor
    double_quantization: Tensor | None
    commitment: Tensor
    codebook: Tensor | None
    sample_entropy: Tensor | None = None
    average_probability_k: Tensor | None = None
    features_nd: Tensor | None = None
    shard: CodebookShard | None = None


class Quantizer(nn.Module):
    """The rule that picks codes, and what it learns from. Always computes in fp32, whatever autocast says around it:
    in bf16 near ties flip and half of a large codebook dies.

    A quantizer is made with ``(codebook_size, code_dim, init_std, shard)``; see `CodebookQuantizer`.
    """

    # Whether the gradient comes through softmax(z C^T): only then is there a double quantization term (with a
    # straight-through z_q it would have no gradient towards the codes).
    soft_assignment: bool = False
    has_entropy: bool = False
    # Of index backpropagation, for quantizers that have a choice; see `model_zoo.ops.index_backprop`.
    impl: str | None = None
    shard: CodebookShard | None = None

    def assign(self, z_nd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
        """Picks a code for each fp32 token ``z_nd``."""
        raise NotImplementedError

    def nearest(self, z_nd: Tensor) -> Tensor:
        """int64 codes ``(n,)`` of fp32 tokens, without gradients."""
        raise NotImplementedError

    def vectors(self, index_n: Tensor) -> Tensor:
        """int64 codes ``(n,)`` -> code vectors ``(n, d)``."""
        raise NotImplementedError

    def anneal(self, progress: float) -> None:
        """Told before each training step how far training is, from 0 to 1."""

    def forward(self, z_bdhw: Tensor, entropy_temperature: float | None = None) -> Quantized:
        """Quantizes a feature map; ``entropy_temperature`` asks for the entropy terms, where the quantizer has any."""
        b, _, h, w = z_bdhw.shape
        with torch.autocast(z_bdhw.device.type, enabled=False):
            z_nd = rearrange(z_bdhw.float(), "b d h w -> (b h w) d")
            finite = z_nd.detach().isfinite()
            if self.training:  # no code is nearest to NaN
                z_nd = torch.where(finite, z_nd, 0)
            out = self.assign(z_nd, entropy_temperature)
            if self.training:
                # ... but it must reach the loss, by which all ranks then leave out this step together.
                out = out._replace(quantized_nd=out.quantized_nd + torch.where(finite.all(), 0.0, torch.nan))
            return Quantized(
                quantized_bdhw=rearrange(out.quantized_nd, "(b h w) d -> b d h w", b=b, h=h, w=w),
                index_bhw=out.index_n.view(b, h, w),
                double_quantization=(out.quantized_nd - z_nd).square().mean() if self.soft_assignment else None,
                commitment=(z_nd - out.code_nd.detach()).square().mean(),
                codebook=(z_nd.detach() - out.code_nd).square().mean() if out.code_nd.requires_grad else None,
                sample_entropy=out.sample_entropy,
                average_probability_k=out.average_probability_k,
                features_nd=z_nd.detach(),
                shard=self.shard,
            )

    @torch.no_grad()
    def tokenize(self, z_bdhw: Tensor) -> Tensor:
        """Features ``(b, d, h, w)`` -> int64 codes ``(b, h, w)``."""
        b, _, h, w = z_bdhw.shape
        with torch.autocast(z_bdhw.device.type, enabled=False):
            return self.nearest(rearrange(z_bdhw.float(), "b d h w -> (b h w) d")).view(b, h, w)

    def lookup(self, index_bhw: Tensor) -> Tensor:
        """Codes ``(b, h, w)`` -> code vectors ``(b, d, h, w)``."""
        b, h, w = index_bhw.shape
        return rearrange(self.vectors(index_bhw.flatten()), "(b h w) d -> b d h w", b=b, h=h, w=w)


class CodebookQuantizer(Quantizer):
    """A quantizer that learns its codes.

    shard: the rows of the codebook that are here; None for all of them. With a shard all ranks of its group must make
    the quantizer and call `forward`, `tokenize` and `lookup` together, each with its own tokens (or with none).
    """

    def __init__(self, codebook_size: int, code_dim: int, init_std: float = 1.0, shard: CodebookShard | None = None):
        super().__init__()
        self.shard = shard
        start, stop = (0, codebook_size) if shard is None else (shard.start, shard.stop)
        if shard is not None:
            shard.check(codebook_size)
        rows_kd = initial_codes(start, stop, codebook_size, code_dim, init_std)
        self.embedding = nn.Embedding.from_pretrained(rows_kd, freeze=False)

    def vectors(self, index_n: Tensor) -> Tensor:
        return lookup_code(index_n, self.embedding.weight, self.shard)

    @torch.no_grad()
    def place_among(self, covariance_dd: Tensor) -> None:
        """Gives the codes, whose directions are random until now, those of features of mean 0 and this covariance, and
        one length for all: a code that is shorter than its neighbours, or that points where no feature does, has the
        largest dot product with none. How long the features are does not change it, but where the assignment is by
        distance. (Ours; the idea is the data-dependent start of Salimans and Kingma, arXiv 1602.07868.)

        covariance_dd: fp64, of all ranks' features, which must vary, in two dimensions or more: in one of them there
        are but two codes of one length.
        """
        variance, direction_dd = torch.linalg.eigh(covariance_dd)
        # A part in every direction: features of few images span few dimensions.
        spread = (variance.clamp(min=0) + FLOOR * variance.mean()).sqrt()
        root_dd = ((direction_dd * spread) @ direction_dd.T).float()
        length = LENGTH if self.soft_assignment else RELATIVE_LENGTH * variance.sum().sqrt()
        for rows_kd in self.embedding.weight.split(INITIAL_BLOCK):
            rows_kd.copy_(F.normalize(rows_kd @ root_dd, dim=1) * length)


def initial_codes(start: int, stop: int, codebook_size: int, code_dim: int, std: float) -> Tensor:
    """Rows ``[start, stop)`` of a codebook from normal(0, std^2): the same ones however the codebook is spread.

    The codebook has a random stream of its own, drawn a block at a time, so that a rank neither holds the others' rows
    nor initialises the layers after it otherwise than the others do.
    """
    rows_kd = torch.empty(stop - start, code_dim)
    if rows_kd.is_meta:  # a model without memory, to count its parameters
        return rows_kd
    generator = torch.Generator(rows_kd.device).manual_seed(int(torch.randint(2**62, ())))
    for first in range(0, codebook_size, INITIAL_BLOCK):
        block_kd = torch.empty(min(INITIAL_BLOCK, codebook_size - first), code_dim)
        block_kd.normal_(std=std, generator=generator)
        here = slice(max(start, first), min(stop, first + len(block_kd)))
        if here.start < here.stop:
            rows_kd[here.start - start : here.stop - start] = block_kd[here.start - first : here.stop - first]
    return rows_kd
