"""One row of `ibq bench cross-entropy`. Runs in a fresh process."""

import torch
from torch import Tensor
from torch.nn import functional as F

from model_zoo.ops import linear_cross_entropy
from tools.bench.measure import Measured, matmul_rate, normal_tensors, time_pass, time_passes

SWEEPS = 3  # products of all tokens with all codes: the logits and the gradients of both operands


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
    return passes._replace(sweeps=SWEEPS, operations_per_second=rate)
