"""The sweeps of `model_zoo.ops.tiled` in plain PyTorch, one tile of tokens and codes at a time."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model_zoo.ops.codebook_parallel import CodebookShard, communicator
from model_zoo.ops.eager import eager
from model_zoo.ops.tiled import (
    Assignment,
    EntropyGradient,
    HardGradient,
    RowStatistics,
    Settings,
    SoftGradient,
    Sweeps,
    accumulation,
    fast_exp,
)

# (tokens, codes) of a tile. On a CPU a tile and its slices of the operands must fit in the cache; on a GPU a kernel
# must take much longer than its launch.
TILE_CPU = (1024, 256)
TILE_CUDA = (8192, 2048)


@eager
@torch.no_grad()
def nearest_code(
    z_nd: Tensor,
    codebook_kd: Tensor,
    *,
    distance: str = "dot",
    shard: CodebookShard | None = None,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """Nearest code of each token, int64 ``(n,)``, in one sweep without the N x K matrix; ties go to the lowest index.

    distance: ``dot`` selects the largest dot product, ``euclidean`` the smallest distance.
    shard: this rank's part of the codebook; all ranks of its group must call together, each with its own tokens.
    """
    ranks = communicator(z_nd, codebook_kd, shard)
    with torch.autocast(z_nd.device.type, enabled=False):
        sweeps = ChunkedSweeps(ranks.gather(z_nd), codebook_kd, ranks.codes, Settings(tile=tile))
        # |z - c|^2 = |z|^2 - 2 (z c - |c|^2 / 2), and |z|^2 is the same for all codes of a token.
        bias_k = -accumulation(codebook_kd).square().sum(dim=1) / 2 if distance == "euclidean" else None
        max_n, index_n = sweeps.best_codes(bias_k)

        def scores() -> Tensor:
            return sweeps.scores(index_n) + (0 if bias_k is None else bias_k[index_n])

        return ranks.global_argmax(max_n, index_n, scores)[1][ranks.own]


class ChunkedSweeps(Sweeps):
    """Sweeps on CPU and CUDA."""

    def __init__(self, z_nd, codebook_kd, codes, settings, maxima=None):
        super().__init__(accumulation(z_nd), codebook_kd, codes, settings, maxima)
        self.tile = _fitting_tile(z_nd, codebook_kd, settings.tile)

    def row_statistics(self, with_output: bool) -> RowStatistics:
        z_nd, tokens = self.z_nd, len(self.z_nd)
        index_n = torch.zeros(tokens, dtype=torch.int64, device=z_nd.device)
        max_n = z_nd.new_full((tokens,), -math.inf)
        self.maxima = z_nd.new_empty(-(-len(self.codebook_kd) // self.tile[1]), tokens)
        sum_n, output_nd = (z_nd.new_zeros(tokens), torch.zeros_like(z_nd)) if with_output else (None, None)
        scratch = self._scratch(2)

        for tile in self._tiles():
            at = tile.tokens
            logits = torch.mm(z_nd[at], tile.codes_td.T, out=scratch(0, tile.shape))
            tile_max = torch.amax(logits, dim=1, out=self.maxima[tile.number, at])
            raised, drop = _raise_max(logits, tile_max, tile.codes.start, max_n[at], index_n[at])
            if with_output:
                sum_n[at][raised] *= drop.exp()
                output_nd[at][raised] *= drop.exp()[:, None]
                live = self._live("output", tile_max, max_n[at], 1.0)
                if live.count:
                    exp = live.of(logits, scratch, 1).sub_(live.of(max_n[at])[:, None])
                    fast_exp(exp, out=exp)
                    live.add(exp.sum(dim=1), to=sum_n[at])
                    live.add_product(exp, tile.codes_td, to=output_nd[at])
        return RowStatistics(index_n, max_n, sum_n, output_nd)

    def best_codes(self, bias_k: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Each token's largest logit (plus the code's bias) and its index."""
        z_nd = self.z_nd
        max_n = z_nd.new_full((len(z_nd),), -math.inf)
        index_n = torch.zeros(len(z_nd), dtype=torch.int64, device=z_nd.device)
        scratch = self._scratch(1)
        for tile in self._tiles():
            logits = torch.mm(z_nd[tile.tokens], tile.codes_td.T, out=scratch(0, tile.shape))
            if bias_k is not None:
                logits += bias_k[tile.codes]
            _raise_max(logits, logits.amax(dim=1), tile.codes.start, max_n[tile.tokens], index_n[tile.tokens])
        return max_n, index_n

    # The sums at the temperature could be computed in the first sweep, but with other rounding: a product with some of
    # the rows rounds logits differently from one with all rows, and 1 / temperature amplifies the difference. All
    # sweeps that use q therefore visit the same rows of the same tiles, so that the q of a token sum to 1.

    def assignment_sums(self, max_n: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        # In fp64, since many tiles may each add very little to a sum of 1.
        sum_n, moment_n = max_n.new_zeros(2, len(max_n), dtype=torch.float64)
        scratch = self._scratch(1)
        for tile, live, x in self._hot_tiles("assignment", max_n, temperature):
            exp = fast_exp(x, out=scratch(0, x.shape))
            live.add(exp.sum(dim=1).double(), to=sum_n[tile.tokens])
            live.add(exp.mul_(x).sum(dim=1).double(), to=moment_n[tile.tokens])
        return sum_n, moment_n

    def assignment_columns(self, max_n: Tensor, assignment: Assignment) -> Tensor:
        columns_k = max_n.new_zeros(len(self.codebook_kd))
        for tile, live, x in self._hot_tiles("average", max_n, assignment.temperature):
            x.sub_(live.of(assignment.log_sum_n[tile.tokens])[:, None])
            columns_k[tile.codes] += fast_exp(x, out=x).sum(dim=0)
        return columns_k

    def assignment_dot(self, max_n: Tensor, assignment: Assignment, values_k: Tensor) -> Tensor:
        dot_n = torch.zeros_like(max_n)
        for tile, live, x in self._hot_tiles("average_gradient", max_n, assignment.temperature):
            x.sub_(live.of(assignment.log_sum_n[tile.tokens])[:, None])
            live.add(fast_exp(x, out=x) @ values_k[tile.codes], to=dot_n[tile.tokens])
        return dot_n

    def gradients(
        self,
        max_n: Tensor,
        soft: SoftGradient | None,
        entropy: EntropyGradient | None,
        hard: HardGradient | None,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Computes each tile of dl once, uses it for dz and dC, and discards it."""
        z_nd, codebook_kd = self.z_nd, self.codebook_kd
        terms = []
        if soft is not None:
            terms.append(("soft_gradient", 1.0, lambda tile, live: self._soft(tile, live, max_n, soft, scratch)))
        if entropy is not None:
            temperature = entropy.assignment.temperature
            terms.append(
                ("entropy_gradient", temperature, lambda tile, live: self._entropy(tile, live, max_n, entropy, scratch))
            )
        scratch = self._scratch(2) if terms else None
        chosen = ChosenCodes(hard, len(codebook_kd), self.tile[1]) if needs[1] and hard is not None else None
        grad_z_nd = torch.zeros_like(z_nd) if needs[0] and terms else None
        grad_codebook_kd = torch.zeros_like(codebook_kd, memory_format=torch.contiguous_format) if needs[1] else None
        for tile in self._tiles():
            at = tile.tokens
            if needs[1] and at.start == 0:
                grad_codes_td = grad_codebook_kd[tile.codes]
                same = grad_codes_td.dtype == z_nd.dtype
                sums_td = grad_codes_td if same else torch.zeros_like(grad_codes_td, dtype=z_nd.dtype)
            for name, temperature, gradient in terms:
                live = self._live(name, self.maxima[tile.number, at], max_n[at], temperature)
                if live.count:
                    grad_logits = gradient(tile, live)
                    if grad_z_nd is not None:
                        live.add_product(grad_logits, tile.codes_td, to=grad_z_nd[at])
                    if needs[1]:
                        sums_td.addmm_(grad_logits.T, live.of(z_nd[at]))
            if needs[1] and at.stop == len(z_nd):
                if chosen:
                    chosen.add(tile, to=sums_td)
                if not same:
                    grad_codes_td.copy_(sums_td)
        return grad_z_nd, grad_codebook_kd

    def _soft(self, tile: "Tile", live: "Live", max_n: Tensor, soft: SoftGradient, scratch: "Scratch") -> Tensor:
        at, shape = tile.tokens, (live.count, tile.shape[1])
        p = torch.mm(live.of(self.z_nd[at]), tile.codes_td.T, out=scratch(0, shape))
        p.sub_(live.of(max_n[at])[:, None])
        fast_exp(p, out=p).div_(live.of(soft.sum_n[at])[:, None])
        slope = torch.mm(live.of(soft.grad_nd[at]), tile.codes_td.T, out=scratch(1, shape))
        return slope.sub_(live.of(soft.grad_output_n[at])[:, None]).mul_(p)

    def _entropy(self, tile: "Tile", live: "Live", max_n: Tensor, entropy: EntropyGradient, scratch: "Scratch"):
        at, assignment = tile.tokens, entropy.assignment
        slope = self._hot_logits(tile, live, max_n, assignment.temperature, scratch)
        slope.sub_(live.of(assignment.log_sum_n[at])[:, None])  # log q
        q = fast_exp(slope, out=scratch(1, slope.shape))
        if entropy.sample_n is None:
            slope.zero_()
        else:
            slope.add_(live.of(assignment.entropy_n[at])[:, None]).mul_(-live.of(entropy.sample_n[at])[:, None])
        if entropy.average_k is not None:
            slope.add_(entropy.average_k[tile.codes]).sub_(live.of(entropy.average_n[at])[:, None])
        return slope.mul_(q).div_(assignment.temperature)

    def _hot_tiles(self, name: str, max_n: Tensor, temperature: float) -> Iterator[tuple["Tile", "Live", Tensor]]:
        """Yields (l - m) / temperature for the live tokens of each tile."""
        scratch = self._scratch(1)
        for tile in self._tiles():
            live = self._live(name, self.maxima[tile.number, tile.tokens], max_n[tile.tokens], temperature)
            if live.count:
                yield tile, live, self._hot_logits(tile, live, max_n, temperature, scratch)

    def _hot_logits(self, tile: "Tile", live: "Live", max_n: Tensor, temperature: float, scratch: "Scratch") -> Tensor:
        at = tile.tokens
        logits = torch.mm(live.of(self.z_nd[at]), tile.codes_td.T, out=scratch(0, (live.count, tile.shape[1])))
        return logits.sub_(live.of(max_n[at])[:, None]).div_(temperature)

    def _tiles(self) -> Iterator["Tile"]:
        """All tiles, grouped by slice of codes."""
        for number, codes in enumerate(_slices(len(self.codebook_kd), self.tile[1])):
            codes_td = self.codebook_kd[codes].to(self.z_nd.dtype)
            for tokens in _slices(len(self.z_nd), self.tile[0]):
                yield Tile(tokens, codes, number, codes_td)

    def _live(self, name: str, tile_max: Tensor, max_n: Tensor, temperature: float) -> "Live":
        """Tokens for which the tile contributes more than rounding error to softmax(l / temperature)."""
        tokens = len(max_n)
        live = Live(None, tokens)
        if self.settings.skip:
            rows = (tile_max - max_n < -self.skip_margin(temperature)).logical_not_().nonzero().squeeze(1)
            if len(rows) < tokens:
                live = Live(rows, len(rows))
        if self.settings.stats:
            self.settings.stats.add(name, tokens, live.count)
        return live

    def _scratch(self, count: int) -> "Scratch":
        return Scratch(self.z_nd, min(self.tile[0], len(self.z_nd)) * min(self.tile[1], len(self.codebook_kd)), count)


class Tile(NamedTuple):
    """A slice of tokens times a slice of codes. number: index of the slice of codes. codes_td: its rows, in the
    accumulation dtype."""

    tokens: slice
    codes: slice
    number: int
    codes_td: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.stop - self.tokens.start, self.codes.stop - self.codes.start


class Live(NamedTuple):
    """The tokens of a tile that are not skipped: their rows within the tile, or None for all of them."""

    rows: Tensor | None
    count: int

    def of(self, matrix: Tensor, scratch: "Scratch | None" = None, number: int = 0) -> Tensor:
        """Their rows of a matrix: a copy (in ``scratch`` if given), or the matrix itself if all tokens are live."""
        if self.rows is None:
            return matrix
        out = scratch and scratch(number, (self.count, matrix.shape[1]))
        return torch.index_select(matrix, 0, self.rows, out=out)

    def add(self, values: Tensor, *, to: Tensor) -> None:
        # Row numbers are unique, so the order of summation is fixed on CUDA too.
        to.add_(values) if self.rows is None else to.index_add_(0, self.rows, values)

    def add_product(self, left: Tensor, right: Tensor, *, to: Tensor) -> None:
        to.addmm_(left, right) if self.rows is None else to.index_add_(0, self.rows, left @ right)


class Scratch:
    """Memory for ``count`` tiles, allocated once and reused for every tile of a sweep."""

    def __init__(self, z_nd: Tensor, elements: int, count: int):
        self.memory = z_nd.new_empty(count, elements)

    def __call__(self, number: int, shape: tuple[int, int]) -> Tensor:
        return self.memory[number, : shape[0] * shape[1]].view(shape)


class ChosenCodes:
    """The hard assignment's part of dC: for each chosen code the sum of its tokens' gradients.

    index_add_ on CUDA would use atomics, in no fixed order. Here tokens are sorted by code and summed by doubling: each
    token adds the partial sum of the token 1, 2, 4, ... places later if that one has the same code. The first token of
    each code then holds the total.
    """

    def __init__(self, hard: HardGradient, codes: int, tile_codes: int):
        index_n, order_n = hard.index_n.sort(stable=True)
        sums_nd = hard.grad_nd[order_n]
        step = 1
        while step < len(index_n) and (same := index_n[step:] == index_n[:-step]).any():
            sums_nd[:-step] += torch.where(same[:, None], sums_nd[step:], 0)
            step *= 2
        first = torch.ones_like(index_n, dtype=torch.bool)
        first[1:] = index_n[1:] != index_n[:-1]
        self.index_m, self.sums_md = index_n[first], sums_nd[first]
        edges = torch.arange(0, codes + tile_codes, tile_codes, device=index_n.device).clamp_(max=codes)
        self.bounds = torch.searchsorted(self.index_m, edges).tolist()

    def add(self, tile: Tile, *, to: Tensor) -> None:
        """Adds the sums of the tile's codes to these codes' gradients ``(codes, D)``."""
        part = slice(self.bounds[tile.number], self.bounds[tile.number + 1])
        to.index_add_(0, self.index_m[part] - tile.codes.start, self.sums_md[part])


def _raise_max(logits: Tensor, tile_max: Tensor, start: int, max_n: Tensor, index_n: Tensor) -> tuple[Tensor, Tensor]:
    """Updates the running maxima and their indices with a tile; returns the updated tokens, and old minus new maximum.

    Only a strictly larger logit replaces the maximum, and argmax returns the first, so ties go to the lowest index.
    """
    raised = (tile_max > max_n).nonzero().squeeze(1)
    new = tile_max[raised]
    drop = max_n[raised] - new
    max_n[raised] = new
    index_n[raised] = logits[raised].argmax(dim=1) + start
    return raised, drop


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _fitting_tile(z_nd: Tensor, codebook_kd: Tensor, tile: tuple[int, int] | None) -> tuple[int, int]:
    """At most ``tile``, with the codes split evenly. A last tile of one code would be a matrix-vector product, which
    rounds differently, so of two equal codes the later one could win.
    """
    tokens, most = tile or (TILE_CUDA if z_nd.is_cuda else TILE_CPU)
    codes = len(codebook_kd)
    return tokens, -(-codes // -(-codes // most))
