"""How long each stage of an evaluation took."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch


class StageTimer:
    """Adds up the seconds of named stages. On CUDA a stage ends with a synchronization; that costs little here, because
    the next stage or the CPU needs the stage's result anyway."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._seconds: dict[str, float] = defaultdict(float)
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._seconds[name] += time.perf_counter() - start

    def iterate(self, name: str, values: Iterable) -> Iterator:
        """Yields the values; the time spent waiting for each belongs to that stage."""
        values, end = iter(values), object()
        while True:
            with self.stage(name):
                value = next(values, end)
            if value is end:
                return
            yield value

    def seconds(self) -> dict[str, float]:
        """All stages, ``rest`` and ``total``, in seconds rounded to milliseconds."""
        total = time.perf_counter() - self._start
        stages = {**self._seconds, "rest": total - sum(self._seconds.values()), "total": total}
        return {name: round(seconds, 3) for name, seconds in stages.items()}
