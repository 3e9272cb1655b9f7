"""The sweeps of `model_zoo.ops.tiled` as Triton kernels: fp32, bf16 and fp16 on CUDA.

A program holds a block of tokens (or, for sums over tokens, a tile of codes) and loops over its list of live tiles. If
there are fewer programs than multiprocessors, several programs share a list; each writes a partial result, and these
are added in a fixed order. No kernel uses atomics, so equal input gives equal bits.

Products of half-precision operands are exact and accumulated in fp32. The products for o, dz and dC first round p and
dl to the operands' dtype. In fp16 values below 2^-24 are lost, so bf16 suits large codebooks better. Products of fp32
operands follow `torch.get_float32_matmul_precision()`: fp32 for "highest", otherwise TF32 on the tensor cores.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model_zoo.errors import ModelError
from model_zoo.ops.tiled import Assignment, EntropyGradient, HardGradient, RowStatistics, SoftGradient, Sweeps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_DIM = 512
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
CHOSEN_STEP = tl.constexpr(16)  # tokens at a time in the sums of the hard assignment: the minimum of tl.dot


class Device(NamedTuple):
    """Properties that block sizes depend on. shared_bytes: maximum shared memory of a program; 0 in the interpreter."""

    multiprocessors: int
    shared_bytes: int


INTERPRETER = Device(8, 0)  # more than the blocks of most tests, so that lists are shared in the interpreter too


class Shape(NamedTuple):
    """Block sizes.

    tokens, codes: size of a tile, powers of two. step: tokens at a time if a program holds a tile of codes.
    depth: number of dimensions of D that a product z C^T processes at a time. If it is all of D, a program keeps its
    operands in shared memory. In fp32 it is a slice of D, and operands are read again for each tile, from the cache:
    without tensor cores both factors must fit in registers, and with tensor cores slices avoid register spills.
    """

    tokens: int
    codes: int
    step: int
    depth: int


def shape_of(width: int, dtype: torch.dtype, device: Device, tile: tuple[int, int] | None) -> Shape:
    """Block sizes for D padded to ``width``; ``tile`` overrides the tile's. They do not depend on the precision of fp32
    products, which may change before the backward pass, while the maxima of the forward pass's tiles are reused."""
    if device == INTERPRETER:
        tokens, codes = tile or (16, 16)
        return Shape(tokens, codes, 16, min(width, 32) if dtype == torch.float32 else width)
    rows = device.shared_bytes // (width * dtype.itemsize)
    if dtype == torch.float32:
        tokens, codes = tile or (64 if width <= 256 else 32, 32)
        return Shape(tokens, codes, min(tokens, 32), min(width, 32))
    # 128 x 256 accumulators in fp32 take half of a multiprocessor's registers; 64 x 512 turned out to be too many.
    tiles = [(128, 64), (64, 64), (64, 32), (32, 32), (16, 16)] if width <= 256 else [(32, 32), (16, 16)]
    for tokens, codes in [tile] if tile else tiles:
        if _stages(rows, 2 * tokens, codes) > 1:
            break
    step = min(tokens, 64)
    while step > 16 and _stages(rows, codes, 2 * step) < 2:
        step //= 2
    return Shape(tokens, codes, step, width)


