"""Writing files: OSErrors become TrainerErrors, and a file appears under its name only when it is complete."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from trainer import TrainerError


@contextlib.contextmanager
def writing(path: Path, option: str = "--out") -> Iterator[None]:
    """Turns an OSError into a one-line TrainerError. option: how the user chooses another path."""
    try:
        yield
    except OSError as error:
        raise TrainerError(
            f"cannot write {path}: {error.strerror or error}; fix that, or choose another path with {option}"
        ) from error


def unfinished(path: Path) -> Path:
    """The temporary file next to ``path`` that holds its content until it is complete."""
    return path.with_name(f".{path.name}.unfinished")


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary path, then renames that file to ``path``. Raises OSError."""
    write(unfinished(path))
    unfinished(path).replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text. Raises OSError."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content) -> None:
    """Writes indented JSON, which has no NaN and no infinity. Raises OSError."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_files(writers: Mapping[Path, Callable[[Path], object]], option: str = "--out") -> None:
    """Writes files in order, each as `write_file` does. Raises TrainerError."""
    for path, write in writers.items():
        with writing(path, option):
            write_file(path, write)
