"""Tars at paths and URLs, and the output of commands, read as shards."""

import io
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from data.addresses import is_remote, redacted
from data.cache import Access
from data.errors import DataError
from data.index import SampleTable, key_hash
from data.samples import Sample, Window, WindowLimit
from data.storage import Timeouts, read, size
from data.tar_format import HOW_TO_FIX, changed_shard, parse_sample, sample_spans, scan

PIPE = "pipe:"
RANGE_BYTES = 8 << 20  # fetched at once from a tar whose sample positions are unknown


@dataclass(eq=False)
class TarShard:
    """A tar at a path or URL, or `pipe:COMMAND`. table: where its samples lie, if known.

    A tar without a table is read sequentially; a missing end is noticed only when the end is reached.
    """

    url: str
    table: SampleTable | None = None
    access: Access = field(default_factory=Access)
    _size_checked: bool = False

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
        return _TarWindow(index, 1, self, self.table).read(0)

    def windows(self, first: int, stop: int | None, limit: WindowLimit) -> Iterator[Window]:
        if self.table is None and self.is_streamed and not self.access.is_copied(self.url):
            assert first == 0 and stop is None
            yield from self._stream(limit)
            return
        # A scanned table is not kept: a run may read very many tars.
        table = self.scan() if self.table is None else self.table
        stop = len(table) if stop is None else stop
        self.check_size(table)
        while first < stop:
            most = np.searchsorted(table.stops_n, table.starts_n[first] + limit.bytes, side="right")
            count = max(1, min(limit.samples, int(most) - first, stop - first))
            yield _TarWindow(first, count, self, table)
            first += count

    def scan(self) -> SampleTable:
        """Where its samples lie, from the tar's headers (of a remote tar: from the cached copy). Raises DataError."""
        if self.url.startswith(PIPE):
            raise DataError(f"{self.name} can only be read sequentially: write the command's output to a file")
        return self.access.apply(scan, self.url)

    def check_size(self, table: SampleTable) -> None:
        """Raises DataError unless the tar's size is that of its table; checked once per process."""
        if self._size_checked or self.url.startswith(PIPE):
            return
        found = self.access.apply(lambda place: size(place, self.access.timeouts), self.url)
        if found != table.bytes:
            raise DataError(
                f"the shard {self.name} has {found:,} bytes, but its index says {table.bytes:,}: {HOW_TO_FIX}"
            )
        self._size_checked = True

    def _stream(self, limit: WindowLimit) -> Iterator[Window]:
        first, samples, begin = 0, [], 0
        with ForwardFile(self.url, self.access.timeouts, self.name) as file:
            for span in sample_spans(file, self.name):
                begin = begin if samples else span.start
                if samples and (len(samples) >= limit.samples or span.stop - begin > limit.bytes):
                    yield _FetchedWindow(first, len(samples), self.name, samples)
                    first, samples, begin = first + len(samples), [], span.start
                samples.append(file.take(span.start, span.stop))
        if samples:
            yield _FetchedWindow(first, len(samples), self.name, samples)


@dataclass(eq=False)
class _TarWindow(Window):
    """Samples at known positions."""

    shard: TarShard
    table: SampleTable
    content: memoryview | None = None

    def fetch(self) -> None:
        if self.content is None and is_remote(self.shard.url):
            table = self.table
            start, stop = table.starts_n[self.first], table.stops_n[self.first + self.count - 1]
            self.content = memoryview(self.shard.access.read(self.shard.url, int(start), int(stop)))

    def read(self, n: int) -> Sample:
        self.fetch()
        table = self.table
        start, stop = int(table.starts_n[self.first + n]), int(table.stops_n[self.first + n])
        if self.content is not None:
            begin = int(table.starts_n[self.first])
            content = self.content[start - begin : stop - begin]
        else:
            content = read(self.shard.url, start, stop)
        sample = parse_sample(content, self.first + n, self.shard.name)
        if key_hash(sample.key) != table.keys_n[self.first + n]:
            raise DataError(f"{changed_shard(self.shard.name)} (sample {self.first + n} is {sample.key}); {HOW_TO_FIX}")
        return sample


@dataclass(eq=False)
class _FetchedWindow(Window):
    """Samples whose bytes have already been read."""

    name: str
    contents: list[bytes]

    def read(self, n: int) -> Sample:
        return parse_sample(self.contents[n], self.first + n, self.name)


class ForwardFile(io.RawIOBase):
    """A remote tar or a command's output as a file that is read forwards. It keeps bytes until `take` passes them."""

    def __init__(self, path: str, timeouts: Timeouts, name: str):
        self.path, self.timeouts, self.name = path, timeouts, name
        self.begin, self.content, self.position = 0, bytearray(), 0
        self.process = self.bytes = None
        if path.startswith(PIPE):
            self.process = subprocess.Popen(path.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE)
        else:
            self.bytes = size(path, timeouts)

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
                more = read(self.path, min(end, self.bytes), min(end + RANGE_BYTES, self.bytes), self.timeouts)
            if not more:
                return
            self.content += more

    def close(self):
        if self.process and not self.closed:
            unread = self.process.stdout.read(1)
            self.process.stdout.close()
            if self.process.wait() and not unread:
                raise DataError(
                    f"the command of {self.name} ended with status {self.process.returncode}: try it by hand"
                )
        super().close()
