"""Fused linear layer and cross-entropy: the loss of a generator over codes, without tokens x vocabulary logits."""

import functools
import importlib
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model_zoo.errors import ModelError
from model_zoo.ops.codebook_parallel import CodebookShard, GroupCommunicator
from model_zoo.ops.eager import eager
from model_zoo.ops.tiled import accumulation_dtype, fast_exp

# Bytes of the logits of one chunk of tokens. Each chunk reads and writes the whole gradient of the weight, so a GPU,
# which is limited by memory bandwidth here, needs larger chunks. Measured on two cores, see docs/LOG.md.
CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**30}
# Rows of the weight's gradient whose half-precision products are held at once, before they are accumulated in fp32.
HALF_ROWS = 8192
# liger returns z only multiplied by its z_weight. This weight is too small to change the loss in fp32.
NEGLIGIBLE_Z_WEIGHT = 2.0**-40


class LinearCrossEntropy(NamedTuple):
    """Result of `linear_cross_entropy`: scalars in fp32, or in fp64 for fp64 operands.

    loss: cross_entropy + z_weight * z, the only differentiable field.
    cross_entropy: mean over tokens of -log softmax(hidden weight^T)[target], in nats.
    z: mean over tokens of logsumexp(logits)^2, the z-loss of PaLM (arXiv 2204.02311, section 5).
    """

    loss: Tensor
    cross_entropy: Tensor
    z: Tensor


def linear_cross_entropy(
    hidden_nd: Tensor,
    weight_vd: Tensor,
    target_n: Tensor,
    *,
    z_weight: float = 0.0,
    impl: str = "auto",
    shard: CodebookShard | None = None,
) -> LinearCrossEntropy:
    """Cross-entropy of the logits ``hidden_nd @ weight_vd.T`` with int64 targets ``(N,)``, N at least 1.

    Under torch.autocast, or with operands in half precision, products use that dtype. Softmax and sums are always in
    fp32, and so is the weight's gradient until it is converted to the weight's dtype at the end.

    impl: ``dense`` builds the N x V logits and is the reference implementation. ``chunked`` holds the logits of some
        tokens at a time (`CHUNK_BYTES`) and computes the gradients in the forward pass, so it needs three matrix
        products, as dense does. The backward pass scales them by the incoming gradient in place; unless that is 1,
        backward can run only once. ``liger`` is liger-kernel's CUDA kernel, which works the same way. ``auto`` selects
        liger on CUDA if it is installed and supports the operands, otherwise chunked.
    shard: for a vocabulary sharded over ranks, the rows that ``weight_vd`` holds. All ranks of the group must call
        together, each with any number of its own tokens, and all must call backward with the same incoming gradient.
        The losses are means over this rank's tokens; the gradients are those of the sum of the ranks' losses.

    Raises ModelError for mismatched operands, an unavailable ``impl``, no tokens, and targets outside [0, V). With a
    shard, missing tokens, bad targets and shards that form no vocabulary raise on all ranks at once; mismatched shapes
    or dtypes raise only on their own rank while the others wait. On CUDA without a shard bad targets trigger a
    device-side assertion, since checking them on the host would synchronise at every step.
    """
    if hidden_nd.ndim != 2 or weight_vd.ndim != 2 or hidden_nd.shape[1] != weight_vd.shape[1]:
        raise ModelError(
            "linear_cross_entropy takes hidden (N, D) and weight (V, D), "
            f"not {tuple(hidden_nd.shape)} and {tuple(weight_vd.shape)}"
        )
    if target_n.shape != hidden_nd.shape[:1] or target_n.dtype != torch.int64:
        raise ModelError(
            f"linear_cross_entropy takes one int64 target for each of {len(hidden_nd)} tokens, "
            f"not {target_n.dtype} {tuple(target_n.shape)}"
        )
    dtype = _operand_dtype(hidden_nd, weight_vd)
    if impl == "auto":
        suits = hidden_nd.is_cuda and shard is None and dtype in (torch.float32, torch.bfloat16)
        impl = "liger" if suits and _liger() else "chunked"
    if impl not in ("dense", "chunked", "liger"):
        raise ModelError(f"unknown impl {impl!r}: choose one of auto, dense, chunked, liger")
    if shard is not None and impl != "chunked":
        raise ModelError(f"impl={impl!r} takes a whole vocabulary: use impl='chunked' or 'auto' with a shard")
    if shard is None:
        _check_targets(target_n, len(weight_vd))
    if impl == "dense":
        return _dense(hidden_nd, weight_vd, target_n, z_weight)
    if impl == "liger":
        return _fused(hidden_nd, weight_vd, target_n, z_weight, dtype)
    return _chunked(hidden_nd, weight_vd, target_n, z_weight, dtype, shard)


