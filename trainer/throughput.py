"""What a device can do, which the speed of training is compared with."""

import time

import torch

SIDE = {"cuda": 8192, "cpu": 1024}  # large enough that a product's speed is the processor's
REPEATS = 5


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a plain square matrix product, the fastest of a few."""
    side = SIDE[device.type]
    # Not drawn by torch's own generator, which a run goes on with.
    a, b = (torch.linspace(-1, 1, side * side, device=device).view(side, side).to(dtype) for _ in range(2))
    torch.mm(a, b)
    seconds = []
    for _ in range(REPEATS):
        _wait(device)
        began = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
