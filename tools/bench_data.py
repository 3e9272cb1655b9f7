"""`ibq bench data`: the training stream's speed, bytes and memory, beside webdataset and a loader that discards.

Every figure is measured by `main`, in a process of its own.
"""

import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import typer
import webdataset
from PIL import Image
from webdataset.writer import TarWriter

import data
from data import DataConfig, DataError
from data.checking import check_shards
from data.index import INDEX_NAME, key_hash, write_index
from data.loader import open_sources, transform_of
from data.parallel import cores, in_processes
from data.photographs import PHOTOGRAPHS
from data.shards import IMAGE_SUFFIXES
from data.storage import bytes_read, is_remote
from tools import bench

BATCH = 32
SHUFFLED = 1000  # samples that webdataset shuffles, as in its documentation
WARM_UP_BATCHES = 6  # of each process; a DataLoader reads two ahead
SCHEMES = {
    "bound": "decode and resize alone, from memory",
    "ibq": "the training stream",
    "webdataset": "webdataset, tars dealt to ranks and workers",
    "discard": "every rank decodes all and keeps each W-th",
}
COLORS = {"bound": "#222222", "ibq": "#4c72b0", "webdataset": "#dd8452", "discard": "#7a7a7a"}
MEMORY_IMAGE_SIZE, MEMORY_BATCH = 32, 8  # small, so that many batches take little time
MEMORY_SAMPLINGS = 100
FLAT_MIB = 0.1  # per 1000 batches, at most

LEGEND = """\
bound: as many processes decode, resize, crop and flip the same samples, which they hold in memory. of bound: by images
per second; by processor: the same ratio of processor time per image, main process included, which others that use the
machine disturb less."""
LONG_LEGEND = """\
Each repeat of each row is a fresh process that goes over all samples at least once, after a warm-up; the repeats of one
number of workers are interleaved, and the fastest counts. Only ratios of one run compare: the machine is as it is.

bound: as many processes do the training transform (decode, resize, random crop, flip) and nothing else, on the same
samples, held in memory. With 0 workers it is one process. of bound: images per second beside it; by processor: the
ratio of the processor time per image, of all processes, the main one included; others that use the machine disturb it
less.

ibq: data.train_batches, images delivered to the main process. webdataset: as its documentation has it: WebDataset with
split_by_node, split_by_worker and shuffle(1000), the same transform, batched in the workers, WebLoader. discard: the
scheme of TencentARC/SEED-Voken, where each of W ranks reads and decodes all samples and keeps each W-th; counted are
those that one rank keeps.

Bytes: what the process read (rchar of /proc/self/io) while W ranks, one after the other and without workers, went over
one epoch, beside the bytes, headers included, that the delivered samples have in their tars. Where tars have no index,
their headers are scanned once at the start; that is not counted here but told below."""


class Tars(NamedTuple):
    """What rows read: a path as `data.train` takes it, and the side of the images that they make of it, in pixels."""

    root: str
    image_size: int

    def config(self, workers: int = 0) -> DataConfig:
        return DataConfig(train=self.root, image_size=self.image_size, workers=workers)


class Delivered(NamedTuple):
    """A sample that arrived."""

    tar: str
    key: str


class Rate(NamedTuple):
    """One repeat. processor_seconds: of all processes together."""

    images: int
    images_per_second: float
    processor_seconds: float

    @property
    def processor_ms(self) -> float:
        """Per image."""
        return 1000 * self.processor_seconds / self.images


class Row(NamedTuple):
    """A scheme's repeats at a number of workers; without any, why there are none."""

    workers: int
    scheme: str
    rates: list[Rate]
    reason: str = ""

    @property
    def images_per_second(self) -> float:
        """Of the fastest repeat."""
        return max(rate.images_per_second for rate in self.rates)

    @property
    def processor_ms(self) -> float:
        """Per image, of the thriftiest repeat."""
        return min(rate.processor_ms for rate in self.rates)


class Bytes(NamedTuple):
    """One epoch of all ranks. by_storage: what `data.storage` counted, for ibq; scanned: before, to find samples."""

    scheme: str
    images: int
    read: int
    needed: int
    by_storage: int | None
    scanned: int


class Memory(NamedTuple):
    """Of each loader worker, after so many batches: resident and proportional set size, in MiB."""

    batches_n: list[int]
    rss_mib_nw: list[list[float]]
    pss_mib_nw: list[list[float]]

    def slopes(self, mib_nw: list[list[float]]) -> list[float]:
        """MiB per 1000 batches of each worker, least squares, without the first tenth."""
        later = [n for n, batches in enumerate(self.batches_n) if batches > self.batches_n[-1] / 10]
        thousands_n = np.array([self.batches_n[n] for n in later]) / 1000
        return np.polyfit(thousands_n, np.array([mib_nw[n] for n in later]), 1)[0].tolist()


# ------------------------------------------------------------------------------------------------------------- the data


