"""Index backpropagation without the N x K matrices: attention over the codebook with a hard forward.

The first sweep over the codebook keeps per token the running maximum m, its index, the running sum and the running
``o = softmax(l) C`` (online softmax). At the temperature of the entropies few tiles contribute; a second sweep sums the
rows and a third one the columns of the assignment q. From these the backward pass recomputes each tile of the gradient
with respect to the logits:

    dl = p (g C^T - g . o) + q ((v - q . v) / N - s (log q + H) / N) / temperature,    dz = dl C,    dC = dl^T z

where g, s and v are the gradients of the quantized vectors, the sample entropy and the average probabilities. In
addition each chosen code gets the sum of its tokens' gradients (the hard assignment). No tensor of N x K elements is
ever built: memory beside operands and gradients is a few tiles, O(N D + K), and one maximum per token and tile.

This file defines the order of the sweeps and the communication between the ranks of a sharded codebook. The sweeps are
implemented in `model_zoo.ops.chunked` (plain PyTorch) and `model_zoo.ops.triton_sweeps` (CUDA kernels). Sums are
accumulated in fp32 for fp16, bf16 and fp32 operands, in fp64 for fp64 operands.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model_zoo.ops.codebook_parallel import CodebookShard, Communicator, communicator
from model_zoo.ops.eager import eager
from model_zoo.ops.types import IndexBackprop


@dataclass
class SkipStats:
    """Counts all and visited row-tiles (one token's logits with one tile of codes) of each sweep that skips.

    Forward: ``output`` (o), ``assignment`` (sums of rows) and ``average`` (sums of columns).
    Backward: ``soft_gradient``, and for the entropies ``average_gradient`` (q . v) and ``entropy_gradient``.
    """

    row_tiles: dict[str, int] = field(default_factory=dict)
    visited: dict[str, int] = field(default_factory=dict)

    def add(self, sweep: str, row_tiles: int, visited: int) -> None:
        self.row_tiles[sweep] = self.row_tiles.get(sweep, 0) + row_tiles
        self.visited[sweep] = self.visited.get(sweep, 0) + visited

    def skip_rate(self, sweep: str) -> float:
        """Fraction of the sweep's row-tiles that were skipped."""
        return 1 - self.visited[sweep] / self.row_tiles[sweep]


class Settings(NamedTuple):
    """How to sweep. skip: skip row-tiles whose contribution to a row's sum is below rounding error. tile: (tokens,
    codes) of a tile; None selects a size for the device. stats: counts skipped row-tiles, or None.
    """

    skip: bool = True
    tile: tuple[int, int] | None = None
    stats: SkipStats | None = None


class RowStatistics(NamedTuple):
    """Online-softmax statistics of each token's row of logits.

    index_n: the code with the largest logit, counted from this rank's first code. max_n: the largest logit m.
    sum_n: sum exp(l - m). output_nd: sum exp(l - m) C. The last two are None if no gradient is needed.
    """

    index_n: Tensor
    max_n: Tensor
    sum_n: Tensor | None
    output_nd: Tensor | None


class Assignment(NamedTuple):
    """Per token, of q = softmax(l / temperature): log sum exp((l - m) / temperature) over all codes, and H(q)."""

    log_sum_n: Tensor
    entropy_n: Tensor
    temperature: float


class SoftGradient(NamedTuple):
    """Gradient through the soft assignment, ``dl = exp(l - m) / sum_n (grad_nd C^T - grad_output_n)``.

    grad_nd: g. grad_output_n: g . o.
    """

    grad_nd: Tensor
    grad_output_n: Tensor
    sum_n: Tensor


class EntropyGradient(NamedTuple):
    """Gradient through the entropies, ``dl = q (average_k - average_n - sample_n (log q + H)) / temperature``.

    sample_n: s / N. average_k: v / N. average_n: q . v / N. Those of an entropy that the loss does not use are None.
    """

    assignment: Assignment
    sample_n: Tensor | None
    average_k: Tensor | None
    average_n: Tensor | None


class HardGradient(NamedTuple):
    """Gradient through the hard assignment: ``dC[index_n] += grad_nd``, ignoring indices outside this rank's codes."""

    index_n: Tensor
    grad_nd: Tensor


class Sweeps(ABC):
    """Sweeps over this rank's codes: z ``(n, d)``, codebook ``(k, d)``, and the number of codes of all ranks.

    maxima: the largest logit of each row-tile, set by `row_statistics`. After `set_global_max` the other sweeps use
    them to skip tiles. All sums have a fixed order and no atomics are used: on one device equal input gives equal bits.
    """

    def __init__(self, z_nd: Tensor, codebook_kd: Tensor, codes: int, settings: Settings, maxima: Tensor | None = None):
        self.z_nd, self.codebook_kd, self.codes, self.settings = z_nd, codebook_kd, codes, settings
        self.maxima = maxima

    @abstractmethod
    def row_statistics(self, with_output: bool) -> RowStatistics:
        """The first sweep. Without ``with_output`` only the maxima are computed."""

    def set_global_max(self, max_n: Tensor) -> None:  # noqa: B027 (nothing to do by default)
        """Receives each token's maximum over all ranks' codes; an implementation may use it to shrink ``maxima``, which
        are kept until the backward pass."""

    @abstractmethod
    def assignment_sums(self, max_n: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Per token the sums of exp(x) and of exp(x) x, x = (l - m) / temperature; in fp64 where that is free."""

    @abstractmethod
    def assignment_columns(self, max_n: Tensor, assignment: Assignment) -> Tensor:
        """Per code the sum of q over tokens ``(k,)``."""

    @abstractmethod
    def assignment_dot(self, max_n: Tensor, assignment: Assignment, values_k: Tensor) -> Tensor:
        """Per token q . values ``(n,)``."""

    @abstractmethod
    def gradients(
        self,
        max_n: Tensor,
        soft: SoftGradient | None,
        entropy: EntropyGradient | None,
        hard: HardGradient | None,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """dz in the accumulation dtype and dC in the codebook's dtype, as far as ``needs`` says; dz is None if only
        ``hard`` is given."""

    def scores(self, index_n: Tensor) -> Tensor:
        """Each token's dot product with one code."""
        return (accumulation(self.z_nd) * accumulation(self.codebook_kd[index_n])).sum(dim=1)

    def skip_margin(self, temperature: float) -> float:
        """Row-tiles whose maximum lies further than this below the row's maximum are skipped. All codes of such tiles
        together add less than machine epsilon to a row's sum, which is at least 1."""
        return temperature * math.log(self.codes / torch.finfo(accumulation_dtype(self.z_nd)).eps)


@eager
def index_backprop_tiled(
    z_nd: Tensor,
    codebook_kd: Tensor,
    entropy_temperature: float | None,
    *,
    sweeps: type[Sweeps],
    shard: CodebookShard | None = None,
    settings: Settings,
) -> IndexBackprop:
    """`index_backprop` with the given sweeps. The entropies have the accumulation dtype. Not differentiable twice."""
    with_gradient = torch.is_grad_enabled() and (z_nd.requires_grad or codebook_kd.requires_grad)
    quantized_nd, code_nd, index_n, sample_entropy, average_k = _IndexBackprop.apply(
        z_nd, codebook_kd, entropy_temperature, sweeps, communicator(z_nd, codebook_kd, shard), settings, with_gradient
    )
    return IndexBackprop(quantized_nd, index_n, sample_entropy, average_k, code_nd, shard)


class _IndexBackprop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_nd, codebook_kd, temperature, sweeps_class, ranks, settings, with_gradient):
        ctx.set_materialize_grads(False)
        assignment = sample_entropy = average_k = None
        with torch.autocast(z_nd.device.type, enabled=False):
            z_nd = ranks.gather(z_nd)
            sweeps = sweeps_class(z_nd, codebook_kd, ranks.codes, settings)
            rows = _over_all_shards(sweeps, sweeps.row_statistics(with_gradient), ranks)
            sweeps.set_global_max(rows.max_n)
            if temperature is not None:
                assignment = _assignment(*sweeps.assignment_sums(rows.max_n, temperature), temperature, ranks, z_nd)
                sample_entropy = assignment.entropy_n[ranks.own].mean()
                average_k = sweeps.assignment_columns(rows.max_n, assignment) / ranks.tokens
            quantized_nd = ranks.lookup(codebook_kd, rows.index_n)
        if with_gradient:
            of_assignment = (assignment.log_sum_n, assignment.entropy_n) if assignment else ()
            ctx.save_for_backward(z_nd, codebook_kd, sweeps.maxima, *rows, *of_assignment)
            ctx.temperature, ctx.sweeps_class, ctx.ranks, ctx.settings = temperature, sweeps_class, ranks, settings
        index_n = rows.index_n[ranks.own]
        ctx.mark_non_differentiable(index_n)
        return quantized_nd, quantized_nd.clone(), index_n, sample_entropy, average_k

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_quantized_nd, grad_code_nd, _, grad_sample, grad_average_k):
        z_nd, codebook_kd, maxima, *saved = ctx.saved_tensors
        rows, ranks = RowStatistics(*saved[: len(RowStatistics._fields)]), ctx.ranks
        sweeps = ctx.sweeps_class(z_nd, codebook_kd, ranks.codes, ctx.settings, maxima)
        soft = entropy = hard = None
        with torch.autocast(z_nd.device.type, enabled=False):
            if grad_quantized_nd is not None:
                grad_nd = accumulation(ranks.gather(grad_quantized_nd))
                soft = SoftGradient(grad_nd, ranks.sum_((grad_nd * rows.output_nd).sum(dim=1)), rows.sum_n)
                hard = HardGradient(rows.index_n - ranks.start, grad_nd)
            if grad_code_nd is not None:
                grad_nd = accumulation(ranks.gather(grad_code_nd))
                hard = HardGradient(rows.index_n - ranks.start, grad_nd if hard is None else hard.grad_nd + grad_nd)
            if grad_sample is not None or grad_average_k is not None:
                assignment = Assignment(*saved[len(RowStatistics._fields) :], ctx.temperature)
                sample_n = average_n = None
                if grad_sample is not None:
                    sample_n = ranks.per_token(grad_sample)
                if grad_average_k is not None:
                    grad_average_k = grad_average_k / ranks.tokens
                    average_n = ranks.sum_(sweeps.assignment_dot(rows.max_n, assignment, grad_average_k))
                entropy = EntropyGradient(assignment, sample_n, grad_average_k, average_n)
            grad_z_nd, grad_codebook_kd = sweeps.gradients(rows.max_n, soft, entropy, hard, ctx.needs_input_grad[:2])
            if grad_z_nd is not None:
                grad_z_nd = ranks.scatter_sum(grad_z_nd).to(z_nd.dtype)
        return grad_z_nd, grad_codebook_kd, None, None, None, None, None


