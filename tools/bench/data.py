"""`ibq bench data`: the training stream's speed, bytes and memory, beside webdataset and a loader that discards."""

import contextlib
import itertools
import json
import math
import os
import platform
import tempfile
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.addresses import is_remote, redacted
from data.errors import DataError
from data.parallel import cores
from data.shards import expand
from tools.bench import common
from tools.bench.common import COLORS, Table, plural
from tools.console import echo

SCHEMES = ("bound", "ibq", "webdataset", "discard")
TARS, SAMPLES_OF_TAR = 8, 256  # made if no tars are given
FLAT_MIB = 0.1  # per 1,000 batches, at most

LEGEND = """\
bound: as many processes decode, resize, crop and flip the same samples from memory, and do nothing else.
discard: each of W ranks decodes all samples and keeps every W-th; the images of one rank count.
processor ms: CPU time per image over all processes. of bound by ms: the bound's CPU time as a share of it, which other
programs on the machine disturb less than images/s."""
LONG_LEGEND = """\
Each repeat of each row is a fresh process: it warms up, then reads all samples at least once. Repeats of rows with the
same number of workers alternate, and the fastest counts. Compare times only within one run of the benchmark.

bound: as many processes as workers (one without workers) apply the training transform (decode, resize, random crop,
flip) to the same samples from memory, and do nothing else. ibq: `data.train_batches`. webdataset: as in its
documentation, WebDataset with split_by_node, split_by_worker and shuffle(1000), the same transform, batches of 32 made
in the workers. discard: the scheme of TencentARC/SEED-Voken, where each of W ranks reads and decodes all samples and
keeps every W-th; the images of one rank count. Images are counted in the main process.

processor ms: CPU time per image over all processes, the main one included. of bound by ms: the bound's CPU time as a
share of it, which other programs on the machine disturb less than images per second.

Bytes: one epoch of W ranks, one after the other in one process without workers. read: from files (rchar of
/proc/self/io), cached or not. needed: the size of the delivered samples in their tars, headers included. distinct: the
number of different images; each rank of discard shuffles in its own order."""
MEMORY_LEGEND = """\
Memory: of each loader worker of ibq, with batches of 8 images of 32 x 32 pixels. resident: including all memory shared
with other processes. proportional: including its share of that. The slope is of a line fitted to 100 measurements,
without the first tenth."""


class Plan(NamedTuple):
    """What is measured. buckets: whether image_size stands for the buckets of about as many pixels. seconds: least time
    of a repeat; memory_batches: 0 skips the memory."""

    workers: list[int]
    world: int
    image_size: int
    buckets: bool
    seconds: float
    repeats: int
    memory_batches: int

    @property
    def schemes(self) -> tuple[str, ...]:
        """Those that are measured: the others have no buckets."""
        return SCHEMES[:2] if self.buckets else SCHEMES


class Rate(NamedTuple):
    """One repeat. processor_seconds: over all processes."""

    images: int
    images_per_second: float
    processor_seconds: float

    @property
    def processor_ms(self) -> float:
        """Per image."""
        return 1000 * self.processor_seconds / self.images


class Row(NamedTuple):
    """A scheme's repeats at a number of workers, or the reason why there are none."""

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
        """Per image, of the repeat that used least."""
        return min(rate.processor_ms for rate in self.rates)


class Bytes(NamedTuple):
    """One epoch of all ranks. by_storage: counted by `data.storage`, for ibq; scanned: read before, to find samples."""

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
    """Of each loader worker, after so many batches, in MiB. proportional: shared pages count by their share."""

    batches_n: list[int]
    resident_mib_nw: list[list[float]]
    proportional_mib_nw: list[list[float]]

    @property
    def slopes(self) -> list[float]:
        """Of each worker's resident memory: MiB per 1,000 batches, least squares without the first tenth."""
        batches_n = np.array(self.batches_n)
        later_n = batches_n > batches_n[-1] / 10
        return np.polyfit(batches_n[later_n] / 1000, np.array(self.resident_mib_nw)[later_n], 1)[0].tolist()

    @property
    def tenths(self) -> list[int]:
        """Indices of the measurements at 10 %, 20 %, ..., 100 %."""
        return [round(len(self.batches_n) * tenth / 10) - 1 for tenth in range(1, 11)]