def generate(folder: str, tars: int, samples: int) -> dict:
    """Tars of parts of scikit-image's photographs, scaled to a shorter side of 512 pixels, with captions and an index."""
    source = resources.files("skimage") / "data"
    names = itertools.chain(*PHOTOGRAPHS.values())
    photographs = {name: data.decode((source / name).read_bytes()) for name in names}
    write = functools.partial(_write_tar, folder=Path(folder), photographs=photographs, samples=samples)
    paths = list(in_processes(write, range(tars), min(cores(), tars)))
    checked = list(check_shards(paths))
    write_index(Path(folder) / INDEX_NAME, paths, [one.table for one in checked], [one.sha256 for one in checked])
    return {}


def _write_tar(number: int, folder: Path, photographs: dict[str, Image.Image], samples: int) -> str:
    rng, path = random.Random(number), str(folder / f"photographs-{number:06d}.tar")
    with TarWriter(path, encoder=False, mtime=0) as writer:
        for sample in range(samples):
            name = rng.choice(list(photographs))
            part = _part(photographs[name], rng)
            buffer = io.BytesIO()
            part.save(buffer, "JPEG", quality=90)
            about = {"width": part.width, "height": part.height, "source": name}
            texts = {"txt": f"part of {name}".encode(), "json": json.dumps(about).encode()}
            writer.write({"__key__": f"{number:06d}-{sample:06d}", "jpg": buffer.getvalue(), **texts})
    return path


def _part(image: Image.Image, rng: random.Random, side: int = 512) -> Image.Image:
    """At random: half to all of the shorter side, upright or lying, up to 3:2."""
    shorter = round(min(image.size) * rng.uniform(0.5, 1))
    longer = round(shorter * rng.uniform(1, 1.5))
    size = (longer, shorter) if rng.random() < 0.5 else (shorter, longer)
    width, height = min(size[0], image.width), min(size[1], image.height)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    scale = side / min(width, height)
    box = (left, top, left + width, top + height)
    return image.resize((round(scale * width), round(scale * height)), Image.Resampling.BICUBIC, box)


# --------------------------------------------------------------------------------------------------------- the schemes


def ibq_batches(tars: Tars, workers: int, rank: int = 0, world: int = 1) -> Iterator[list[Delivered]]:
    """Endless."""
    stream = data.train_batches(
        tars.config(workers),
        global_batch_size=BATCH * world,
        micro_batch_size=BATCH,
        rank=rank,
        world_size=world,
        seed=0,
    )
    for batch in stream:
        yield [Delivered(info.shard, info.key) for info in batch.infos]


def webdataset_batches(
    tars: Tars, workers: int, *, keep: slice = slice(None), endless: bool = True
) -> Iterator[list[Delivered]]:
    """As webdataset's documentation has it. keep: which of the decoded samples are kept."""
    urls = data.expand(tars.root)
    if len(urls) < _world() * max(1, workers):
        raise DataError(f"{len(urls)} tars cannot be dealt to {_world()} ranks x {max(1, workers)} workers")
    transform, rng = transform_of(tars.config()), random.Random(0)

    def prepared(sample: dict) -> tuple[str, str, torch.Tensor]:
        content = next(sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample)
        return sample["__url__"], sample["__key__"], torch.from_numpy(transform(content, rng))

    split = {"nodesplitter": webdataset.split_by_node, "workersplitter": webdataset.split_by_worker}
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls), **split).shuffle(SHUFFLED)
    if endless:
        samples = samples.repeat()
    samples = samples.map(prepared, handler=webdataset.ignore_and_continue)
    batches = samples.slice(keep.start, keep.stop, keep.step).batched(BATCH)
    for names, keys, _ in webdataset.WebLoader(batches, batch_size=None, num_workers=workers):
        yield [Delivered(name, key) for name, key in zip(names, keys, strict=True)]


def _world() -> int:
    """As webdataset sees it."""
    return int(os.environ.get("WORLD_SIZE", 1))


# --------------------------------------------------------------------------------------------------------------- speed


def measure(root: str, image_size: int, scheme: str, workers: int, world: int, seconds: float) -> dict:
    """A `Rate`: of whole passes over the samples, as many as it takes to fill so many seconds."""
    tars = Tars(root, image_size)
    if scheme == "bound":
        return bound(tars, workers, seconds)._asdict()
    images_in_pass = sum(len(shard) for shard in _source(tars).shards)
    if scheme == "ibq":
        batches = ibq_batches(tars, workers)
    elif scheme == "webdataset":
        batches = webdataset_batches(tars, workers)
    else:
        batches = webdataset_batches(tars, workers, keep=slice(0, None, world))
        images_in_pass = math.ceil(images_in_pass / world)
    for _ in range(WARM_UP_BATCHES * max(1, workers)):
        next(batches)
    start, processor, images = time.perf_counter(), _processor_seconds(), 0
    for passes in itertools.count(1):
        while images < passes * images_in_pass:
            images += len(next(batches))
        passed = time.perf_counter() - start
        if passed >= seconds:
            return Rate(images, images / passed, _processor_seconds() - processor)._asdict()