def _over_all_shards(sweeps: Sweeps, rows: RowStatistics, ranks: Communicator) -> RowStatistics:
    """Statistics over all ranks' codes. output_nd stays this shard's part of o."""
    max_n, index_n = ranks.global_argmax(rows.max_n, rows.index_n, lambda: sweeps.scores(rows.index_n))
    if rows.sum_n is None:
        return RowStatistics(index_n, max_n, None, None)
    scale_n = (rows.max_n - max_n).exp()
    sum_n = ranks.sum_(rows.sum_n * scale_n)
    return RowStatistics(index_n, max_n, sum_n, rows.output_nd.mul_((scale_n / sum_n)[:, None]))


def _assignment(sum_n: Tensor, moment_n: Tensor, temperature: float, ranks: Communicator, z_nd: Tensor) -> Assignment:
    sum_n, moment_n = ranks.sum_(sum_n.double()), ranks.sum_(moment_n.double())
    log_sum_n, dtype = sum_n.log(), accumulation_dtype(z_nd)
    return Assignment(log_sum_n.to(dtype), (log_sum_n - moment_n / sum_n).to(dtype), temperature)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64 tensors, otherwise fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def accumulation(tensor: Tensor) -> Tensor:
    """The tensor in its accumulation dtype, contiguous."""
    return tensor.to(accumulation_dtype(tensor)).contiguous()


def fast_exp(x: Tensor, out: Tensor) -> Tensor:
    """exp, computed as exp2. On CPUs PyTorch's exp calls MKL, which is ten times slower than PyTorch's own exp2 for
    arguments whose result underflows."""
    return torch.mul(x, 1 / math.log(2), out=out).exp2_()
