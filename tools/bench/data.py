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
import platform
import random
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Iterator
from datetime import datetime, timezone
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
from data.addresses import is_remote, redacted
from data.index import INDEX_NAME, key_hash, write_index
from data.loader import open_sources, transform_of
from data.parallel import cores, in_processes
from data.prep.check import check_shards
from data.prep.photographs import PHOTOGRAPHS
from data.samples import IMAGE_SUFFIXES
from data.sources import Source
from data.storage import bytes_read
from tools.bench import command as bench
from tools.bench.quantizer import machine

BATCH = 32
SHUFFLED = 1000  # samples that webdataset shuffles, as in its documentation
WARM_UP_BATCHES = 6  # of each process; a DataLoader reads two ahead
SCHEMES = ("bound", "ibq", "webdataset", "discard")
COLORS = {"bound": "#222222", "ibq": "#4c72b0", "webdataset": "#dd8452", "discard": "#9a9a9a"}
TARS, SAMPLES_OF_TAR = 8, 256  # that are made where none are named
SMALL_IMAGE, SMALL_BATCH = 32, 8  # where the number of batches matters and not their speed
LOOKS = 100  # at the workers' memory
FLAT_MIB = 0.1  # per 1,000 batches, at most

LEGEND = """\
bound: as many processes decode, resize, crop and flip the same samples, held in memory, and do nothing else.
discard: each of W ranks decodes all samples and keeps each W-th; the images of one rank count.
processor ms: an image's time on the processors, in all processes together; of bound by ms: the bound's beside it, which
programs beside this one disturb less than images/s."""
LONG_LEGEND = """\
Each repeat of each row is a fresh process: it warms up, and then goes over all samples once or more. The repeats of the
rows of one number of workers take turns, and the fastest counts. Times of one run compare with each other only.

bound: as many processes do the training transform (decode, resize, random crop, flip) and nothing else, on the same
samples, held in memory; one process where there are no workers. ibq: `data.train_batches`. webdataset: as its
documentation has it, WebDataset with split_by_node, split_by_worker and shuffle(1000), the same transform, batched by
32 in the workers. discard: the scheme of TencentARC/SEED-Voken, where each of W ranks reads and decodes all samples and
keeps each W-th; the images of one rank count. All count where they arrive, in the main process.

processor ms: the time that an image takes on the processors, in all processes together, the main one included. of bound
by ms: the bound's beside it, which programs beside this one disturb less than images per second.

One epoch of W ranks, one after the other in one process and without workers. read: from files (rchar of /proc/self/io),
whether they were in the page cache or not. needed: what the delivered samples have in their tars, headers included.
distinct: how many of the images are different ones; the ranks of discard shuffle each in an order of its own."""
MEMORY_LEGEND = """\
Memory: of each loader worker of ibq, while 8 images of 32 x 32 pixels make a batch. resident: with all that it shares
with other processes; proportional: with its part of that. The slope is that of a line through 100 looks, without the
first tenth."""


class Plan(NamedTuple):
    """What is measured. seconds: least time of a repeat; memory_batches: 0 leaves the memory out."""

    workers: list[int]
    world: int
    image_size: int
    seconds: float
    repeats: int
    memory_batches: int


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
    distinct: int
    read: int
    needed: int
    by_storage: int | None
    scanned: int

    @property
    def ratio(self) -> float:
        return self.read / self.needed


class Memory(NamedTuple):
    """Of each loader worker, after so many batches, in MiB. proportional: shared pages count in parts."""

    batches_n: list[int]
    resident_mib_nw: list[list[float]]
    proportional_mib_nw: list[list[float]]

    @property
    def slopes(self) -> list[float]:
        """Of each worker's resident memory: MiB per 1,000 batches, least squares without the first tenth."""
        later = [n for n, batches in enumerate(self.batches_n) if batches > self.batches_n[-1] / 10]
        thousands_n = np.array([self.batches_n[n] for n in later]) / 1000
        return np.polyfit(thousands_n, np.array([self.resident_mib_nw[n] for n in later]), 1)[0].tolist()

    @property
    def tenths(self) -> list[int]:
        """Which looks are at 10 %, 20 % and so on to 100 %."""
        return [round(len(self.batches_n) * tenth / 10) - 1 for tenth in range(1, 11)]