SPEED_HEADINGS = [
    *("scheme", "workers", "images/s", "of bound", "processor ms", "of bound by ms"),
    "images/s of each repeat",
]
SPEED_WIDTHS = [10, 7, 8, 8, 12, 14, 23]


class Report(NamedTuple):
    """All figures. memories: one, or none if skipped; failures: what could not be measured, and why."""

    heading: list[str]
    command: str
    plan: Plan
    rows: list[Row]
    bytes: list[Bytes]
    memories: list[Memory]
    failures: list[str]

    def row(self, scheme: str, workers: int) -> Row | None:
        """None if it was not measured."""
        return next((row for row in self.rows if row.rates and (row.scheme, row.workers) == (scheme, workers)), None)

    def record(self) -> dict:
        """For JSON."""
        rows = [row._asdict() | {"rates": [rate._asdict() for rate in row.rates]} for row in self.rows]
        bytes_, memories = ([one._asdict() for one in many] for many in (self.bytes, self.memories))
        return self._asdict() | {"plan": self.plan._asdict(), "rows": rows, "bytes": bytes_, "memories": memories}

    def speed_cells(self, row: Row) -> list[str]:
        """The row's numbers, or the reason why it has none."""
        names = [row.scheme, str(row.workers)]
        if not row.rates:
            return [*names, f"not measured: {row.reason}"]
        bound, shares = self.row("bound", row.workers), ["-", "-"]
        if bound is not None:
            ratios = row.images_per_second / bound.images_per_second, bound.processor_ms / row.processor_ms
            shares = [f"{ratio:.1%}" for ratio in ratios]
        repeats = " ".join(f"{rate.images_per_second:.0f}" for rate in row.rates)
        return [*names, f"{row.images_per_second:.1f}", shares[0], f"{row.processor_ms:.2f}", shares[1], repeats]

    def bytes_table(self) -> Table:
        headings = ["images", "distinct", "read, MB", "needed, MB", "read / needed"]
        rows = []
        for one in self.bytes:
            megabytes = [f"{number / 1e6:.1f}" for number in (one.read, one.needed)]
            rows.append([one.scheme, f"{one.images:,}", f"{one.distinct:,}", *megabytes, f"{one.ratio:.3f}"])
        return Table([f"one epoch, W = {self.plan.world}", *headings], rows)

    def memory_table(self) -> Table:
        headings = ["memory", "batches", "resident, MiB of each worker", "proportional, MiB of each worker"]
        rows = []
        for memory in self.memories:
            for tenth, look in enumerate(memory.tenths, start=1):
                sizes = memory.resident_mib_nw[look], memory.proportional_mib_nw[look]
                texts = [" ".join(f"{size:.1f}" for size in size_w) for size_w in sizes]
                rows.append([f"{tenth * 10} %", f"{memory.batches_n[look]:,}", *texts])
        return Table(headings, rows)

    def notes(self) -> list[str]:
        """Ratios between the schemes, bytes, memory, and what could not be measured."""
        notes = []
        for workers in self.plan.workers:
            rows = {scheme: row for scheme in SCHEMES if (row := self.row(scheme, workers))}
            if "ibq" not in rows:
                continue
            ibq = rows["ibq"].images_per_second
            parts = [f"{ibq / rows['bound'].images_per_second:.1%} of the bound"] if "bound" in rows else []
            others = [scheme for scheme in SCHEMES[2:] if scheme in rows]
            parts += [f"{ibq / rows[scheme].images_per_second:.2f} times the images of {scheme}" for scheme in others]
            notes.append(f"{plural(workers, 'worker')}: ibq delivers {', '.join(parts)}")
        for one in self.bytes:
            if one.scheme == "ibq":
                counted = f"{one.by_storage / one.needed:.3f} by its own count"
                notes.append(f"ibq reads {one.ratio:.3f} of the bytes it needs; {counted}")
                if one.scanned > one.needed / 100:
                    scanned = f"{one.scanned / 1e6:.1f} MB"
                    notes.append(f"scanning tars without an index read {scanned} more, once at the start")
        for memory in self.memories:
            flat = max(map(abs, memory.slopes)) <= FLAT_MIB
            slopes = ", ".join(f"{slope:+.3f}" for slope in memory.slopes)
            notes.append(
                f"the workers' memory is {'flat' if flat else 'not flat'}: {slopes} MiB per 1,000 batches (resident)"
            )
        return [*notes, *self.failures]

    def markdown(self, picture: str) -> str:
        speed = Table(SPEED_HEADINGS, [self.speed_cells(row) for row in self.rows])
        tables = [speed, self.bytes_table(), *([self.memory_table()] if self.memories else [])]
        legends = LONG_LEGEND, MEMORY_LEGEND if self.memories else ""
        picture = f"![Images per second, bytes, memory]({picture})"
        return common.markdown_page("The training stream", self, tables, *legends, picture)

    def draw(self, path: Path) -> None:
        """Images per second over workers, bytes read / needed, and memory over batches."""
        widths = [7, 3.6, 4] if self.memories else [7, 3.6]
        size = sum(widths), 4.8
        figure, axes = common.pyplot().subplots(1, len(widths), figsize=size, layout="constrained", width_ratios=widths)
        _draw_speed(axes[0], self)
        _draw_bytes(axes[1], self)
        for memory in self.memories:
            _draw_memory(axes[2], memory)
        figure.suptitle("\n".join(self.heading), fontsize=9)
        common.save(figure, path)


