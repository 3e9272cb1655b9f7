"""Tars and zip files with links, and with two members of one name."""

import io
import tarfile
import warnings
import zipfile
from pathlib import Path

from samples import encoded, picture

LINK = 0o120777 << 16  # a zip member's attributes if it is a symbolic link


def write_hard_linked_tar(path: Path, kind: bytes = tarfile.LNKTYPE) -> str:
    """What GNU tar writes of 10 pictures a0.png ... and 10 hard links b0.png ... to them. kind: of the link."""
    with tarfile.open(path, "w") as tar:
        for n in range(10):
            content = encoded(picture(n), "PNG")
            info = tarfile.TarInfo(f"a{n}.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for n in range(10):
            link = tarfile.TarInfo(f"b{n}.png")
            link.type, link.linkname = kind, f"a{n}.png"
            tar.addfile(link)
    return str(path)


def write_doubled_zip(path: Path) -> str:
    """A zip file of a.png, twice b.png with different pictures, a link c.png to a.png, and ../d.png."""
    link = zipfile.ZipInfo("c.png")
    link.external_attr = LINK
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as file:
        warnings.simplefilter("ignore", UserWarning)  # of the name that comes twice
        for n, name in enumerate(("a.png", "b.png", "b.png", "../d.png")):
            file.writestr(name, encoded(picture(n), "PNG"))
        file.writestr(link, "a.png")
    return str(path)