# ------------------------------------------------------------------------------------------------------------- the data


def generate(folder: str) -> dict:
    """Tars with an index: parts of scikit-image's photographs, with a shorter side of 512 pixels, and captions."""
    source = resources.files("skimage") / "data"
    names = itertools.chain(*PHOTOGRAPHS.values())
    photographs = {name: data.decode((source / name).read_bytes()) for name in names}
    write = functools.partial(_write_tar, folder=Path(folder), photographs=photographs)
    paths = list(in_processes(write, range(TARS), min(cores(), TARS)))
    checked = list(check_shards(paths))
    write_index(Path(folder) / INDEX_NAME, paths, [one.table for one in checked], [one.sha256 for one in checked])
    return {}


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
    tars: Tars, workers: int, rank: int = 0, world: int = 1, *, endless: bool = True
) -> Iterator[list[Delivered]]:
    """As webdataset's documentation has it: tars are dealt to ranks and workers."""
    return _webdataset(tars, workers, rank, world, slice(None), endless)


def discard_batches(
    tars: Tars, workers: int, rank: int = 0, world: int = 1, *, endless: bool = True
) -> Iterator[list[Delivered]]:
    """As TencentARC/SEED-Voken has it: each rank decodes what all of them get, and keeps each W-th."""
    return _webdataset(tars, workers, 0, 1, slice(rank, None, world), endless)


def _webdataset(
    tars: Tars, workers: int, rank: int, world: int, keep: slice, endless: bool
) -> Iterator[list[Delivered]]:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))  # where split_by_node looks
    urls, transform, rng = data.expand(tars.root), transform_of(tars.config()), random.Random(0)
    if len(urls) < world * max(1, workers):
        raise DataError(f"there are fewer tars than {_plural(world, 'rank')} x {_plural(max(1, workers), 'worker')}")

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
        batches, images_in_pass = discard_batches(tars, workers, 0, world), math.ceil(images_in_pass / world)
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
    ready, rates = context.Barrier(count, timeout=600), context.SimpleQueue()

    def work(first: int) -> None:
        own, rng, images = contents[first::count], random.Random(first), 0
        for content in own[: WARM_UP_BATCHES * BATCH]:
            with contextlib.suppress(data.ImageError):
                transform(content, rng)
        ready.wait()
        start, processor, passed = time.perf_counter(), time.process_time(), 0.0
        while passed < seconds:
            for content in own:
                with contextlib.suppress(data.ImageError):
                    transform(content, rng)
                    images += 1
            passed = time.perf_counter() - start
        rates.put(Rate(images, images / passed, time.process_time() - processor))

    processes = [context.Process(target=work, args=(first,)) for first in range(workers)]
    for process in processes:
        process.start()
    if not workers:
        work(0)
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise DataError("a process was killed, perhaps for lack of memory")
    return Rate(*(sum(values) for values in zip(*(rates.get() for _ in range(count)), strict=True)))


def _source(tars: Tars) -> Source:
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
    tars = Tars(root, SMALL_IMAGE)
    before = _bytes_read()
    shards = _source(tars).shards
    scanned = _bytes_read() - before
    size = {}
    for shard in shards:
        places = zip(shard.table.keys_n, shard.table.stops_n - shard.table.starts_n, strict=True)
        size.update({(shard.name, int(key)): int(count) for key, count in places})
    steps = len(size) // (BATCH * world)
    if not steps and scheme == "ibq":
        raise DataError(f"{len(size)} samples are fewer than {world} ranks x {BATCH}: use more, or a smaller --world")
    before, storage_before, delivered = _bytes_read(), bytes_read(), []
    for rank in range(world):
        if scheme == "ibq":
            batches = itertools.islice(ibq_batches(tars, 0, rank, world), steps)
        elif scheme == "webdataset":
            batches = webdataset_batches(tars, 0, rank, world, endless=False)
        else:
            batches = discard_batches(tars, 0, rank, world, endless=False)
        delivered += itertools.chain.from_iterable(batches)
    read, by_storage = _bytes_read() - before, bytes_read() - storage_before if scheme == "ibq" else None
    needed = sum(size[one.tar, key_hash(one.key)] for one in delivered)
    return Bytes(scheme, len(delivered), len(set(delivered)), read, needed, by_storage, scanned)._asdict()