def bound(tars: Tars, workers: int, seconds: float) -> Rate:
    """Of the transform alone, in this process or in as many as there are workers."""
    contents = []
    for shard in _source(tars).shards:
        for index in range(len(shard)):
            with contextlib.suppress(data.ImageError):
                contents.append(shard.read(index).image())
    transform, count = transform_of(tars.config()), max(1, workers)
    context = multiprocessing.get_context("fork")
    ready, rates = context.Barrier(count), context.SimpleQueue()

    def work(first: int) -> None:
        own, rng, images = contents[first::count], random.Random(first), 0
        for content in own[: WARM_UP_BATCHES * BATCH]:
            with contextlib.suppress(data.ImageError):
                transform(content, rng)
        ready.wait()
        start, processor = time.perf_counter(), time.process_time()
        while (passed := time.perf_counter() - start) < seconds or not images:
            for content in own:
                with contextlib.suppress(data.ImageError):
                    transform(content, rng)
                    images += 1
        rates.put(Rate(images, images / passed, time.process_time() - processor))

    if workers == 0:
        work(0)
    for process in [context.Process(target=work, args=(first,)) for first in range(workers)]:
        process.start()
    all_rates = [rates.get() for _ in range(count)]
    return Rate(*(sum(values) for values in zip(*all_rates, strict=True)))


def _source(tars: Tars) -> data.sources.Source:
    """Tars with their tables: from the index, or scanned."""
    return open_sources(tars.config())[0]


def _processor_seconds() -> float:
    """Of this process and its workers so far."""
    return time.process_time() + sum(map(_processor_seconds_of, _workers()))


def _processor_seconds_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may hold spaces
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _workers() -> list[int]:
    return sorted(process.pid for process in multiprocessing.active_children())


# --------------------------------------------------------------------------------------------------------------- bytes


def count_bytes(root: str, scheme: str, world: int) -> dict:
    """A `Bytes`: one epoch of `world` ranks, one after the other, without workers; images are small to save time."""
    tars = Tars(root, MEMORY_IMAGE_SIZE)
    before = _bytes_read()
    shards = _source(tars).shards
    scanned = _bytes_read() - before
    size = {}
    for shard in shards:
        places = zip(shard.table.keys_n, shard.table.stops_n - shard.table.starts_n, strict=True)
        size.update({(shard.name, int(key)): int(count) for key, count in places})
    steps = len(size) // (BATCH * world)
    if not steps:
        raise DataError(f"{len(size)} samples are fewer than {world} ranks x {BATCH}: use more, or a smaller --world")
    before, storage_before, images, needed = _bytes_read(), bytes_read(), 0, 0
    for rank in range(world):
        if scheme == "ibq":
            batches = itertools.islice(ibq_batches(tars, 0, rank, world), steps)
        elif scheme == "webdataset":
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
            batches = webdataset_batches(tars, 0, endless=False)
        else:
            batches = webdataset_batches(tars, 0, keep=slice(rank, None, world), endless=False)
        for batch in batches:
            images += len(batch)
            needed += sum(size[one.tar, key_hash(one.key)] for one in batch)
    by_storage = bytes_read() - storage_before if scheme == "ibq" else None
    return Bytes(scheme, images, _bytes_read() - before, needed, by_storage, scanned)._asdict()


def _bytes_read() -> int:
    """By this process so far, from the page cache or from below."""
    return int(Path("/proc/self/io").read_text().split()[1])  # "rchar: 1234" is its first line


# -------------------------------------------------------------------------------------------------------------- memory


def watch_memory(root: str, workers: int, batches: int) -> dict:
    """A `Memory` of the training stream."""
    config = Tars(root, MEMORY_IMAGE_SIZE).config(workers)
    stream = data.train_batches(
        config, global_batch_size=MEMORY_BATCH, micro_batch_size=MEMORY_BATCH, rank=0, world_size=1, seed=0
    )
    memory = Memory([], [], [])
    marks = {math.ceil(batches * n / MEMORY_SAMPLINGS) for n in range(1, MEMORY_SAMPLINGS + 1)}
    for number in range(1, batches + 1):
        next(stream)
        if number in marks:
            sizes = [_mebibytes(pid) for pid in _workers()]
            memory.batches_n.append(number)
            memory.rss_mib_nw.append([size["Rss"] for size in sizes])
            memory.pss_mib_nw.append([size["Pss"] for size in sizes])
    stream.close()
    return memory._asdict()


def _mebibytes(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}


def main() -> None:
    """A job's name, and its arguments as JSON; the answer is the last line of stdout, JSON too."""
    job = {job.__name__: job for job in (generate, measure, count_bytes, watch_memory)}[sys.argv[1]]
    try:
        answer = job(**json.loads(sys.argv[2]))
    except DataError as error:
        answer = {"failed": str(error)}
    except Exception as error:
        traceback.print_exception(error)
        answer = {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    print(json.dumps(answer))
