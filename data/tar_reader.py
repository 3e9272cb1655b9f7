"""WebDataset tars at paths and URLs, and the output of commands, read as shards.

Samples are grouped by `data.grouping`. webdataset silently skips damage (a tar that ends early, a broken header, zeroed
blocks); here all damage raises an error.
"""

import functools
import io
import os
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data.addresses import is_remote, redacted
from data.cache import Access
from data.errors import DataError, ImageError
from data.file_kinds import START_BYTES, kind_of
from data.grouping import KNOWN_SUFFIXES, Group, grouped, key_to_first_dot, split_name
from data.index import SampleTable, key_hash
from data.object_store import Version
from data.samples import IMAGE_SUFFIXES, Sample, Window, WindowLimit, is_content
from data.storage import Timeouts, read, version

PIPE = "pipe:"
RANGE_BYTES = 8 << 20  # fetched at once from a tar whose sample positions are unknown
MOST_UNUSED_BYTES = 1 << 18  # between two wanted samples: reading them takes no longer than another request
MOST_MEMBER_BYTES = 1 << 30  # a header that claims more is damaged
HOW_TO_FIX = "copy it again, write the index again, or name the shard in data.quarantine"


@dataclass(eq=False)
class TarShard:
    """A tar at a path or URL, or `pipe:COMMAND`. table: where its samples lie, if known. suffixes: they end a key.

    A tar without a table is read sequentially; a missing end is noticed only when the end is reached.
    """

    url: str
    table: SampleTable | None = None
    access: Access = field(default_factory=Access)
    suffixes: frozenset[str] = KNOWN_SUFFIXES
    _version: Version | None = None  # that its size was checked of

    @property
    def name(self) -> str:
        return PIPE + "…" if self.url.startswith(PIPE) else redacted(self.url)

    @property
    def is_streamed(self) -> bool:
        """Whether the bytes come from a server or a command, not from a local disk."""
        return self.url.startswith(PIPE) or is_remote(self.url)

    def __len__(self):
        return len(self.table)

    def read(self, index: int) -> Sample:
        return _TarWindow(range(index, index + 1), self, self.table).read(0)

    def windows(
        self, first: int, stop: int | None, limit: WindowLimit, numbers: Sequence[int] | None = None
    ) -> Iterator[Window]:
        if self.table is None and self.is_streamed and not self.access.is_copied(self.url):
            assert first == 0 and stop is None
            yield from self._stream(limit)
            return
        # A scanned table is not kept: a run may read very many tars.
        table = self.scan() if self.table is None else self.table
        self.check_size(table)
        chosen = (range(len(table)) if numbers is None else numbers)[first:stop]
        stops_n = np.cumsum(table.stops_n[chosen] - table.starts_n[chosen]) if numbers is not None else None
        begin = 0
        while begin < len(chosen):
            if stops_n is None:  # consecutive samples: also the bytes between them are counted
                from_byte = table.starts_n[chosen[begin]] + limit.bytes
                most = int(np.searchsorted(table.stops_n, from_byte, side="right")) - chosen[begin]
            else:
                read_before = stops_n[begin - 1] if begin else 0
                most = int(np.searchsorted(stops_n, read_before + limit.bytes, side="right")) - begin
            count = max(1, min(limit.samples, most))
            yield _TarWindow(chosen[begin : begin + count], self, table)
            begin += count

    def scan(self) -> SampleTable:
        """Where its samples lie, from the tar's headers (of a remote tar: from the cached copy). Raises DataError."""
        if self.url.startswith(PIPE):
            raise DataError(f"{self.name} can only be read sequentially: write the command's output to a file")
        return self.access.apply(functools.partial(scan, suffixes=self.suffixes), self.url)

    def check_size(self, table: SampleTable) -> None:
        """Raises DataError unless the tar's size is that of its table; checked once per process."""
        if self._version is not None or self.url.startswith(PIPE):
            return
        found = self.access.apply(lambda place: version(place, self.access.timeouts), self.url)
        if found.bytes != table.bytes:
            raise DataError(
                f"the shard {self.name} has {found.bytes:,} bytes, but its index says {table.bytes:,}: {HOW_TO_FIX}"
            )
        self._version = found

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes start to stop, of the version whose size was checked. Raises DataError."""
        return self.access.read(self.url, start, stop, self._version)

    def _stream(self, limit: WindowLimit) -> Iterator[Window]:
        first, samples, begin = 0, [], 0
        with ForwardFile(self.url, self.access.timeouts, self.name) as file:
            for span in sample_spans(file, self.name, self.suffixes):
                begin = begin if samples else span.start
                if samples and (len(samples) >= limit.samples or span.stop - begin > limit.bytes):
                    yield _FetchedWindow(range(first, first + len(samples)), self, samples)
                    first, samples, begin = first + len(samples), [], span.start
                samples.append(file.take(span.start, span.stop))
        if samples:
            yield _FetchedWindow(range(first, first + len(samples)), self, samples)


@dataclass(eq=False)
class _TarWindow(Window):
    """Samples at known positions. fetched: first byte -> bytes of each stretch of the tar that was downloaded."""

    table: SampleTable
    fetched: dict[int, memoryview] | None = None

    def fetch(self) -> None:
        if self.fetched is None and is_remote(self.shard.url):
            self.fetched = {start: memoryview(self.shard.read_range(start, stop)) for start, stop in self._stretches()}

    def _stretches(self) -> list[tuple[int, int]]:
        """The bytes to download: few long stretches, which may hold samples between the wanted ones."""
        stretches: list[tuple[int, int]] = []
        for number in self.numbers:
            start, stop = int(self.table.starts_n[number]), int(self.table.stops_n[number])
            if stretches and start - stretches[-1][1] <= MOST_UNUSED_BYTES:
                start, _ = stretches.pop()
            stretches.append((start, stop))
        return stretches

    def read(self, n: int) -> Sample:
        self.fetch()
        table, number = self.table, int(self.numbers[n])
        start, stop = int(table.starts_n[number]), int(table.stops_n[number])
        if self.fetched is not None:
            begin = max(first for first in self.fetched if first <= start)
            content = self.fetched[begin][start - begin : stop - begin]
        else:
            content = read(self.shard.url, start, stop)
        expected = int(table.keys_n[number])
        return parse_sample(content, number, self.shard.name, self.shard.suffixes, expected)


@dataclass(eq=False)
class _FetchedWindow(Window):
    """Samples whose bytes have already been read."""

    contents: list[bytes]

    def read(self, n: int) -> Sample:
        return parse_sample(self.contents[n], self.numbers[n], self.shard.name, self.shard.suffixes)


class ForwardFile(io.RawIOBase):
    """A remote tar or a command's output as a file that is read forwards. It keeps bytes until `take` passes them."""

    def __init__(self, path: str, timeouts: Timeouts, name: str):
        self.path, self.timeouts, self.name = path, timeouts, name
        self.begin, self.content, self.position = 0, bytearray(), 0
        self.process = self.version = None
        if path.startswith(PIPE):
            self.process = subprocess.Popen(path.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE)
        else:
            self.version = version(path, timeouts)

    @property
    def bytes(self) -> int | None:
        """Size of the tar; None for the output of a command."""
        return self.version and self.version.bytes

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.position

    def seek(self, offset, whence=io.SEEK_SET):
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("can only seek from the start")
        self.position = offset
        return offset

    def read(self, count=-1):
        self._fill(self.position + count)
        start = self.position - self.begin
        content = bytes(self.content[start : start + count])
        self.position += len(content)
        return content

    def take(self, start: int, stop: int) -> bytes:
        """The bytes start to stop; all bytes before `stop` are dropped."""
        self._fill(stop)
        content = bytes(self.content[start - self.begin : stop - self.begin])
        del self.content[: stop - self.begin]
        self.begin = stop
        return content

    def _fill(self, stop: int) -> None:
        while (end := self.begin + len(self.content)) < stop:
            if self.process:
                more = self.process.stdout.read(RANGE_BYTES)
            else:
                more = self.read_range(min(end, self.bytes), min(end + RANGE_BYTES, self.bytes))
            if not more:
                return
            self.content += more

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes start to stop of the version that was opened. Raises DataError."""
        return read(self.path, start, stop, self.timeouts, self.version)

    def close(self):
        if self.process and not self.closed:
            unread = self.process.stdout.read(1)
            self.process.stdout.close()
            if self.process.wait() and not unread:
                raise DataError(
                    f"the command of {self.name} ended with status {self.process.returncode}: try it by hand"
                )
        super().close()


class PlainTarInfo(tarfile.TarInfo):
    """A header of GNU's format has times where others have a prefix of the name; tarfile takes those for one, too."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        member = super().frombuf(buf, encoding, errors)
        if buf[257:265] == tarfile.GNU_MAGIC and buf[345:346] != b"\0" and member.type not in tarfile.GNU_TYPES:
            prefix = tarfile.nts(buf[345:500], encoding, errors)
            member.name = member.name.removeprefix(f"{prefix}/")
        return member


