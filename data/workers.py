"""Loader workers: the processes that read a rank's lanes."""

import atexit
import functools
import gc
import heapq
import itertools
import multiprocessing
import os
import shutil
import signal
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data.errors import DataError
from data.reader import LaneReader, ReadSamples
from data.sampler import LaneAssignment
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


@dataclass
class LaneDataset(IterableDataset):
    """A rank's infinite stream of `ReadSamples`, distributed by turn over the DataLoader's workers.

    A worker yields a DataError instead of raising it, since a DataLoader would bury its one line in a traceback.
    """

    reader: LaneReader
    assignment: LaneAssignment
    first_reader: int = 0
    # (workers, SLOTS, images of a read, *shape of an image or its codes). The workers write into it in turn: fresh
    # shared memory for each read would cost up to a tenth of the time that decoding takes.
    shared: np.ndarray | None = None

    def __iter__(self) -> Iterator[ReadSamples | DataError]:
        worker = get_worker_info()
        return self.reads(worker.id if worker else None)

    def reads(self, worker: int | None) -> Iterator[ReadSamples | DataError]:
        """The reads of one worker, or of the only reader (None)."""
        turn = (worker or 0) + self.first_reader
        lanes_of_reader = self.assignment.reader_lanes(turn % self.assignment.readers)
        # The lane that has delivered the fewest images is next, the first one among equals.
        waiting = [(self.reader.delivered[lane], n, lane) for n, lane in enumerate(lanes_of_reader)]
        heapq.heapify(waiting)
        images_per_read, images_per_turn = self.assignment.images_per_read, self.assignment.images_per_turn
        transform = self.reader.transform
        try:
            for number in itertools.count():
                lanes = []
                while len(lanes) < images_per_read:
                    count, n, lane = waiting[0]
                    lanes += [lane] * images_per_turn
                    heapq.heapreplace(waiting, (count + images_per_turn, n, lane))
                if worker is None:
                    yield self.reader.read(lanes, np.empty((images_per_read, *transform.shape), transform.dtype))
                else:
                    read = self.reader.read(lanes, self.shared[worker, number % SLOTS])
                    yield read._replace(values=None)  # the main process finds them in the shared memory
        except DataError as error:
            yield error
        except MemoryError:
            yield DataError(f"no memory is left to read {images_per_read} images: {LESS_MEMORY}")


class WorkerLoader:
    """Iterates over a `LaneDataset` with DataLoader workers, in order. `close` ends the workers, even if they wait.

    Raises DataError if there is too little shared memory. A worker that dies gives a DataError in place of a read.
    """

    iterator: Iterator | None = None

    def __init__(self, dataset: LaneDataset, workers: int):
        self.workers, self.taken = workers, 0
        transform, images_per_read = dataset.reader.transform, dataset.assignment.images_per_read
        values = np.empty((workers, SLOTS, images_per_read, *transform.shape), transform.dtype)
        handler, others = signal.getsignal(signal.SIGCHLD), multiprocessing.active_children()
        try:
            self.shared = dataset.shared = torch.from_numpy(values).share_memory_().numpy()
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
        return read if isinstance(read, DataError) else read._replace(values=self.shared[worker, number % SLOTS])

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
