"""One row of `ibq bench quantizer` or `ibq bench cross-entropy`. Runs in a fresh process.

The reference is imported from a checkout of its project; this project contains none of its code.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model_zoo.ops import linear_cross_entropy
from model_zoo.ops.chunked import ChunkedSweeps
from model_zoo.ops.index_backprop import index_backprop_dense
from model_zoo.ops.tiled import Settings, SkipStats, index_backprop_tiled
from tools.bench.measure import Measured, load_reference, matmul_rate, normal_tensors, time_pass, time_passes
from tools.bench.quantizer import REFERENCE_CLASS

# A sweep is one product of all tokens with all codes. The number of sweeps of each counted pass, if it skips no tile.
# "first" computes the logits and never skips. In Triton two kernels compute dz and dC, and each recomputes dl.
ONE_EACH = dict.fromkeys(("first", "output", "assignment", "average", "average_gradient"), 1)
PRODUCTS = {
    "chunked": ONE_EACH | {"soft_gradient": 4, "entropy_gradient": 3},
    "triton": ONE_EACH | {"soft_gradient": 6, "entropy_gradient": 4},
}
# Sweeps of impls that skip nothing. dense: logits and code vectors; backward g C^T, onehot^T g, dl C, dl^T z.
# reference: the same, plus the code vectors of its VQ losses and their gradient. attention: two forward, five backward.
SWEEPS = {"dense": 6, "reference": 8, "attention": 7}


class Loss(NamedTuple):
    """of(stats): the loss of one forward pass; a tiled impl counts skipped tiles in stats, unless None. kernel: as in
    `Measured`."""

    of: Callable[[SkipStats | None], Tensor]
    kernel: str | None = None


def measure(
    *,
    impl: str,
    dtype: str,
    tokens: int,
    codes: int,
    dim: int,
    temperature: float | None = 0.01,
    scale: float = 1.0,
    skip: bool = True,
    tile: list[int] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    repeats: int = 1,
    reference: str | None = None,
) -> Measured:
    """Forward and backward passes of z, normal(0, scale^2), with a codebook, normal(0, 1), as at the start of training.

    The loss uses the quantized vectors and, with a temperature, both entropies (attention has none).
    """
    if threads:
        torch.set_num_threads(threads)
    normal = normal_tensors(dtype, device)

    def operands(tokens: int, codes: int) -> tuple[Tensor, Tensor, nn.Parameter]:
        shape = reference_shape(tokens, dim) if impl == "reference" else (tokens, dim)
        return normal(*shape).mul_(scale).requires_grad_(), normal(*shape), nn.Parameter(normal(codes, dim))

    def loss(z: Tensor, grad: Tensor, codebook_kd: nn.Parameter) -> Loss:
        if impl == "reference":
            return reference_loss(reference, z, grad, codebook_kd, temperature)
        if impl == "attention":
            return attention_loss(z, grad, codebook_kd)
        return index_backprop_loss(impl, z, grad, codebook_kd, temperature, skip, tile)

    rate = matmul_rate(normal, device, tokens, dim)
    small = loss(*operands(64, 600))
    time_pass(lambda: small.of(None), [], device)  # starts libraries and threads
    z, grad, codebook_kd = operands(tokens, codes)
    measured, learned = loss(z, grad, codebook_kd), [z, codebook_kd]
    stats = counted = SkipStats()
    if device == "cuda":
        time_pass(lambda: measured.of(counted), learned, device)  # compiles kernels for these shapes
        stats = None  # on CUDA, counting waits for the device
    passes = time_passes(lambda: measured.of(stats), learned, device, repeats)
    skipped = {name: counted.skip_rate(name) for name in counted.visited}
    sweeps = SWEEPS.get(impl)
    if sweeps is None:
        sweeps = PRODUCTS[impl]["first"] + sum(PRODUCTS[impl][name] * (1 - skipped[name]) for name in skipped)
    return passes._replace(
        sweeps=sweeps,
        operations_per_second=rate,
        skip_soft=skipped.get("soft_gradient"),
        skip_entropy=skipped.get("entropy_gradient"),
        kernel=measured.kernel,
    )


def cross_entropy(
    *,
    impl: str,
    dtype: str,
    tokens: int,
    codes: int,
    dim: int,
    device: str = "cpu",
    threads: int | None = None,
    repeats: int = 1,
) -> Measured:
    """Forward and backward passes of the mean cross-entropy. Logits are normal(0, 1), targets random.

    dense is the usual `F.cross_entropy(F.linear(hidden, weight), target)`; `linear_cross_entropy`'s own readable impl
    needs more memory.
    """
    if threads:
        torch.set_num_threads(threads)
    normal = normal_tensors(dtype, device)
    target_generator = torch.Generator(device).manual_seed(1)

    def operands(tokens: int, codes: int) -> tuple[Tensor, Tensor, Tensor]:
        target_n = torch.randint(codes, (tokens,), device=device, generator=target_generator)
        return normal(tokens, dim).requires_grad_(), normal(codes, dim).div_(dim**0.5).requires_grad_(), target_n

    def loss(hidden_nd: Tensor, weight_vd: Tensor, target_n: Tensor) -> Tensor:
        if impl == "dense":
            return F.cross_entropy(F.linear(hidden_nd, weight_vd), target_n)
        return linear_cross_entropy(hidden_nd, weight_vd, target_n, impl=impl).loss

    rate = matmul_rate(normal, device, tokens, dim)
    small = operands(64, 600)
    time_pass(lambda: loss(*small), [], device)  # starts libraries and threads
    measured = operands(tokens, codes)
    learned = measured[:2]
    if device == "cuda":
        time_pass(lambda: loss(*measured), learned, device)  # compiles kernels for these shapes
    passes = time_passes(lambda: loss(*measured), learned, device, repeats)
    # Three products of all tokens with all codes: the logits and the gradients of both operands.
    return passes._replace(sweeps=3, operations_per_second=rate)


def index_backprop_loss(impl, z_nd, grad_nd, codebook_kd, temperature, skip, tile) -> Loss:
    """The loss by this project's operation."""
    if impl == "triton":
        from model_zoo.ops.triton_sweeps import TritonSweeps  # Triton exists on Linux only

    def of(stats: SkipStats | None) -> Tensor:
        if impl == "dense":
            out = index_backprop_dense(z_nd, codebook_kd, temperature)
        else:
            settings = Settings(skip=skip, tile=tuple(tile) if tile else None, stats=stats)
            sweeps = ChunkedSweeps if impl == "chunked" else TritonSweeps
            out = index_backprop_tiled(z_nd, codebook_kd, temperature, sweeps=sweeps, settings=settings)
        loss = (out.quantized_nd * grad_nd).sum()
        return loss if temperature is None else loss + out.sample_entropy - out.average_entropy

    return Loss(of)


