"""Writing files: OSErrors become TrainerErrors, and a file that grows holds whole lines only."""

import contextlib
import glob
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from data.unfinished import complete_file, remove_dead
from trainer import TrainerError


@contextlib.contextmanager
def os_errors(what: str, fix: str) -> Iterator[None]:
    """Turns an OSError into a one-line TrainerError: what failed, why, and the fix."""
    try:
        yield
    except OSError as error:
        raise TrainerError(f"{what}: {error.strerror or error}; {fix}") from error


def writing(path: Path, option: str = "--out") -> contextlib.AbstractContextManager[None]:
    """`os_errors` for a path that the user can change with an option."""
    return os_errors(f"cannot write {path}", f"fix that, or choose another path with {option}")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text. Raises OSError."""
    with complete_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(content) -> str:
    """Indented JSON, which has no NaN and no infinity."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def write_json(path: Path, content) -> None:
    """Writes `json_text`. Raises OSError."""
    write_text(path, json_text(content))


def write_files(contents: Mapping[Path, str | Callable[[Path], object]], option: str = "--out") -> None:
    """Writes files in order: a text, or what a function writes to the path that it is given. Raises TrainerError."""
    for path, content in contents.items():
        with writing(path, option):
            remove_dead(path.parent, glob.escape(path.name))
        with writing(path, option), complete_file(path) as temporary:
            if isinstance(content, str):
                temporary.write_text(content, encoding="utf-8")
            else:
                content(temporary)


class ReportFiles(NamedTuple):
    """The files of one report, which a later one may replace.

    is_earlier: whether the content of FILE.json is that of an earlier report. mark: a text that FILE.md of every report
    has. others: further files.
    """

    json: Path
    is_earlier: Callable[[object], bool]
    markdown: Path
    mark: str
    others: Collection[Path] = ()

    def check(self, option: str = "--out") -> None:
        """Raises TrainerError if they would replace files that no earlier report wrote. FILE.json tells it; where users
        have removed that one to make a report again, FILE.md does."""
        with writing(self.json, option):
            if self.json.exists():
                in_use = None if self.is_earlier(_read_json(self.json)) else self.json
            elif self.markdown.exists():
                text = self.markdown.read_text(encoding="utf-8", errors="replace")
                in_use = None if self.mark in text else self.markdown
            else:
                in_use = next((path for path in self.others if path.exists()), None)
        if in_use is not None:
            raise TrainerError(
                f"{in_use} already exists and is of no earlier report: choose another {option}, or remove it"
            )


def _read_json(path: Path) -> object:
    """The content, or None if it is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def has_keys(*keys: str) -> Callable[[object], bool]:
    """Whether JSON content is an object with these keys."""
    return lambda content: isinstance(content, dict) and content.keys() >= set(keys)


class LineFile:
    """A file of lines that grows. Lines that cannot be written, for example to a full disk, wait for the next `append`;
    until then the file ends with its last whole line."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[str] = []

    def move_to(self, folder: Path) -> None:
        """Writes into a file of the same name in another folder from now on."""
        self.path = folder / self.path.name

    def append(self, *lines: str) -> str | None:
        """Writes the lines (without line breaks) after those that wait. Returns what to print where writing begins to
        fail or works again, else None."""
        failing = bool(self.waiting)
        self.waiting += lines
        try:
            if self.waiting:
                append_whole(self.path, "".join(f"{line}\n" for line in self.waiting).encode())
        except OSError as error:
            said = f"ALARM: cannot write {self.path} ({error.strerror}): its lines wait until it can be written again"
            return None if failing else said
        count = len(self.waiting) - len(lines)
        self.waiting = []
        what = "line that waited is" if count == 1 else "lines that waited are"
        return f"{self.path} can be written again: {count:,} {what} in it" if failing else None


def append_whole(path: Path, content: bytes) -> None:
    """Appends whole lines to a file of JSON objects. A last line without a line break gets one if it is complete, and
    is removed if it was cut off. If writing fails, the file ends with its last whole line. Raises OSError."""
    with path.open("a+b", buffering=0) as file:
        rest = _unended_line(file)
        end = file.seek(0, os.SEEK_END)
        if _is_json_object(rest):
            content = b"\n" + content
        else:
            end -= len(rest)
        try:
            file.truncate(end)
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(end)
            raise


def _unended_line(file) -> bytes:
    """What follows the last line break."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read(1) in (b"", b"\n"):
        return b""
    file.seek(0)
    return file.read().rpartition(b"\n")[2]


def _is_json_object(line: bytes) -> bool:
    """No part of an object is one, so a line that was cut off is none."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
