"""What a report records of its making: machine, versions, weights files, images, and the seconds of each stage."""

import contextlib
import hashlib
import platform
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib import metadata

import torch

from model_zoo.eval_nets.weights import WEIGHTS_FILES, checked_weights

PACKAGES = ("ibq", "torchvision", "torch-fidelity", "lpips", "numpy", "pillow", "opencv-python-headless")


def environment(device: torch.device | str) -> dict[str, str | None]:
    """The device's name, and the versions of Python and the packages that results depend on; None if not installed."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "torch": torch.__version__,  # includes the CUDA version
        **{package: installed_version(package) for package in PACKAGES},
    }


def weights_files(keys: Iterable[str]) -> dict[str, dict]:
    """``file`` and ``sha256`` of weights files, by key of `model_zoo.eval_nets.weights.WEIGHTS_FILES`.

    Raises ModelError if a file is missing or has another hash.
    """
    return {key: {"file": str(checked_weights(key)), "sha256": WEIGHTS_FILES[key].sha256} for key in keys}


def image_list_hash(keys: Iterable[str]) -> str:
    """The SHA-256 of the images' keys in order: it identifies which images were used, not their pixels."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def installed_version(package: str) -> str | None:
    """A package's version; None if it is not installed, as `ibq` itself in a checkout."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
