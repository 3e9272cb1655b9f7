"""Generated tars, readers without processes, waits without sleep; nothing is read from outside the temporary folder but
scikit-image's wheel."""

import copy
import time
from dataclasses import replace

import numpy as np
import pytest
from samples import write_tars

from data.errors import DataError
from data.workers import SLOTS


class InProcessWorkers:
    """`WorkerLoader` without processes: each worker reads with its own copy of the reader's state.

    Like DataLoader workers it reads ahead: a worker has filled all its buffers when a read is delivered, so a buffer
    that is used too early shows up as a wrong picture, and a state that counts what was read ahead as a wrong order.
    """

    def __init__(self, dataset, workers):
        dataset.shared = np.empty(dataset.shared_shape(workers), dataset.dtype)
        self.dataset = dataset
        self.reads = []
        for worker in range(workers):
            parts = [
                part._replace(reader=replace(part.reader, states=copy.deepcopy(part.reader.states)))
                for part in dataset.parts
            ]
            self.reads.append(replace(dataset, parts=parts).reads(worker))
        self.ahead = [[] for _ in range(workers)]
        self.taken = 0
        self.closed = False

    def __next__(self):
        if self.closed:
            raise StopIteration
        number, worker = divmod(self.taken, len(self.reads))
        self.taken += 1
        ahead = self.ahead[worker]
        while len(ahead) < SLOTS and not (ahead and isinstance(ahead[-1], DataError)):
            ahead.append(next(self.reads[worker]))
        read = ahead.pop(0)
        if isinstance(read, DataError):
            return read
        part = self.dataset.part_of_step(self.dataset.steps + number)
        return read._replace(values=self.dataset.values(part, worker, number % SLOTS, len(read.infos)))

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def in_process_workers(request, monkeypatch):
    """Loader workers are processes only in tests that are marked so."""
    if not request.node.get_closest_marker("process"):
        monkeypatch.setattr("data.loader.WorkerLoader", InProcessWorkers)


class Clock:
    """The time, which `sleep` moves on without sleeping."""

    def __init__(self):
        self.slept = 0.0

    def monotonic(self):
        return time.monotonic() + self.slept

    def sleep(self, seconds):
        self.slept += seconds


@pytest.fixture
def clock(monkeypatch):
    """Waits between tries take no time."""
    clock = Clock()
    monkeypatch.setattr("data.storage.time", clock)
    return clock


@pytest.fixture
def tars(tmp_path):
    """Three tars with 7, 9 and 4 pictures, keys 0-0, 0-1, ..., as a folder."""
    return write_tars(tmp_path / "tars", (7, 9, 4), "train-{:06d}.tar", txt=b"a caption")
