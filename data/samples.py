"""Samples, and what every kind of shard has in common.

A shard is a tar, a folder or a zip file of samples. It is read in windows. For a local shard, a window reads nothing
until a sample is requested; for a remote shard, a window is fetched whole, in one request where its samples are
consecutive.
"""

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from data.errors import ImageError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "jfif", "jpe")  # the last two: JPEGs by other names
ANY_IMAGE = (*IMAGE_SUFFIXES, "jpeg.jpg", "jpg.jpg")  # doubled as some downloaders do
# Suffixes of pictures in other formats. They are reported as unusable, since their owner may expect them to be used.
UNREAD_IMAGES = (
    *("apng", "avif", "bmp", "gif", "heic", "heif", "ico", "jp2", "jxl", "pbm", "pgm"),
    *("pnm", "ppm", "psd", "svg", "tga", "tif", "tiff"),
)
NO_CLASS = ("", "-1")  # contents of a class member that says that there is no class
# Characters that no caption has. UTF-16 without a mark and UTF-32 become texts with NUL, and ISO-2022 ones with ESC.
OF_OTHER_ENCODINGS = frozenset("\0\x1b")
CODES = "codes"  # suffix of an image's tokens, see data.tokens


class Skipped(NamedTuple):
    """A sample that was left out: the file or shard, the sample's key or file name, the reason in one line, and the
    name of its data source."""

    source: str
    key: str
    reason: str
    dataset: str = ""


class Sample(NamedTuple):
    """A raw sample: its key, and the bytes of each member by its suffix in lower case (``jpg``, ``txt``, ``json``)."""

    key: str
    members: dict[str, bytes]

    def image(self, suffixes: Iterable[str] = ()) -> bytes:
        """The first member of ``suffixes`` that exists; by default, the one with an image's suffix. Raises ImageError
        if there is none, or if several could be meant."""
        found = [suffix for suffix in suffixes or image_suffixes(self.members) if suffix in self.members]
        if found and (suffixes or len(found) == 1):
            return self.members[found[0]]
        if found:
            named = ", ".join(found[:4]) + (", …" if len(found) > 4 else "")
            fix = "rename them, or name the suffix to use in the source's `image`"
            raise ImageError(f"{len(found)} images under one key ({named}): {fix}", "several images")
        wanted = f" ({', '.join(suffixes)})" if suffixes else ""
        if CODES in self.members:
            raise ImageError(f"it holds tokens, no image{wanted}: data.content=tokens reads them", "no image")
        raise ImageError(f"no image{wanted} among its members: {', '.join(sorted(self.members)) or 'none'}", "no image")


def text_of(content: bytes, errors: str = "strict") -> str:
    """A caption or a class: UTF-8, or UTF-16 if it begins with that byte order mark, as some editors write it. errors:
    as of `bytes.decode`; if strict, raises ImageError for another encoding, which cannot be known."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    unknown = ImageError(f"its caption is not in UTF-8 ({content[:40]!r}): save it as UTF-8", "bad caption")
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise unknown from error
    if errors == "strict" and not OF_OTHER_ENCODINGS.isdisjoint(text):
        raise unknown
    return text


def fields_of(content: bytes) -> dict:
    """The fields of a member ``json``. Raises ImageError if it is damaged or holds something else."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"its json is damaged: {error}", "bad json") from error
    if not isinstance(fields, dict):
        raise ImageError("its json is no mapping", "bad json")
    return fields


def is_image(name: str) -> bool:
    """Whether a file name or a member's suffix is that of an image."""
    return name.lower().rsplit(".", 1)[-1] in IMAGE_SUFFIXES


def image_suffixes(suffixes: Iterable[str]) -> list[str]:
    """Those of images among a sample's suffixes: plain ones, or else ones like 0001.png, which old indexes give."""
    suffixes = sorted(suffixes)
    return [suffix for suffix in suffixes if suffix in ANY_IMAGE] or list(filter(is_image, suffixes))


def is_content(suffix: str) -> bool:
    """Whether a member with this suffix can be trained on: an image, or its tokens."""
    return suffix == CODES or is_image(suffix)


class WindowLimit(NamedTuple):
    """The size limit of a window: samples, and bytes (a single larger sample is a window by itself)."""

    samples: int
    bytes: int


@dataclass(eq=False)
class Window:
    """Some samples of a shard, by ascending number: `read(n)` returns sample numbers[n], for n in range(len(window)).

    `fetch` downloads what `read` needs; otherwise the first `read` does. `read` raises ImageError for a sample that
    cannot be used, DataError if the shard cannot be read.
    """

    numbers: Sequence[int]
    shard: "Shard"

    def __len__(self):
        return len(self.numbers)

    def fetch(self) -> None:
        """Does nothing unless the shard is remote."""

    def read(self, n: int) -> Sample:
        return self.shard.read(int(self.numbers[n]))


class Shard(Protocol):
    """A tar, a folder or a zip file of samples."""

    url: str

    @property
    def name(self) -> str:
        """How messages name the shard: without secrets."""

    @property
    def is_streamed(self) -> bool:
        """Whether the bytes come from a server or a command, not from a local disk."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Sample:
        """One sample. Raises as `Window.read`."""

    def windows(
        self, first: int, stop: int | None, limit: WindowLimit, numbers: Sequence[int] | None = None
    ) -> Iterator[Window]:
        """The samples first to stop (None: to the end) of the given ones, by default of all, in windows that depend on
        the arguments only."""
