"""What the benchmarks share: option parsing, fresh processes, tables, and pictures. Imports no torch."""

import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import typer

from tools.console import echo

COLORS = {
    "reference": "#7a7a7a",
    "dense": "#c44e52",
    "chunked": "#4c72b0",
    "triton": "#55a868",
    "attention": "#dd8452",
    "uncached": "#c44e52",
    "cached": "#4c72b0",
    "cached-eager": "#8fa9d4",
    "compiled": "#2f4b7c",
    "checkpointed": "#55a868",
    "selective": "#dd8452",
    "bound": "#222222",
    "ibq": "#4c72b0",
    "webdataset": "#dd8452",
    "discard": "#9a9a9a",
}


# ------------------------------------------------------------------------------------------------------------- options


class Options(NamedTuple):
    """Options of several benchmarks. reference: a checkout of the reference project; command: the command line."""

    device: str
    threads: int | None
    repeats: int
    reference: Path | None = None
    out: Path | None = None
    command: str = ""


def bad(option: str | None, message: str) -> typer.BadParameter:
    """The error for a wrong value of an option, to be raised."""
    return typer.BadParameter(message, param_hint=option)


def numbers(option: str, text: str, least: int = 1) -> list[int]:
    """Parses "1024,4096". Raises BadParameter."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [least - 1]
    if min(found) < least:
        example = "1024,4096" if least else "0,2,4"
        raise bad(option, f"{text!r} is not a list of integers >= {least}, such as {example}")
    return found


def names(option: str, text: str, choices: tuple[str, ...]) -> list[str]:
    """Parses "dense,chunked". Raises BadParameter."""
    found = text.split(",")
    if wrong := [name for name in found if name not in choices]:
        raise bad(option, f"{wrong[0]!r} is not one of {', '.join(choices)}")
    return found


def check_out(out: Path | None, *suffixes: str) -> None:
    """Fails before hours of measuring if FILE.md or a file beside it exists or cannot be written."""
    if out is None:
        return
    if out.suffix != ".md":
        raise bad("--out", f"{out} does not end in .md")
    for path in (out, *map(out.with_suffix, suffixes)):
        if path.exists():
            raise bad("--out", f"{path} already exists; choose another name")
    if not os.access(out.parent, os.W_OK):
        raise bad("--out", f"{out.parent} is not a writable folder")


def command_line(context: typer.Context) -> str:
    """The command as it would be typed, without options left at their defaults."""
    words = ["ibq", "bench", context.info_name]
    for option in context.command.params:
        if context.get_parameter_source(option.name).name == "COMMANDLINE":
            value = context.params[option.name]
            words += [option.opts[0]] if value is True else [option.opts[0], str(value)]
    return shlex.join(words)


# ----------------------------------------------------------------------------------------------------- fresh processes


def run_job(module: str, job: str, **arguments) -> dict:
    """Runs a function of tools.bench.MODULE in a fresh process.

    Returns the fields of its named tuple, or {"failed": why}. The process imports from where this one does; `python -m`
    would put the working directory first. It ends on Ctrl-C without a traceback.
    """
    script = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.path[:] = {sys.path!r}
from tools.bench.measure import answer
answer(*sys.argv[1:])"""
    command = [sys.executable, "-c", script, module, job, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode == -signal.SIGKILL:
        return {"failed": "killed, probably out of memory"}
    if done.returncode < 0:
        return {"failed": f"ended by {signal.Signals(-done.returncode).name}"}
    if done.returncode > 0:
        return {"failed": f"its process ended with status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


class Prepared(NamedTuple):
    """What follows from the options and the machine. device: cpu or cuda; reference: the reference project's file."""

    options: Options
    heading: list[str]
    device: str
    name: str
    reference: str | None


def prepare(options: Options, file: Path | None = None, names: tuple[str, ...] = ()) -> Prepared:
    """Checks the options and asks a fresh process about the machine. Raises BadParameter.

    file, names: where in a checkout the reference is, and what must be defined there.
    """
    path = options.reference and options.reference / file
    if path and not path.is_file():
        fix = "git clone https://github.com/TencentARC/SEED-Voken and pass that folder"
        raise bad("--reference", f"{options.reference} has no {file}: {fix}")
    check_out(options.out, ".png")
    reference = path and str(path.resolve())
    asked = dict(device=options.device, threads=options.threads, reference=reference and [reference, *names])
    found = run_job("measure", "machine", **asked)
    if "failed" in found:
        raise bad(None, found["failed"])
    name = found["name"] if found["device"] == "cuda" else f"{found['name']}, {plural(found['threads'], 'thread')}"
    heading = [f"{today()}: {name}; PyTorch {found['torch']}, Python {found['python']}"]
    if reference:
        heading.append(revision(options.reference))
    return Prepared(options, heading, found["device"], found["name"], reference)


def measure_rows(module: str, job: str, rows: list, prepared: Prepared, **settings) -> Iterator:
    """Yields the rows with `measured` set, or with `reason`. Rows that already have a reason are not measured.

    settings: further arguments of the job.
    """
    settings |= dict(device=prepared.device, threads=prepared.options.threads, repeats=prepared.options.repeats)
    for number, row in enumerate(rows, start=1):
        if row.reason:
            yield row
            continue
        with status(f"measuring row {number} of {len(rows)}: {row.impl}, {row.shape}"):
            found = run_job(module, job, impl=row.impl, **row.arguments, **settings)
        failed = found.pop("failed", "")
        yield row._replace(measured=None if failed else found, reason=failed)


@contextlib.contextmanager
def status(doing: str) -> Iterator[None]:
    """A spinner if stderr is a terminal, otherwise one line on stderr."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_terminal:
        echo(doing, err=True)
    with console.status(Text(doing)) if console.is_terminal else contextlib.nullcontext():
        yield


# -------------------------------------------------------------------------------------------------------------- tables


class Table(NamedTuple):
    """For the terminal and for Markdown. A short row ends with the reason why it has no numbers."""

    headings: list[str]
    rows: list[list[str]]


def line(cells: list[str], widths: list[int], left: int = 2) -> str:
    """Aligns the first ``left`` cells to the left and the others to the right. A reason may exceed its width."""
    aligned = zip(cells, widths, [str.ljust] * left + [str.rjust] * (len(cells) - left), strict=False)
    return "  ".join(align(cell, width) for cell, width, align in aligned).rstrip()


def lines(table: Table) -> list[str]:
    """The table for the terminal, with columns as wide as their longest cell."""
    rows = [table.headings, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [line(row, widths, left=1) for row in rows]


def markdown_table(table: Table) -> str:
    text = ["| " + " | ".join(table.headings) + " |", "|" + " --- |" * len(table.headings)]
    for row in table.rows:
        cells = [cell.replace("|", "/") for cell in row]
        text.append("| " + " | ".join(cells + ["-"] * (len(table.headings) - len(cells))) + " |")
    return "\n".join(text)


def markdown_page(title: str, report: Any, tables: list[Table], *more: str) -> str:
    """Title, heading, command, tables, notes, and more. report: as in `present`, with its `command`."""
    notes = "\n".join(f"- {note}" for note in report.notes())
    heading = f"# {title}", *report.heading, f"`{report.command}`"
    parts = [*heading, *map(markdown_table, tables), notes, *more]
    return "\n\n".join(part for part in parts if part) + "\n"


def present(report: Any, rows: Iterator, out: Path | None) -> None:
    """Prints each row as it is measured, then legend and notes. Writes the table to ``out`` and the picture beside it.

    The file is rewritten after each row, so that an interrupted benchmark keeps what it measured.
    report: has `heading`, `headings`, `widths`, `rows`, `legend`, `cells(row)`, `notes()`, `markdown()` and
    `draw(path)`.
    """
    echo("\n".join([*report.heading, "", line(report.headings, report.widths)]))
    for row in rows:
        report.rows.append(row)
        echo(line(report.cells(row), report.widths))
        if out is not None:
            out.write_text(report.markdown(out.with_suffix(".png").name), encoding="utf-8")
    echo("\n".join(["", *([report.legend, ""] if report.legend else []), *report.notes()]).rstrip())
    if out is not None:
        echo(f"\ntable: {out}")
        if any(row.measured for row in report.rows):
            report.draw(out.with_suffix(".png"))
            echo(f"picture: {out.with_suffix('.png')}")


def today() -> str:
    return f"{datetime.now(timezone.utc):%Y-%m-%d}"


def cpu_name() -> str:
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return found[0].split(":")[1].strip() if found else platform.machine()


def proc_number(path: str, name: str) -> int:
    """The number in a line ``name: 1234`` or ``name: 1234 kB`` of a file in /proc."""
    return next(int(line.split()[1]) for line in Path(path).read_text().splitlines() if line.startswith(f"{name}:"))


def revision(reference: Path) -> str:
    """Names the reference's checkout and, if it is a git repository, its commit."""
    commit = "revision unknown"
    if (reference / ".git").exists():
        command = ["git", "-C", str(reference), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or commit
    return f"reference: {reference} ({commit})"


def share(ratio: float) -> str:
    return f"1/{1 / ratio:.0f}" if ratio < 0.1 else f"{ratio:.2f}"


def plural(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number or 'no'} {what}s"


# ------------------------------------------------------------------------------------------------------------ pictures


def pyplot():
    """matplotlib.pyplot without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure, path: Path, software: str | None = None) -> None:
    """Writes a PNG and closes the figure. software: the program that the file names, default matplotlib."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": software} if software else None)
    pyplot().close(figure)


def bar_text(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