def _draw_speed(axis, report: Report) -> None:
    workers, schemes = report.plan.workers, report.plan.schemes[1:]
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
        axis.bar_label(bars, texts, padding=-11, color="white", fontsize=8)  # above it would overlap the bound's line
    bounds = [(n, row.images_per_second) for n, number in enumerate(workers) if (row := report.row("bound", number))]
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
    axis.set_title(f"bytes read / needed, {plural(report.plan.world, 'rank')}", loc="left", fontsize=10)


def _draw_memory(axis, memory: Memory) -> None:
    for worker, mib_n in enumerate(np.array(memory.resident_mib_nw).T):
        style = {"linewidth": 1} if worker else {"linewidth": 4, "alpha": 0.4}  # so that equal lines are both visible
        axis.plot(memory.batches_n, mib_n, label=f"worker {worker}", **style)
    axis.set_ylim(0, 1.3 * np.max(memory.resident_mib_nw))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.locator_params(axis="x", nbins=4)
    axis.set_xlabel("batches delivered")
    axis.set_title("resident memory of ibq's workers, MiB", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8, loc="upper right", ncols=4)


# ------------------------------------------------------------------------------------------------------------ measuring


def compare(root: str | None, plan: Plan, out: Path | None, command: str) -> None:
    """Measures everything in the plan, prints it, and writes it to ``out`` and beside it. root: None makes tars."""
    with contextlib.ExitStack() as stack:
        about = root
        if root is None:
            about = "crops of scikit-image's photographs, shorter side 512 pixels"
            root = stack.enter_context(tempfile.TemporaryDirectory(prefix="ibq-bench-"))
            with common.status(f"making {TARS * SAMPLES_OF_TAR:,} images"):
                made = common.run_job("data_rows", "generate", folder=root)
            if failed := made.get("failed"):
                raise DataError(failed)
        report = Report([*_machine(), f"data: {about}: {_size(root)}"], command, plan, [], [], [], [])
        headings = common.line(SPEED_HEADINGS, SPEED_WIDTHS)
        echo("\n".join([*report.heading, "", headings]))
        for row in _measured(root, plan):
            report.rows.append(row)
            echo(common.line(report.speed_cells(row), SPEED_WIDTHS))
        echo(f"\n{LEGEND}\n")
        _count(root, report)
        echo("\n".join(common.lines(report.bytes_table())))
        if plan.memory_batches:
            _watch(root, report)
            echo("\n" + "\n".join(common.lines(report.memory_table())))
    echo("\n".join(["", *(textwrap.fill(note, 120) for note in report.notes())]))
    if out is not None:
        out.write_text(report.markdown(out.with_suffix(".png").name), encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(report.record(), indent=2) + "\n", encoding="utf-8")
        report.draw(out.with_suffix(".png"))
        echo(f"\ntables: {out}\nJSON: {out.with_suffix('.json')}\npicture: {out.with_suffix('.png')}")


