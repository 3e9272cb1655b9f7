"""Names with dots, as cameras and scientists write them (webdataset #237)."""

from pathlib import Path

from samples import encoded, picture, write_tar

NAMES = [*(f"IMG.{n:04}" for n in range(20)), *(f"scan_0/22.{n:02}" for n in range(20))]


def write_dotted_tar(path: Path) -> str:
    """A tar of 40 pictures: IMG.0000.png to IMG.0019.png, scan_0/22.00.png to scan_0/22.19.png."""
    return write_tar(path, [{"__key__": name, "png": encoded(picture(n), "PNG")} for n, name in enumerate(NAMES)])
