"""Shards: tars, folders and zip files of images. Finding them, and reading samples out of them.

A shard is read in windows of consecutive samples. A window of a local shard costs nothing until a sample is asked for;
that of a remote one is fetched whole, in one request.
"""

import functools
import glob
import io
import itertools
import os
import posixpath
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import braceexpand
import numpy as np
from webdataset.tariterators import base_plus_ext, group_by_keys

from data.errors import DataError
from data.index import Table, key_hash
from data.storage import Cache, Patience, is_remote, list_tars, read, redacted, scheme_of, size
from data.transforms import MAX_BYTES, ImageError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CODES = "codes"  # suffix of an image's tokens, see data.tokens
ZIP_SUFFIX = ".zip"
LIST_SUFFIX = ".txt"
PIPE = "pipe:"
MOST_SHARDS = 2_000_000  # of one pattern
RANGE_BYTES = 8 << 20  # what is fetched at once of a tar whose samples are not known beforehand
PUSHED_OUT_TIMES = 5  # that a copy may be gone from the cache before it is read
MOST_MEMBER_BYTES = 1 << 30  # a header that claims more is damaged


class Skipped(NamedTuple):
    """A sample that was left out: the file or shard, the sample's key or file name, the reason in one line, and the
    name of the data source that it belongs to."""

    source: str
    key: str
    reason: str
    dataset: str = ""


class Sample(NamedTuple):
    """A raw sample: its key, and each member's bytes under its suffix in lower case (``jpg``, ``txt``, ``json``)."""

    key: str
    members: dict[str, bytes]

    def image(self, suffixes: Iterable[str] = ()) -> bytes:
        """The first of ``suffixes`` that there is; without any, the first member that is an image by its name."""
        for suffix in suffixes or sorted(filter(is_image, self.members)):
            if suffix in self.members:
                return self.members[suffix]
        wanted = f" ({', '.join(suffixes)})" if suffixes else ""
        if CODES in self.members:
            raise ImageError(f"it holds tokens, no image{wanted}: data.content=tokens reads them")
        raise ImageError(f"no image{wanted} among its members: {', '.join(sorted(self.members)) or 'none'}")


def is_image(name: str) -> bool:
    """Whether a file's name or a member's suffix is that of an image."""
    return name.lower().rsplit(".", 1)[-1] in IMAGE_SUFFIXES


def is_content(suffix: str) -> bool:
    """Whether a member's suffix is that of what is trained on: an image, or its tokens."""
    return suffix == CODES or is_image(suffix)


# ---------------------------------------------------------------------------------------------------------- finding


def expand(spec: str | Iterable[str], *, allow_pipes: bool = False) -> list[str]:
    """The tars that `spec` names, as paths or URLs: a folder (its *.tar, sorted), one tar, a brace pattern, a glob, an
    http(s), s3 or gs URL with or without braces, a folder in s3 or gs, a .txt file that lists one of these in each
    line, `bundled:train` or `bundled:val` (the photographs in scikit-image's wheel), or a list of these. `pipe:COMMAND`
    only where `allow_pipes` says so: it runs a shell.

    Raises DataError naming the part that gives nothing.
    """
    if spec is None:
        raise DataError("no data named: set data.train (and data.val) to tars, a folder of tars or bundled:train")
    if isinstance(spec, os.PathLike):
        spec = os.fspath(spec)
    if isinstance(spec, (bytes, dict)) or not isinstance(spec, Iterable):
        raise DataError(f"{spec!r} names no data: give a path (./{spec}), a pattern in quotes or a list of these")
    if not isinstance(spec, str):
        paths = [path for part in spec for path in expand(part, allow_pipes=allow_pipes)]
        if not paths:
            raise DataError("no data named: the list of tars is empty")
        return paths
    if spec.startswith("bundled:"):
        from data.prep.photographs import photographs  # which packs them, with all that this takes

        return expand(photographs(spec))
    if spec.startswith(PIPE):
        if not allow_pipes:
            raise DataError("pipe: runs a shell command: allow it with data.allow_pipes=true, if you trust the recipe")
        return _braced(spec)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", spec):
        return [url for braced in _braced(spec) for url in _remote_tars(braced)]
    return _local_tars(os.path.expanduser(spec), allow_pipes)  # the shell leaves the ~ of data.train=~/tars alone


