"""A codebook that is sharded by rows over the ranks of a process group, and the communication that it needs.

Every rank has its own tokens and holds rows ``[start, stop)`` of the codebook. Tokens are all-gathered, each rank
processes its own rows with all tokens, and a few numbers per token are reduced. The communication volume is
O(tokens x D); the codebook and its gradient are never communicated.

Gradients are those of the *sum* of the ranks' losses, since a rank's tokens move the codes of all ranks. Callers that
average losses over ranks must divide the gradients of z and of the shard by the same factor.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from model_zoo.errors import ModelError
from model_zoo.ops.eager import eager

# PyTorch 2.14 renamed these two collectives and deprecated the old names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class CodebookShard:
    """This rank holds rows ``[start, stop)``. The shards of the ranks of ``group``, in order, form the codebook."""

    start: int
    stop: int
    group: dist.ProcessGroup

    @classmethod
    def even(cls, codes: int, group: dist.ProcessGroup) -> "CodebookShard":
        """This rank's part of ``codes`` rows, split as evenly as possible; the first ranks hold one row more."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if codes < size:
            raise ModelError(f"a codebook of {codes} codes cannot be split over {size} ranks")
        share, more = divmod(codes, size)
        start = rank * share + min(rank, more)
        return cls(start, start + share + (rank < more), group)

    def check(self, codes: int) -> None:
        """Checks that the group's shards form a codebook of ``codes`` rows. All ranks call together, and all raise
        ModelError if not."""
        parts = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(parts, (self.start, self.stop), group=self.group)
        ends = [0, *(stop for _, stop in parts)]
        if [start for start, _ in parts] != ends[:-1] or ends[-1] != codes:
            raise ModelError(f"the shards {parts} are not the codebook's {codes} codes, one after the other")


