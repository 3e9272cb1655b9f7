"""Index backpropagation in tiles: attention over the codebook with a hard forward, in plain PyTorch.

The first sweep over the codebook keeps per token the running maximum, its index, the running sum and the running
``o = softmax(l) C`` (online softmax). At the entropy's temperature, where few tiles are live, one more adds up the rows
and another the columns of the assignment. With them the backward pass makes every tile of the logits' gradient afresh:

    dl = p (g C^T - g . o) + q ((v - q . v) / N - s (log q + H) / N) / temperature,    dz = dl C,    dC = dl^T z

for the gradients g of the quantized vectors, s of the sample entropy and v of the average probabilities. The hard
choice adds the sum of its tokens' gradients to each chosen code. Nothing of N x K elements is ever built: beside
operands and gradients there are a few tiles, O(N D + K), and one maximum per token and tile.

Sums are taken in fp32 for fp16, bf16 and fp32 operands and in fp64 for fp64 ones.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model_zoo.ops.index_backprop import IndexBackprop

# (tokens, codes) of a tile. On a CPU tiles share the cache with the operands' slices; on a GPU each kernel must be long
# against its launch.
TILE_CPU = (1024, 256)
TILE_CUDA = (8192, 2048)


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


class Sweep(NamedTuple):
    """How to go over the tiles. tile: (tokens, codes). skip: leave out row-tiles that hold less than rounding."""

    tile: tuple[int, int]
    skip: bool
    stats: SkipStats


def index_backprop_chunked(
    z_nd: Tensor,
    codebook_kd: Tensor,
    entropy_temperature: float | None,
    *,
    skip: bool = True,
    tile: tuple[int, int] | None = None,
    stats: SkipStats | None = None,
) -> IndexBackprop:
    """`index_backprop` without the N x K matrices; the entropies come in fp32 for half-precision operands.

    skip: leave out the row-tiles whose largest term lies so far below the row's maximum that all that is left out
        together is below rounding (of the accumulation's type). Exact to rounding, as is the order of the sums.
    tile: (tokens, codes) of a tile; None takes a size that suits the device.
    stats: counts what was skipped, in the forward and in the backward pass.

    Deterministic: every sum has a fixed order, and no atomics are used. Not differentiable twice.
    """
    sweep = Sweep(_fitting_tile(z_nd, codebook_kd, tile), skip, stats or SkipStats())
    with_gradient = torch.is_grad_enabled() and (z_nd.requires_grad or codebook_kd.requires_grad)
    quantized_nd, code_nd, index_n, sample_entropy, average_k = _IndexBackprop.apply(
        z_nd, codebook_kd, entropy_temperature, sweep, with_gradient
    )
    return IndexBackprop(quantized_nd, index_n, sample_entropy, average_k, code_nd)


@torch.no_grad()
def nearest_by_dot(z_nd: Tensor, codebook_kd: Tensor, *, tile: tuple[int, int] | None = None) -> Tensor:
    """int64 ``(n,)``: the code with the largest dot product for each token, the lowest on ties. One sweep."""
    sweep = Sweep(_fitting_tile(z_nd, codebook_kd, tile), False, SkipStats())
    with torch.autocast(z_nd.device.type, enabled=False):
        z_nd = _accumulation(z_nd)
        max_n = z_nd.new_full((len(z_nd),), -math.inf)
        index_n = torch.zeros(len(z_nd), dtype=torch.int64, device=z_nd.device)
        scratch = Scratch(z_nd, codebook_kd, sweep, count=1)
        for tile in _tiles(len(z_nd), codebook_kd, z_nd.dtype, sweep):
            logits = torch.mm(z_nd[tile.tokens], tile.codes_td.T, out=scratch(0, tile.shape))
            _raise_max(logits, logits.amax(dim=1), tile.codes.start, max_n[tile.tokens], index_n[tile.tokens])
    return index_n


class _IndexBackprop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z_nd, codebook_kd, temperature, sweep, with_gradient):
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.sweep = temperature, sweep
        with torch.autocast(z_nd.device.type, enabled=False):
            rows = _first_sweep(_accumulation(z_nd), codebook_kd, sweep, with_gradient)
            sample_entropy = average_k = None
            if temperature is not None:
                rows, average_k = _assignment_sweeps(_accumulation(z_nd), codebook_kd, rows, temperature, sweep)
                sample_entropy = rows.entropy_n.mean()
        if with_gradient:
            ctx.save_for_backward(z_nd, codebook_kd, *rows)
        ctx.mark_non_differentiable(rows.index_n)
        quantized_nd = codebook_kd.index_select(0, rows.index_n)
        return quantized_nd, quantized_nd.clone(), rows.index_n, sample_entropy, average_k

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_quantized_nd, grad_code_nd, _, grad_sample, grad_average_k):
        z_nd, codebook_kd, *rows = ctx.saved_tensors
        upstream = Upstream(grad_quantized_nd, grad_code_nd, grad_sample, grad_average_k)
        with torch.autocast(z_nd.device.type, enabled=False):
            gradients = _backward(
                z_nd, codebook_kd, Rows(*rows), upstream, ctx.temperature, ctx.sweep, ctx.needs_input_grad
            )
        return *gradients, None, None, None


class Rows(NamedTuple):
    """What the sweeps keep of each token. m is the largest logit, q = softmax(l / temperature).

    tile_max_tn: the largest logit of each tile of codes.
    sum_n: sum exp(l - m), and output_nd: softmax(l) C; None where no gradient will be asked for.
    assignment_log_sum_n: log sum exp((l - m) / temperature), and entropy_n: H(q); None without temperature.
    """

    index_n: Tensor
    max_n: Tensor
    tile_max_tn: Tensor
    sum_n: Tensor | None
    output_nd: Tensor | None
    assignment_log_sum_n: Tensor | None = None
    entropy_n: Tensor | None = None


class Upstream(NamedTuple):
    """Gradients of the loss with respect to the operation's outputs; None where the loss does not use one."""

    quantized_nd: Tensor | None
    code_nd: Tensor | None
    sample_entropy: Tensor | None
    average_k: Tensor | None


class Tile(NamedTuple):
    """Some tokens times some codes. number: of the slice of codes, whose rows are ``codes_td`` in the sums' type."""

    tokens: slice
    codes: slice
    number: int
    codes_td: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.stop - self.tokens.start, self.codes.stop - self.codes.start


def _tiles(tokens: int, codebook_kd: Tensor, dtype: torch.dtype, sweep: Sweep) -> Iterator[Tile]:
    """All tiles; those of the same codes follow each other."""
    for number, codes in enumerate(_slices(len(codebook_kd), sweep.tile[1])):
        codes_td = codebook_kd[codes].to(dtype)
        for rows in _slices(tokens, sweep.tile[0]):
            yield Tile(rows, codes, number, codes_td)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


class Live(NamedTuple):
    """The tokens of a tile that have to be looked at: their numbers within the tile, or None for all of them."""

    rows: Tensor | None
    count: int

    def of(self, matrix: Tensor, scratch: "Scratch | None" = None, number: int = 0) -> Tensor:
        """Their rows, copied (into a tile of ``scratch``); all of them are the matrix itself."""
        if self.rows is None:
            return matrix
        out = scratch and scratch(number, (self.count, matrix.shape[1]))
        return torch.index_select(matrix, 0, self.rows, out=out)

    def add(self, values: Tensor, *, to: Tensor) -> None:
        # The numbers differ from one another, so that on CUDA too there is one order of summation.
        to.add_(values) if self.rows is None else to.index_add_(0, self.rows, values)

    def add_product(self, left: Tensor, right: Tensor, *, to: Tensor) -> None:
        to.addmm_(left, right) if self.rows is None else to.index_add_(0, self.rows, left @ right)


def _live(name: str, tile_max: Tensor, max_n: Tensor, codes: int, temperature: float, sweep: Sweep) -> Live:
    """Tokens for which the tile holds more than rounding of softmax(l / temperature).

    What is left out weighs less than ``codes`` terms of (machine epsilon / codes) beside a sum of at least 1.
    """
    tokens = len(max_n)
    live = Live(None, tokens)
    if sweep.skip:
        reach = temperature * math.log(codes / torch.finfo(max_n.dtype).eps)
        rows = (tile_max - max_n < -reach).logical_not_().nonzero().squeeze(1)  # NaN is live
        if len(rows) < tokens:
            live = Live(rows, len(rows))
    sweep.stats.add(name, tokens, live.count)
    return live


def _raise_max(logits: Tensor, tile_max: Tensor, start: int, max_n: Tensor, index_n: Tensor) -> tuple[Tensor, Tensor]:
    """Raises the running maxima and their indices by a tile's; returns the tokens concerned, and old minus new maximum.

    Only a larger logit counts, and argmax takes the first, so ties go to the lowest index.
    """
    raised = (tile_max > max_n).nonzero().squeeze(1)
    new = tile_max[raised]
    drop = max_n[raised] - new
    max_n[raised] = new
    index_n[raised] = logits[raised].argmax(dim=1) + start
    return raised, drop


class Scratch:
    """Memory of ``count`` tiles, made once and used for every tile of a sweep."""

    def __init__(self, z_nd: Tensor, codebook_kd: Tensor, sweep: Sweep, count: int):
        self.memory = z_nd.new_empty(count, min(sweep.tile[0], len(z_nd)) * min(sweep.tile[1], len(codebook_kd)))

    def __call__(self, number: int, shape: tuple[int, int]) -> Tensor:
        return self.memory[number, : shape[0] * shape[1]].view(shape)


def _first_sweep(z_nd: Tensor, codebook_kd: Tensor, sweep: Sweep, with_output: bool) -> Rows:
    tokens, codes = len(z_nd), len(codebook_kd)
    index_n = torch.zeros(tokens, dtype=torch.int64, device=z_nd.device)
    max_n = z_nd.new_full((tokens,), -math.inf)
    tile_max_tn = z_nd.new_empty(-(-codes // sweep.tile[1]), tokens)
    sum_n, output_nd = (z_nd.new_zeros(tokens), torch.zeros_like(z_nd)) if with_output else (None, None)
    scratch = Scratch(z_nd, codebook_kd, sweep, count=2)

    for tile in _tiles(tokens, codebook_kd, z_nd.dtype, sweep):
        at = tile.tokens
        logits = torch.mm(z_nd[at], tile.codes_td.T, out=scratch(0, tile.shape))
        tile_max = torch.amax(logits, dim=1, out=tile_max_tn[tile.number, at])
        raised, drop = _raise_max(logits, tile_max, tile.codes.start, max_n[at], index_n[at])
        if with_output:
            sum_n[at][raised] *= drop.exp()
            output_nd[at][raised] *= drop.exp()[:, None]
            live = _live("output", tile_max, max_n[at], codes, 1.0, sweep)
            if live.count:
                exp = live.of(logits, scratch, 1).sub_(live.of(max_n[at])[:, None]).exp_()
                live.add(exp.sum(dim=1), to=sum_n[at])
                live.add_product(exp, tile.codes_td, to=output_nd[at])

    if with_output:
        output_nd /= sum_n[:, None]
    return Rows(index_n, max_n, tile_max_tn, sum_n, output_nd)


def _assignment_sweeps(
    z_nd: Tensor, codebook_kd: Tensor, rows: Rows, temperature: float, sweep: Sweep
) -> tuple[Rows, Tensor]:
    """Adds the sums at the temperature to ``rows``; returns the mean of q over tokens too.

    The sums could be taken in the first sweep, but not to the same bits: a product with some of the rows rounds logits
    otherwise than one with all, and 1 / temperature makes that larger. All that uses q takes the same rows of the same
    tiles, so that the q of a token add up to 1.
    """
    sum_n, moment_n = z_nd.new_zeros(len(z_nd)), z_nd.new_zeros(len(z_nd))  # of exp(x) and exp(x) x, x = (l - m) / t
    scratch = Scratch(z_nd, codebook_kd, sweep, count=1)
    for tile, live, x in _hot_tiles("assignment", z_nd, codebook_kd, rows, temperature, sweep):
        exp = torch.exp(x, out=scratch(0, x.shape))
        live.add(exp.sum(dim=1), to=sum_n[tile.tokens])
        live.add(exp.mul_(x).sum(dim=1), to=moment_n[tile.tokens])
    log_sum_n = sum_n.log()
    rows = rows._replace(assignment_log_sum_n=log_sum_n, entropy_n=log_sum_n - moment_n / sum_n)

    average_k = z_nd.new_zeros(len(codebook_kd))
    for tile, live, x in _hot_tiles("average", z_nd, codebook_kd, rows, temperature, sweep):
        average_k[tile.codes] += x.sub_(live.of(log_sum_n[tile.tokens])[:, None]).exp_().sum(dim=0)
    return rows, average_k / len(z_nd)


def _hot_tiles(
    name: str, z_nd: Tensor, codebook_kd: Tensor, rows: Rows, temperature: float, sweep: Sweep
) -> Iterator[tuple[Tile, Live, Tensor]]:
    """(l - m) / temperature, a tile's live tokens at a time."""
    scratch = Scratch(z_nd, codebook_kd, sweep, count=1)
    for tile in _tiles(len(z_nd), codebook_kd, z_nd.dtype, sweep):
        tile_max, max_n = rows.tile_max_tn[tile.number, tile.tokens], rows.max_n[tile.tokens]
        live = _live(name, tile_max, max_n, len(codebook_kd), temperature, sweep)
        if live.count:
            yield tile, live, _hot_logits(tile, live, z_nd, rows, temperature, scratch)


def _hot_logits(tile: Tile, live: Live, z_nd: Tensor, rows: Rows, temperature: float, scratch: Scratch) -> Tensor:
    at = tile.tokens
    logits = torch.mm(live.of(z_nd[at]), tile.codes_td.T, out=scratch(0, (live.count, tile.shape[1])))
    return logits.sub_(live.of(rows.max_n[at])[:, None]).div_(temperature)


class SoftTerm:
    """The soft assignment's part of dl, ``p (g C^T - g . o)``."""

    def __init__(self, z_nd: Tensor, codebook_kd: Tensor, rows: Rows, grad_nd: Tensor, sweep: Sweep):
        self.z_nd, self.rows, self.sweep, self.codes = z_nd, rows, sweep, len(codebook_kd)
        # p is exp(l - m) over its sum, and the latter is here rather than in a pass over every tile.
        self.grad_nd = _accumulation(grad_nd) / rows.sum_n[:, None]
        self.grad_output_n = (self.grad_nd * rows.output_nd).sum(dim=1)
        self.scratch = Scratch(z_nd, codebook_kd, sweep, count=2)

    def live(self, tile: Tile) -> Live:
        tile_max, max_n = self.rows.tile_max_tn[tile.number, tile.tokens], self.rows.max_n[tile.tokens]
        return _live("soft_gradient", tile_max, max_n, self.codes, 1.0, self.sweep)

    def gradient(self, tile: Tile, live: Live) -> Tensor:
        at, shape = tile.tokens, (live.count, tile.shape[1])
        exp = torch.mm(live.of(self.z_nd[at]), tile.codes_td.T, out=self.scratch(0, shape))
        exp.sub_(live.of(self.rows.max_n[at])[:, None]).exp_()
        slope = torch.mm(live.of(self.grad_nd[at]), tile.codes_td.T, out=self.scratch(1, shape))
        return slope.sub_(live.of(self.grad_output_n[at])[:, None]).mul_(exp)


class EntropyTerm:
    """The entropies' part of dl, ``q (v - q . v - s (log q + H)) / (N temperature)``."""

    def __init__(
        self, z_nd: Tensor, codebook_kd: Tensor, rows: Rows, upstream: Upstream, temperature: float, sweep: Sweep
    ):
        self.z_nd, self.rows, self.sweep, self.codes = z_nd, rows, sweep, len(codebook_kd)
        self.temperature, self.scale = temperature, 1 / (len(z_nd) * temperature)
        self.grad_sample, self.grad_average_k = upstream.sample_entropy, upstream.average_k
        self.scratch = Scratch(z_nd, codebook_kd, sweep, count=2)
        if self.grad_average_k is not None:
            self.mean_n = z_nd.new_zeros(len(z_nd))  # q . v
            for tile, live, x in _hot_tiles("average_gradient", z_nd, codebook_kd, rows, temperature, sweep):
                q = x.sub_(live.of(rows.assignment_log_sum_n[tile.tokens])[:, None]).exp_()
                live.add(q @ self.grad_average_k[tile.codes], to=self.mean_n[tile.tokens])

    def live(self, tile: Tile) -> Live:
        tile_max, max_n = self.rows.tile_max_tn[tile.number, tile.tokens], self.rows.max_n[tile.tokens]
        return _live("entropy_gradient", tile_max, max_n, self.codes, self.temperature, self.sweep)

    def gradient(self, tile: Tile, live: Live) -> Tensor:
        slope = _hot_logits(tile, live, self.z_nd, self.rows, self.temperature, self.scratch)
        slope.sub_(live.of(self.rows.assignment_log_sum_n[tile.tokens])[:, None])  # log q
        q = torch.exp(slope, out=self.scratch(1, slope.shape))
        if self.grad_sample is None:
            slope.zero_()
        else:
            slope.add_(live.of(self.rows.entropy_n[tile.tokens])[:, None]).mul_(-self.grad_sample)
        if self.grad_average_k is not None:
            slope.add_(self.grad_average_k[tile.codes]).sub_(live.of(self.mean_n[tile.tokens])[:, None])
        return slope.mul_(q).mul_(self.scale)


def _backward(
    z_nd: Tensor, codebook_kd: Tensor, rows: Rows, upstream: Upstream, temperature: float | None, sweep: Sweep, needs
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of z and of the codebook, where they are needed. Each tile of dl is made, used twice and forgotten."""
    z_dtype, z_nd = z_nd.dtype, _accumulation(z_nd)
    hard = [_accumulation(grad_nd) for grad_nd in (upstream.quantized_nd, upstream.code_nd) if grad_nd is not None]
    chosen = ChosenCodes(rows.index_n, sum(hard), len(codebook_kd), sweep.tile[1]) if needs[1] and hard else None
    terms = []
    if upstream.quantized_nd is not None:
        terms.append(SoftTerm(z_nd, codebook_kd, rows, upstream.quantized_nd, sweep))
    if upstream.sample_entropy is not None or upstream.average_k is not None:
        terms.append(EntropyTerm(z_nd, codebook_kd, rows, upstream, temperature, sweep))

    grad_z_nd = torch.zeros_like(z_nd) if needs[0] and terms else None
    grad_codebook_kd = torch.zeros_like(codebook_kd, memory_format=torch.contiguous_format) if needs[1] else None
    for tile in _tiles(len(z_nd), codebook_kd, z_nd.dtype, sweep):
        at = tile.tokens
        if needs[1] and at.start == 0:
            grad_codes_td = grad_codebook_kd[tile.codes]
            same = grad_codes_td.dtype == z_nd.dtype
            sums_td = grad_codes_td if same else torch.zeros_like(grad_codes_td, dtype=z_nd.dtype)
        for term in terms:
            live = term.live(tile)
            if live.count:
                grad_logits = term.gradient(tile, live)
                if grad_z_nd is not None:
                    live.add_product(grad_logits, tile.codes_td, to=grad_z_nd[at])
                if needs[1]:
                    sums_td.addmm_(grad_logits.T, live.of(z_nd[at]))
        if needs[1] and at.stop == len(z_nd):
            if chosen:
                chosen.add(tile, to=sums_td)
            if not same:
                grad_codes_td.copy_(sums_td)
    return grad_z_nd if grad_z_nd is None else grad_z_nd.to(z_dtype), grad_codebook_kd


class ChosenCodes:
    """The hard choice's part of dC: for each chosen code the sum of its tokens' gradients.

    index_add_ on CUDA would add them by atomics, in any order. Here tokens are sorted by code, and a token takes over
    the sum of the one 1, 2, 4, ... places on while that has the same code: the first of each code ends with all.
    """

    def __init__(self, index_n: Tensor, grad_nd: Tensor, codes: int, tile_codes: int):
        index_n, order_n = index_n.sort(stable=True)
        sums_nd = grad_nd[order_n]
        step = 1
        while step < len(index_n) and (same := index_n[step:] == index_n[:-step]).any():
            sums_nd[:-step] += torch.where(same[:, None], sums_nd[step:], 0)
            step *= 2
        first = torch.cat([index_n.new_ones(1, dtype=torch.bool), index_n[1:] != index_n[:-1]])
        self.index_m, self.sums_md = index_n[first], sums_nd[first]
        edges = torch.arange(0, codes + tile_codes, tile_codes, device=index_n.device)
        self.bounds = torch.searchsorted(self.index_m, edges).tolist()

    def add(self, tile: Tile, *, to: Tensor) -> None:
        """Adds the sums of the tile's codes to these codes' gradients ``(codes, D)``."""
        part = slice(self.bounds[tile.number], self.bounds[tile.number + 1])
        to.index_add_(0, self.index_m[part] - tile.codes.start, self.sums_md[part])


def _fitting_tile(z_nd: Tensor, codebook_kd: Tensor, tile: tuple[int, int] | None) -> tuple[int, int]:
    """At most ``tile``, with the codes cut evenly: a last tile of one code would be a matrix-vector product, which
    rounds otherwise, so that of two equal codes the later could win.
    """
    tokens, most = tile or (TILE_CUDA if z_nd.is_cuda else TILE_CPU)
    codes = len(codebook_kd)
    return tokens, -(-codes // -(-codes // most))


def _accumulation(tensor: Tensor) -> Tensor:
    """In the type of the sums, rows contiguous."""
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).contiguous()
