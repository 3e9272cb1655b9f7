"""One row of `ibq bench cross-entropy`, measured in a process of its own."""

import time

import torch
from torch import Tensor
from torch.nn import functional as F

from model_zoo.ops import linear_cross_entropy
from tools.bench.common import answer, now, peak_bytes, reset_peak
from tools.bench.quantizer import Measured, matmul_rate

SWEEPS = 3  # products of all tokens with all codes: the logits, and the gradients of both operands


def measure(
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

    dense is what one would write, `F.cross_entropy(F.linear(hidden, weight), target)`; the readable twin of the
    operation needs more.
    """
    if threads:
        torch.set_num_threads(threads)
    on_cpu = device == "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device).normal_(generator=generator)

    def operands(tokens: int, codes: int) -> tuple[Tensor, Tensor, Tensor]:
        target_n = torch.randint(codes, (tokens,), device=device, generator=generator)
        return normal(tokens, dim).requires_grad_(), normal(codes, dim).div_(dim**0.5).requires_grad_(), target_n

    def run(hidden_nd: Tensor, weight_vd: Tensor, target_n: Tensor) -> tuple[float, float, float]:
        hidden_nd.grad = weight_vd.grad = None
        start, processor = now(device), time.process_time()
        if impl == "dense":
            loss = F.cross_entropy(F.linear(hidden_nd, weight_vd), target_n)
        else:
            loss = linear_cross_entropy(hidden_nd, weight_vd, target_n, impl=impl).loss
        middle = now(device)
        loss.backward()
        end = now(device)
        return middle - start, end - middle, time.process_time() - processor

    rate = matmul_rate(normal, device, tokens, dim)
    run(*operands(64, 600))  # libraries, threads
    measured = hidden_nd, weight_vd, _ = operands(tokens, codes)
    if not on_cpu:
        run(*measured)  # kernels are compiled for the shapes they meet
        hidden_nd.grad = weight_vd.grad = None
    reset_peak(device)
    before = peak_bytes(device)
    times = [run(*measured)]
    in_all = peak_bytes(device)
    extra = max(0, in_all - before - hidden_nd.grad.nbytes - weight_vd.grad.nbytes)
    times += [run(*measured) for _ in range(repeats - 1)]
    forward, backward, processor = min(times, key=lambda seconds: seconds[0] + seconds[1])
    return Measured(forward, backward, processor, extra, in_all, None, None, SWEEPS, rate, None)


def main() -> None:
    """The process of a row."""
    answer(measure)
