"""Index backpropagation without the N x K matrices: attention over the codebook with a hard forward.

The first sweep over the codebook keeps per token the running maximum m, its index, the running sum and the running
``o = softmax(l) C`` (online softmax). At the entropy's temperature, where few tiles are live, one more adds up the rows
and another the columns of the assignment q. With them the backward pass makes each tile of the logits' gradient afresh:

    dl = p (g C^T - g . o) + q ((v - q . v) / N - s (log q + H) / N) / temperature,    dz = dl C,    dC = dl^T z

for the gradients g of the quantized vectors, s of the sample entropy and v of the average probabilities. The hard
choice adds the sum of its tokens' gradients to each chosen code. Nothing of N x K elements is ever built: beside
operands and gradients there are a few tiles, O(N D + K), and one maximum per token and tile.

This file is the order of events, and what the ranks of a sharded codebook tell each other in between. The sweeps
themselves are `model_zoo.ops.chunked` (plain PyTorch) and `model_zoo.ops.triton_sweeps` (CUDA kernels). Sums are taken
in fp32 for fp16, bf16 and fp32 operands, in fp64 for fp64 ones.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model_zoo.ops.codebook_parallel import Alone, CodebookShard, exchange
from model_zoo.ops.index_backprop import IndexBackprop


@dataclass
class SkipStats:
    """Counts row-tiles (one token's logits with one tile of codes), all and visited, for each sweep that skips.

    Forward: ``output`` (o, with the logits at hand), ``assignment`` (sums of rows) and ``average`` (sums of columns).
    Backward: ``soft_gradient``, and for the entropies ``average_gradient`` (q . v) and ``entropy_gradient``.
    """

    row_tiles: dict[str, int] = field(default_factory=dict)
    visited: dict[str, int] = field(default_factory=dict)

    def add(self, sweep: str, row_tiles: int, visited: int) -> None:
        self.row_tiles[sweep] = self.row_tiles.get(sweep, 0) + row_tiles
        self.visited[sweep] = self.visited.get(sweep, 0) + visited

    def skip_rate(self, sweep: str) -> float:
        """Share of the sweep's row-tiles that were skipped."""
        return 1 - self.visited[sweep] / self.row_tiles[sweep]


class Settings(NamedTuple):
    """How to sweep. skip: leave out row-tiles that hold less than rounding of a row's sum; exact to rounding, as is the
    order of the sums. tile: (tokens, codes) of a tile; None takes a size that suits the device. stats: counts what was
    skipped, or None.
    """

    skip: bool = True
    tile: tuple[int, int] | None = None
    stats: SkipStats | None = None


class Rows(NamedTuple):
    """What the first sweep keeps of each token, m its largest logit. index_n counts from the first code at hand.

    sum_n: sum exp(l - m), and output_nd: sum exp(l - m) C; None where no gradient will be asked for.
    """

    index_n: Tensor
    max_n: Tensor
    sum_n: Tensor | None
    output_nd: Tensor | None


class Assignment(NamedTuple):
    """q = softmax(l / temperature) of each token: log sum exp((l - m) / temperature) over all codes, and H(q)."""

    log_sum_n: Tensor
    entropy_n: Tensor
    temperature: float


class SoftGradient(NamedTuple):
    """The soft assignment's part, ``dl = exp(l - m) / sum_n (grad_nd C^T - grad_output_n)``, for g and g . o."""

    grad_nd: Tensor
    grad_output_n: Tensor
    sum_n: Tensor


class EntropyGradient(NamedTuple):
    """The entropies' part, ``dl = q (average_k - average_n - sample_n (log q + H)) / temperature``.

    sample_n: s / N, and average_k: v / N, average_n: q . v / N; None where the loss does not use that entropy.
    """

    assignment: Assignment
    sample_n: Tensor | None
    average_k: Tensor | None
    average_n: Tensor | None


class HardGradient(NamedTuple):
    """The hard choice's part: ``dC[index_n] += grad_nd``. Indices beyond the codes at hand belong to other ranks."""

    index_n: Tensor
    grad_nd: Tensor


class Sweeps(ABC):
    """The sweeps over the codes at hand. Made from z ``(n, d)``, codebook ``(k, d)``, and the number of all codes.

    maxima: the largest logits of each tile of codes, from `first`; after `settle` the other sweeps skip by them.
    All sums have a fixed order and no atomics are used: equal input gives equal bits on one device.
    """

    def __init__(self, z_nd: Tensor, codebook_kd: Tensor, codes: int, settings: Settings, maxima: Tensor | None = None):
        self.z_nd, self.codebook_kd, self.codes, self.settings = z_nd, codebook_kd, codes, settings
        self.maxima = maxima

    @abstractmethod
    def first(self, with_output: bool) -> Rows:
        """Maxima, and sums where ``with_output``."""

    def settle(self, max_n: Tensor) -> None:  # noqa: B027 (nothing to do by default)
        """Takes the tokens' maxima over all codes, with which ``maxima`` may become less. They are kept until the
        backward pass."""

    @abstractmethod
    def assignment_sums(self, max_n: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Per token the sums of exp(x) and of exp(x) x, x = (l - m) / temperature; in fp64 if it costs nothing."""

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
        """dz in the sums' type and dC in the codebook's, where they are needed; dz is None where nothing moves z."""

    def scores(self, index_n: Tensor) -> Tensor:
        """Each token's dot product with one code, token by token."""
        return (accumulation(self.z_nd) * accumulation(self.codebook_kd[index_n])).sum(dim=1)

    def reach(self, temperature: float) -> float:
        """How far below its row's maximum a tile's may lie: what is further weighs less than ``codes`` terms of
        (machine epsilon / codes) beside a sum of at least 1."""
        return temperature * math.log(self.codes / torch.finfo(accumulation_dtype(self.z_nd)).eps)


@torch.compiler.disable
def index_backprop_tiled(
    z_nd: Tensor,
    codebook_kd: Tensor,
    entropy_temperature: float | None,
    *,
    sweeps: type[Sweeps],
    shard: CodebookShard | None = None,
    settings: Settings,
) -> IndexBackprop:
    """`index_backprop` by ``sweeps``; the entropies come in the sums' type. Not differentiable twice."""
    with_gradient = torch.is_grad_enabled() and (z_nd.requires_grad or codebook_kd.requires_grad)
    quantized_nd, code_nd, index_n, sample_entropy, average_k = _IndexBackprop.apply(
        z_nd, codebook_kd, entropy_temperature, sweeps, exchange(z_nd, codebook_kd, shard), settings, with_gradient
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
            rows = _over_all_shards(sweeps, sweeps.first(with_gradient), ranks)
            sweeps.settle(rows.max_n)
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
        rows, ranks = Rows(*saved[: len(Rows._fields)]), ctx.ranks
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
                assignment = Assignment(*saved[len(Rows._fields) :], ctx.temperature)
                sample_n = average_n = None
                if grad_sample is not None:
                    sample_n = ranks.per_token(grad_sample)
                if grad_average_k is not None:
                    grad_average_k = grad_average_k / ranks.tokens
                    average_n = ranks.sum_(sweeps.assignment_dot(rows.max_n, assignment, grad_average_k))
                entropy = EntropyGradient(assignment, sample_n, grad_average_k, average_n)
            needs = ctx.needs_input_grad[:2]
            grad_z_nd, grad_codebook_kd = sweeps.gradients(rows.max_n, soft, entropy, hard, needs)
            if grad_z_nd is not None:
                grad_z_nd = ranks.scatter_sum(grad_z_nd).to(z_nd.dtype)
        return grad_z_nd, grad_codebook_kd, None, None, None, None, None


def _over_all_shards(sweeps: Sweeps, rows: Rows, ranks: Alone) -> Rows:
    """The rows of the whole codebook, the sums relative to its maximum. output_nd stays this shard's part of o."""
    max_n, index_n = ranks.best(rows.max_n, rows.index_n, lambda: sweeps.scores(rows.index_n))
    if rows.sum_n is None:
        return Rows(index_n, max_n, None, None)
    scale_n = (rows.max_n - max_n).exp()
    sum_n = ranks.sum_(rows.sum_n * scale_n)
    return Rows(index_n, max_n, sum_n, rows.output_nd.mul_((scale_n / sum_n)[:, None]))


def _assignment(sum_n: Tensor, moment_n: Tensor, temperature: float, ranks: Alone, z_nd: Tensor) -> Assignment:
    sum_n, moment_n = ranks.sum_(sum_n.double()), ranks.sum_(moment_n.double())
    log_sum_n, dtype = sum_n.log(), accumulation_dtype(z_nd)
    return Assignment(log_sum_n.to(dtype), (log_sum_n - moment_n / sum_n).to(dtype), temperature)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """The type of the sums."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def accumulation(tensor: Tensor) -> Tensor:
    """In the type of the sums, rows contiguous."""
    return tensor.to(accumulation_dtype(tensor)).contiguous()