def _remote_tars(url: str) -> list[str]:
    scheme_of(url)
    if re.split(r"[?#]", url)[0].endswith(".tar"):
        return [url]
    if not (found := list_tars(url)):
        raise DataError(f"no *.tar in {redacted(url)}: look at the path")
    return found


def _lines(path: str) -> list[str]:
    """The lines of a list that are no comments."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"the list {path} is not in UTF-8: save it anew") from error
    except OSError as error:
        raise DataError(f"cannot read the list {path}: {error.strerror or error}") from error
    parts = [line for line in lines if line and not line.startswith("#")]
    if not parts:
        raise DataError(f"the list {path} is empty: write one tar, pattern or URL in each line")
    if nested := next((part for part in parts if part.endswith(LIST_SUFFIX)), None):
        raise DataError(f"the list {path} names a list, {nested}: write tars, patterns or URLs")
    return parts


def _braced(pattern: str) -> list[str]:
    name = PIPE + "…" if pattern.startswith(PIPE) else redacted(pattern)
    try:
        found = list(itertools.islice(braceexpand.braceexpand(pattern), MOST_SHARDS + 1))
    except ValueError as error:
        raise DataError(
            f"{name}: its braces do not match; a pattern reads like train-{{000000..000009}}.tar"
        ) from error
    if len(found) > MOST_SHARDS:
        raise DataError(f"{name} stands for more than {MOST_SHARDS:,} tars: look at its braces")
    return found


def _local_tars(spec: str, allow_pipes: bool) -> list[str]:
    if os.path.isdir(spec):
        paths = sorted(str(path) for path in Path(spec).glob("*.tar") if path.is_file())
        if not paths:
            raise DataError(f"no *.tar in the folder {spec}: pack images with `ibq shards pack FOLDER --out {spec}`")
        return paths
    if os.path.isfile(spec) and spec.endswith(LIST_SUFFIX):
        return expand(_lines(spec), allow_pipes=allow_pipes)
    if os.path.exists(spec):
        return [spec]
    paths = []
    for pattern in _braced(spec):
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern] * os.path.exists(pattern)
        if not found:
            of = f" (from {spec})" if pattern != spec else ""
            raise DataError(f"no such tar or folder: {pattern}{of}")
        paths += [path for one in found for path in expand(one)]
    return paths


def find_images(folder: Path) -> list[Path]:
    """Paths relative to `folder`, sorted, without hidden files and folders."""
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = (name for name in names if is_image(Path(name).suffix) and not name.startswith("."))
        found += [(Path(parent) / name).relative_to(folder) for name in images]
    return sorted(found, key=lambda path: path.as_posix())


# ---------------------------------------------------------------------------------------------------------- windows


class Limit(NamedTuple):
    """The most of a window: samples, and bytes unless one sample alone has more."""

    samples: int
    bytes: int


class Access(NamedTuple):
    """How remote shards are reached: with what patience, and through which cache."""

    patience: Patience = Patience()
    cache: Cache | None = None

    def is_copied(self, url: str) -> bool:
        """Whether the shard is read from a local copy in the cache."""
        return self.cache is not None and is_remote(url)

    def read(self, url: str, start: int, stop: int) -> bytes:
        """The bytes start to stop of a shard. Raises DataError."""
        if self.is_copied(url):
            return self.with_copy(url, lambda path: read(path, start, stop))
        return read(url, start, stop, self.patience)

    def with_copy(self, url: str, action: Callable[[str], Any]) -> Any:
        """What `action` makes of the path of the local copy; other processes may push the copy out any time."""
        for _ in range(PUSHED_OUT_TIMES):
            path = str(self.cache.path(url))
            try:
                return action(path)
            except DataError as error:
                if os.path.exists(path):
                    os.unlink(path)  # so that a mended shard is fetched
                    raise DataError(str(error).replace(path, redacted(url))) from error
        raise DataError(f"the cache {self.cache.folder} is too small for what is read at once: data.cache_gigabytes")


class Window:
    """Consecutive samples of a shard: `read(n)` gives the n-th of `len(window)`, whose place in the shard is first + n.

    `fetch` gets everything that `read` needs; without it, the first `read` does. `read` raises ImageError for a sample
    that cannot be used, DataError where the shard cannot be read.
    """

    def __init__(self, first: int, count: int):
        self.first, self.count = first, count

    def __len__(self):
        return self.count

    def fetch(self) -> None:
        """Nothing, unless the shard is remote."""

    def read(self, n: int) -> Sample:
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------- tars


@dataclass(eq=False)
class TarShard:
    """A tar at a path or URL, or `pipe:COMMAND`. table: where its samples lie, if that is known.

    A tar without a table is read from its start to its end; whether it ends as a tar must is seen only then.
    """

    url: str
    table: Table | None = None
    access: Access = field(default_factory=Access)
    _checked: bool = False

    @property
    def name(self) -> str:
        """What messages call it."""
        return PIPE + "…" if self.url.startswith(PIPE) else redacted(self.url)

    def __len__(self):
        return len(self.table)

    def read(self, index: int) -> Sample:
        """One sample alone."""
        return _TarWindow(self, self.table, index, 1).read(0)

    def windows(self, first: int, stop: int | None, limit: Limit) -> Iterator[Window]:
        """The samples from first to stop (None: to the end), in windows that depend on first, stop and limit only."""
        if self.table is None and _is_stream(self.url) and not self.access.is_copied(self.url):
            assert first == 0 and stop is None
            yield from self._stream(limit)
            return
        # What is scanned here is not kept: a run comes to many tars.
        table = self.scan() if self.table is None else self.table
        stop = len(table) if stop is None else stop
        self.check_size(table)
        while first < stop:
            most = np.searchsorted(table.stops_n, table.starts_n[first] + limit.bytes, side="right")
            count = max(1, min(limit.samples, int(most) - first, stop - first))
            yield _TarWindow(self, table, first, count)
            first += count

    def scan(self) -> Table:
        """Where its samples lie, from its headers; of a remote tar, from those of a copy. Raises DataError."""
        if self.url.startswith(PIPE):
            raise DataError(f"{self.name} can be read forwards only: write its output into a file")
        return self.access.with_copy(self.url, scan) if self.access.is_copied(self.url) else scan(self.url)

    def check_size(self, table: Table) -> None:
        """Raises DataError unless the tar has the size that its table tells, once in a process."""
        if self._checked or self.url.startswith(PIPE):
            return
        found = (
            self.access.with_copy(self.url, size)
            if self.access.is_copied(self.url)
            else size(self.url, self.access.patience)
        )
        if found != table.bytes:
            raise DataError(
                f"the shard {self.name} has {found:,} bytes and not the {table.bytes:,} its index tells: {MEND}"
            )
        self._checked = True

    def _stream(self, limit: Limit) -> Iterator[Window]:
        first, samples, begin = 0, [], 0
        with ForwardFile(self.url, self.access.patience, self.name) as file:
            for span in spans(file, self.name):
                begin = begin if samples else span.start
                if samples and (len(samples) >= limit.samples or span.stop - begin > limit.bytes):
                    yield _Fetched(self.name, first, samples)
                    first, samples, begin = first + len(samples), [], span.start
                samples.append(file.take(span.start, span.stop))
        if samples:
            yield _Fetched(self.name, first, samples)


class _TarWindow(Window):
    def __init__(self, shard: TarShard, table: Table, first: int, count: int):
        super().__init__(first, count)
        self.shard, self.table, self.content = shard, table, None

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
        sample = parse(content, self.first + n, self.shard.name)
        if key_hash(sample.key) != table.keys_n[self.first + n]:
            raise DataError(f"{_changed(self.shard.name)} (sample {self.first + n} is {sample.key}); {MEND}")
        return sample


class _Fetched(Window):
    def __init__(self, name: str, first: int, contents: list[bytes]):
        super().__init__(first, len(contents))
        self.name, self.contents = name, contents

    def read(self, n: int) -> Sample:
        return parse(self.contents[n], self.first + n, self.name)


def parse(content: bytes | memoryview, index: int, name: str) -> Sample:
    """A sample out of the bytes of its members, which are a tar of their own; webdataset groups them just as it would
    in the whole shard.

    Raises ImageError for a sample that cannot be used, DataError where the bytes are not those of one sample: then the
    shard has changed since it was scanned or indexed.
    """
    try:
        members = _plain_members(content, name)
        samples = list(group_by_keys(_members(content, name) if members is None else members))
    except ValueError as error:
        raise ImageError(f"sample {index}: {str(error.args[0]).split(' dict_keys')[0]}") from error
    except tarfile.TarError as error:
        raise DataError(f"{_changed(name)} (sample {index}: {error}); {MEND}") from error
    if len(samples) != 1:
        raise DataError(f"{_changed(name)} (sample {index}: {len(samples)} samples in its place); {MEND}")
    (sample,) = samples
    key = sample.pop("__key__")
    if key.startswith("/") or ".." in key.split("/"):
        raise ImageError(f"the key {key!r} leads out of its folder")
    return Sample(key, {suffix: value for suffix, value in sample.items() if not suffix.startswith("__")})


MEND = "copy it again, write the index again, or name the shard in data.quarantine"


def _changed(name: str) -> str:
    return f"the shard {name} is damaged, or not the one that was scanned or indexed"


def _plain_members(content: bytes | memoryview, name: str) -> list[dict] | None:
    """The same as `_members` in a tenth of the time, or None where a header is not of the plainest kind, or damaged."""
    members, at = [], 0
    while at < len(content):
        header = bytes(content[at : at + 512])
        path, size, checksum = header[:100].rstrip(b"\0"), header[124:136], header[148:156]
        # A regular file without a prefix to its name; octal numbers; not of GNU's older kinds.
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
        if _is_of_sample(fname):
            members.append({"fname": fname, "data": bytes(content[at + 512 : stop]), "__url__": name})
        at = -(-stop // 512) * 512
    return members if at == len(content) and members else None


def _members(content: bytes | memoryview, name: str) -> Iterator[dict]:
    """What webdataset's tar reader gives, which would leave out what follows a damaged header without a word."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in _entries(tar):
            if is_member(member):
                yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": name}
        if tar.offset != len(content):
            raise tarfile.ReadError(f"damaged at byte {tar.offset:,} of {len(content):,}")


