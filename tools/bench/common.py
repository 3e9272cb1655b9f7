"""What rows of `ibq bench` are measured with, each in a process of its own."""

import contextlib
import ctypes
import json
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from model_zoo import ModelError


def now(device: str) -> float:
    """Seconds, once the device has done all."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(device: str) -> int:
    """Of the process, or on CUDA of what PyTorch allocates there."""
    # Not getrusage, whose peak is at first that of the process that started this one.
    return kibibytes("/proc/self/status", "VmHWM") * 2**10 if device == "cpu" else torch.cuda.max_memory_allocated()


def reset_peak(device: str) -> None:
    """From here on the peak counts from what is in use; where the system does not let us, from the peak so far."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again and not be seen
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def bound_memory(device: str) -> None:
    """A row that is too large fails in this process, and the machine stays usable."""
    with contextlib.suppress(OSError):  # /proc may be read-only
        Path("/proc/self/oom_score_adj").write_text("1000")
    if device == "cpu":
        available = kibibytes("/proc/meminfo", "MemAvailable") * 2**10
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = available if hard == resource.RLIM_INFINITY else min(available, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def kibibytes(path: str, name: str) -> int:
    """The value of a line ``name: 1234 kB``."""
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:"))


def failure(error: Exception) -> str:
    """Why there are no numbers, in a few words. What is unexpected is told in full on stderr."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    if isinstance(error, ModelError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def answer(*jobs: Callable[..., NamedTuple]) -> None:
    """A row's process: the name of one of the jobs and its arguments as JSON; what it gives is the last line of stdout,
    JSON too."""
    job = {job.__name__: job for job in jobs}[sys.argv[1]]
    arguments = json.loads(sys.argv[2])
    bound_memory(arguments["device"])
    try:
        given = job(**arguments)._asdict()
    except Exception as error:
        given = {"failed": failure(error)}
    print(json.dumps(given))
