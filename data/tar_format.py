"""WebDataset tars as bytes: where each sample lies, and the members of one sample.

Samples are grouped exactly as webdataset groups them. But webdataset silently skips damage (a tar that ends early, a
broken header, zeroed blocks); here all damage raises an error.
"""

import functools
import io
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data.errors import DataError, ImageError
from data.index import SampleTable, key_hash
from data.samples import IMAGE_SUFFIXES, Sample, is_content

MOST_MEMBER_BYTES = 1 << 30  # a header that claims more is damaged
HOW_TO_FIX = "copy it again, write the index again, or name the shard in data.quarantine"


@functools.cache
def _webdataset():
    from webdataset import tariterators  # on first use: importing it takes half a second

    return tariterators


# ------------------------------------------------------------------------------------------------------- one sample


def parse_sample(content: bytes | memoryview, index: int, name: str) -> Sample:
    """A sample from the bytes of its members, which form a tar by themselves.

    Raises ImageError for a sample that cannot be used, and DataError if the bytes are not those of one sample: then the
    shard has changed since it was scanned or indexed.
    """
    try:
        members = read_plain_members(content, name)
        if members is None:
            members = read_members(content, name)
        samples = list(_webdataset().group_by_keys(members))
    except ValueError as error:
        raise ImageError(f"sample {index}: {str(error.args[0]).split(' dict_keys')[0]}") from error
    except tarfile.TarError as error:
        raise DataError(f"{changed_shard(name)} (sample {index}: {error}); {HOW_TO_FIX}") from error
    if len(samples) != 1:
        raise DataError(f"{changed_shard(name)} (sample {index}: {len(samples)} samples in its place); {HOW_TO_FIX}")
    (sample,) = samples
    key = sample.pop("__key__")
    if key.startswith("/") or ".." in key.split("/"):
        raise ImageError(f"the key {key!r} leads out of its folder")
    return Sample(key, {suffix: value for suffix, value in sample.items() if not suffix.startswith("__")})


def changed_shard(name: str) -> str:
    """The beginning of an error message."""
    return f"the shard {name} is damaged, or not the one that was scanned or indexed"


def read_plain_members(content: bytes | memoryview, name: str) -> list[dict] | None:
    """The same as `read_members` in a tenth of the time, or None if a header is damaged or not of the plainest kind."""
    members, at = [], 0
    while at < len(content):
        header = bytes(content[at : at + 512])
        path, size, checksum = header[:100].rstrip(b"\0"), header[124:136], header[148:156]
        # A regular file, a name without a prefix, octal numbers, none of GNU's old formats.
        if len(header) < 512 or header[156:157] != b"0" or header[345] or b"\0" in path or path.endswith(b"/"):
            return None
        if (header[100:156] + header[329:345]).translate(None, b"01234567 \0"):
            return None
        try:
            if int(checksum.strip(b"\0 "), 8) != sum(header) - sum(checksum) + 256:
                return None
            stop = at + 512 + int(size.strip(b"\0 "), 8)
            fname = path.decode("utf-8", "strict")
        except ValueError:
            return None
        if stop > len(content) or not path:
            return None
        if _belongs_to_sample(fname):
            members.append({"fname": fname, "data": bytes(content[at + 512 : stop]), "__url__": name})
        at = -(-stop // 512) * 512
    return members if at == len(content) and members else None


def read_members(content: bytes | memoryview, name: str) -> Iterator[dict]:
    """What webdataset's tar reader yields. Raises TarError for a damaged header, where webdataset silently stops."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in _entries(tar):
            if is_member(member):
                yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": name}
        if tar.offset != len(content):
            raise tarfile.ReadError(f"damaged at byte {tar.offset:,} of {len(content):,}")


def _entries(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """A tar's entries. Raises TarError where tarfile itself would loop forever (a negative size) or raise errors of
    many kinds (a size larger than any file)."""
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # otherwise tarfile keeps every member in memory
            if not 0 <= member.size <= MOST_MEMBER_BYTES:
                raise tarfile.ReadError(f"{member.name} claims {member.size:,} bytes")
            if member.isreg() and not member.name:
                raise tarfile.ReadError(f"a member without a name at byte {member.offset:,}")
            yield member
    except (OverflowError, ValueError, RecursionError) as error:
        raise tarfile.ReadError(f"damaged header: {error}") from error


def is_member(member: tarfile.TarInfo) -> bool:
    """Whether a tar entry belongs to a sample: webdataset's rule, except that macOS' ._ files do not belong."""
    return member.isreg() and _belongs_to_sample(member.name)


def _belongs_to_sample(name: str) -> bool:
    named = _webdataset().base_plus_ext(name)[0] is not None and not posixpath.basename(name).startswith("._")
    return named and not re.match(r"__[^/]*__($|/)", name)


# ------------------------------------------------------------------------------------------------------- whole tars


class SampleSpan(NamedTuple):
    """Where a sample lies in its tar, in bytes, and the suffixes of its members."""

    key: str
    start: int
    stop: int
    suffixes: tuple[str, ...]


def sample_spans(file, name: str) -> Iterator[SampleSpan]:
    """Each sample of an uncompressed tar, from the headers only.

    Raises DataError with the tar's name for a damaged tar, and for one without samples.
    """
    key, start, stop, suffixes, found = None, 0, 0, [], False
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _entries(tar):
                if not is_member(member):
                    continue
                member_key, suffix = _webdataset().base_plus_ext(member.name)
                if member_key != key:
                    if key is not None:
                        yield SampleSpan(key, start, stop, tuple(suffixes))
                    key, start, suffixes, found = member_key, member.offset, [], True
                stop = tar.offset
                suffixes.append(suffix.lower())
            _check_end(file, tar.offset)
    except (tarfile.TarError, RecursionError) as error:  # RecursionError: very many headers in a row
        raise DataError(
            f"the shard {name} is no whole, uncompressed tar ({error}): pack or copy it again, or leave it out"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read the shard {name}: {error.strerror or error}") from error
    if not found:
        raise DataError(f"the shard {name} holds no sample: leave it out")
    yield SampleSpan(key, start, stop, tuple(suffixes))


def _check_end(file, offset: int) -> None:
    """A whole tar ends in blocks of zeros, with nothing after them."""
    file.seek(offset)
    ended = False
    while block := file.read(1 << 20):
        if block.count(0) != len(block):
            raise tarfile.ReadError(f"damaged at byte {offset:,}")
        ended = True
    if not ended:
        raise tarfile.ReadError("cut off before its end mark")


def scan(path: str) -> SampleTable:
    """Where each sample of a local tar lies, from its headers. An unchanged file is scanned once per process.

    Raises DataError for a tar that is damaged, empty, or contains neither images nor tokens.
    """
    try:
        stat = os.stat(path)
        if stat.st_size == 0:
            raise DataError(f"the shard {path} is empty (0 bytes): pack or copy it again, or leave it out")
        return _scan(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror}") from error


@functools.lru_cache(maxsize=512)
def _scan(path: str, bytes_in_file: int, mtime_ns: int) -> SampleTable:
    with open(path, "rb") as file:
        found = list(sample_spans(file, path))
    if not any(is_content(suffix) for span in found for suffix in span.suffixes):
        raise DataError(f"the shard {path} holds no image ({', '.join(IMAGE_SUFFIXES)}) and no tokens: leave it out")
    return SampleTable(
        bytes_in_file,
        np.array([span.start for span in found], np.int64),
        np.array([span.stop for span in found], np.int64),
        np.array([key_hash(span.key) for span in found], np.uint64),
    )