def _dense(hidden_nd: Tensor, weight_vd: Tensor, target_n: Tensor, z_weight: float) -> LinearCrossEntropy:
    """The formula, differentiated by autograd. Memory: several N x V matrices."""
    logits_nv = F.linear(hidden_nd, weight_vd)
    logits_nv = logits_nv.to(accumulation_dtype(logits_nv))
    log_sum_n = logits_nv.logsumexp(dim=1)
    cross_entropy = (log_sum_n - logits_nv.gather(1, target_n[:, None])[:, 0]).mean()
    z = log_sum_n.square().mean()
    return LinearCrossEntropy(cross_entropy + z_weight * z, cross_entropy.detach(), z.detach())


@eager
def _chunked(hidden_nd, weight_vd, target_n, z_weight, dtype, shard) -> LinearCrossEntropy:
    with_gradient = torch.is_grad_enabled()
    return LinearCrossEntropy(*_Chunked.apply(hidden_nd, weight_vd, target_n, z_weight, dtype, shard, with_gradient))


class _Chunked(torch.autograd.Function):
    """The logits of a chunk are stored as ``(V, C)``, so that both products with the weight read whole rows of it."""

    @staticmethod
    def forward(ctx, hidden_nd, weight_vd, target_n, z_weight, dtype, shard, with_gradient):
        needs_hidden, needs_weight = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        ctx.dtypes = hidden_nd.dtype, weight_vd.dtype
        with torch.autocast(hidden_nd.device.type, enabled=False):
            tokens = _Tokens(hidden_nd.to(dtype), target_n, weight_vd, shard)
            weight_vd = weight_vd.to(dtype)
            count, rows = len(tokens.hidden_nd), len(weight_vd)
            sums = accumulation_dtype(weight_vd)
            log_sum_n, cross_entropy_n = hidden_nd.new_empty(2, count, dtype=sums)
            # In the accumulation dtype, since it is summed over ranks.
            grad_hidden_nd = torch.empty_like(tokens.hidden_nd, dtype=sums) if needs_hidden else None
            # Not zeroed: the first chunk overwrites it (beta = 0).
            grad_weight_vd = weight_vd.new_empty(weight_vd.shape, dtype=sums) if needs_weight else None

            bytes_per_logit = sums.itemsize + (dtype.itemsize if dtype != sums else 0)
            chunks = _chunks(count, bytes_per_logit * tokens.rows_per_rank, hidden_nd.device.type)
            memory = weight_vd.new_empty(rows * chunks[0].stop, dtype=sums)
            half = memory.new_empty(memory.shape, dtype=dtype) if dtype != sums else memory
            for at in chunks:
                shape = rows, at.stop - at.start
                logits_vc, product_vc = (m[: math.prod(shape)].view(shape) for m in (memory, half))
                hidden_cd, local_c, mine_c = tokens.hidden_nd[at], tokens.local_n[None, at], tokens.mine_n[at]
                torch.mm(weight_vd, hidden_cd.T, out=product_vc)
                if product_vc is not logits_vc:
                    logits_vc.copy_(product_vc)

                max_c = tokens.reduce_(logits_vc.amax(dim=0), dist.ReduceOp.MAX)
                target_logit_c = logits_vc.gather(0, local_c)[0].where(mine_c, 0)
                fast_exp(logits_vc.sub_(max_c), out=logits_vc)
                sums_2c = torch.stack([logits_vc.sum(dim=0), target_logit_c])
                sum_c, target_logit_c = tokens.reduce_(sums_2c, dist.ReduceOp.SUM)
                log_sum_n[at] = log_sum_c = max_c + sum_c.log()
                # Large logits are subtracted first, for accuracy.
                cross_entropy_n[at] = sum_c.log() + (max_c - target_logit_c)
                if not (needs_hidden or needs_weight):
                    continue

                # Gradient of the logits, times the mean number of tokens per rank: p / N would underflow in fp16.
                loss_weight_c = tokens.loss_weight_n[at]
                logits_vc.mul_(loss_weight_c * (1 + 2 * z_weight * log_sum_c) / sum_c)
                logits_vc.scatter_(0, local_c, logits_vc.gather(0, local_c) - loss_weight_c * mine_c)
                if product_vc is not logits_vc:
                    product_vc.copy_(logits_vc)
                if needs_hidden:
                    grad_hidden_nd[at] = product_vc.T @ weight_vd
                if needs_weight:
                    _add_product(product_vc, hidden_cd, grad_weight_vd, 1 / tokens.mean_count, at.start == 0)
            if needs_hidden:
                grad_hidden_nd = tokens.scatter_sum(grad_hidden_nd)
        ctx.save_for_backward(grad_hidden_nd, grad_weight_vd)
        ctx.mean_count = tokens.mean_count
        cross_entropy = cross_entropy_n[tokens.own].mean()
        z = log_sum_n[tokens.own].square().mean()
        ctx.mark_non_differentiable(cross_entropy, z)
        return cross_entropy + z_weight * z, cross_entropy, z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        grad_hidden_nd, grad_weight_vd = ctx.saved_tensors
        if grad_hidden_nd is not None:
            grad_hidden_nd = (grad_hidden_nd * (grad_loss / ctx.mean_count)).to(ctx.dtypes[0])
        if grad_weight_vd is not None:
            # In place, since a copy would double the memory; autograd then raises on a second backward. Comparing the
            # factor with 1 would synchronise on CUDA.
            if grad_loss.is_cuda or grad_loss != 1:
                grad_weight_vd.mul_(grad_loss)
            grad_weight_vd = grad_weight_vd.to(ctx.dtypes[1])
        return grad_hidden_nd, grad_weight_vd, *5 * [None]


