"""What the rows of `ibq bench` are measured with. Runs in the fresh process of a row."""

import contextlib
import ctypes
import importlib
import importlib.util
import json
import platform
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from data.errors import DataError
from model_zoo.errors import ModelError
from tools.bench.common import cpu_name, proc_number


def answer(module: str, job: str, arguments: str) -> None:
    """Calls a function of tools.bench.MODULE with arguments from JSON.

    The last line of stdout is the returned named tuple as JSON, or why the call failed.
    """
    keywords = json.loads(arguments)
    if "device" in keywords:
        bound_memory(keywords["device"])
    try:
        given = getattr(importlib.import_module(f"tools.bench.{module}"), job)(**keywords)._asdict()
    except Exception as error:
        given = {"failed": failure(error)}
    print(json.dumps(given))


def failure(error: Exception) -> str:
    """Why there are no numbers, in a few words. Prints the traceback of an unexpected error to stderr."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    if isinstance(error, (ModelError, DataError)):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


# ------------------------------------------------------------------------------------------- machine and reference code


class Machine(NamedTuple):
    """Where rows are measured. device: cpu or cuda, never auto."""

    device: str
    name: str
    threads: int
    torch: str
    python: str


def machine(device: str, threads: int | None, reference: list[str] | None) -> Machine:
    """Raises ModelError if ``device`` is missing or `load_reference(*reference)` fails."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: PyTorch finds no CUDA device; see `ibq doctor`, or use --device cpu")
    if reference is not None:
        load_reference(*reference)
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return Machine(device, name, threads or torch.get_num_threads(), torch.__version__, platform.python_version())


def load_reference(path: str, *names: str) -> ModuleType:
    """Imports a file of the reference project, which must define ``names``. Raises ModelError."""
    spec = importlib.util.spec_from_file_location("ibq_bench_reference", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ModelError(f"--reference: {path} needs the package {error.name}; install it") from None
    if missing := [name for name in names if not hasattr(module, name)]:
        raise ModelError(f"--reference: {path} has no {missing[0]}; check out TencentARC/SEED-Voken's main branch")
    return module


# -------------------------------------------------------------------------------------------------------------- memory


def bound_memory(device: str) -> None:
    """Makes a row that needs too much memory fail in this process, so that the machine stays usable."""
    with contextlib.suppress(OSError):  # /proc may be read-only
        Path("/proc/self/oom_score_adj").write_text("1000")
    if device == "cpu":
        available = proc_number("/proc/meminfo", "MemAvailable") * 2**10
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = available if hard == resource.RLIM_INFINITY else min(available, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def peak_bytes(device: str) -> int:
    """Of the process; on CUDA, of what PyTorch allocates on the device."""
    # Not getrusage: its peak starts at that of the parent process.
    return proc_number("/proc/self/status", "VmHWM") * 2**10 if device == "cpu" else torch.cuda.max_memory_allocated()


def reset_peak(device: str) -> None:
    """Lowers the peak to what is in use. Where the system forbids that, the former peak remains."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory would be reused without raising the peak
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


# ---------------------------------------------------------------------------------------------------------------- time


def now(device: str) -> float:
    """Seconds, after the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class PassSeconds(NamedTuple):
    forward: float
    backward: float
    processor: float


class Measured(NamedTuple):
    """Seconds of the fastest repeat, memory of the first, and from `sweeps` on what the row's job fills in.

    extra_bytes: the peak minus what was in use before, minus gradients. process_bytes: the peak. sweeps: products of
    all tokens with all codes that were computed. operations_per_second: of a plain matrix product. kernel: which
    attention kernel ran, or None.
    """

    forward_seconds: float
    backward_seconds: float
    processor_seconds: float
    extra_bytes: int
    process_bytes: int
    sweeps: float = 0.0
    operations_per_second: float = 0.0
    skip_soft: float | None = None
    skip_entropy: float | None = None
    kernel: str | None = None


def time_pass(loss: Callable[[], Tensor], operands: Sequence[Tensor], device: str) -> PassSeconds:
    """Forward and backward once, after clearing the operands' gradients."""
    for operand in operands:
        operand.grad = None
    start, processor = now(device), time.process_time()
    value = loss()
    middle = now(device)
    value.backward()
    end = now(device)
    return PassSeconds(middle - start, end - middle, time.process_time() - processor)


def time_passes(loss: Callable[[], Tensor], operands: Sequence[Tensor], device: str, repeats: int) -> Measured:
    for operand in operands:
        operand.grad = None
    reset_peak(device)
    before = peak_bytes(device)
    seconds = [time_pass(loss, operands, device)]
    peak = peak_bytes(device)
    extra = max(0, peak - before - sum(operand.grad.nbytes for operand in operands))
    seconds += [time_pass(loss, operands, device) for _ in range(repeats - 1)]
    return Measured(*min(seconds, key=lambda one: one.forward + one.backward), extra, peak)


def normal_tensors(dtype: str, device: str) -> Callable[..., Tensor]:
    """A function of a shape that draws normal(0, 1), the same numbers in each process."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device).normal_(generator=generator)

    return normal


def matmul_rate(normal: Callable[..., Tensor], device: str, tokens: int, dim: int) -> float:
    """Operations per second of the fastest of ten products of the tokens with 4096 codes."""
    left, right = normal(tokens, dim), normal(4096, dim)
    out = left @ right.T
    best = float("inf")
    for _ in range(10):
        start = now(device)
        torch.mm(left, right.T, out=out)
        best = min(best, now(device) - start)
    return 2 * tokens * 4096 * dim / best
