"""Writing files: OSErrors become TrainerErrors, a file appears under its name only when it is complete, and a file that
grows holds whole lines only."""

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from data.file_names import fitted
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


def unfinished(path: Path) -> Path:
    """The temporary file next to ``path`` that holds its content until it is complete. Each process has its own."""
    return path.with_name(fitted(".", path.name, f".{socket.gethostname()}-{os.getpid()}.unfinished"))


def remove_unfinished(folder: Path, *names: str) -> None:
    """Removes what killed jobs left of files of these names, which may be patterns. Only for their one writer. Raises
    OSError."""
    for name in names:
        for path in folder.glob(f".{name}.*.unfinished"):
            path.unlink()


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path, and renames that file to ``path`` at the end of the context. Where ``path`` is a link,
    the file that it names is replaced and the link stays. Raises OSError."""
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    yield unfinished(path)
    unfinished(path).replace(path)


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
        with writing(path, option), complete_file(path) as temporary:
            if isinstance(content, str):
                temporary.write_text(content, encoding="utf-8")
            else:
                content(temporary)


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
