"""Names as long as a file's name can be."""

from pathlib import Path

from samples import picture

MOST_BYTES = 255


def write_long_names(folder: Path) -> list[str]:
    """Three pictures whose names have 255 bytes, two of which differ in the last letter only; returns the names."""
    folder.mkdir()
    names = [f"{'x' * (MOST_BYTES - 5)}{n}.png" for n in range(2)] + [f"{'é' * ((MOST_BYTES - 5) // 2)}e.png"]
    for number, name in enumerate(names):
        assert len(name.encode()) == MOST_BYTES
        picture(number).save(folder / name)
    return names
