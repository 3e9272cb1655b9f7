"""Data of the same names and counts as before, and other pictures."""

from pathlib import Path

from webdataset.writer import TarWriter


def tar_of(path: Path, pictures: list[bytes]) -> Path:
    """A tar with samples 0, 1, ...; the same keys whatever the pictures are."""
    with TarWriter(str(path), encoder=False, mtime=0) as tar:
        for number, content in enumerate(pictures):
            tar.write({"__key__": f"{number:04d}", "png": content})
    return path


def folder_of(path: Path, names: list[str], content: bytes) -> Path:
    """A folder of equal pictures under these names."""
    path.mkdir()
    for name in names:
        (path / name).write_bytes(content)
    return path
