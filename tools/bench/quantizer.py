"""One row of `ibq bench quantizer`, measured in a process of its own.

The reference is imported from a checkout of its project; nothing of it is kept here.
"""

import importlib.util
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model_zoo import ModelError
from model_zoo.ops.chunked import ChunkedSweeps
from model_zoo.ops.dense import index_backprop_dense
from model_zoo.ops.tiled import Settings, SkipStats, index_backprop_tiled
from tools.bench.common import answer, now, peak_bytes, reset_peak

# A sweep is one product of all tokens with all codes. How many each counted pass makes with what it does not skip:
# "first" is the logits, of which none is skipped. In Triton dz and dC come from two kernels, and each makes dl anew.
PRODUCTS = {
    "chunked": {
        "first": 1,
        "output": 1,
        "assignment": 1,
        "average": 1,
        "soft_gradient": 4,
        "average_gradient": 1,
        "entropy_gradient": 3,
    },
    "triton": {
        "first": 1,
        "output": 1,
        "assignment": 1,
        "average": 1,
        "soft_gradient": 6,
        "average_gradient": 1,
        "entropy_gradient": 4,
    },
}
# Those that skip nothing. dense: logits and code vectors; backward g C^T, onehot^T g, dl C, dl^T z. reference: the same
# and its second code vectors, for its VQ losses, with their gradient. attention: two forward, five backward.
SWEEPS = {"dense": 6, "reference": 8, "attention": 7}
REFERENCE_CLASS = "IndexPropagationQuantize"


class Machine(NamedTuple):
    """Where rows are measured. device: cpu or cuda, never auto."""

    device: str
    name: str
    threads: int
    torch: str
    python: str


class Measured(NamedTuple):
    """Seconds of the fastest repeat, and of the first one the memory: extra_bytes is the peak minus what was there
    before minus gradients, process_bytes the peak in all.

    sweeps: products of all tokens with all codes that were made. operations_per_second: of a plain matrix product.
    kernel: whose attention it was, or None.
    """

    forward_seconds: float
    backward_seconds: float
    processor_seconds: float
    extra_bytes: int
    process_bytes: int
    skip_soft: float | None
    skip_entropy: float | None
    sweeps: float
    operations_per_second: float
    kernel: str | None


class Loss(NamedTuple):
    """of(stats): the loss of one forward pass; a tiled impl counts in stats, or None, what it skips. kernel: as in
    `Measured`."""

    of: Callable[[SkipStats | None], Tensor]
    kernel: str | None = None


