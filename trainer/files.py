"""Writing files: OSErrors become TrainerErrors, and a file appears under its name only when it is complete."""

import contextlib
import json
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
    """The temporary file next to ``path`` that holds its content until it is complete."""
    return path.with_name(fitted(".", path.name, ".unfinished"))


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path, and renames that file to ``path`` at the end of the context. Raises OSError."""
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