class Communicator:
    """Communication of one call in a single process, which holds the whole codebook and all tokens: every method is
    the identity. `GroupCommunicator` implements the same methods with collectives."""

    def __init__(self, z_nd: Tensor, codebook_kd: Tensor):
        _check(_header(z_nd, codebook_kd, None)[None].tolist())
        self.tokens, self.codes, self.start = len(z_nd), len(codebook_kd), 0
        self.own = slice(0, self.tokens)  # position of this rank's tokens among all

    def gather(self, own_nd: Tensor) -> Tensor:
        """Concatenates the rows of all ranks."""
        return own_nd

    def per_token(self, value: Tensor) -> Tensor:
        """Divides each rank's scalar by its number of tokens, one element for each token: ``(all tokens,)``."""
        return (value / self.tokens).expand(self.tokens)

    def scatter_sum(self, all_nd: Tensor) -> Tensor:
        """Sums over ranks and returns this rank's rows."""
        return all_nd

    def sum_(self, all_n: Tensor) -> Tensor:
        """Sums over ranks, in place."""
        return all_n

    def global_argmax(self, max_n: Tensor, index_n: Tensor, score: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """The largest of the ranks' maxima and its index in the whole codebook; ties go to the lowest index.

        score: recomputes the maxima with arithmetic that does not depend on the code's shard. Matrix products of
        different shapes round differently, so of two equal codes on two ranks the later one could win.
        """
        return max_n, index_n

    def lookup(self, codebook_kd: Tensor, index_n: Tensor) -> Tensor:
        """Code vectors of this rank's tokens, given the indices of all tokens; differentiable in the codebook."""
        return F.embedding(index_n, codebook_kd)


class GroupCommunicator(Communicator):
    """Communication of one call over a process group. All ranks must call together; mismatched operands raise on all
    ranks. Ranks may have different numbers of tokens, or none.
    """

    def __init__(self, z_nd: Tensor, codebook_kd: Tensor, shard: CodebookShard):
        """z_nd: features ``(n, D)``; or codes ``(n, 1)``, of which only the number of rows matters."""
        self.group, self.rank = shard.group, dist.get_rank(shard.group)
        header = _header(z_nd, codebook_kd, shard)
        headers = header.new_empty(dist.get_world_size(shard.group) * len(header))
        _all_gather(headers, header, group=self.group)
        rows = headers.view(-1, len(header)).tolist()
        _check(rows)
        self.counts = [row[TOKENS] for row in rows]
        self.tokens, self.codes, self.start = sum(self.counts), rows[-1][STOP], shard.start
        first = sum(self.counts[: self.rank])
        self.own = slice(first, first + self.counts[self.rank])

    def gather(self, own_nd: Tensor) -> Tensor:
        most, ranks = max(self.counts), len(self.counts)
        padded_nd = own_nd.contiguous()
        if len(own_nd) < most:
            padded_nd = torch.cat([own_nd, own_nd.new_zeros(most - len(own_nd), *own_nd.shape[1:])])
        all_nd = own_nd.new_empty(ranks * most, *own_nd.shape[1:])
        _all_gather(all_nd, padded_nd, group=self.group)
        if min(self.counts) == most:
            return all_nd
        return torch.cat([all_nd[r * most : r * most + count] for r, count in enumerate(self.counts)])

    def per_token(self, value: Tensor) -> Tensor:
        values = value.new_empty(len(self.counts))
        _all_gather(values, value.reshape(1), group=self.group)
        counts = torch.tensor(self.counts, device=value.device)
        return (values / counts).repeat_interleave(counts, output_size=self.tokens)

    def scatter_sum(self, all_nd: Tensor) -> Tensor:
        most, ranks = max(self.counts), len(self.counts)
        if min(self.counts) < most:  # not all backends support unequal parts: pad, as `gather` does
            padded_nd = all_nd.new_zeros(ranks * most, *all_nd.shape[1:])
            for r, part_nd in enumerate(all_nd.split(self.counts)):
                padded_nd[r * most : r * most + len(part_nd)] = part_nd
            all_nd = padded_nd
        own_nd = all_nd.new_empty(most, *all_nd.shape[1:])
        _reduce_scatter(own_nd, all_nd.contiguous(), group=self.group)
        return own_nd[: self.counts[self.rank]]

    def sum_(self, all_n: Tensor) -> Tensor:
        dist.all_reduce(all_n, group=self.group)
        return all_n

    def global_argmax(self, max_n: Tensor, index_n: Tensor, score: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        score_n = score()
        best_2n = torch.stack([max_n, score_n])
        dist.all_reduce(best_2n, dist.ReduceOp.MAX, group=self.group)
        # A rank with a smaller score contributes an index beyond all codes, which the minimum below ignores.
        index_n = torch.where(score_n == best_2n[1], index_n + self.start, self.codes)
        dist.all_reduce(index_n, dist.ReduceOp.MIN, group=self.group)
        return best_2n[0], index_n

    def lookup(self, codebook_kd: Tensor, index_n: Tensor) -> Tensor:
        local_n = index_n - self.start
        mine_n = (local_n >= 0) & (local_n < len(codebook_kd))
        code_nd = F.embedding(local_n.clamp(0, len(codebook_kd) - 1), codebook_kd)
        return _ScatterSum.apply(code_nd.masked_fill(~mine_n[:, None], 0), self)  # adding zeros is exact


@eager
def communicator(z_nd: Tensor, codebook_kd: Tensor, shard: CodebookShard | None) -> Communicator:
    """The communicator of one call. Raises ModelError, on all ranks of ``shard``'s group, for mismatched operands and
    for values that are not finite."""
    return Communicator(z_nd, codebook_kd) if shard is None else GroupCommunicator(z_nd, codebook_kd, shard)


@eager
def lookup_code(index_n: Tensor, codebook_kd: Tensor, shard: CodebookShard | None = None) -> Tensor:
    """Code vectors ``(n, D)`` of int64 codes ``(n,)``, differentiable in the codebook: the chosen codes get gradients.

    shard: this rank's part of the codebook; all ranks of its group must call together, each with its own codes.
    """
    if shard is None:
        return F.embedding(index_n, codebook_kd)
    ranks = GroupCommunicator(index_n[:, None], codebook_kd, shard)
    return ranks.lookup(codebook_kd, ranks.gather(index_n))


@eager
def sum_over_shards(value: Tensor, shard: CodebookShard | None) -> Tensor:
    """Sums a tensor over the shard's group, differentiably: a sum over this rank's codes becomes one over all codes."""
    return value if shard is None else _SumOverShards.apply(value, shard.group)


class _ScatterSum(torch.autograd.Function):
    """`GroupCommunicator.scatter_sum`; its backward pass is `GroupCommunicator.gather`."""

    @staticmethod
    def forward(ctx, all_nd, ranks):
        ctx.ranks = ranks
        return ranks.scatter_sum(all_nd)

    @staticmethod
    def backward(ctx, grad_nd):
        return ctx.ranks.gather(grad_nd), None


class _SumOverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, group):
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)  # every rank's loss depends on this rank's value
        return grad, None