def _bytes_read() -> int:
    """By this process so far, from the page cache or from below."""
    return int(Path("/proc/self/io").read_text().split()[1])  # "rchar: 1234" is its first line


# -------------------------------------------------------------------------------------------------------------- memory


def watch_memory(root: str, workers: int, batches: int) -> dict:
    """A `Memory` of the training stream."""
    config = Tars(root, SMALL_IMAGE).config(workers)
    stream = data.train_batches(
        config, global_batch_size=SMALL_BATCH, micro_batch_size=SMALL_BATCH, rank=0, world_size=1, seed=0
    )
    memory = Memory([], [], [])
    marks = {math.ceil(batches * n / LOOKS) for n in range(1, LOOKS + 1)}
    for number in range(1, batches + 1):
        next(stream)
        if number in marks:
            sizes = [_mebibytes(pid) for pid in _workers()]
            memory.batches_n.append(number)
            memory.resident_mib_nw.append([size["Rss"] for size in sizes])
            memory.proportional_mib_nw.append([size["Pss"] for size in sizes])
    stream.close()
    return memory._asdict()


def _mebibytes(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}


# ------------------------------------------------------------------------------------------------------ the comparison


def compare(root: str | None, plan: Plan, out: Path | None, command: str) -> None:
    """Measures all that is planned, prints it, and writes it to `out` and beside it. root: None makes tars."""
    with contextlib.ExitStack() as stack:
        about = root
        if root is None:
            about = "parts of scikit-image's photographs, shorter side 512 pixels"
            root = stack.enter_context(tempfile.TemporaryDirectory(prefix="ibq-bench-"))
            with bench._saying(f"making {TARS * SAMPLES_OF_TAR:,} pictures"):
                made = _run("generate", folder=root)
            if "failed" in made:
                raise DataError(made["failed"])
        report = Report([_machine(), f"data: {about}: {_size(root)}"], command, plan, [], [], [], [])
        typer.echo("\n".join([*report.heading, "", bench._line(list(SPEED_HEADINGS), SPEED_WIDTHS)]))
        for row in _measured(root, plan):
            report.rows.append(row)
            typer.echo(bench._line(_speed_cells(row, report.bound(row.workers)), SPEED_WIDTHS).rstrip())
        typer.echo(f"\n{LEGEND}\n")
        _count(root, report)
        typer.echo("\n".join(_lines(_bytes_table(report))))
        if plan.memory_batches:
            _watch(root, report)
            typer.echo("\n" + "\n".join(_lines(_memory_table(report))))
    typer.echo("\n".join(["", *(textwrap.fill(note, 120) for note in _notes(report))]))
    if out is not None:
        out.write_text(_markdown(report, out.with_suffix(".png").name), encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(report.record(), indent=2) + "\n", encoding="utf-8")
        _draw(report, out.with_suffix(".png"))
        typer.echo(f"\ntables: {out}\nJSON: {out.with_suffix('.json')}\npicture: {out.with_suffix('.png')}")


