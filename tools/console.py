"""What commands share: options, and how they print progress, tables and counts."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the recipe's.")]
Tokenizer = Annotated[
    Path,
    typer.Argument(help="A run or one of its checkpoints, a file of weights (.ckpt, .pt), or an export's folder."),
]
ImageSuffixes = Annotated[
    list[str] | None,
    typer.Option(
        "--image", metavar="SUFFIX", help="Suffix of the images in tars, as in a source's `image`; may be repeated."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Weights = Annotated[str, typer.Option(help="ema or raw.")]
BatchSize = Annotated[int, typer.Option(help="Images in a batch, in each process.")]

LINE_SECONDS = 10.0
REDRAW_SECONDS = 0.1


@contextmanager
def progress(what: str, lines: bool = True) -> Iterator[Callable[..., None]]:
    """Yields a function of (done, total or None, more), which reports how many of ``what`` are done.

    Draws a bar on stderr if that is a terminal. Otherwise, with ``lines``, prints a line every LINE_SECONDS.
    more: further words, such as the speed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from data.text import printable

    what = printable(what)
    console, printed, drawn = Console(stderr=True), time.monotonic(), 0.0
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    hidden = not console.is_terminal
    # Without auto_refresh no thread draws: some commands fork processes meanwhile.
    with Progress(*columns, console=console, transient=True, disable=hidden, auto_refresh=False) as bar:
        task = bar.add_task(what, total=None)

        def show(done: int, total: int | None, more: str = "") -> None:
            nonlocal printed, drawn
            now, more = time.monotonic(), f", {printable(more)}" if more else ""
            refresh = now > drawn + REDRAW_SECONDS
            drawn = now if refresh else drawn
            bar.update(task, completed=done, total=total or None, description=f"{what}{more}", refresh=refresh)
            if hidden and lines and now - printed > LINE_SECONDS:
                printed = now
                print(f"{done:,}{f' of {total:,}' if total else ''} {what}{more}", flush=True)

        yield show


def print_table(title: str, rows: list[list[str]]) -> None:
    """Rows of text, headings first; the first column is aligned to the left. Asterisks around a cell are removed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from data.text import printable

    table = Table(title=Text(printable(title)))
    for number, heading in enumerate(rows[0]):
        table.add_column(Text(printable(heading)), justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*(Text(printable(cell.strip("*"))) for cell in row))
    Console().print(table)


def echo(text: str = "", nl: bool = True, err: bool = False) -> None:
    """Prints lines, with names made `printable`."""
    from data.text import printable

    # Not typer's: for a terminal that knows ASCII only it writes UTF-8.
    print(printable(text, keep="\n\t"), end="\n" * nl, file=sys.stderr if err else sys.stdout, flush=True)


def counted(number: int, what: str) -> str:
    """Writes 1 image, 2,000 images."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
