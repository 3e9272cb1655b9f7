"""Speed of training, and the speed of a device that it is compared with."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SIDE = {"cuda": 8192, "cpu": 1024}  # large enough that a product's speed is the processor's
REPEATS = 5


class Throughput:
    """Measures images per second of training alone: the time within ``paused()`` does not count."""

    def __init__(self, images_per_step: int, step: int):
        self.images_per_step = images_per_step
        self.restart(step)

    def restart(self, step: int) -> None:
        """Measures from the end of ``step`` on."""
        self.step, self.began = step, time.perf_counter()

    def images_per_second(self, step: int) -> float:
        """The mean since the last restart, after ``step``."""
        return (step - self.step) * self.images_per_step / (time.perf_counter() - self.began)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the context no training takes place."""
        paused = time.perf_counter()
        yield
        self.began += time.perf_counter() - paused


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