# ------------------------------------------------------------------------------------------------------- one sample


def parse_sample(
    content: bytes | memoryview,
    index: int,
    name: str,
    suffixes: frozenset[str] = KNOWN_SUFFIXES,
    expected: int | None = None,
) -> Sample:
    """A sample from the bytes of its members, which form a tar by themselves. expected: hash of its key, if known.

    Raises ImageError for a sample that cannot be used, and DataError if the bytes are not those of one sample: then the
    shard has changed since it was scanned or indexed.
    """
    try:
        members = read_plain_members(content)
        if members is None:
            members = list(read_members(content))
    except tarfile.TarError as error:
        raise _changed(name, f"sample {index}: {error}") from error
    groups = list(grouped(members, suffixes))
    if expected is not None and [key_hash(group.key) for group in groups] != [expected]:
        groups = _as_formerly(members, expected) or groups
    if len(groups) != 1 or expected not in (None, key_hash(groups[0].key)):
        found = groups[0].key if len(groups) == 1 else f"{len(groups)} samples"
        as_known = suffixes != KNOWN_SUFFIXES and [key_hash(one.key) for one in grouped(members)] == [expected]
        hint = "; an index for a source with image= is written with --image" if as_known else ""
        raise _changed(name, f"sample {index} is {found}{hint}")
    (group,) = groups
    if group.key.startswith("/") or ".." in group.key.split("/"):
        raise ImageError(f"the key {group.key!r} leads out of its folder", "bad key", group.key)
    found = {}
    for suffix, value in group.members:
        if isinstance(value, ImageError):
            if suffix not in suffixes:  # nothing that would be used
                continue
            value.key = group.key
            raise value
        if suffix in found:
            raise ImageError(f"two members are called {group.key}.{suffix}", "duplicate key", group.key)
        found[suffix] = value
    return Sample(group.key, found)