class Report(NamedTuple):
    """All that was found. memories: one, or none where it was left out; failures: what could not be found, and why."""

    heading: list[str]
    command: str
    plan: Plan
    rows: list[Row]
    bytes: list[Bytes]
    memories: list[Memory]
    failures: list[str]

    def row(self, scheme: str, workers: int) -> Row | None:
        """None where it was not measured."""
        return next((row for row in self.rows if row.rates and (row.scheme, row.workers) == (scheme, workers)), None)

    def bound(self, workers: int) -> Row | None:
        return self.row("bound", workers)

    def record(self) -> dict:
        """For JSON."""
        rows = [row._asdict() | {"rates": [rate._asdict() for rate in row.rates]} for row in self.rows]
        bytes_, memories = ([one._asdict() for one in many] for many in (self.bytes, self.memories))
        return self._asdict() | {"plan": self.plan._asdict(), "rows": rows, "bytes": bytes_, "memories": memories}


def _measured(root: str, plan: Plan) -> Iterator[Row]:
    """The rows of one number of workers after the other; their repeats take turns, since the machine may change."""
    number, in_all = 0, len(plan.workers) * plan.repeats * len(SCHEMES)
    for workers in plan.workers:
        rows = {scheme: Row(workers, scheme, []) for scheme in SCHEMES}
        for _, scheme in itertools.product(range(plan.repeats), SCHEMES):
            number += 1
            if rows[scheme].reason:
                continue
            with bench._saying(f"measuring {number} of {in_all}: {scheme}, {_plural(workers, 'worker')}"):
                settings = {"image_size": plan.image_size, "world": plan.world, "seconds": plan.seconds}
                answer = _run("measure", root=root, scheme=scheme, workers=workers, **settings)
            if "failed" in answer:
                rows[scheme] = Row(workers, scheme, [], answer["failed"])
            else:
                rows[scheme].rates.append(Rate(**answer))
        yield from rows.values()


def _count(root: str, report: Report) -> None:
    """Bytes, into the report."""
    for scheme in SCHEMES[1:]:
        with bench._saying(f"counting bytes: {scheme}"):
            answer = _run("count_bytes", root=root, scheme=scheme, world=report.plan.world)
        if "failed" in answer:
            report.failures.append(f"bytes of {scheme} are not counted: {answer['failed']}")
        else:
            report.bytes.append(Bytes(**answer))


def _watch(root: str, report: Report) -> None:
    """Memory, into the report."""
    workers, batches = max([1, *report.plan.workers]), report.plan.memory_batches
    with bench._saying(f"watching the memory of {_plural(workers, 'worker')} over {batches:,} batches"):
        answer = _run("watch_memory", root=root, workers=workers, batches=batches)
    if "failed" in answer:
        report.failures.append(f"memory is not watched: {answer['failed']}")
    else:
        report.memories.append(Memory(**answer))


_run = functools.partial(bench._run, module="data")


# -------------------------------------------------------------------------------------------------------- what is shown

SPEED_HEADINGS = (
    *("scheme", "workers", "images/s", "of bound", "processor ms", "of bound by ms"),
    "images/s of each repeat",
)
SPEED_WIDTHS = [10, 7, 8, 8, 12, 14, 23]


class Table(NamedTuple):
    """For the terminal and for Markdown."""

    headings: tuple[str, ...]
    rows: list[list[str]]


def _speed_cells(row: Row, bound: Row | None) -> list[str]:
    """Its numbers; where there are none, the reason and nothing more."""
    names = [row.scheme, str(row.workers)]
    if not row.rates:
        return [*names, f"not measured: {row.reason}"]
    shares = ["-", "-"]
    if bound is not None:
        ratios = row.images_per_second / bound.images_per_second, bound.processor_ms / row.processor_ms
        shares = [f"{ratio:.1%}" for ratio in ratios]
    repeats = " ".join(f"{rate.images_per_second:.0f}" for rate in row.rates)
    return [*names, f"{row.images_per_second:.1f}", shares[0], f"{row.processor_ms:.2f}", shares[1], repeats]


def _bytes_table(report: Report) -> Table:
    headings = (f"one epoch, W = {report.plan.world}", "images", "distinct", "read, MB", "needed, MB", "read / needed")
    rows = [
        [
            one.scheme,
            f"{one.images:,}",
            f"{one.distinct:,}",
            f"{one.read / 1e6:.1f}",
            f"{one.needed / 1e6:.1f}",
            f"{one.ratio:.3f}",
        ]
        for one in report.bytes
    ]
    return Table(headings, rows)


