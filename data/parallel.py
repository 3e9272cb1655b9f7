"""One function over many values, in threads or in processes; results come in the values' order."""

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data.errors import DataError
from data.stop_signals import STOP_SIGNALS


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_threads(function: Callable, values: Iterable, threads: int, ahead: int = 64) -> Iterator:
    """Where the work releases the interpreter's lock, as Pillow does while it decodes. At most `ahead` results wait in
    memory. An error is raised at its position."""
    values, waiting = iter(values), deque()
    pool = ThreadPoolExecutor(threads)
    try:
        waiting.extend(pool.submit(function, value) for value in itertools.islice(values, ahead))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, value) for value in itertools.islice(values, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def in_processes(function: Callable, values: Iterable, jobs: int) -> Iterator:
    """In this process where jobs is 1. The function may hold much: processes are forked, and inherit it.

    What it raises, it raises here. Raises DataError where a process was killed.
    """
    if jobs == 1:
        yield from map(function, values)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(function,)) as pool:
        try:
            yield from pool.map(_call, values)
        except BrokenProcessPool as error:
            raise DataError("a process was killed, perhaps for lack of memory: try again with --jobs 1") from error


_function: Callable[[Any], Any]  # of a process that `in_processes` started


def _start(function: Callable) -> None:
    global _function
    _function = function
    for number in STOP_SIGNALS:  # each ends it at once, without another traceback
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _call(value: Any) -> Any:
    return _function(value)