TOKENS, DIM, ROWS, START, STOP, BAD_TOKENS, BAD_CODES, LAST_CODE = range(8)  # positions in a header


def _header(z_nd: Tensor, codebook_kd: Tensor, shard: CodebookShard | None) -> Tensor:
    start, stop = (0, len(codebook_kd)) if shard is None else (shard.start, shard.stop)
    # A mismatched shape is sent to all ranks and raised there: raising here would leave the other ranks waiting.
    is_codes = not z_nd.is_floating_point()
    fits = z_nd.ndim == codebook_kd.ndim == 2 and (is_codes or z_nd.shape[1] == codebook_kd.shape[1])
    numbers = [len(z_nd), codebook_kd.shape[-1] if fits else -1, len(codebook_kd), start, stop]
    header = torch.tensor([*numbers, 0, 0, -1], dtype=torch.int64, device=z_nd.device)
    if fits and not is_codes:
        header[BAD_TOKENS] = (~z_nd.detach().isfinite()).any(dim=1).sum()
        # A sum needs no memory, and NaN propagates through it.
        header[BAD_CODES] = ~codebook_kd.detach().sum().isfinite()
    elif fits and z_nd.numel():
        header[BAD_TOKENS], header[LAST_CODE] = (z_nd < 0).sum(), z_nd.max()
    return header


def _check(headers: list[list[int]]) -> None:
    """Raises ModelError, the same on every rank, for shards that form no codebook and values that are not finite."""
    end, dim = 0, headers[0][DIM]
    for rank, (tokens, dim_here, rows, start, stop, bad_tokens, bad_codes, last_code) in enumerate(headers):
        where = f" of rank {rank} in the group" if len(headers) > 1 else ""
        if dim_here < 0:
            raise ModelError(f"z{where} must be (N, D) and its codebook (K, D) with the same D")
        if dim_here != dim:
            raise ModelError(f"z{where} has {dim_here} dimensions, that of rank 0 has {dim}")
        if stop - start != rows or rows < 1:
            raise ModelError(f"the shard{where} says codes {start} to {stop}, but {rows} codes are there")
        if start != end:
            kind = "a gap" if start > end else "an overlap"
            raise ModelError(f"the shard{where} starts at code {start}, the one before it ends at {end}: {kind}")
        if bad_codes:
            raise ModelError(f"the codebook{where} holds NaN or infinity: resume from an earlier checkpoint")
        if last_code >= headers[-1][STOP] or (bad_tokens and last_code >= 0):
            raise ModelError(f"codes{where} must lie in [0, {headers[-1][STOP]})")
        if bad_tokens:
            raise ModelError(
                f"z{where} is not finite in {bad_tokens} of {tokens} tokens: the encoder's weights or its input hold "
                "NaN or infinity; resume from an earlier checkpoint with a lower optimizer.lr"
            )
        end = stop