def _memory_table(report: Report) -> Table:
    headings = ("memory", "batches", "resident, MiB of each worker", "proportional, MiB of each worker")
    rows = []
    for memory in report.memories:
        for tenth, look in enumerate(memory.tenths, start=1):
            sizes = memory.resident_mib_nw[look], memory.proportional_mib_nw[look]
            texts = [" ".join(f"{size:.1f}" for size in size_w) for size_w in sizes]
            rows.append([f"{tenth * 10} %", f"{memory.batches_n[look]:,}", *texts])
    return Table(headings, rows)


def _lines(table: Table) -> list[str]:
    """For the terminal: names to the left, numbers to the right."""
    rows = [list(table.headings), *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _notes(report: Report) -> list[str]:
    """What the numbers say."""
    notes = []
    for workers in report.plan.workers:
        rows = {scheme: row for scheme in SCHEMES if (row := report.row(scheme, workers))}
        if "ibq" not in rows:
            continue
        ibq = rows["ibq"].images_per_second
        parts = [f"{ibq / rows['bound'].images_per_second:.1%} of the bound"] if "bound" in rows else []
        others = [scheme for scheme in SCHEMES[2:] if scheme in rows]
        parts += [f"{ibq / rows[scheme].images_per_second:.2f} times the images of {scheme}" for scheme in others]
        notes.append(f"{_plural(workers, 'worker')}: ibq delivers {', '.join(parts)}")
    for one in report.bytes:
        if one.scheme == "ibq":
            notes.append(
                f"ibq reads {one.ratio:.3f} of the bytes it needs; {one.by_storage / one.needed:.3f} by its own count"
            )
            if one.scanned > one.needed / 100:
                scanned = f"{one.scanned / 1e6:.1f} MB"
                notes.append(f"finding the samples of tars that have no index took {scanned} more, once at the start")
    for memory in report.memories:
        flat = max(map(abs, memory.slopes)) <= FLAT_MIB
        slopes = ", ".join(f"{slope:+.3f}" for slope in memory.slopes)
        notes.append(
            f"the workers' memory is {'flat' if flat else 'not flat'}: {slopes} MiB per 1,000 batches (resident)"
        )
    return [*notes, *report.failures]


def _markdown(report: Report, picture: str) -> str:
    speed = [_speed_cells(row, report.bound(row.workers)) for row in report.rows]
    parts = [
        "# The training stream",
        *report.heading,
        f"`{report.command}`",
        _markdown_table(Table(SPEED_HEADINGS, speed)),
        _markdown_table(_bytes_table(report)),
        *([_markdown_table(_memory_table(report))] if report.memories else []),
        "\n".join(f"- {note}" for note in _notes(report)),
        LONG_LEGEND.rstrip(),
        *([MEMORY_LEGEND] if report.memories else []),
        f"![Images per second, bytes, memory]({picture})",
    ]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = ["| " + " | ".join(table.headings) + " |", "|" + " --- |" * len(table.headings)]
    for row in table.rows:
        cells = [cell.replace("|", "/") for cell in row]
        lines.append("| " + " | ".join(cells + ["-"] * (len(table.headings) - len(cells))) + " |")
    return "\n".join(lines)


def _draw(report: Report, path: Path) -> None:
    """Images per second over workers, bytes read beside those needed, and memory over batches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = [7, 3.6, 4] if report.memories else [7, 3.6]
    size = sum(widths), 4.8
    figure, axes = pyplot.subplots(1, len(widths), figsize=size, layout="constrained", width_ratios=widths)
    _draw_speed(axes[0], report)
    _draw_bytes(axes[1], report)
    for memory in report.memories:
        _draw_memory(axes[2], memory)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("\n".join(report.heading), fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_speed(axis, report: Report) -> None:
    workers, schemes = report.plan.workers, SCHEMES[1:]
    about = {
        "webdataset": "webdataset, as documented",
        "discard": f"discard: decodes all, keeps 1 of {report.plan.world}",
    }
    width = 0.8 / len(schemes)
    for place, scheme in enumerate(schemes):
        rows = [report.row(scheme, number) for number in workers]
        at = [n + (place - (len(schemes) - 1) / 2) * width for n in range(len(workers))]
        heights = [row.images_per_second if row else math.nan for row in rows]
        bars = axis.bar(at, heights, width * 0.92, color=COLORS[scheme], label=about.get(scheme, scheme))
        texts = [f"{row.images_per_second:.0f}" if row else "" for row in rows]
        axis.bar_label(bars, texts, padding=-11, color="white", fontsize=8)  # above they would meet the bound's line
    bounds = [(n, row.images_per_second) for n, number in enumerate(workers) if (row := report.bound(number))]
    if bounds:
        places, heights = zip(*bounds, strict=True)
        ends = [n - 0.47 for n in places], [n + 0.47 for n in places]
        axis.hlines(heights, *ends, color=COLORS["bound"], linewidth=1.5, label="bound: decode and resize alone")
        for left, height in zip(ends[0], heights, strict=True):
            axis.text(left, height, f"{height:.0f}", va="bottom", fontsize=8)
    axis.set_xticks(range(len(workers)), [str(number) for number in workers])
    axis.set_xlabel("loader workers")
    axis.set_title("images per second that reach training (higher is better)", loc="left", fontsize=10)
    axis.set_ylim(0, axis.get_ylim()[1] * 1.2)  # room for the legend
    axis.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def _draw_bytes(axis, report: Report) -> None:
    names = [one.scheme for one in report.bytes]
    bars = axis.bar(names, [one.ratio for one in report.bytes], 0.7, color=[COLORS[name] for name in names])
    axis.bar_label(bars, [f"{one.ratio:.2f}" for one in report.bytes], fontsize=8)
    axis.axhline(1, color=COLORS["bound"], linewidth=1, linestyle=":")
    axis.set_title(f"bytes read / needed, {_plural(report.plan.world, 'rank')}", loc="left", fontsize=10)


def _draw_memory(axis, memory: Memory) -> None:
    for worker, mib_n in enumerate(np.array(memory.resident_mib_nw).T):
        style = {"linewidth": 1} if worker else {"linewidth": 4, "alpha": 0.4}  # so that equal ones are both seen
        axis.plot(memory.batches_n, mib_n, label=f"worker {worker}", **style)
    axis.set_ylim(0, 1.3 * np.max(memory.resident_mib_nw))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.locator_params(axis="x", nbins=4)
    axis.set_xlabel("batches delivered")
    axis.set_title("resident memory of ibq's workers, MiB", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="upper right", ncols=4)


def _machine() -> str:
    packages = [f"{package} {metadata.version(package)}" for package in ("torch", "pillow", "webdataset")]
    versions = ", ".join([*packages, f"Python {platform.python_version()}"])
    about = f"{machine('cpu', None, None).name}, {_plural(cores(), 'core')}, load {os.getloadavg()[0]:.1f} before"
    return f"{datetime.now(timezone.utc):%Y-%m-%d}: {about}; {versions}"


def _size(root: str) -> str:
    """Of the tars. Raises DataError for what the rows cannot all read."""
    urls = data.expand(root)
    if wrong := next((url for url in urls if is_remote(url) or not url.endswith(".tar")), None):
        raise DataError(f"{redacted(wrong)} is no local tar: copy some tars here, and name them with --data")
    total = sum(map(os.path.getsize, urls))
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    if total > available / 2:
        raise DataError(
            f"the tars of --data have {total / 1e9:.1f} GB, and the bound holds them in memory, of which "
            f"{available / 1e9:.1f} GB are free: name fewer of them"
        )
    return f"{_plural(len(urls), 'tar')}, {total / 1e6:,.0f} MB"


def _plural(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number or 'no'} {what}s"


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