def attention_loss(z_nd: Tensor, grad_nd: Tensor, codebook_kd: Tensor) -> Loss:
    """Attention over the codebook, with one head of size D: it computes the same softmax and its gradients.

    Uses the package flash_attn if it is installed, otherwise PyTorch's flash kernel, or another of PyTorch's kernels if
    that one does not accept the operands.
    """
    dim = z_nd.shape[1]
    if z_nd.is_cuda and flash_takes(z_nd) and importlib.util.find_spec("flash_attn"):
        import flash_attn

        def attention() -> Tensor:
            q, kv = z_nd.view(1, -1, 1, dim), codebook_kd.view(1, -1, 1, dim)
            return flash_attn.flash_attn_func(q, kv, kv, softmax_scale=1.0)

        kernel = f"flash_attn {flash_attn.__version__}"
    else:
        flash = flash_takes(z_nd)
        backends = SDPBackend.FLASH_ATTENTION if flash else [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]

        def attention() -> Tensor:
            q, kv = z_nd.view(1, 1, -1, dim), codebook_kd.view(1, 1, -1, dim)
            with sdpa_kernel(backends):
                return F.scaled_dot_product_attention(q, kv, kv, scale=1.0)

        kernel = "PyTorch flash" if flash else "PyTorch, not flash"
    return Loss(lambda _: (attention().reshape(grad_nd.shape) * grad_nd).sum(), kernel=kernel)


def flash_takes(z_nd: Tensor) -> bool:
    """Whether FlashAttention accepts the operands. PyTorch's on a CPU accepts fp32 and any size."""
    return not z_nd.is_cuda or (z_nd.dtype in (torch.float16, torch.bfloat16) and z_nd.shape[1] <= 256)


def reference_loss(path: str, z_bdhw, grad_bdhw, codebook_kd, temperature) -> Loss:
    """The reference's own quantizer on our operands, with its VQ losses and, with a temperature, its entropy loss.

    path: of its file. Raises ModelError.
    """
    quantizer_class = getattr(load_reference(path, REFERENCE_CLASS), REFERENCE_CLASS)
    codes, dim = codebook_kd.shape
    entropy = {} if temperature is None else {"entropy_temperature": temperature}
    with torch.device("meta"):  # its own codebook is not needed
        quantizer = quantizer_class(codes, dim, use_entropy_loss=temperature is not None, **entropy)
    quantizer.embedding.weight = codebook_kd

    def of(_) -> Tensor:
        quantized_bdhw, losses, _ = quantizer(z_bdhw)
        if temperature is not None:
            quantization, _, _, entropy_loss = losses
            losses = quantization + entropy_loss
        return (quantized_bdhw * grad_bdhw).sum() + losses

    return Loss(of)


def reference_shape(tokens: int, dim: int) -> tuple[int, int, int, int]:
    """(B, D, H, W): images of 16 x 16 tokens, or one row of tokens if 256 does not divide them."""
    return (1, dim, 1, tokens) if tokens % 256 else (tokens // 256, dim, 16, 16)
