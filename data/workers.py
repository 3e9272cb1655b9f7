"""Loader workers: the processes that read a rank's lanes."""

import atexit
import functools
import gc
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.errors import DataError
from data.reader import LaneReader, ReadSamples
from data.sampler import DueLanes, LaneAssignment
from data.stop_signals import STOP_SIGNALS

# Buffers of each worker in shared memory. A worker may start on a buffer when the main process has asked for the read
# after next, and by then the buffer has been copied: see `WorkerLoader`.
SLOTS = 3
SHARED_MEMORY = "/dev/shm"
LESS_MEMORY = "use fewer data.workers, or a smaller data.shuffle_megabytes"
# What usually ends a worker by a signal, and what helps.
KILLED = {
    signal.SIGKILL: f"usually because memory ran out: {LESS_MEMORY}",
    signal.SIGBUS: f"usually because {SHARED_MEMORY} is full: use `docker run --shm-size=8g`, or data.workers=0",
}


class Part(NamedTuple):
    """A stream's images of one size: who reads them, and how its lanes are distributed."""

    reader: LaneReader
    assignment: LaneAssignment


@dataclass
class LaneDataset(IterableDataset):
    """A rank's infinite stream of `ReadSamples`: in each step one of every reader, of the DataLoader's workers by turn.

    parts: one for each size of images. part_of_step: step (from 0) -> the number of its part. steps: that are done.
    A worker yields a DataError instead of raising it, since a DataLoader would bury its one line in a traceback.
    """

    parts: list[Part]
    part_of_step: Callable[[int], int]
    steps: int = 0
    # (workers, SLOTS, values of a read). The workers write into it in turn: fresh shared memory for each read would
    # cost up to a tenth of the time that decoding takes.
    shared: np.ndarray | None = None

    def __iter__(self) -> Iterator[ReadSamples | DataError]:
        worker = get_worker_info()
        return self.reads(worker.id if worker else None)

    def reads(self, worker: int | None) -> Iterator[ReadSamples | DataError]:
        """The reads of one worker, or of the only reader (None)."""
        due = [DueLanes(assignment, worker or 0, reader.delivered) for reader, assignment in self.parts]
        try:
            for number in itertools.count():
                part = self.part_of_step(self.steps + number)
                lanes, reader = due[part].take(), self.parts[part].reader
                if worker is None:
                    yield reader.read(lanes, np.empty((len(lanes), *reader.transform.shape), reader.transform.dtype))
                else:
                    read = reader.read(lanes, self.values(part, worker, number % SLOTS, len(lanes)))
                    yield read._replace(values=None)  # the main process finds them in the shared memory
        except DataError as error:
            yield error
        except MemoryError:
            yield DataError(f"no memory is left to read {len(lanes)} images: {LESS_MEMORY}")

    def values(self, part: int, worker: int, slot: int, images: int) -> np.ndarray:
        """Where a read lies in the shared memory: (images, *shape of an image or its codes)."""
        shape = images, *self.parts[part].reader.transform.shape
        return self.shared[worker, slot, : math.prod(shape)].reshape(shape)

    def shared_shape(self, workers: int) -> tuple[int, int, int]:
        """That of `shared`: with room for the largest read."""
        reads = [
            assignment.images_of_reader(worker) * math.prod(reader.transform.shape)
            for reader, assignment in self.parts
            for worker in range(workers)
        ]
        return workers, SLOTS, max(reads)

    @property
    def dtype(self) -> np.dtype:
        """Of the values."""
        return self.parts[0].reader.transform.dtype


class WorkerLoader:
    """Iterates over a `LaneDataset` with DataLoader workers, in order. `close` ends the workers, even if they wait.

    Raises DataError if there is too little shared memory. A worker that dies gives a DataError in place of a read.
    """

    iterator: Iterator | None = None

    def __init__(self, dataset: LaneDataset, workers: int):
        self.dataset, self.workers, self.taken = dataset, workers, 0
        values = np.empty(dataset.shared_shape(workers), dataset.dtype)
        handler, others = signal.getsignal(signal.SIGCHLD), multiprocessing.active_children()
        try:
            dataset.shared = torch.from_numpy(values).share_memory_().numpy()
            multiprocessing.Lock()  # takes shared memory, too; torch does not expect that its own fail
            self.stop_read, self.stop_write = os.pipe()  # one byte for each worker makes it end
            self.iterator = iter(self._loader(dataset))
        except (RuntimeError, OSError) as error:  # of torch's buffers, and of multiprocessing's locks
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{workers} data.workers need {values.nbytes / 1e6:,.0f} MB of shared memory ({reason}), and "
                f"{SHARED_MEMORY} has {shutil.disk_usage(SHARED_MEMORY).free / 1e6:,.0f} MB free: use `docker run "
                "--shm-size=8g`, fewer workers, or data.workers=0"
            ) from error
        # torch's handler would raise an error of a worker that dies at any point of the main process, even where it
        # writes a checkpoint. Without it, the next read notices.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        self.processes = [process for process in multiprocessing.active_children() if process not in others]
        # At exit Python waits for its child processes after a SIGTERM, which the workers ignore.
        atexit.register(_close, weakref.ref(self))

    def __next__(self) -> ReadSamples | DataError:
        """The next read. Its values must be copied before the next call."""
        if self.iterator is None:
            raise StopIteration
        try:
            read = next(self.iterator)
        except RuntimeError:
            if (dead := self._dead_worker()) is None:
                raise
            return DataError(dead)
        # A DataLoader asks a worker for its read n + 2 when read n is taken.
        number, worker = divmod(self.taken, self.workers)
        self.taken += 1
        if isinstance(read, DataError):
            return read
        part = self.dataset.part_of_step(self.dataset.steps + number)
        return read._replace(values=self.dataset.values(part, worker, number % SLOTS, len(read.infos)))

    def _loader(self, dataset: LaneDataset) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.workers,
            prefetch_factor=SLOTS - 1,
            multiprocessing_context="fork",  # workers inherit the pipe and what is known of the shards
            worker_init_fn=functools.partial(_start_worker, self.stop_read),
            generator=torch.Generator(),  # a DataLoader draws a seed: not from the global generator
        )

    def _dead_worker(self) -> str | None:
        """Describes a worker that has died; None if all live."""
        for process in self.processes:
            if (status := process.exitcode) is not None:
                how = f"was ended by signal {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
                why = KILLED.get(-status)
                return f"a data worker (process {process.pid}) {how}" + (f", {why}" if why else "")
        return None

    def close(self) -> None:
        if self.iterator is not None:
            os.write(self.stop_write, bytes(self.workers))
            self.iterator = None  # joins the workers
            os.close(self.stop_read)
            os.close(self.stop_write)

    __del__ = close


def _close(loader: weakref.ref) -> None:
    if (found := loader()) is not None:
        found.close()


def _unchanged(read):
    return read


def _start_worker(stop_read: int, _: int) -> None:
    # Launchers send signals to whole process groups, but only the parent decides when a run ends and ends its workers.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()  # inherited objects need no garbage collection
    threading.Thread(target=_end_on_request, args=(stop_read,), daemon=True).start()


def _end_on_request(stop_read: int) -> None:
    os.read(stop_read, 1)
    os._exit(0)  # a worker has no work worth finishing
