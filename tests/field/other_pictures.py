"""Files that are no tar, and pictures that are no JPEG, PNG or WebP."""

from pathlib import Path

from PIL import Image
from samples import encoded, picture

# Content -> what is said of it.
NO_TARS = {
    encoded(picture(0)): "it is a JPEG image: name the folder",
    encoded(picture(0), "WEBP"): "it is a WebP image: name the folder",
    encoded(picture(0), "TIFF"): "it is a TIFF image: convert",
    b"PAR1" + bytes(600): "it is a Parquet file",
}


def write_gif(path: Path) -> str:
    """A GIF of 8 x 8 pixels."""
    Image.new("L", (8, 8)).save(path, "GIF")
    return str(path)
