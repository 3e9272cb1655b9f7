"""Sets of tars of which some were never downloaded (img2dataset #174)."""

from collections.abc import Iterable
from pathlib import Path


def write_some(folder: Path, numbers: Iterable[int]) -> list[str]:
    """The tars a-NN.tar of these numbers; returns their paths."""
    paths = [folder / f"a-{number:02}.tar" for number in numbers]
    for path in paths:
        path.touch()
    return [*map(str, paths)]


def write_list(folder: Path, count: int) -> str:
    """A list of the tars a-00.tar, a-01.tar, ...; returns its path."""
    (folder / "list.txt").write_text("".join(f"{folder}/a-{number:02}.tar\n" for number in range(count)))
    return str(folder / "list.txt")
