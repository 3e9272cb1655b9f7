"""The measurements of `ibq bench data`. Each job runs in a fresh process."""

import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset
from PIL import Image
from webdataset.writer import TarWriter

from data.buckets import bucket_of, bucket_sizes
from data.config import DataConfig
from data.errors import DataError, ImageError
from data.index import INDEX_NAME, key_hash, write_index
from data.loader import open_sources, train_batches, transform_of
from data.parallel import cores, in_processes
from data.prep.check import check_shards
from data.samples import IMAGE_SUFFIXES
from data.shards import PHOTOGRAPHS, expand
from data.sources import Source
from data.storage import bytes_read
from data.transforms import TrainingTransform, decode, image_header
from tools.bench.common import plural, proc_number
from tools.bench.data import SAMPLES_OF_TAR, TARS, Bytes, Memory, Rate

BATCH = 32
SHUFFLED = 1000  # size of webdataset's shuffle buffer, as in its documentation
WARM_UP_BATCHES = 6  # of each process; a DataLoader prefetches two
SMALL_IMAGE, SMALL_BATCH = 32, 8  # for jobs where speed does not matter
LOOKS = 100  # measurements of the workers' memory


class Generated(NamedTuple):
    tars: int


class Delivered(NamedTuple):
    """A delivered sample."""

    tar: str
    key: str


def generate(folder: str) -> Generated:
    """Makes tars with an index: crops of scikit-image's photographs, shorter side 512 pixels, with captions."""
    source = resources.files("skimage") / "data"
    names = itertools.chain(*PHOTOGRAPHS.values())
    photographs = {name: decode((source / name).read_bytes()) for name in names}
    write = functools.partial(_write_tar, folder=Path(folder), photographs=photographs)
    paths = list(in_processes(write, range(TARS), min(cores(), TARS)))
    checked = list(check_shards(paths))
    write_index(Path(folder) / INDEX_NAME, paths, [one.table for one in checked], [one.sha256 for one in checked])
    return Generated(len(paths))


def _write_tar(number: int, folder: Path, photographs: dict[str, Image.Image]) -> str:
    rng, path = random.Random(number), str(folder / f"photographs-{number:06d}.tar")
    with TarWriter(path, encoder=False, mtime=0) as writer:
        for sample in range(SAMPLES_OF_TAR):
            name = rng.choice(list(photographs))
            part = _part(photographs[name], rng)
            buffer = io.BytesIO()
            part.save(buffer, "JPEG", quality=90)
            about = {"width": part.width, "height": part.height, "source": name}
            texts = {"txt": f"part of {name}".encode(), "json": json.dumps(about).encode()}
            writer.write({"__key__": f"{number:06d}-{sample:06d}", "jpg": buffer.getvalue(), **texts})
    return path


def _part(image: Image.Image, rng: random.Random, side: int = 512) -> Image.Image:
    """A random crop: half to all of the shorter side, portrait or landscape, up to 3:2."""
    shorter = round(min(image.size) * rng.uniform(0.5, 1))
    longer = round(shorter * rng.uniform(1, 1.5))
    size = (longer, shorter) if rng.random() < 0.5 else (shorter, longer)
    width, height = min(size[0], image.width), min(size[1], image.height)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    scale = side / min(width, height)
    box = (left, top, left + width, top + height)
    return image.resize((round(scale * width), round(scale * height)), Image.Resampling.BICUBIC, box)


# --------------------------------------------------------------------------------------------------------- the schemes


def batches_of(
    scheme: str, config: DataConfig, rank: int, world: int, *, endless: bool = True
) -> Iterator[list[Delivered]]:
    """The batches of one rank. Those of ibq are always endless."""
    if scheme == "ibq":
        return _ibq(config, rank, world)
    if scheme == "webdataset":  # as in its documentation: tars are distributed over ranks and workers
        return _webdataset(config, rank, world, slice(None), endless)
    # As in TencentARC/SEED-Voken: each rank decodes all samples and keeps every W-th.
    return _webdataset(config, 0, 1, slice(rank, None, world), endless)


def _ibq(config: DataConfig, rank: int, world: int) -> Iterator[list[Delivered]]:
    sizes = {"global_batch_size": BATCH * world, "micro_batch_size": BATCH}
    for batch in train_batches(config, **sizes, rank=rank, world_size=world, seed=0):
        yield [Delivered(info.shard, info.key) for info in batch.infos]


def _webdataset(config: DataConfig, rank: int, world: int, keep: slice, endless: bool) -> Iterator[list[Delivered]]:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))  # where split_by_node looks
    urls, transform, rng, workers = expand(config.train), transform_of(config), random.Random(0), config.workers
    if len(urls) < world * max(1, workers):
        raise DataError(f"there are fewer tars than {plural(world, 'rank')} x {plural(max(1, workers), 'worker')}")

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


# --------------------------------------------------------------------------------------------------------------- speed


