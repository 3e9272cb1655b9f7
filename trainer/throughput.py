"""Throughput of training, and the matrix product rate of the device as a reference."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SIDE = {"cuda": 8192, "cpu": 1024}  # large enough for the product to be limited by arithmetic
REPEATS = 5


class Throughput:
    """Measures images per second of training. Time within ``paused()`` does not count."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Starts a new measurement."""
        self.images, self.began = 0, time.perf_counter()

    def count(self, images: int) -> None:
        """Counts the images of a step."""
        self.images += images

    def seconds(self) -> float:
        """Since the last restart."""
        return time.perf_counter() - self.began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time within the context from the measurement."""
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matrix product, the fastest of REPEATS."""
    side = SIDE[device.type]
    # Not random, so that the state of torch's generator does not change.
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
