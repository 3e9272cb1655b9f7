"""The progress of a long command: a bar, or ever again a line where there is no terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 10.0


@contextmanager
def progress(what: str) -> Iterator[Callable[..., None]]:
    """Gives a function of (done, total or None, more): how many of ``what``, and a word more, such as the speed."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    console, said = Console(), time.monotonic()
    columns = SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def tell(done: int, total: int | None, more: str = "") -> None:
            nonlocal said
            more = f", {more}" if more else ""
            bar.update(task, completed=done, total=total or None, description=f"{what}{more}")
            if not console.is_terminal and time.monotonic() - said > LINE_SECONDS:
                said = time.monotonic()
                print(f"{done:,}{f' of {total:,}' if total else ''} {what}{more}", flush=True)

        yield tell
