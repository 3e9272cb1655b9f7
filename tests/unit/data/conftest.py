"""Small generated pictures and tars; nothing is read from outside the temporary folder but scikit-image's wheel."""

import copy
import io
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter

from data.errors import DataError
from data.workers import SLOTS


def picture(number: int, size=(48, 40), mode="RGB") -> Image.Image:
    """A smooth picture, another one for each number."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    waves = [0.5 + 0.5 * np.sin(5 * x + number + 2 * c) * np.cos(4 * y + 3 * number - c) for c in range(3)]
    return Image.fromarray((255 * np.stack(waves, -1)).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind="JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path, samples, mtime=0):
    """samples: dicts of member suffix to bytes, with __key__. mtime: a float gives each member a PAX header."""
    with TarWriter(str(path), encoder=False, mtime=mtime) as writer:
        for sample in samples:
            writer.write(sample)
    return str(path)


class InProcessWorkers:
    """`WorkerLoader` without processes: each worker reads with its own copy of the reader's state.

    Like DataLoader workers it reads ahead: a worker has filled all its buffers when a read is delivered, so a buffer
    that is used too early shows up as a wrong picture, and a state that counts what was read ahead as a wrong order.
    """

    def __init__(self, dataset, workers):
        transform = dataset.reader.transform
        shape = (workers, SLOTS, dataset.assignment.images_per_read, *transform.shape)
        self.shared = np.empty(shape, transform.dtype)
        self.reads = []
        for worker in range(workers):
            reader = replace(dataset.reader, states=copy.deepcopy(dataset.reader.states))
            self.reads.append(replace(dataset, reader=reader, shared=self.shared).reads(worker))
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
        return read if isinstance(read, DataError) else read._replace(values=self.shared[worker, number % SLOTS])

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


@pytest.fixture(scope="session")
def make_picture():
    return picture


@pytest.fixture(scope="session")
def encode():
    return encoded


@pytest.fixture(scope="session")
def make_tar():
    return write_tar


@pytest.fixture
def tars(tmp_path):
    """Three tars with 7, 9 and 4 pictures, keys 0-0, 0-1, ..., as a folder."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard, count in enumerate((7, 9, 4)):
        samples = [
            {"__key__": f"{shard}-{n}", "jpg": encoded(picture(10 * shard + n)), "txt": b"a caption"}
            for n in range(count)
        ]
        write_tar(folder / f"train-{shard:06d}.tar", samples)
    return folder
