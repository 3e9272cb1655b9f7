"""Pictures that are no JPEG, PNG or WebP."""

from pathlib import Path

from PIL import Image


def write_gif(path: Path) -> str:
    """A GIF of 8 x 8 pixels."""
    Image.new("L", (8, 8)).save(path, "GIF")
    return str(path)