def _measured(root: str, plan: Plan) -> Iterator[Row]:
    """Yields rows by number of workers. Repeats alternate between schemes, since the load of the machine varies."""
    number, in_all = 0, len(plan.workers) * plan.repeats * len(plan.schemes)
    for workers in plan.workers:
        rows = {scheme: Row(workers, scheme, []) for scheme in plan.schemes}
        for _, scheme in itertools.product(range(plan.repeats), plan.schemes):
            number += 1
            if rows[scheme].reason:
                continue
            with common.status(f"measuring {number} of {in_all}: {scheme}, {plural(workers, 'worker')}"):
                settings = {name: getattr(plan, name) for name in ("image_size", "buckets", "world", "seconds")}
                answer = common.run_job("data_rows", "measure", root=root, scheme=scheme, workers=workers, **settings)
            if "failed" in answer:
                rows[scheme] = Row(workers, scheme, [], answer["failed"])
            else:
                rows[scheme].rates.append(Rate(**answer))
        yield from rows.values()


def _count(root: str, report: Report) -> None:
    """Adds bytes to the report."""
    for scheme in report.plan.schemes[1:]:
        with common.status(f"counting bytes: {scheme}"):
            answer = common.run_job("data_rows", "count_bytes", root=root, scheme=scheme, world=report.plan.world)
        if "failed" in answer:
            report.failures.append(f"bytes of {scheme} were not counted: {answer['failed']}")
        else:
            report.bytes.append(Bytes(**answer))


def _watch(root: str, report: Report) -> None:
    """Adds memory to the report."""
    workers, batches = max([1, *report.plan.workers]), report.plan.memory_batches
    with common.status(f"watching the memory of {plural(workers, 'worker')} over {batches:,} batches"):
        answer = common.run_job("data_rows", "watch_memory", root=root, workers=workers, batches=batches)
    if "failed" in answer:
        report.failures.append(f"memory was not watched: {answer['failed']}")
    else:
        report.memories.append(Memory(**answer))


def _machine() -> list[str]:
    packages = [f"{package} {metadata.version(package)}" for package in ("torch", "pillow", "webdataset")]
    versions = ", ".join([*packages, f"Python {platform.python_version()}"])
    about = f"{common.cpu_name()}, {plural(cores(), 'core')}, load average {os.getloadavg()[0]:.1f}"
    return [f"{common.today()}: {about}", versions]


def _size(root: str) -> str:
    """Number and size of the tars. Raises DataError for tars that some rows cannot read."""
    urls = expand(root)
    if wrong := next((url for url in urls if is_remote(url) or not url.endswith(".tar")), None):
        raise DataError(f"{redacted(wrong)} is not a local tar: copy some tars to this machine and pass them as --data")
    total = sum(map(os.path.getsize, urls))
    available = common.proc_number("/proc/meminfo", "MemAvailable") * 1024
    if total > available / 2:
        raise DataError(
            f"the tars of --data are {total / 1e9:.1f} GB; the bound keeps them in memory, of which "
            f"{available / 1e9:.1f} GB are free: use fewer tars"
        )
    return f"{plural(len(urls), 'tar')}, {total / 1e6:,.0f} MB"
