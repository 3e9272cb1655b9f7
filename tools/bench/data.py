"""`ibq bench data`: the training stream's speed, bytes and memory, beside webdataset and a loader that discards."""

import contextlib
import itertools
import json
import os
import platform
import tempfile
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import typer

from data.addresses import is_remote, redacted
from data.errors import DataError
from data.parallel import cores
from data.shards import expand
from tools.bench import common
from tools.bench import data_report as reporting
from tools.bench.common import plural
from tools.bench.data_report import SAMPLES_OF_TAR, SCHEMES, TARS, Bytes, Memory, Plan, Rate, Report, Row


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
        report = Report([_machine(), f"data: {about}: {_size(root)}"], command, plan, [], [], [], [])
        headings = common.line(reporting.SPEED_HEADINGS, reporting.SPEED_WIDTHS)
        typer.echo("\n".join([*report.heading, "", headings]))
        for row in _measured(root, plan):
            report.rows.append(row)
            typer.echo(common.line(report.speed_cells(row), reporting.SPEED_WIDTHS))
        typer.echo(f"\n{reporting.LEGEND}\n")
        _count(root, report)
        typer.echo("\n".join(common.lines(report.bytes_table())))
        if plan.memory_batches:
            _watch(root, report)
            typer.echo("\n" + "\n".join(common.lines(report.memory_table())))
    typer.echo("\n".join(["", *(textwrap.fill(note, 120) for note in report.notes())]))
    if out is not None:
        out.write_text(report.markdown(out.with_suffix(".png").name), encoding="utf-8")
        out.with_suffix(".json").write_text(json.dumps(report.record(), indent=2) + "\n", encoding="utf-8")
        report.draw(out.with_suffix(".png"))
        typer.echo(f"\ntables: {out}\nJSON: {out.with_suffix('.json')}\npicture: {out.with_suffix('.png')}")


def _measured(root: str, plan: Plan) -> Iterator[Row]:
    """Yields rows by number of workers. Repeats alternate between schemes, since the load of the machine varies."""
    number, in_all = 0, len(plan.workers) * plan.repeats * len(SCHEMES)
    for workers in plan.workers:
        rows = {scheme: Row(workers, scheme, []) for scheme in SCHEMES}
        for _, scheme in itertools.product(range(plan.repeats), SCHEMES):
            number += 1
            if rows[scheme].reason:
                continue
            with common.status(f"measuring {number} of {in_all}: {scheme}, {plural(workers, 'worker')}"):
                settings = {"image_size": plan.image_size, "world": plan.world, "seconds": plan.seconds}
                answer = common.run_job("data_rows", "measure", root=root, scheme=scheme, workers=workers, **settings)
            if "failed" in answer:
                rows[scheme] = Row(workers, scheme, [], answer["failed"])
            else:
                rows[scheme].rates.append(Rate(**answer))
        yield from rows.values()


def _count(root: str, report: Report) -> None:
    """Adds bytes to the report."""
    for scheme in SCHEMES[1:]:
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


def _machine() -> str:
    packages = [f"{package} {metadata.version(package)}" for package in ("torch", "pillow", "webdataset")]
    versions = ", ".join([*packages, f"Python {platform.python_version()}"])
    about = f"{common.cpu_name()}, {plural(cores(), 'core')}, load average {os.getloadavg()[0]:.1f}"
    return f"{common.today()}: {about}; {versions}"


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