def measure(
    root: str, image_size: int, scheme: str, workers: int, world: int, seconds: float, buckets: bool = False
) -> Rate:
    """Measures whole passes over the samples, as many as fill ``seconds``."""
    sizes = {"pixels": [image_size]} if buckets else {"image_size": image_size}
    config = DataConfig(train=root, workers=workers, **sizes)
    if scheme == "bound":
        return bound(config, seconds)
    ranks = world if scheme == "discard" else 1
    images_in_pass = math.ceil(sum(map(len, _source(config).shards)) / ranks)
    batches = batches_of(scheme, config, 0, ranks)
    for _ in range(WARM_UP_BATCHES * max(1, workers)):
        next(batches)
    start, processor, images = time.perf_counter(), _processor_seconds(), 0
    for passes in itertools.count(1):
        while images < passes * images_in_pass:
            images += len(next(batches))
        passed = time.perf_counter() - start
        if passed >= seconds:
            return Rate(images, images / passed, _processor_seconds() - processor)


def bound(config: DataConfig, seconds: float) -> Rate:
    """Measures the transform alone, in as many processes as workers, or in this process."""
    contents = []
    for shard in _source(config).shards:
        for index in range(len(shard)):
            with contextlib.suppress(ImageError):
                content = shard.read(index).image()
                contents.append((content, _transform(config, content)))
    count = max(1, config.workers)
    context = multiprocessing.get_context("fork")
    ready, rates = context.Barrier(count, timeout=600), context.SimpleQueue()

    def work(first: int) -> None:
        own, rng, images = contents[first::count], random.Random(first), 0
        for content, transform in own[: WARM_UP_BATCHES * BATCH]:
            with contextlib.suppress(ImageError):
                transform(content, rng)
        ready.wait()
        start, processor, passed = time.perf_counter(), time.process_time(), 0.0
        while passed < seconds:
            for content, transform in own:
                with contextlib.suppress(ImageError):
                    transform(content, rng)
                    images += 1
            passed = time.perf_counter() - start
        rates.put(Rate(images, images / passed, time.process_time() - processor))

    processes = [context.Process(target=work, args=(first,)) for first in range(config.workers)]
    for process in processes:
        process.start()
    if not processes:
        work(0)
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise DataError("a process was killed, probably out of memory")
    return Rate(*(sum(values) for values in zip(*(rates.get() for _ in range(count)), strict=True)))


def _transform(config: DataConfig, content: bytes) -> TrainingTransform:
    """That of the image's bucket, if there are any."""
    if not (sizes := bucket_sizes(config)):
        return transform_of(config)
    header = image_header(content)
    (bucket,), _ = bucket_of(sizes, np.array([[header.height, header.width]]), config.max_enlargement)
    return TrainingTransform(config, sizes[bucket], config.max_enlargement)


def _source(config: DataConfig) -> Source:
    """Opens the tars by their index, or scans them."""
    return open_sources(config)[0]


def _processor_seconds() -> float:
    """CPU time of this process and its workers so far."""
    return time.process_time() + sum(map(_processor_seconds_of, _workers()))


def _processor_seconds_of(pid: int) -> float:
    # The process name before the last parenthesis may contain spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _workers() -> list[int]:
    return sorted(process.pid for process in multiprocessing.active_children())


# --------------------------------------------------------------------------------------------------------------- bytes


def count_bytes(root: str, scheme: str, world: int) -> Bytes:
    """Counts bytes of one epoch of ``world`` ranks, one after the other, without workers; small images save time."""
    config = DataConfig(train=root, image_size=SMALL_IMAGE, workers=0)
    before = _bytes_read()
    shards = _source(config).shards
    scanned = _bytes_read() - before
    size = {}
    for shard in shards:
        places = zip(shard.table.keys_n, shard.table.stops_n - shard.table.starts_n, strict=True)
        size.update({(shard.name, int(key)): int(count) for key, count in places})
    steps = len(size) // (BATCH * world)
    if not steps and scheme == "ibq":
        raise DataError(
            f"{len(size)} samples are fewer than {world} ranks x {BATCH}: use more samples or a smaller --world"
        )
    before, storage_before, delivered = _bytes_read(), bytes_read(), []
    for rank in range(world):
        batches = batches_of(scheme, config, rank, world, endless=False)
        delivered += itertools.chain(*itertools.islice(batches, steps if scheme == "ibq" else None))
    read, by_storage = _bytes_read() - before, bytes_read() - storage_before if scheme == "ibq" else None
    needed = sum(size[one.tar, key_hash(one.key)] for one in delivered)
    return Bytes(scheme, len(delivered), len(set(delivered)), read, needed, by_storage, scanned)


def _bytes_read() -> int:
    """Read by this process so far, cached or not."""
    return proc_number("/proc/self/io", "rchar")


# -------------------------------------------------------------------------------------------------------------- memory


def watch_memory(root: str, workers: int, batches: int) -> Memory:
    """Watches the memory of the training stream's workers."""
    config = DataConfig(train=root, image_size=SMALL_IMAGE, workers=workers)
    sizes = {"global_batch_size": SMALL_BATCH, "micro_batch_size": SMALL_BATCH}
    stream = train_batches(config, **sizes, rank=0, world_size=1, seed=0)
    memory = Memory([], [], [])
    marks = {math.ceil(batches * n / LOOKS) for n in range(1, LOOKS + 1)}
    for number in range(1, batches + 1):
        next(stream)
        if number in marks:
            sizes = [_mebibytes(process.pid) for process in stream.reads.processes]
            memory.batches_n.append(number)
            memory.resident_mib_nw.append([size["Rss"] for size in sizes])
            memory.proportional_mib_nw.append([size["Pss"] for size in sizes])
    stream.close()
    return memory


def _mebibytes(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
