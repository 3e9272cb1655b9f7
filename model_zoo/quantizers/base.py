"""The interface of quantizers."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.config import TokenizerConfig
from model_zoo.errors import ModelError
from model_zoo.ops.codebook_parallel import CodebookShard, lookup_code
from model_zoo.ops.types import IndexBackprop

INITIAL_BLOCK = 2**14  # codes initialized at a time
VARIANCE_FLOOR = 1e-3  # relative to the features' mean variance
# Initial norm of codes for assignments by softmax(z C^T). During training features and codes converge to one norm,
# whose square sets how sharp the assignment becomes. A larger norm leaves more codes unused; with a norm of 0.46 models
# with few code dimensions did not learn to reconstruct (docs/LOG.md, 2026-11-27).
CODE_NORM = 1.25
RELATIVE_CODE_NORM = 0.5  # for assignments by distance; relative to the features' root mean square norm


class Quantized(NamedTuple):
    """A quantized feature map and its loss terms, which are unweighted means over all elements.

    quantized_bdhw: code vectors; the quantizer defines their gradient with respect to features and codebook.
    index_bhw: int64 codes.
    double_quantization: |z_q - z|^2 with gradient through z_q (paper eq. 12, first term); None unless the assignment is
        soft.
    commitment: |z - sg[C[i]]|^2, moves features towards their codes.
    codebook: |sg[z] - C[i]|^2, moves codes towards their features; None without a learned codebook.
    sample_entropy, average_probability_k: see `model_zoo.ops.IndexBackprop`; None if not requested. Quantizers whose
        codes are made of groups give the groups' mean assignments one after another.
    features_nd: the features that were quantized, without gradient.
    shard: the quantizer's shard; average_probability_k then covers this rank's codes only.
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
    """Base class of quantizers: assigns codes to features and computes the loss terms. Always computes in fp32, also
    under autocast: in bf16 near ties flip, and half of a large codebook falls out of use.

    config: of which ``quantizer`` (the name in error messages), ``codebook_size``, ``code_dim`` and the quantizer's own
    keys are used.
    shard: this rank's codes; None for all codes. Raises ModelError for settings that the quantizer does not support.
    """

    # Whether the gradient flows through softmax(z C^T). Only then is there a double quantization term: with a
    # straight-through z_q it would have no gradient with respect to the codes.
    soft_assignment: bool = False
    has_entropy: bool = False
    # Whether the quantizer works with a sharded codebook, and with normalized features and codes.
    shards: bool = False
    normalizes: bool = False
    # Names of parameters that decide neither which code a feature gets nor the code vectors.
    without_effect_on_codes: tuple[str, ...] = ()
    # Whether `after_step` moves the codes, which the optimizer does not train.
    moves_codes: bool = False
    # Updates within which codes that all start at one place come into use; 0 for codes that start apart.
    start_updates: int = 0
    # Implementation of index backpropagation, see `model_zoo.ops.index_backprop`; None for quantizers without it.
    impl: str | None = None
    shard: CodebookShard | None = None

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None = None):
        super().__init__()
        if shard is not None and not self.shards:
            raise ModelError(f"model.quantizer={config.quantizer} cannot shard its codes: set codebook_parallel=1")
        if config.normalize and not self.normalizes:
            raise ModelError(f"model.quantizer={config.quantizer} does not normalize: set model.normalize=false")
        self.counted_sizes = [config.codebook_size]  # see `counted`

    def row_parameters(self) -> list[nn.Parameter]:
        """The parameters with one row per code, which may be sharded over ranks. Parameters without a gradient are not
        trained by the optimizer."""
        return []

    def prepare(self, z_nd: Tensor) -> Tensor:
        """The features that are quantized and that the loss terms compare with the codes."""
        return z_nd

    def assign(self, z_nd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
        """Assigns a code to each fp32 token ``z_nd``."""
        raise NotImplementedError

    def nearest(self, z_nd: Tensor) -> Tensor:
        """int64 codes ``(n,)`` of fp32 tokens, without gradients."""
        raise NotImplementedError

    def vectors(self, index_n: Tensor) -> Tensor:
        """int64 codes ``(n,)`` -> code vectors ``(n, d)``."""
        raise NotImplementedError

    def anneal(self, progress: float) -> None:
        """Called before each training step with the progress of training, from 0 to 1."""

    def after_step(self) -> None:
        """Called on all ranks after each training step that updated the tokenizer."""

    def statistics(self) -> dict[str, Tensor]:
        """Running values, equal on all ranks, that training saves and restores beside the parameters, by name."""
        return {}

    def scalars(self) -> dict[str, float]:
        """Values that training logs for this kind of quantizer, by name."""
        return {}

    @property
    def counted_codes(self) -> int:
        """How many different numbers `counted` returns."""
        return sum(self.counted_sizes)

    @property
    def counts_groups(self) -> bool:
        """Whether statistics of usage count groups of bits, so that they do not compare with those of whole codes."""
        return len(self.counted_sizes) > 1

    def counted(self, index: Tensor) -> Tensor:
        """Int64 codes of any shape -> what statistics of usage count, in [0, ``counted_codes``). These are the codes
        themselves. For a codebook that is too large to count, they are the values of groups of its bits, with one more
        dimension for the groups, whose numbers of values are ``counted_sizes``."""
        return index

    def settings(self) -> str:
        """What decides, besides tensors, which code a feature gets; part of `Tokenizer.fingerprint`. Empty for the
        largest dot product with a code of a table, and where no other quantizer has the same tensors."""
        return ""

    def forward(self, z_bdhw: Tensor, entropy_temperature: float | None = None) -> Quantized:
        """Quantizes a feature map. With ``entropy_temperature``, quantizers that have entropy terms compute them."""
        b, _, h, w = z_bdhw.shape
        with torch.autocast(z_bdhw.device.type, enabled=False):
            z_nd = _flatten(z_bdhw.float())
            finite = z_nd.detach().isfinite()
            if self.training:  # NaN has no nearest code
                z_nd = torch.where(finite, z_nd, 0)
            z_nd = self.prepare(z_nd)
            out = self.assign(z_nd, entropy_temperature)
            if self.training:
                # Put NaN back into the output, so that it reaches the loss and all ranks skip this step together.
                out = out._replace(quantized_nd=out.quantized_nd + torch.where(finite.all(), 0.0, torch.nan))
            return Quantized(
                quantized_bdhw=_unflatten(out.quantized_nd, b, h, w),
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
            z_nd = self.prepare(_flatten(z_bdhw.float()))
            if self.shard is None and not z_nd.isfinite().all():  # with a shard, all ranks raise together later
                raise ModelError("the features are not finite: the encoder's weights or its input hold NaN or infinity")
            return self.nearest(z_nd).view(b, h, w)

    def lookup(self, index_bhw: Tensor) -> Tensor:
        """Codes ``(b, h, w)`` -> code vectors ``(b, d, h, w)``."""
        return _unflatten(self.vectors(index_bhw.flatten()), *index_bhw.shape)


def _flatten(x_bdhw: Tensor) -> Tensor:
    """``(b, d, h, w)`` -> ``(b h w, d)``."""
    return x_bdhw.permute(0, 2, 3, 1).reshape(-1, x_bdhw.shape[1])


def _unflatten(x_nd: Tensor, b: int, h: int, w: int) -> Tensor:
    """``(b h w, d)`` -> ``(b, d, h, w)``."""
    return x_nd.reshape(b, h, w, x_nd.shape[1]).permute(0, 3, 1, 2)


class CodebookQuantizer(Quantizer):
    """A quantizer with a learned codebook.

    shard: this rank's rows of the codebook; None for all rows. With a shard all ranks of its group must construct the
    quantizer and call `forward`, `tokenize` and `lookup` together, each with its own tokens (or with none).

    With ``model.normalize`` features and codes are divided by their norms before anything else: similarities are
    cosines, the loss terms compare unit vectors, and code vectors have norm 1. IBQ multiplies the cosines by
    ``model.logit_scale`` in its softmax. (Scale 1 is the ``l2_normalize`` of Emu3.5's tokenizer, arXiv 2510.26583.)
    """

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None = None):
        super().__init__(config, shard)
        if config.normalize and config.code_dim < 2:
            raise ModelError("model.normalize=true with model.code_dim=1 has two codes, -1 and 1: give 2 or more")
        self.shard, self.normalize = shard, config.normalize
        codes = config.codebook_size
        start, stop = (0, codes) if shard is None else (shard.start, shard.stop)
        if shard is not None:
            shard.check(codes)
        rows_kd = initial_codes(start, stop, codes, config.code_dim, config.codebook_init_std)
        self.embedding = nn.Embedding.from_pretrained(rows_kd, freeze=False)

    def row_parameters(self) -> list[nn.Parameter]:
        return [self.embedding.weight]

    def settings(self) -> str:
        return "normalize\n" if self.normalize else ""

    def prepare(self, z_nd: Tensor) -> Tensor:
        return F.normalize(z_nd) if self.normalize else z_nd

    def codes(self) -> Tensor:
        """The code vectors ``(k, d)``, or this rank's; differentiable."""
        return F.normalize(self.embedding.weight) if self.normalize else self.embedding.weight

    def vectors(self, index_n: Tensor) -> Tensor:
        code_nd = lookup_code(index_n, self.embedding.weight, self.shard)
        return F.normalize(code_nd) if self.normalize else code_nd

    @torch.no_grad()
    def match_features(self, covariance_dd: Tensor) -> None:
        """Transforms the random initial codes so that their directions are distributed like those of features with mean
        0 and this covariance, and gives all codes the same norm.

        A code that is shorter than its neighbours, or that points where no feature does, never has the largest dot
        product. The norm does not depend on that of the features, except for assignments by distance. (Our own method,
        after the data-dependent initialization of Salimans and Kingma, arXiv 1602.07868.)

        covariance_dd: fp64, over the features of all ranks, which must vary in at least two dimensions: in one
        dimension there are only two codes of one norm.
        """
        variance, direction_dd = torch.linalg.eigh(covariance_dd)
        # The floor covers every direction, since the features of few images span few dimensions.
        spread = (variance.clamp(min=0) + VARIANCE_FLOOR * variance.mean()).sqrt()
        root_dd = ((direction_dd * spread) @ direction_dd.T).float()
        if self.normalize:
            norm = 1.0
        else:
            norm = CODE_NORM if self.soft_assignment else RELATIVE_CODE_NORM * variance.sum().sqrt()
        for rows_kd in self.embedding.weight.split(INITIAL_BLOCK):
            rows_kd.copy_(F.normalize(rows_kd @ root_dd, dim=1) * norm)


def initial_codes(start: int, stop: int, codebook_size: int, code_dim: int, std: float) -> Tensor:
    """Rows ``[start, stop)`` of a codebook drawn from normal(0, std^2), independent of how the codebook is sharded.

    The codebook has its own random generator and is drawn in blocks. A rank therefore does not hold the other ranks'
    rows, and the layers after the codebook are initialized equally on all ranks.
    """
    rows_kd = torch.empty(stop - start, code_dim)
    if rows_kd.is_meta:  # a model without storage, for counting parameters
        return rows_kd
    generator = torch.Generator(rows_kd.device).manual_seed(int(torch.randint(2**62, ())))
    for first in range(0, codebook_size, INITIAL_BLOCK):
        block_kd = torch.empty(min(INITIAL_BLOCK, codebook_size - first), code_dim)
        block_kd.normal_(std=std, generator=generator)
        here = slice(max(start, first), min(stop, first + len(block_kd)))
        if here.start < here.stop:
            rows_kd[here.start - start : here.stop - start] = block_kd[here.start - first : here.stop - first]
    return rows_kd