def _entries(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """A tar's entries. tarfile by itself reads in a circle where a size is below zero, and raises errors of many kinds
    where a number is larger than any file."""
    try:
        while (member := tar.next()) is not None:
            tar.members = []  # tarfile keeps every member otherwise
            if not 0 <= member.size <= MOST_MEMBER_BYTES:
                raise tarfile.ReadError(f"{member.name} claims {member.size:,} bytes")
            if member.isreg() and not member.name:
                raise tarfile.ReadError(f"a member without a name at byte {member.offset:,}")
            yield member
    except (OverflowError, ValueError, RecursionError) as error:
        raise tarfile.ReadError(f"damaged header: {error}") from error


def is_member(member: tarfile.TarInfo) -> bool:
    """Whether an entry of a tar is part of a sample: webdataset's rule, but for macOS' ._ files, which it takes."""
    return member.isreg() and _is_of_sample(member.name)


def _is_of_sample(name: str) -> bool:
    named = base_plus_ext(name)[0] is not None and not posixpath.basename(name).startswith("._")
    return named and not re.match(r"__[^/]*__($|/)", name)


class Span(NamedTuple):
    """Where a sample lies in its tar, in bytes, and what kinds of members it has."""

    key: str
    start: int
    stop: int
    suffixes: tuple[str, ...]


def spans(file, name: str) -> Iterator[Span]:
    """Each sample of an uncompressed tar, from headers alone.

    webdataset by itself passes over a tar that ends early, a broken header or zeroed blocks in silence. Here each of
    them, and a tar without any sample, is a DataError that names the tar.
    """
    key, start, stop, suffixes, found = None, 0, 0, [], False
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in _entries(tar):
                if not is_member(member):
                    continue
                member_key, suffix = base_plus_ext(member.name)
                if member_key != key:
                    if key is not None:
                        yield Span(key, start, stop, tuple(suffixes))
                    key, start, suffixes, found = member_key, member.offset, [], True
                stop = tar.offset
                suffixes.append(suffix.lower())
            _check_end(file, tar.offset)
    except (tarfile.TarError, RecursionError) as error:  # the latter for very many headers in a row
        raise DataError(
            f"the shard {name} is no whole, uncompressed tar ({error}): pack or copy it again, or leave it out"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read the shard {name}: {error.strerror or error}") from error
    if not found:
        raise DataError(f"the shard {name} holds no sample: leave it out")
    yield Span(key, start, stop, tuple(suffixes))


def _check_end(file, offset: int) -> None:
    """A whole tar ends in zero blocks and has nothing after them."""
    file.seek(offset)
    ended = False
    while block := file.read(1 << 20):
        if block.count(0) != len(block):
            raise tarfile.ReadError(f"damaged at byte {offset:,}")
        ended = True
    if not ended:
        raise tarfile.ReadError("cut off before its end mark")


def scan(path: str) -> Table:
    """Reads a local tar's headers only: where each sample lies. An unchanged file is scanned once in a process.

    Raises DataError for a tar that is not whole, holds nothing, or holds neither image nor tokens.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror}") from error
    if stat.st_size == 0:
        raise DataError(f"the shard {path} is empty (0 bytes): pack or copy it again, or leave it out")
    return _scan(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=512)
def _scan(path: str, bytes_in_file: int, mtime_ns: int) -> Table:
    try:
        with open(path, "rb") as file:
            found = list(spans(file, path))
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror}") from error
    if not any(is_content(suffix) for span in found for suffix in span.suffixes):
        raise DataError(f"the shard {path} holds no image ({', '.join(IMAGE_SUFFIXES)}) and no tokens: leave it out")
    return Table(
        bytes_in_file,
        np.array([span.start for span in found], np.int64),
        np.array([span.stop for span in found], np.int64),
        np.array([key_hash(span.key) for span in found], np.uint64),
    )


def _is_stream(path: str) -> bool:
    return path.startswith(PIPE) or is_remote(path)


class ForwardFile(io.RawIOBase):
    """A remote tar or a command's output as a file that is read forwards, and keeps what no `take` has passed yet."""

    def __init__(self, path: str, patience: Patience, name: str):
        self.path, self.patience, self.name = path, patience, name
        self.begin, self.content, self.position = 0, bytearray(), 0
        self.process = self.bytes = None
        if path.startswith(PIPE):
            self.process = subprocess.Popen(path.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE)
        else:
            self.bytes = size(path, patience)

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.position

    def seek(self, offset, whence=io.SEEK_SET):
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("only from the start")
        self.position = offset
        return offset

    def read(self, count=-1):
        self._fill(self.position + count)
        start = self.position - self.begin
        piece = bytes(self.content[start : start + count])
        self.position += len(piece)
        return piece

    def take(self, start: int, stop: int) -> bytes:
        """These bytes; those before `stop` are not needed any more."""
        self._fill(stop)
        piece = bytes(self.content[start - self.begin : stop - self.begin])
        del self.content[: stop - self.begin]
        self.begin = stop
        return piece

    def _fill(self, stop: int) -> None:
        while (end := self.begin + len(self.content)) < stop:
            if self.process:
                more = self.process.stdout.read(RANGE_BYTES)
            else:
                more = (
                    read(self.path, end, min(end + RANGE_BYTES, self.bytes), self.patience) if end < self.bytes else b""
                )
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


# -------------------------------------------------------------------------------------------------- folders and zips


@dataclass(eq=False)
class FolderShard:
    """The images of a folder and its sub-folders, in sorted order. The key of a sample is its relative path; .txt, .cls
    and .json beside the image belong to it; ``cls`` may come from the top sub-folder."""

    url: str
    images: list[Path]
    classes: dict[str, int] | None = None

    @property
    def name(self) -> str:
        return self.url

    def __len__(self):
        return len(self.images)

    def windows(self, first: int, stop: int | None, limit: Limit) -> Iterator[Window]:
        return _windows_by_count(self, first, len(self) if stop is None else stop, limit)

    def read(self, index: int) -> Sample:
        relative = self.images[index]
        path = Path(self.url) / relative
        try:
            members = {path.suffix.lower().lstrip("."): path.read_bytes()}
            for suffix in ("txt", "cls", "json"):
                if (beside := path.with_suffix(f".{suffix}")).exists():
                    members[suffix] = beside.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        if self.classes is not None:
            members["cls"] = str(self.classes[relative.parts[0]]).encode()
        return Sample(relative.as_posix(), members)


@dataclass(eq=False)
class ZipShard:
    """The images in a zip file, in the order of their names."""

    url: str
    names: list[str]
    _file: tuple[int, zipfile.ZipFile] | None = None

    @property
    def name(self) -> str:
        return self.url

    def __len__(self):
        return len(self.names)

    def windows(self, first: int, stop: int | None, limit: Limit) -> Iterator[Window]:
        return _windows_by_count(self, first, len(self) if stop is None else stop, limit)

    def read(self, index: int) -> Sample:
        name = self.names[index]
        suffix = name.rpartition(".")[2]
        try:
            if self._file is None or self._file[0] != os.getpid():  # a forked process must not share the file's place
                self._file = os.getpid(), zipfile.ZipFile(self.url)
            file = self._file[1]
            if (bytes_of_image := file.getinfo(name).file_size) > MAX_BYTES:
                raise ImageError(f"{bytes_of_image:,} bytes are more than {MAX_BYTES:,}")
            return Sample(name, {suffix.lower(): file.read(name)})
        except (zipfile.BadZipFile, zipfile.zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise ImageError(f"damaged or encrypted in the zip file: {error}") from error
        except OSError as error:
            raise DataError(f"cannot read {self.url}: {error.strerror or error}") from error


class _ByPlace(Window):
    def __init__(self, shard: FolderShard | ZipShard, first: int, count: int):
        super().__init__(first, count)
        self.shard = shard

    def read(self, n: int) -> Sample:
        return self.shard.read(self.first + n)


def _windows_by_count(shard, first: int, stop: int, limit: Limit) -> Iterator[Window]:
    for begin in range(first, stop, limit.samples):
        yield _ByPlace(shard, begin, min(limit.samples, stop - begin))


Shard = TarShard | FolderShard | ZipShard


def folder_shard(folder: str, class_from_folder: bool = False) -> FolderShard:
    """Raises DataError where there is no image, or images and tars."""
    images, has_tars = find_images(Path(folder)), any(Path(folder).glob("*.tar"))
    if images and has_tars:
        raise DataError(
            f"{folder} holds images and tars: name a folder with one kind only, or the tars as {folder}/*.tar"
        )
    if not images:
        raise DataError(f"neither {', '.join(IMAGE_SUFFIXES)} nor tars under {folder}: name a folder that holds images")
    if not class_from_folder:
        return FolderShard(folder, images)
    if loose := [image for image in images if len(image.parts) == 1]:
        raise DataError(f"{folder}/{loose[0]} lies in no class folder: move it into one")
    names = sorted({image.parts[0] for image in images})
    return FolderShard(folder, images, {name: number for number, name in enumerate(names)})


def zip_shard(path: str) -> ZipShard:
    """Raises DataError for what is no zip file, or holds no image."""
    try:
        with zipfile.ZipFile(path) as file:
            names = sorted(name for name in file.namelist() if is_image(name) and not _is_hidden(name))
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is no whole zip file: copy it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not names:
        raise DataError(f"no {', '.join(IMAGE_SUFFIXES)} in {path}: name a zip file of images")
    return ZipShard(path, names)


def _is_hidden(name: str) -> bool:
    return name.startswith("__MACOSX/") or any(part.startswith(".") for part in name.split("/"))


def is_folder_of_images(spec) -> bool:
    """Whether `spec` is a local folder without tars."""
    return isinstance(spec, (str, os.PathLike)) and os.path.isdir(spec) and not any(Path(spec).glob("*.tar"))


def is_zip(spec) -> bool:
    """Whether `spec` is a local zip file."""
    return isinstance(spec, (str, os.PathLike)) and os.path.isfile(spec) and str(spec).lower().endswith(ZIP_SUFFIX)