class _Tokens:
    """The tokens of all ranks of the group and the communication between them; without a shard, this process's tokens.

    own: position of this rank's tokens among all. mine_n: whether this rank's weight holds the token's target, and
    local_n: in which row. mean_count: mean number of tokens per rank. loss_weight_n: mean_count divided by the number
    of tokens of the token's rank.
    """

    def __init__(self, hidden_nd: Tensor, target_n: Tensor, weight_vd: Tensor, shard: CodebookShard | None):
        self.shard, self.rows_per_rank, self.mean_count = shard, len(weight_vd), len(target_n)
        self.hidden_nd, self.own, self.local_n = hidden_nd.contiguous(), slice(None), target_n
        self.loss_weight_n = hidden_nd.new_ones(len(target_n), dtype=accumulation_dtype(hidden_nd))
        if shard is not None:
            # Raises for targets outside the vocabulary.
            self.ranks = GroupCommunicator(target_n[:, None], weight_vd, shard)
            counts = torch.tensor(self.ranks.counts, device=target_n.device)
            if 0 in self.ranks.counts:
                raise ModelError(f"every rank needs a token, but the group's have {self.ranks.counts}")
            self.rows_per_rank, self.mean_count = -(-self.ranks.codes // len(counts)), self.ranks.tokens / len(counts)
            self.hidden_nd, self.own = self.ranks.gather(hidden_nd), self.ranks.own
            self.local_n = self.ranks.gather(target_n) - shard.start
            loss_weight_r = self.mean_count / counts.to(self.loss_weight_n.dtype)
            self.loss_weight_n = loss_weight_r.repeat_interleave(counts, output_size=self.ranks.tokens)
        self.mine_n = (self.local_n >= 0) & (self.local_n < len(weight_vd))
        self.local_n = self.local_n.clamp(0, len(weight_vd) - 1)

    def reduce_(self, value: Tensor, op: dist.ReduceOp) -> Tensor:
        if self.shard is not None:
            dist.all_reduce(value, op, group=self.shard.group)
        return value

    def scatter_sum(self, all_nd: Tensor) -> Tensor:
        return all_nd if self.shard is None else self.ranks.scatter_sum(all_nd)


def _add_product(left_vc: Tensor, right_cd: Tensor, sums_vd: Tensor, factor: float, first: bool) -> None:
    """sums += factor * left right; for the first chunk, sums = factor * left right. Half-precision products are
    computed `HALF_ROWS` rows at a time."""
    if left_vc.dtype == sums_vd.dtype:
        sums_vd.addmm_(left_vc, right_cd, beta=0 if first else 1, alpha=factor)
        return
    for some_vc, some_vd in zip(left_vc.split(HALF_ROWS), sums_vd.split(HALF_ROWS), strict=True):
        product_vd = some_vc @ right_cd
        torch.mul(product_vd, factor, out=some_vd) if first else some_vd.add_(product_vd, alpha=factor)


def _chunks(tokens: int, bytes_per_token: int, device_type: str) -> list[slice]:
    """Splits tokens into chunks of equal length, except the last."""
    most = max(1, CHUNK_BYTES[device_type] // bytes_per_token)
    step = -(-tokens // -(-tokens // most))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


@eager
def _fused(hidden_nd, weight_vd, target_n, z_weight, dtype) -> LinearCrossEntropy:
    """liger-kernel's Triton kernels, with our chunk size: at 2^18 codes its default chunks hold only a few tokens."""
    fused = _liger()
    if fused is None:
        raise ModelError("impl='liger' needs liger-kernel 0.8.5 or later: pip install liger-kernel")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ModelError(f"impl='liger' loses accuracy of the gradients in {dtype}: use impl='chunked'")
    if not torch.is_grad_enabled():
        hidden_nd, weight_vd = hidden_nd.detach(), weight_vd.detach()
    elif weight_vd.requires_grad and not hidden_nd.requires_grad:
        hidden_nd = hidden_nd.detach().requires_grad_()  # liger computes no gradients at all if hidden needs none
    (count, dim), rows = hidden_nd.shape, len(weight_vd)
    chunk = _chunks(count, dtype.itemsize * rows, "cuda")[0].stop
    scale = z_weight or NEGLIGIBLE_Z_WEIGHT
    out = fused(
        hidden_nd,
        weight_vd,
        target_n,
        lse_square_scale=scale,
        return_z_loss=True,
        accum_dtype=torch.float32,
        chunk_mem_const=-(-rows * chunk // (count * dim)),
    )
    z = out.z_loss.detach().float() / scale
    return LinearCrossEntropy(out.loss, out.loss.detach() - z_weight * z, z)


@functools.cache
def _liger():
    """liger-kernel's function, or None if it cannot be imported. Imported at first use, since it needs Triton."""
    try:
        return importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    except (ImportError, AttributeError):
        return None


def _operand_dtype(hidden_nd: Tensor, weight_vd: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's (which does not apply to fp64), otherwise the operands' common dtype."""
    if torch.is_autocast_enabled(hidden_nd.device.type) and torch.float64 not in (hidden_nd.dtype, weight_vd.dtype):
        return torch.get_autocast_dtype(hidden_nd.device.type)
    if hidden_nd.dtype != weight_vd.dtype:
        raise ModelError(f"hidden is {hidden_nd.dtype} and weight {weight_vd.dtype}: cast one, or use torch.autocast")
    return hidden_nd.dtype


def _check_targets(target_n: Tensor, vocabulary: int) -> None:
    if not len(target_n):
        raise ModelError("linear_cross_entropy needs at least one token: the mean over no tokens is undefined")
    if target_n.is_cuda:
        torch._assert_async(((target_n >= 0) & (target_n < vocabulary)).all(), f"targets must lie in [0, {vocabulary})")
        return
    least, most = (int(end) for end in target_n.aminmax())
    if least < 0 or most >= vocabulary:
        raise ModelError(f"targets must lie in [0, {vocabulary}), not from {least} to {most}")
