"""A codebook whose rows are spread over the ranks of a group, and what these tell each other.

Every rank brings its own tokens and holds rows ``[start, stop)`` of the codebook. Tokens are gathered, each rank goes
over its own rows with all of them, and per token a few numbers are reduced: what travels is O(tokens x D), never the
codebook or its gradient.

Gradients are those of the *sum* of the ranks' losses: a rank's tokens move the codes of all others, and the other way
round. Whoever averages losses over ranks divides the gradients of z and of the shard alike.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from model_zoo.errors import ModelError

# PyTorch 2.14 has new names for these two and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class CodebookShard:
    """This rank holds rows ``[start, stop)``; the ranks of ``group``, in order, hold the codebook without a gap."""

    start: int
    stop: int
    group: dist.ProcessGroup

    @classmethod
    def even(cls, codes: int, group: dist.ProcessGroup) -> "CodebookShard":
        """This rank's part of ``codes`` rows spread as evenly as they go, the first ranks one row more."""
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if codes < size:
            raise ModelError(f"a codebook of {codes} codes cannot be spread over {size} ranks")
        share, more = divmod(codes, size)
        start = rank * share + min(rank, more)
        return cls(start, start + share + (rank < more), group)

    def check(self, codes: int) -> None:
        """ModelError on all ranks of the group, which call together, where their parts are not ``codes`` rows."""
        parts = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(parts, (self.start, self.stop), group=self.group)
        ends = [0, *(stop for _, stop in parts)]
        if [start for start, _ in parts] != ends[:-1] or ends[-1] != codes:
            raise ModelError(f"the shards {parts} are not the codebook's {codes} codes, one after the other")