def machine(device: str, threads: int | None, reference: str | None) -> Machine:
    """Raises ModelError where ``device`` is not there or the reference cannot be imported."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: PyTorch finds no CUDA device here: see `ibq doctor`, or use --device cpu")
    if reference is not None:
        reference_class(reference)
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.machine()
    return Machine(device, name, threads or torch.get_num_threads(), torch.__version__, platform.python_version())


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
    """Forward and backward passes of z, normal(0, scale^2), with a codebook, normal(0, 1), as it is at the start.

    The loss uses the quantized vectors and, with a temperature, both entropies (attention has none).
    """
    if threads:
        torch.set_num_threads(threads)
    on_cpu = device == "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device).normal_(generator=generator)

    def operands(tokens: int, codes: int) -> tuple[Tensor, Tensor, nn.Parameter]:
        shape = reference_shape(tokens, dim) if impl == "reference" else (tokens, dim)
        return normal(*shape).mul_(scale).requires_grad_(), normal(*shape), nn.Parameter(normal(codes, dim))

    def loss(z: Tensor, grad: Tensor, codebook_kd: nn.Parameter) -> Loss:
        if impl == "reference":
            return reference_loss(reference_class(reference), z, grad, codebook_kd, temperature)
        if impl == "attention":
            return attention_loss(z, grad, codebook_kd)
        return index_backprop_loss(impl, z, grad, codebook_kd, temperature, skip, tile)

    def run(loss: Loss, stats: SkipStats | None = None) -> tuple[float, float, float]:
        start, processor = now(device), time.process_time()
        value = loss.of(stats)
        middle = now(device)
        value.backward()
        end = now(device)
        return middle - start, end - middle, time.process_time() - processor

    rate = matmul_rate(normal, device, tokens, dim)
    run(loss(*operands(64, 600)))  # libraries, threads
    z, grad, codebook_kd = operands(tokens, codes)
    measured = loss(z, grad, codebook_kd)
    stats = counted = SkipStats()
    if not on_cpu:
        run(measured, stats)  # kernels are compiled for the shapes they meet
        stats = None  # on CUDA counting waits for the device
        z.grad = codebook_kd.grad = None
    reset_peak(device)
    before = peak_bytes(device)
    times = []
    for number in range(repeats):
        z.grad = codebook_kd.grad = None
        times.append(run(measured, stats))
        if number == 0:
            in_all = peak_bytes(device)
            extra = max(0, in_all - before - z.grad.nbytes - codebook_kd.grad.nbytes)
    forward, backward, processor = min(times, key=lambda seconds: seconds[0] + seconds[1])

    skipped = {name: counted.skip_rate(name) for name in counted.visited}
    sweeps = SWEEPS.get(impl)
    if sweeps is None:
        sweeps = PRODUCTS[impl]["first"] + sum(PRODUCTS[impl][name] * (1 - skipped[name]) for name in skipped)
    skip_soft, skip_entropy = skipped.get("soft_gradient"), skipped.get("entropy_gradient")
    return Measured(forward, backward, processor, extra, in_all, skip_soft, skip_entropy, sweeps, rate, measured.kernel)


def index_backprop_loss(impl, z_nd, grad_nd, codebook_kd, temperature, skip, tile) -> Loss:
    """Of this project's operation."""
    if impl == "triton":
        from model_zoo.ops.triton_sweeps import TritonSweeps  # triton is there on Linux only

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
    """Attention over the codebook, one head of size D: the peer that makes the same softmax and its gradients.

    The package flash_attn where it is installed, or else PyTorch's: its flash kernel, or what it has for operands that
    this one does not take.
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
    """What FlashAttention is written for; PyTorch's on a CPU takes fp32 and any size."""
    return not z_nd.is_cuda or (z_nd.dtype in (torch.float16, torch.bfloat16) and z_nd.shape[1] <= 256)


def reference_loss(quantizer_class, z_bdhw, grad_bdhw, codebook_kd, temperature) -> Loss:
    """The reference's own quantizer with our operands, its VQ losses and, with a temperature, its entropy loss."""
    codes, dim = codebook_kd.shape
    entropy = {} if temperature is None else {"entropy_temperature": temperature}
    with torch.device("meta"):  # the codebook that it would make is not needed
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
    """(B, D, H, W): pictures of 16 x 16 tokens, or one row of tokens where they do not come out even."""
    return (1, dim, 1, tokens) if tokens % 256 else (tokens // 256, dim, 16, 16)


def reference_class(path: str) -> type[nn.Module]:
    """The quantizer in the reference's file at ``path``; ModelError where it cannot be had."""
    spec = importlib.util.spec_from_file_location("ibq_bench_reference", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ModelError(f"--reference: {path} needs the package {error.name}: install it here") from None
    if not hasattr(module, REFERENCE_CLASS):
        raise ModelError(f"--reference: {path} has no class {REFERENCE_CLASS}: check out TencentARC/SEED-Voken's main")
    return getattr(module, REFERENCE_CLASS)


def matmul_rate(normal: Callable[..., Tensor], device: str, tokens: int, dim: int) -> float:
    """Operations per second of the best of ten products of the tokens with 4096 codes."""
    left, right = normal(tokens, dim), normal(4096, dim)
    out = left @ right.T
    best = float("inf")
    for _ in range(10):
        start = now(device)
        torch.mm(left, right.T, out=out)
        best = min(best, now(device) - start)
    return 2 * tokens * 4096 * dim / best


def main() -> None:
    """The process of a row."""
    answer(machine, measure)