def _stages(rows: int, kept: int, moving: int) -> int:
    """Number of pipeline stages, at most three: how many tiles of ``moving`` rows fit into shared memory of ``rows``
    rows beside the ``kept`` rows. One tile stays free: for dl, and as Blackwell's tensor cores hold operands longer."""
    return max(0, min(3, (rows - kept) // moving - 1))


def _precision(dtype: torch.dtype) -> str:
    """Triton's name for the precision of products; has no effect on half precision."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


# An argument `rows` of a device function is a triple: a matrix, the numbers of the requested rows, the number of rows.


@triton.jit
def _load(rows, start, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Columns ``[start, start + WIDTH)`` of the rows, ``(rows, WIDTH)``; zero outside the matrix."""
    matrix, at, count = rows
    d = start + tl.arange(0, WIDTH)
    inside = (at < count)[:, None]
    if DIM % WIDTH != 0:
        inside = inside & (d < DIM)[None, :]
    return tl.load(matrix + at.to(tl.int64)[:, None] * DIM + d[None, :], mask=inside, other=0.0)


@triton.jit
def _dot(left, right, sums, PRECISION: tl.constexpr):
    """sums + left right in fp32."""
    if INTERPRETED:  # the interpreter multiplies the bits of bf16 as integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision=PRECISION)


@triton.jit
def _load_kept(rows, DIM: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """The rows that a program keeps if products process all of D at once; None if they read slices."""
    return _load(rows, 0, DIM, WIDTH) if DEPTH == WIDTH else None


@triton.jit
def _products(
    left_rows, left, right_rows, right,
    DIM: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left right^T, from loaded rows or slice by slice."""
    products = tl.zeros([left_rows[1].shape[0], right_rows[1].shape[0]], tl.float32)
    if DEPTH == WIDTH:
        products = _dot(left, right.T, products, PRECISION)
    else:
        for start in range(0, DIM, DEPTH):
            left_slice = _load(left_rows, start, DIM, DEPTH)
            right_slice = _load(right_rows, start, DIM, DEPTH)
            products = _dot(left_slice, right_slice.T, products, PRECISION)
    return products


@triton.jit
def _share(first, last):
    """This program's part of the steps ``[first, last)``, which axis 1 of the grid divides evenly and in order."""
    split, splits, steps = tl.program_id(1), tl.num_programs(1), last - first
    return first + steps * split // splits, first + steps * (split + 1) // splits


@triton.jit
def _soft_gradient(logits, slopes, max_, sum_, grad_output):
    """p (g C^T - g . o); the arguments broadcast to the tile."""
    return tl.exp(logits - max_) * (1 / sum_) * (slopes - grad_output)


@triton.jit
def _entropy_gradient(logits, max_, log_sum, entropy, sample, average, values, temperature):
    """q (v - q . v - s (log q + H)) / temperature; the arguments broadcast to the tile."""
    log_q = (logits - max_) / temperature - log_sum
    return tl.exp(log_q) * ((values - average - sample * (log_q + entropy)) / temperature)


@triton.jit
def first_kernel(
    z_nd, codebook_kd, tile_max_tn, max_sn, index_sn, sum_sn, output_snd, tokens, codes,
    WITH_OUTPUT: tl.constexpr, TOKENS: tl.constexpr, CODES: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a block of tokens and a part of the tiles: running maxima and online softmax."""
    at = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    z_rows = (z_nd, at, tokens)
    z = _load_kept(z_rows, DIM, WIDTH, DEPTH)
    max_ = tl.full([TOKENS], float("-inf"), tl.float32)
    index = tl.zeros([TOKENS], tl.int32)
    if WITH_OUTPUT:
        sum_ = tl.zeros([TOKENS], tl.float32)
        output = tl.zeros([TOKENS, WIDTH], tl.float32)
    first, last = _share(0, tl.cdiv(codes, CODES))
    tile_max_pointers = tile_max_tn + first.to(tl.int64) * tokens + at
    for tile in range(first, last):
        code = tile * CODES + tl.arange(0, CODES)
        c_rows = (codebook_kd, code, codes)
        c = _load(c_rows, 0, DIM, WIDTH)
        logits = _products(z_rows, z, c_rows, c, DIM, WIDTH, DEPTH, PRECISION)
        logits = tl.where((code < codes)[None, :], logits, float("-inf"))
        # Ties go to the lowest index: the first within a tile, and a later tile must have a strictly larger logit.
        tile_max, column = tl.max(logits, 1, return_indices=True, return_indices_tie_break_left=True)
        tl.store(tile_max_pointers, tile_max, mask=at < tokens)
        tile_max_pointers += tokens
        index = tl.where(tile_max > max_, tile * CODES + column, index)
        raised = tl.maximum(max_, tile_max)
        if WITH_OUTPUT:
            exp = tl.exp(logits - raised[:, None])
            scale = tl.exp(max_ - raised)
            sum_ = sum_ * scale + tl.sum(exp, 1)
            output = _dot(exp.to(c.dtype), c, output * scale[:, None], PRECISION)
        max_ = raised
    row = tl.program_id(1).to(tl.int64) * tokens + at
    tl.store(max_sn + row, max_, mask=at < tokens)
    tl.store(index_sn + row, index, mask=at < tokens)
    if WITH_OUTPUT:
        tl.store(sum_sn + row, sum_, mask=at < tokens)
        d = tl.arange(0, WIDTH)
        inside = (at < tokens)[:, None] & (d < DIM)[None, :]
        tl.store(output_snd + row[:, None] * DIM + d[None, :], output, mask=inside)


@triton.jit
def gap_kernel(tile_max_tn, max_n, gap_tb, tokens, tiles, blocks, TOKENS: tl.constexpr, TILES: tl.constexpr):
    """For each tile and block, the largest difference over tokens between the tile's maximum and the row's maximum."""
    block = tl.program_id(0)
    at, tile = block * TOKENS + tl.arange(0, TOKENS), tl.program_id(1) * TILES + tl.arange(0, TILES)
    pointers = tile_max_tn + tile.to(tl.int64)[:, None] * tokens + at[None, :]
    tile_max = tl.load(pointers, mask=(tile < tiles)[:, None] & (at < tokens)[None, :], other=float("-inf"))
    gap = tile_max - tl.load(max_n + at, mask=at < tokens, other=0.0)[None, :]
    tl.store(gap_tb + tile.to(tl.int64) * blocks + block, tl.max(gap, 1), mask=tile < tiles)


@triton.jit
def assignment_rows_kernel(
    z_nd, codebook_kd, hot_list, hot_count, max_n, log_sum_n, values_k, first_sn, second_sn,
    tokens, codes, temperature,
    TOKENS: tl.constexpr, CODES: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a block of tokens: q . values; or without values the sums of exp(x) and of exp(x) x."""
    block = tl.program_id(0)
    at = block * TOKENS + tl.arange(0, TOKENS)
    z_rows = (z_nd, at, tokens)
    z = _load_kept(z_rows, DIM, WIDTH, DEPTH)
    max_ = tl.load(max_n + at, mask=at < tokens, other=0.0)
    if values_k is not None:
        log_sum = tl.load(log_sum_n + at, mask=at < tokens, other=0.0)
    first_sum = tl.zeros([TOKENS], tl.float32)
    second_sum = tl.zeros([TOKENS], tl.float32)
    numbers = hot_list + block.to(tl.int64) * tl.cdiv(codes, CODES)
    first, last = _share(0, tl.load(hot_count + block))
    for i in range(first, last):
        code = tl.load(numbers + i) * CODES + tl.arange(0, CODES)
        c_rows = (codebook_kd, code, codes)
        c = _load_kept(c_rows, DIM, WIDTH, DEPTH)
        x = (_products(z_rows, z, c_rows, c, DIM, WIDTH, DEPTH, PRECISION) - max_[:, None]) / temperature
        if values_k is not None:
            values = tl.load(values_k + code, mask=code < codes, other=0.0)
            x = tl.where((code < codes)[None, :], x - log_sum[:, None], 0.0)
            first_sum += tl.sum(tl.exp(x) * values[None, :], 1)
        else:
            exp = tl.where((code < codes)[None, :], tl.exp(x), 0.0)
            first_sum += tl.sum(exp, 1)
            second_sum += tl.sum(exp * x, 1)
    row = tl.program_id(1).to(tl.int64) * tokens + at
    tl.store(first_sn + row, first_sum, mask=at < tokens)
    if values_k is None:
        tl.store(second_sn + row, second_sum, mask=at < tokens)


@triton.jit
def assignment_columns_kernel(
    z_nd, codebook_kd, hot_list, hot_count, max_n, log_sum_n, columns_sk, tokens, codes, temperature,
    STEP: tl.constexpr, TOKENS: tl.constexpr, CODES: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a tile of codes: the sums of q over tokens."""
    tile = tl.program_id(0)
    code = tile * CODES + tl.arange(0, CODES)
    c_rows = (codebook_kd, code, codes)
    c = _load_kept(c_rows, DIM, WIDTH, DEPTH)
    columns = tl.zeros([CODES], tl.float32)
    numbers = hot_list + tile.to(tl.int64) * tl.cdiv(tokens, TOKENS)
    first, last = _share(0, tl.load(hot_count + tile) * (TOKENS // STEP))
    for i in range(first, last):
        at = _step_of_list(numbers, i, TOKENS, STEP)
        z_rows = (z_nd, at, tokens)
        z = _load_kept(z_rows, DIM, WIDTH, DEPTH)
        logits = _products(c_rows, c, z_rows, z, DIM, WIDTH, DEPTH, PRECISION)
        max_ = tl.load(max_n + at, mask=at < tokens, other=0.0)
        log_sum = tl.load(log_sum_n + at, mask=at < tokens, other=0.0)
        q = tl.exp((logits - max_[None, :]) / temperature - log_sum[None, :])
        columns += tl.sum(tl.where((at < tokens)[None, :], q, 0.0), 1)
    tl.store(columns_sk + tl.program_id(1).to(tl.int64) * codes + code, columns, mask=code < codes)


@triton.jit
def _step_of_list(numbers, i, TOKENS: tl.constexpr, STEP: tl.constexpr):
    """Step ``i`` over the tokens of the listed blocks."""
    steps: tl.constexpr = TOKENS // STEP
    return tl.load(numbers + i // steps) * TOKENS + (i % steps) * STEP + tl.arange(0, STEP)


# Rows outside the operands are loaded as zero, but dl can be infinite there, and 0 times infinity is NaN: mask dl.


@triton.jit
def grad_z_kernel(
    z_nd, codebook_kd, max_n, grad_nd, sum_n, grad_output_n, soft_list, soft_count,
    log_sum_n, entropy_n, sample_n, average_n, average_k, hot_list, hot_count,
    grad_z_snd, tokens, codes, temperature,
    TOKENS: tl.constexpr, CODES: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a block of tokens: dl C."""
    block = tl.program_id(0)
    at = block * TOKENS + tl.arange(0, TOKENS)
    z_rows = (z_nd, at, tokens)
    z = _load_kept(z_rows, DIM, WIDTH, DEPTH)
    max_ = tl.load(max_n + at, mask=at < tokens, other=0.0)
    grad_z = tl.zeros([TOKENS, WIDTH], tl.float32)
    if soft_list is not None:
        grad_rows = (grad_nd, at, tokens)
        grad = _load_kept(grad_rows, DIM, WIDTH, DEPTH)
        sum_ = tl.load(sum_n + at, mask=at < tokens, other=1.0)
        grad_output = tl.load(grad_output_n + at, mask=at < tokens, other=0.0)
        numbers = soft_list + block.to(tl.int64) * tl.cdiv(codes, CODES)
        first, last = _share(0, tl.load(soft_count + block))
        for i in range(first, last):
            code = tl.load(numbers + i) * CODES + tl.arange(0, CODES)
            c_rows = (codebook_kd, code, codes)
            c = _load(c_rows, 0, DIM, WIDTH)
            logits = _products(z_rows, z, c_rows, c, DIM, WIDTH, DEPTH, PRECISION)
            slopes = _products(grad_rows, grad, c_rows, c, DIM, WIDTH, DEPTH, PRECISION)
            grad_logits = _soft_gradient(logits, slopes, max_[:, None], sum_[:, None], grad_output[:, None])
            grad_logits = tl.where((code < codes)[None, :], grad_logits, 0.0)
            grad_z = _dot(grad_logits.to(c.dtype), c, grad_z, PRECISION)
    if hot_list is not None:
        log_sum = tl.load(log_sum_n + at, mask=at < tokens, other=0.0)
        entropy = tl.load(entropy_n + at, mask=at < tokens, other=0.0)
        sample = tl.load(sample_n + at, mask=at < tokens, other=0.0)
        average = tl.load(average_n + at, mask=at < tokens, other=0.0)
        numbers = hot_list + block.to(tl.int64) * tl.cdiv(codes, CODES)
        first, last = _share(0, tl.load(hot_count + block))
        for i in range(first, last):
            code = tl.load(numbers + i) * CODES + tl.arange(0, CODES)
            c_rows = (codebook_kd, code, codes)
            c = _load(c_rows, 0, DIM, WIDTH)
            logits = _products(z_rows, z, c_rows, c, DIM, WIDTH, DEPTH, PRECISION)
            values = tl.load(average_k + code, mask=code < codes, other=0.0)
            grad_logits = _entropy_gradient(
                logits, max_[:, None], log_sum[:, None], entropy[:, None], sample[:, None], average[:, None],
                values[None, :], temperature,
            )  # fmt: skip
            grad_logits = tl.where((code < codes)[None, :], grad_logits, 0.0)
            grad_z = _dot(grad_logits.to(c.dtype), c, grad_z, PRECISION)
    row, d = tl.program_id(1).to(tl.int64) * tokens + at, tl.arange(0, WIDTH)
    inside = (at < tokens)[:, None] & (d < DIM)[None, :]
    tl.store(grad_z_snd + row[:, None] * DIM + d[None, :], grad_z, mask=inside)


@triton.jit
def grad_codebook_kernel(
    z_nd, codebook_kd, max_n, grad_nd, sum_n, grad_output_n, soft_list, soft_count,
    log_sum_n, entropy_n, sample_n, average_n, average_k, hot_list, hot_count,
    chosen_grad_nd, chosen_index_n, chosen_order_n, chosen_bounds_t,
    grad_codebook_skd, tokens, codes, temperature,
    STEP: tl.constexpr, TOKENS: tl.constexpr, CODES: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For a tile of codes: dl^T z plus the gradients of the tokens that chose these codes. Tiles are transposed, so
    that dl^T has the layout that the product needs."""
    tile = tl.program_id(0)
    code = tile * CODES + tl.arange(0, CODES)
    grad_c = tl.zeros([CODES, WIDTH], tl.float32)
    if chosen_bounds_t is not None:
        # Tokens are sorted by code, so those of this tile are contiguous. A product with one-hot codes sums them.
        first, last = _share(tl.load(chosen_bounds_t + tile), tl.load(chosen_bounds_t + tile + 1))
        for start in range(first, last, CHOSEN_STEP):
            place = start + tl.arange(0, CHOSEN_STEP)
            chosen = tl.load(chosen_index_n + place, mask=place < last, other=-1)
            at = tl.load(chosen_order_n + place, mask=place < last, other=0)
            one_hot = (code[:, None] == chosen[None, :]).to(tl.float32)
            chosen_grad = _load((chosen_grad_nd, at, tokens), 0, DIM, WIDTH)
            grad_c = _dot(one_hot, chosen_grad, grad_c, "ieee")
    c_rows = (codebook_kd, code, codes)
    c = _load_kept(c_rows, DIM, WIDTH, DEPTH)
    # The entropies come first: after the soft part sm_90 would be two registers short.
    if hot_list is not None:
        values = tl.load(average_k + code, mask=code < codes, other=0.0)
        numbers = hot_list + tile.to(tl.int64) * tl.cdiv(tokens, TOKENS)
        first, last = _share(0, tl.load(hot_count + tile) * (TOKENS // STEP))
        for i in range(first, last):
            at = _step_of_list(numbers, i, TOKENS, STEP)
            z_rows = (z_nd, at, tokens)
            z = _load(z_rows, 0, DIM, WIDTH)
            max_ = tl.load(max_n + at, mask=at < tokens, other=0.0)
            log_sum = tl.load(log_sum_n + at, mask=at < tokens, other=0.0)
            entropy = tl.load(entropy_n + at, mask=at < tokens, other=0.0)
            sample = tl.load(sample_n + at, mask=at < tokens, other=0.0)
            average = tl.load(average_n + at, mask=at < tokens, other=0.0)
            logits = _products(c_rows, c, z_rows, z, DIM, WIDTH, DEPTH, PRECISION)
            grad_logits = _entropy_gradient(
                logits, max_[None, :], log_sum[None, :], entropy[None, :], sample[None, :], average[None, :],
                values[:, None], temperature,
            )  # fmt: skip
            grad_logits = tl.where((at < tokens)[None, :], grad_logits, 0.0)
            grad_c = _dot(grad_logits.to(z.dtype), z, grad_c, PRECISION)
    if soft_list is not None:
        numbers = soft_list + tile.to(tl.int64) * tl.cdiv(tokens, TOKENS)
        first, last = _share(0, tl.load(soft_count + tile) * (TOKENS // STEP))
        for i in range(first, last):
            at = _step_of_list(numbers, i, TOKENS, STEP)
            z_rows, grad_rows = (z_nd, at, tokens), (grad_nd, at, tokens)
            z, grad = _load(z_rows, 0, DIM, WIDTH), _load_kept(grad_rows, DIM, WIDTH, DEPTH)
            max_ = tl.load(max_n + at, mask=at < tokens, other=0.0)
            sum_ = tl.load(sum_n + at, mask=at < tokens, other=1.0)
            grad_output = tl.load(grad_output_n + at, mask=at < tokens, other=0.0)
            logits = _products(c_rows, c, z_rows, z, DIM, WIDTH, DEPTH, PRECISION)
            slopes = _products(c_rows, c, grad_rows, grad, DIM, WIDTH, DEPTH, PRECISION)
            grad_logits = _soft_gradient(logits, slopes, max_[None, :], sum_[None, :], grad_output[None, :])
            grad_logits = tl.where((at < tokens)[None, :], grad_logits, 0.0)
            grad_c = _dot(grad_logits.to(z.dtype), z, grad_c, PRECISION)
    row, d = tl.program_id(1).to(tl.int64) * codes + code, tl.arange(0, WIDTH)
    inside = (code < codes)[:, None] & (d < DIM)[None, :]
    tl.store(grad_codebook_skd + row[:, None] * DIM + d[None, :], grad_c, mask=inside)


class TritonSweeps(Sweeps):
    """Sweeps on CUDA tensors, or on any tensors in Triton's interpreter."""

    def __init__(self, z_nd, codebook_kd, codes, settings, maxima=None):
        super().__init__(z_nd.contiguous(), codebook_kd.contiguous(), codes, settings, maxima)
        (tokens, dim), dtype = z_nd.shape, z_nd.dtype
        if dtype not in DTYPES or codebook_kd.dtype != dtype:
            raise ModelError(
                "impl='triton' takes z and codebook both in fp32, bf16 or fp16, not "
                f"{dtype} and {codebook_kd.dtype}: use impl='chunked'"
            )
        if dim > LARGEST_DIM:
            raise ModelError(f"impl='triton' takes at most {LARGEST_DIM} dimensions, not {dim}: use impl='chunked'")
        self.device = device_of(z_nd)
        self.width = max(16, triton.next_power_of_2(dim))
        self.shape = shape_of(self.width, dtype, self.device, settings.tile)
        self.blocks, self.tiles = -(-tokens // self.shape.tokens), -(-len(codebook_kd) // self.shape.codes)

    def row_statistics(self, with_output: bool) -> RowStatistics:
        parts = self._parts(self.blocks, self.tiles)
        self.maxima, max_sn = self._per_token(self.tiles), self._per_token(parts)
        index_sn = torch.empty_like(max_sn, dtype=torch.int32)
        sum_sn = output_snd = None
        if with_output:
            sum_sn, output_snd = self._per_token(parts), max_sn.new_empty(parts, *self.z_nd.shape)
            if self.settings.stats:
                self.settings.stats.add("output", self.maxima.numel(), self.maxima.numel())
        self._over_tiles(
            first_kernel, parts, tile_max_tn=self.maxima, max_sn=max_sn, index_sn=index_sn,
            sum_sn=sum_sn, output_snd=output_snd, WITH_OUTPUT=with_output,
        )  # fmt: skip
        # Earlier parts hold lower indices, and `max` returns the first of equal maxima.
        max_n, part_n = max_sn.max(dim=0)
        index_n = index_sn.gather(0, part_n[None])[0].long()
        if not with_output:
            return RowStatistics(index_n, max_n, None, None)
        scale_sn = (max_sn - max_n).exp()
        sum_n, output_nd = sum_sn.mul_(scale_sn).sum(dim=0), output_snd.mul_(scale_sn[:, :, None]).sum(dim=0)
        return RowStatistics(index_n, max_n, sum_n, output_nd)

    def set_global_max(self, max_n: Tensor) -> None:
        """Reduces ``maxima`` ``(tiles, tokens)`` to gaps ``(tiles, blocks)``: tiles are skipped for whole blocks."""
        tiles, gap_tb = 16, max_n.new_empty(self.tiles, self.blocks)
        arguments = {"tile_max_tn": self.maxima, "max_n": max_n, "gap_tb": gap_tb, "tokens": len(self.z_nd)}
        arguments |= {"tiles": self.tiles, "blocks": self.blocks, "TOKENS": self.shape.tokens, "TILES": tiles}
        launch(gap_kernel, (self.blocks, -(-self.tiles // tiles)), arguments, {"num_warps": 4, "num_stages": 1})
        self.maxima = gap_tb

    def assignment_sums(self, max_n: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        parts = self._parts(self.blocks, self.tiles)
        sum_sn, moment_sn = self._per_token(parts), self._per_token(parts)
        self._over_tiles(
            assignment_rows_kernel, parts, max_n=max_n, log_sum_n=None, values_k=None, first_sn=sum_sn,
            second_sn=moment_sn, temperature=temperature,
            **_lists("hot", self._live("assignment", temperature).T),
        )  # fmt: skip
        return sum_sn.sum(dim=0), moment_sn.sum(dim=0)

    def assignment_dot(self, max_n: Tensor, assignment: Assignment, values_k: Tensor) -> Tensor:
        parts = self._parts(self.blocks, self.tiles)
        dot_sn = self._per_token(parts)
        self._over_tiles(
            assignment_rows_kernel, parts, max_n=max_n, log_sum_n=assignment.log_sum_n, values_k=values_k.contiguous(),
            first_sn=dot_sn, second_sn=None, temperature=assignment.temperature,
            **_lists("hot", self._live("average_gradient", assignment.temperature).T),
        )  # fmt: skip
        return dot_sn.sum(dim=0)

    def assignment_columns(self, max_n: Tensor, assignment: Assignment) -> Tensor:
        parts = self._parts(self.tiles, self.blocks)
        columns_sk = max_n.new_empty(parts, len(self.codebook_kd))
        self._over_tokens(
            assignment_columns_kernel, parts, max_n=max_n, log_sum_n=assignment.log_sum_n, columns_sk=columns_sk,
            temperature=assignment.temperature, **_lists("hot", self._live("average", assignment.temperature)),
        )  # fmt: skip
        return columns_sk.sum(dim=0)

    def gradients(
        self,
        max_n: Tensor,
        soft: SoftGradient | None,
        entropy: EntropyGradient | None,
        hard: HardGradient | None,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        arguments = {"max_n": max_n} | self._soft_arguments(soft) | self._entropy_arguments(entropy)
        soft_live = self._live("soft_gradient", 1.0) if soft else None
        hot_live = self._live("entropy_gradient", entropy.assignment.temperature) if entropy else None

        grad_z_nd = grad_codebook_kd = None
        if needs[0] and (soft or entropy):
            parts = self._parts(self.blocks, self.tiles)
            # Two launches, since one kernel with both terms would need too many registers for the largest blocks.
            no_soft, no_hot = self._soft_arguments(None) | _lists("soft", None), _lists("hot", None)
            terms = []
            if soft:
                terms.append(_lists("soft", soft_live.T) | no_hot)
            if entropy:
                terms.append(no_soft | _lists("hot", hot_live.T))
            grad_z_snd = max_n.new_empty(parts * len(terms), *self.z_nd.shape)
            for term, of_term_snd in zip(terms, grad_z_snd.split(parts), strict=True):
                self._over_tiles(grad_z_kernel, parts, grad_z_snd=of_term_snd, **(arguments | term))
            grad_z_nd = grad_z_snd.sum(dim=0)
        if needs[1]:
            parts, codebook_kd = self._parts(self.tiles, self.blocks), self.codebook_kd
            # Without sharing, programs write the result directly; only small codebooks need another K x D in fp32.
            dtype = max_n.dtype if parts > 1 else codebook_kd.dtype
            grad_codebook_skd = codebook_kd.new_empty(parts, *codebook_kd.shape, dtype=dtype)
            lists = _lists("soft", soft_live) | _lists("hot", hot_live) | self._chosen(hard)
            self._over_tokens(grad_codebook_kernel, parts, grad_codebook_skd=grad_codebook_skd, **arguments, **lists)
            grad_codebook_kd = grad_codebook_skd[0]
            if parts > 1:
                grad_codebook_kd = grad_codebook_skd.sum(dim=0).to(codebook_kd.dtype)
        return grad_z_nd, grad_codebook_kd

    def _soft_arguments(self, soft: SoftGradient | None) -> dict:
        if soft is None:
            return dict.fromkeys(("grad_nd", "sum_n", "grad_output_n"))
        # The gradient arrived in the operands' dtype, so converting it back is exact.
        return soft._asdict() | {"grad_nd": soft.grad_nd.to(self.z_nd.dtype).contiguous()}

    def _entropy_arguments(self, entropy: EntropyGradient | None) -> dict:
        names = ("log_sum_n", "entropy_n", "sample_n", "average_n", "average_k", "temperature")
        if entropy is None:
            return dict.fromkeys(names)
        assignment, sample_n, average_k, average_n = entropy
        none_n = torch.zeros_like(assignment.entropy_n)
        sample_n = none_n if sample_n is None else sample_n.contiguous()
        if average_k is None:
            average_k, average_n = none_n.new_zeros(len(self.codebook_kd)), none_n
        values = (assignment.log_sum_n, assignment.entropy_n, sample_n, average_n, average_k.contiguous())
        return dict(zip(names, (*values, assignment.temperature), strict=True))

    def _chosen(self, hard: HardGradient | None) -> dict:
        """Tokens sorted by their chosen code, and the range of each tile; other ranks' codes lie outside all ranges."""
        names = ("chosen_grad_nd", "chosen_index_n", "chosen_order_n", "chosen_bounds_t")
        if hard is None:
            return dict.fromkeys(names)
        index_n, order_n = hard.index_n.sort(stable=True)
        edges = torch.arange(self.tiles + 1, device=index_n.device).mul_(self.shape.codes)
        bounds = torch.searchsorted(index_n, edges.clamp_(max=len(self.codebook_kd)), out_int32=True)
        return dict(zip(names, (hard.grad_nd.contiguous(), index_n, order_n, bounds), strict=True))

    def _live(self, name: str, temperature: float) -> Tensor:
        """int8 ``(tiles, blocks)``: 1 if a tile contributes more than rounding error to any token of a block."""
        tokens = len(self.z_nd)
        margin = self.skip_margin(temperature) if self.settings.skip else math.inf
        live_tb = (self.maxima >= -margin).to(torch.int8)
        if self.settings.stats:
            rows_b = torch.full_like(live_tb[0], self.shape.tokens, dtype=torch.int64)
            rows_b[-1] = tokens - (self.blocks - 1) * self.shape.tokens
            self.settings.stats.add(name, self.tiles * tokens, int((live_tb * rows_b).sum()))
        return live_tb

    def _per_token(self, parts: int) -> Tensor:
        return self.z_nd.new_empty(parts, len(self.z_nd), dtype=torch.float32)

    def _parts(self, programs: int, steps: int) -> int:
        """Number of programs that share each list, so that all multiprocessors are busy."""
        return max(1, min(steps, self.device.multiprocessors // max(1, programs)))

    def _over_tiles(self, kernel, parts: int, **arguments) -> None:
        """Launches one program per block of tokens. It keeps the block's rows, and those of its gradients if used."""
        kept = self.shape.tokens * (1 if arguments.get("soft_list") is None else 2)
        self._launch(kernel, (self.blocks, parts), kept, self.shape.codes, arguments)

    def _over_tokens(self, kernel, parts: int, **arguments) -> None:
        """Launches one program per tile of codes."""
        moving = self.shape.step * (1 if arguments.get("soft_list") is None else 2)
        self._launch(kernel, (self.tiles, parts), self.shape.codes, moving, arguments | {"STEP": self.shape.step})

    def _launch(self, kernel, grid: tuple[int, int], kept: int, moving: int, arguments: dict) -> None:
        shape, dtype = self.shape, self.z_nd.dtype
        arguments |= {"z_nd": self.z_nd, "codebook_kd": self.codebook_kd}
        arguments |= {"tokens": len(self.z_nd), "codes": len(self.codebook_kd), "TOKENS": shape.tokens}
        arguments |= {"CODES": shape.codes, "DIM": self.z_nd.shape[1], "WIDTH": self.width, "DEPTH": shape.depth}
        arguments |= {"PRECISION": _precision(dtype)}
        rows = self.device.shared_bytes // (self.width * dtype.itemsize)
        stages = max(1, _stages(rows, kept, moving)) if shape.depth == self.width else 3
        warps = 8 if kept * self.width >= 64 * 64 else 4
        launch(kernel, grid, arguments, {"num_warps": warps, "num_stages": stages})


def suits(z_nd: Tensor, codebook_kd: Tensor) -> bool:
    """Whether the kernels support these operands and their device: an NVIDIA GPU of compute capability 8.0 or more."""
    if not z_nd.is_cuda or torch.version.cuda is None or torch.cuda.get_device_capability(z_nd.device) < (8, 0):
        return False
    return z_nd.dtype == codebook_kd.dtype and z_nd.dtype in DTYPES and z_nd.shape[1] <= LARGEST_DIM


def device_of(z_nd: Tensor) -> Device:
    """The device of a tensor. Raises ModelError if the kernels do not support it."""
    if INTERPRETED:
        return INTERPRETER
    if not z_nd.is_cuda:
        raise ModelError(
            "impl='triton' takes CUDA tensors: use impl='chunked', or set TRITON_INTERPRET=1 before Python starts"
        )
    properties = torch.cuda.get_device_properties(z_nd.device)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def launch(kernel, grid: tuple[int, int], arguments: dict, options: dict) -> None:
    """Launches a kernel. All launches go through here, so that a test can record their arguments."""
    if 0 not in grid:  # CUDA rejects an empty grid
        with torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, Tensor))):
            kernel[grid](**arguments, **options)


def _lists(name: str, live: Tensor | None) -> dict[str, Tensor | None]:
    """Kernel arguments: for each row of ``live`` the numbers of its live columns in order, and their count."""
    if live is None:
        return {f"{name}_list": None, f"{name}_count": None}
    # nonzero() would synchronise with the device.
    live = live.contiguous()
    numbers = live.argsort(dim=1, descending=True, stable=True).int()
    return {f"{name}_list": numbers, f"{name}_count": live.sum(dim=1, dtype=torch.int32)}