def _as_formerly(members: list[tuple[str, bytes | ImageError]], expected: int) -> list[Group]:
    """The sample of an index that was written when keys ended at the first dot, or nothing."""
    belonging = [(path, value) for path, value in members if split_name(path) is not None]
    keys = {key_to_first_dot(path) for path, _ in belonging}
    if [key_hash(key) for key in keys] != [expected]:
        return []
    (key,) = keys
    return [Group(key, [(path[len(key) + 1 :].lower(), value) for path, value in belonging])]


def _changed(name: str, what: str) -> DataError:
    return DataError(f"the shard {name} is damaged, or not the one that was scanned or indexed ({what}); {HOW_TO_FIX}")


def read_plain_members(content: bytes | memoryview) -> list[tuple[str, bytes]] | None:
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
        members.append((fname, bytes(content[at + 512 : stop])))
        at = -(-stop // 512) * 512
    return members if at == len(content) and members else None


def read_members(content: bytes | memoryview) -> Iterator[tuple[str, bytes | ImageError]]:
    """The members of a sample as (name, bytes). A member that has no content, such as a link, gives an ImageError with
    the reason instead of bytes. Raises TarError for a damaged header, where webdataset silently stops."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:", tarinfo=PlainTarInfo) as tar:
        for member in _entries(tar):
            if member.isreg():
                yield member.name, tar.extractfile(member).read()
            elif _is_member(member):
                yield member.name, ImageError(f"{member.name} {_without_bytes(member)}", "link")
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


def _is_member(member: tarfile.TarInfo) -> bool:
    """Whether a tar's entry belongs to a sample. One without bytes, such as a link, does if its suffix is known: its
    owner may expect it to be used."""
    if member.isreg() or member.isdir():
        return member.isreg()
    name = split_name(member.name)
    return name is not None and name.is_known


def _without_bytes(member: tarfile.TarInfo) -> str:
    if not (member.islnk() or member.issym()):
        return "is a pipe or a device, not a file"
    kind, option = ("hard", "--hard-dereference") if member.islnk() else ("symbolic", "--dereference")
    return f"is a {kind} link to {member.linkname}: write the tar with {option}"


# ------------------------------------------------------------------------------------------------------- whole tars


class SampleSpan(NamedTuple):
    """Where a sample lies in its tar, in bytes, and the suffixes of its members."""

    key: str
    start: int
    stop: int
    suffixes: tuple[str, ...]


def sample_spans(file, name: str, suffixes: frozenset[str] = KNOWN_SUFFIXES) -> Iterator[SampleSpan]:
    """Each sample of an uncompressed tar, from the headers only. suffixes: those that end a key.

    Raises DataError with the tar's name for a damaged tar, and for one without samples.
    """
    found = False
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=PlainTarInfo) as tar:
            members = ((member.name, (member.offset, tar.offset)) for member in _entries(tar) if _is_member(member))
            for key, parts in grouped(members, suffixes):
                found = True
                (_, (start, _)), (_, (_, stop)) = parts[0], parts[-1]
                yield SampleSpan(key, start, stop, tuple(suffix for suffix, _ in parts))
            _check_end(file, tar.offset)
    except (tarfile.TarError, RecursionError) as error:  # RecursionError: very many headers in a row
        file.seek(0)
        if not found and (known := kind_of(file.read(START_BYTES))):
            raise DataError(f"{name} is no whole, uncompressed tar: {known}") from error
        raise DataError(
            f"the shard {name} is no whole, uncompressed tar ({error}): pack or copy it again, or leave it out"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read the shard {name}: {error.strerror or error}") from error
    if not found:
        raise DataError(f"the shard {name} holds no sample: leave it out")


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


def scan(path: str, suffixes: frozenset[str] = KNOWN_SUFFIXES) -> SampleTable:
    """Where each sample of a local tar lies, from its headers. An unchanged file is scanned once per process.

    Raises DataError for a tar that is damaged, empty, or contains neither images nor tokens.
    """
    try:
        stat = os.stat(path)
        if stat.st_size == 0:
            raise DataError(f"the shard {path} is empty (0 bytes): pack or copy it again, or leave it out")
        return _scan(path, suffixes, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror}") from error


@functools.lru_cache(maxsize=512)
def _scan(path: str, suffixes: frozenset[str], bytes_in_file: int, mtime_ns: int) -> SampleTable:
    with open(path, "rb") as file:
        found = list(sample_spans(file, path, suffixes))
    if not any(is_content(suffix) for span in found for suffix in span.suffixes):
        raise DataError(f"the shard {path} holds no image ({', '.join(IMAGE_SUFFIXES)}) and no tokens: leave it out")
    return SampleTable(
        bytes_in_file,
        np.array([span.start for span in found], np.int64),
        np.array([span.stop for span in found], np.int64),
        np.array([key_hash(span.key) for span in found], np.uint64),
    )
