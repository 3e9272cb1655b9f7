"""The same pictures in a folder, a zip file and a tar: three that can be used, and 12 kinds of members that cannot."""

import io
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from samples import encoded, picture


class Made(NamedTuple):
    """The places with the same members, and what each unusable one comes to: name -> part of the reason."""

    folder: Path
    zip: Path
    tar: Path
    reasons: dict[str, str]


NOWHERE = "nowhere.png"


def contents() -> dict[str, tuple[bytes, str | None]]:
    """Name -> content and part of the reason why it cannot be used; None if it can, or belongs to another."""
    jpeg, png = encoded(picture(0, (200, 200))), encoded(picture(1), "PNG")
    huge = io.BytesIO()
    Image.new("1", (20_000, 6_000)).save(huge, "PNG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1
    return {
        "good0.jpg": (jpeg, None),
        "good1.png": (png, None),
        "good1.cls": (b"-1", None),
        "good2.webp": (encoded(picture(2), "WEBP"), None),
        "cut.jpg": (jpeg[:2000], "truncated"),
        "empty.png": (b"", "empty (0 bytes)"),
        "page.jpg": (b"<html>not found</html>", "no JPEG, PNG or WebP image"),
        "gif.png": (encoded(picture(3), "GIF"), "no JPEG, PNG or WebP image"),
        "flipped.png": (bytes(flipped), "checksum"),
        "half.webp": (encoded(picture(4), "WEBP")[:60], ""),
        "huge.png": (huge.getvalue(), "20000 x 6000 pixels are more than"),
        "word.jpg": (jpeg, "the class 'cat' is no number"),
        "word.cls": (b"cat", None),
        "digits.jpg": (jpeg, "is no number"),
        "digits.cls": (b"9" * 5000, None),
        "moving.gif": (encoded(picture(5), "GIF"), "no image among its members: gif"),
        "scan.tiff": (encoded(picture(6), "TIFF"), "no image among its members: tiff"),
        "link.png": (b"", "link"),  # to NOWHERE
    }


def write_unusable_members(place: Path) -> Made:
    """Writes PLACE/folder, PLACE/a.zip and PLACE/a.tar."""
    folder, members = place / "folder", contents()
    folder.mkdir(parents=True)
    with zipfile.ZipFile(place / "a.zip", "w") as file, tarfile.open(place / "a.tar", "w") as tar:
        for name, (content, _) in members.items():
            info, zipped = tarfile.TarInfo(name), zipfile.ZipInfo(name)
            info.size = len(content)
            if name == "link.png":
                info.type, info.linkname = tarfile.SYMTYPE, NOWHERE
                zipped.external_attr = (stat.S_IFLNK | 0o777) << 16
                (folder / name).symlink_to(NOWHERE)
            else:
                (folder / name).write_bytes(content)
            tar.addfile(info, io.BytesIO(content))
            file.writestr(zipped, NOWHERE if name == "link.png" else content)
    reasons = {name: reason for name, (_, reason) in members.items() if reason is not None}
    return Made(folder, place / "a.zip", place / "a.tar", reasons)