class Alone:
    """The whole codebook and all tokens are here: nothing travels. `Exchange` does the same among ranks."""

    def __init__(self, z_nd: Tensor, codebook_kd: Tensor):
        _check(_header(z_nd, codebook_kd, None)[None].tolist())
        self.tokens, self.codes, self.start = len(z_nd), len(codebook_kd), 0
        self.own = slice(0, self.tokens)  # this rank's tokens among all

    def gather(self, own_nd: Tensor) -> Tensor:
        """All ranks' rows, from this rank's."""
        return own_nd

    def per_token(self, value: Tensor) -> Tensor:
        """Each rank's scalar, divided among its tokens and once for each of them: ``(all tokens,)``."""
        return (value / self.tokens).expand(self.tokens)

    def scatter_sum(self, all_nd: Tensor) -> Tensor:
        """This rank's rows of the sum over ranks."""
        return all_nd

    def sum_(self, all_n: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        return all_n

    def best(self, max_n: Tensor, index_n: Tensor, score: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """The largest of the ranks' maxima, and its index in the whole codebook, the lowest on ties.

        score: gives the maxima once more, by an arithmetic that does not depend on where a code lies: products of
        matrices of other shapes round otherwise, so that of two equal codes the later could win.
        """
        return max_n, index_n

    def lookup(self, codebook_kd: Tensor, index_n: Tensor) -> Tensor:
        """This rank's tokens' code vectors, from the indices of all; differentiable in the codebook."""
        return F.embedding(index_n, codebook_kd)


class Exchange(Alone):
    """Collectives of one call. All ranks of the group make it together; what does not fit is an error on all of them.

    Ranks may bring different numbers of tokens, and none.
    """

    def __init__(self, z_nd: Tensor, codebook_kd: Tensor, shard: CodebookShard):
        """z_nd: features ``(n, D)``, or codes ``(n, 1)``, whose number alone counts."""
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
        if min(self.counts) < most:  # not all backends take unequal parts: pad, as `gather` does
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

    def best(self, max_n: Tensor, index_n: Tensor, score: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        score_n = score()
        best_2n = torch.stack([max_n, score_n])
        dist.all_reduce(best_2n, dist.ReduceOp.MAX, group=self.group)
        # A rank whose score is smaller names an index that none has, so that it loses.
        index_n = torch.where(score_n == best_2n[1], index_n + self.start, self.codes)
        dist.all_reduce(index_n, dist.ReduceOp.MIN, group=self.group)
        return best_2n[0], index_n

    def lookup(self, codebook_kd: Tensor, index_n: Tensor) -> Tensor:
        local_n = index_n - self.start
        mine_n = (local_n >= 0) & (local_n < len(codebook_kd))
        code_nd = F.embedding(local_n.clamp(0, len(codebook_kd) - 1), codebook_kd)
        return _ScatterSum.apply(code_nd.masked_fill(~mine_n[:, None], 0), self)  # a sum with zeros: exact


@torch.compiler.disable
def exchange(z_nd: Tensor, codebook_kd: Tensor, shard: CodebookShard | None) -> Alone:
    """What the ranks of ``shard`` tell each other in one call. ModelError on all of them where the parts do not fit."""
    return Alone(z_nd, codebook_kd) if shard is None else Exchange(z_nd, codebook_kd, shard)


@torch.compiler.disable
def lookup_code(index_n: Tensor, codebook_kd: Tensor, shard: CodebookShard | None = None) -> Tensor:
    """Code vectors ``(n, D)`` of int64 codes ``(n,)``, differentiable in the codebook: its chosen codes get gradients.

    shard: the part of the codebook that is here; all ranks of its group call together, each with its own codes.
    """
    if shard is None:
        return F.embedding(index_n, codebook_kd)
    ranks = Exchange(index_n[:, None], codebook_kd, shard)
    return ranks.lookup(codebook_kd, ranks.gather(index_n))


@torch.compiler.disable
def sum_over_shards(value: Tensor, shard: CodebookShard | None) -> Tensor:
    """The sum of a tensor over the shard's group, differentiable: so that a sum over codes is one over all codes."""
    return value if shard is None else _SumOverShards.apply(value, shard.group)


class _ScatterSum(torch.autograd.Function):
    """`Exchange.scatter_sum`; the gradient of all ranks' rows is what `Exchange.gather` brings."""

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


TOKENS, DIM, ROWS, START, STOP, BAD_TOKENS, BAD_CODES, LAST_CODE = range(8)  # of a header


def _header(z_nd: Tensor, codebook_kd: Tensor, shard: CodebookShard | None) -> Tensor:
    start, stop = (0, len(codebook_kd)) if shard is None else (shard.start, shard.stop)
    # A shape that fits nothing else is told to all rather than raised here, where the others would wait.
    fits = z_nd.ndim == codebook_kd.ndim == 2 and (
        z_nd.shape[1] == codebook_kd.shape[1] or not z_nd.is_floating_point()
    )
    numbers = [len(z_nd), codebook_kd.shape[-1] if fits else -1, len(codebook_kd), start, stop]
    header = torch.tensor([*numbers, 0, 0, -1], dtype=torch.int64, device=z_nd.device)
    if fits and z_nd.is_floating_point():
        header[BAD_TOKENS] = (~z_nd.detach().isfinite()).any(dim=1).sum()
        header[BAD_CODES] = ~codebook_kd.detach().sum().isfinite()  # a sum needs no memory, and NaN stays in it
    elif fits and z_nd.numel():
        header[BAD_TOKENS], header[LAST_CODE] = (z_nd < 0).sum(), z_nd.max()
    return header


def _check(headers: list[list[int]]) -> None:
    """Raises ModelError, the same on every rank, for parts that make no codebook or features that are no numbers."""
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
            raise ModelError(f"the codebook{where} holds NaN or infinity: go on from an earlier checkpoint")
        if last_code >= headers[-1][STOP] or (bad_tokens and last_code >= 0):
            raise ModelError(f"codes{where} must lie in [0, {headers[-1][STOP]})")
        if bad_tokens:
            raise ModelError(
                f"z{where} is not finite in {bad_tokens} of {tokens} tokens: the encoder's weights or its input hold "
                "NaN or infinity; go on from an earlier checkpoint with a lower optimizer.lr"
            )
        end = stop
