"""Check tars, folders and zip files for damage and mistakes; each tar is read once, from start to end."""

import functools
import hashlib
import itertools
import math
import re
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.addresses import is_remote, redacted
from data.errors import DataError, ImageError
from data.file_kinds import kind_of
from data.folder_reader import file_shard, is_files
from data.index import Index, SampleTable, common_root, key_hash
from data.parallel import cores, in_processes, in_threads
from data.samples import CODES, Sample, image_suffixes, is_content
from data.sources import IMAGES, TOKENS, Layout, metadata_of, pick
from data.storage import DEFAULT_TIMEOUTS, Timeouts
from data.tar_reader import MOST_MEMBER_BYTES, RANGE_BYTES, ForwardFile, parse_sample, sample_spans
from data.tokens import grid_of_codes, unpack_codes
from data.transforms import decode, image_header

BLOCK_BYTES = 512  # of a tar: each header is one, and members fill whole ones
NAMED_SAMPLES = 1000  # listed for each kind of problem and shard; more are only counted
NAMED_DUPLICATES = 5
# A shard with one of these problems cannot be read; with any other problem, only some samples cannot.
BROKEN = frozenset({"truncated", "corrupt", "empty", "unreadable", "missing"})


class Problem(NamedTuple):
    """kind: truncated, corrupt, empty, unreadable or missing (see BROKEN), duplicate shard, duplicate key, index (the
    shard differs from its index), or, of a sample that training skips, ImageError.kind.

    sample: its number in the shard, from 0; None for a problem of the whole shard.
    """

    kind: str
    message: str
    sample: int | None = None
    key: str | None = None


@dataclass
class Checked:
    """The result for one shard: a tar, a folder or a zip file. None: unknown, since the shard cannot be read; bytes,
    sha256 and table are those of a tar.

    samples: complete samples before the first damage. table: where they lie; None if the shard is broken. keys: the
    keys of all samples, each followed by NUL, compressed. counts: problems by kind. problems: the first of each kind.
    dotted: samples with a dot in their key. not_read: files that belong to no picture, in a line.
    """

    url: str
    bytes: int | None = None
    sha256: str | None = None
    samples: int = 0
    table: SampleTable | None = None
    keys: bytes = b""
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    dotted: int = 0
    not_read: str = ""

    @property
    def name(self) -> str:
        """What messages call it."""
        return redacted(self.url)

    @property
    def status(self) -> str:
        """`broken`, `flawed` (it can be read, but has problems) or `ok`."""
        return "broken" if BROKEN & self.counts.keys() else "flawed" if self.problems else "ok"

    def key(self, sample: int) -> str:
        return zlib.decompress(self.keys).split(b"\0")[sample].decode("utf-8", "surrogateescape")

    def add(self, kind: str, message: str, sample: int | None = None, key: str | None = None) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= NAMED_SAMPLES:
            self.problems.append(Problem(kind, message, sample, key))

    def record(self) -> dict:
        """For JSON: shard, status, samples, bytes, sha256, counts, problems; None is left out of a problem."""
        problems = [
            {name: value for name, value in problem._asdict().items() if value is not None} for problem in self.problems
        ]
        return {
            "shard": self.name,
            "status": self.status,
            "samples": self.samples,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "counts": dict(self.counts),
            "problems": problems,
        }


def check_shards(
    urls: list[str],
    *,
    index: Index | None = None,
    decode_images: bool = False,
    layout: Layout = IMAGES,
    jobs: int = 1,
) -> Iterator[Checked]:
    """Check tars in `jobs` processes, and yield the results in order.

    index: compare the tars with this index. decode_images: decode every image; codes are always checked. layout: that
    of the source which will read them. Problems that involve several tars are found by `find_duplicates` and
    `missing_shards`.
    """
    root = common_root(urls)
    check_one = functools.partial(check_shard, decode_images=decode_images, layout=layout)
    for checked in in_processes(check_one, urls, jobs):
        if index is not None and not is_files(checked.url):
            _compare(checked, index, root)
        yield checked


def check_shard(
    url: str, decode_images: bool = False, layout: Layout = IMAGES, timeouts: Timeouts = DEFAULT_TIMEOUTS
) -> Checked:
    """Read a tar once, and find its samples, its SHA-256 and its problems; of a folder or a zip file, the problems."""
    if is_files(url):
        return _check_files(url, decode_images, layout)
    checked = Checked(url)
    try:
        with _Hashed(url, timeouts, checked.name) as file:
            checked.bytes = file.bytes
            if file.bytes:
                _check_samples(file, checked, decode_images, layout)
            else:
                checked.add("empty", "0 bytes")
            file.finish()
            checked.sha256 = file.sha256.hexdigest()
    except DataError as error:
        checked.add("unreadable", str(error))
    return checked


# ---------------------------------------------------------------------------------------------------------- one shard


class _Unreadable(DataError):
    """The bytes cannot be read. All other errors of `sample_spans` are about their content."""


class _Hashed(ForwardFile):
    """A tar that is read forwards, and the SHA-256 of what has been read. Raises _Unreadable."""

    def __init__(self, url: str, timeouts: Timeouts, name: str):
        super().__init__(url, timeouts, name)
        self.sha256 = hashlib.sha256()

    def _fill(self, stop: int) -> None:
        had = len(self.content)
        try:
            super()._fill(stop)
        except DataError as error:
            raise _Unreadable(str(error)) from error
        with memoryview(self.content)[had:] as new:
            self.sha256.update(new)

    def finish(self) -> None:
        while (end := self.begin + len(self.content)) < self.bytes:
            self.take(end, min(end + RANGE_BYTES, self.bytes))


def _check_samples(file: _Hashed, checked: Checked, decode_images: bool, layout: Layout) -> None:
    starts, stops, hashes, sizes = array("q"), array("q"), array("Q"), []
    packer, keys, usable, damage, has_both = zlib.compressobj(1), bytearray(), 0, None, False
    try:
        for number, span in enumerate(sample_spans(file, checked.name, layout.suffixes)):
            content = file.take(span.start, span.stop)
            usable += any(map(is_content, span.suffixes))
            size = 0, 0
            has_both |= CODES in span.suffixes and bool(image_suffixes(span.suffixes))
            try:
                sample = parse_sample(content, number, checked.name, layout.suffixes)
                size = _size_of(sample, layout)
                _check_sample(sample, decode_images, layout)
            except ImageError as error:
                checked.add(error.kind, f"{span.key}: {error}", number, span.key)
            sizes.append(size)
            checked.dotted += "." in span.key.rpartition("/")[2]
            starts.append(span.start)
            stops.append(span.stop)
            hashes.append(key_hash(span.key))
            keys += packer.compress(span.key.encode("utf-8", "surrogateescape") + b"\0")
    except _Unreadable:
        raise
    except DataError as error:
        if error.__cause__ is None:  # it is a tar
            damage = Problem("empty", "no sample: none of its members has a name like KEY.jpg")
        else:
            damage = _find_damage(file, stops[-1] if stops else 0) or Problem("corrupt", str(error.__cause__))
    checked.samples, checked.keys = len(starts), bytes(keys + packer.flush())
    if damage is None and not usable:
        damage = Problem("empty", f"no image and no tokens in any of its {checked.samples:,} samples")
        del checked.counts["no image"]  # one for each sample
        checked.problems = [problem for problem in checked.problems if problem.kind != "no image"]
    if damage is not None:
        checked.add(*damage)
    else:
        arrays = [np.array(starts, np.int64), np.array(stops, np.int64), np.array(hashes, np.uint64)]
        # Where a sample holds an image and codes, one size would be that of the wrong one for some readers.
        checked.table = SampleTable(file.bytes, *arrays, None if has_both else np.array(sizes, np.int32))


def _check_files(path: str, decode_images: bool, layout: Layout) -> Checked:
    checked = Checked(path)

    def check_one(number: int) -> ImageError | None:
        try:
            sample = shard.read(number)
            _check_sample(sample, decode_images, layout)
        except ImageError as error:
            error.key = error.key or sample.key
            return error

    try:
        shard = file_shard(path, layout.label == "folder")
        checked.samples, checked.not_read = len(shard), shard.not_read()
        for number, error in enumerate(in_threads(check_one, range(len(shard)), cores())):
            if error is not None:
                checked.add(error.kind, f"{error.key}: {error}", number, error.key)
        for skipped in shard.skipped_unread():
            checked.add("no image", f"{skipped.key}: {skipped.reason}", None, skipped.key)
    except DataError as error:
        checked.add("unreadable", str(error))
    return checked


def _check_sample(sample: Sample, decode_images: bool, layout: Layout) -> None:
    """Raises ImageError, as `ibq tokenize` does, for a sample that it would skip, and for a json that only some sources
    read; pixels are looked at on request."""
    if CODES in sample.members:
        unpack_codes(pick(sample, TOKENS).whole().content)
        return
    picked = pick(sample, layout).whole()
    if decode_images:
        decode(picked.content)
    metadata_of(sample)


def _size_of(sample: Sample, layout: Layout) -> tuple[int, int]:
    """Height and width of a sample's image, or rows and columns of its codes; 0 where they cannot be read. Captions do
    not matter, nor what follows the headers: the same numbers as of a reader without an index."""
    try:
        if CODES in sample.members:
            return grid_of_codes(sample.members[CODES])
        header = image_header(sample.image(layout.image))
    except ImageError:
        return 0, 0
    return header.height, header.width


# -------------------------------------------------------------------------------------------------------------- damage

# Types of the extra header before a member with a long name, or with a fractional time.
LONG_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def _find_damage(file: _Hashed, at: int) -> Problem | None:
    """Where a tar that `sample_spans` rejects is damaged. at: the end of its last complete sample.

    Reads a few headers only; tarfile itself does not say where it stopped.
    """
    while at < file.bytes:
        block = file.read_range(at, min(at + BLOCK_BYTES, file.bytes))
        if not block.strip(b"\0"):
            return _find_behind_zeros(file, at)
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            if at == 0 and (known := kind_of(block)):
                return Problem("corrupt", f"no tar: {known}")
            if len(block) < BLOCK_BYTES:
                return Problem("truncated", f"ends at byte {file.bytes:,}, inside a header")
            no_tar = ", or it is no tar" if at == 0 else ""
            return Problem("corrupt", f"the header at byte {at:,} is damaged ({error}){no_tar}")
        if not 0 <= member.size <= MOST_MEMBER_BYTES:
            return Problem("corrupt", f"the header at byte {at:,} is damaged (it claims {member.size:,} bytes)")
        has_content = not (member.isdir() or member.issym() or member.islnk() or member.isdev())
        content_bytes = member.size if has_content else 0
        stop = at + BLOCK_BYTES * (1 + math.ceil(content_bytes / BLOCK_BYTES))
        if stop > file.bytes:
            lies = f"{member.name} ({content_bytes:,} bytes from byte {at + BLOCK_BYTES:,} on)"
            inside = "a header" if member.type in LONG_HEADERS else lies
            return Problem("truncated", f"ends at byte {file.bytes:,}, inside {inside}")
        at = stop
    return Problem("truncated", f"ends at byte {file.bytes:,}, between two members, without an end mark")


def _find_behind_zeros(file: _Hashed, at: int) -> Problem | None:
    """Damage after the blocks of zeros that end a tar."""
    data = None
    for start in range(at, file.bytes, RANGE_BYTES):
        content = file.read_range(start, min(start + RANGE_BYTES, file.bytes))
        if data is None and (rest := content.lstrip(b"\0")):
            data = start + (len(content) - len(rest)) // BLOCK_BYTES * BLOCK_BYTES
        for match in re.finditer(b"ustar", content):  # at byte 257 of each header
            header = match.start() - 257
            if header >= 0 and header % BLOCK_BYTES == 0 and _is_header(content[header : header + BLOCK_BYTES]):
                what = f"{data - at:,} zero bytes at byte {at:,}, but more members from byte {start + header:,} on"
                return Problem("corrupt", f"{what}: zeroed by a disk or a copy, or several tars in one file")
    if data is None:
        return None
    if data - at == BLOCK_BYTES:  # a tar ends in two blocks of zeros
        return Problem("corrupt", f"the header at byte {at:,} is zeroed")
    return Problem("corrupt", f"{file.bytes - data:,} bytes of something else behind its end at byte {at:,}")


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


# ---------------------------------------------------------------------------------------------------------- all shards


def find_duplicates(found: list[Checked]) -> None:
    """Record shards with the same bytes as an earlier one, and keys that an earlier sample has.

    Keys are compared by their 64-bit hashes. Keys of duplicate and of broken shards are not compared.
    """
    first_with: dict[str, Checked] = {}
    compared = []
    for checked in found:
        first = first_with.setdefault(checked.sha256, checked) if checked.bytes and checked.sha256 else checked
        if first is not checked:
            checked.add("duplicate shard", f"the same bytes as {first.name}")
        elif checked.table is not None:
            compared.append(checked)
    firsts = np.cumsum([0, *(checked.samples for checked in compared)])
    keys = np.concatenate([np.zeros(0, np.uint64), *(checked.table.keys_n for checked in compared)])
    _, first_of_key, key_numbers = np.unique(keys, return_index=True, return_inverse=True)
    before = first_of_key[key_numbers]  # of each sample: the first one that has its key
    again = np.flatnonzero(before != np.arange(len(keys)))
    borders = np.searchsorted(again, firsts)
    for checked, first, (start, stop) in zip(compared, firsts, itertools.pairwise(borders), strict=False):
        for place in again[start:stop][:NAMED_DUPLICATES]:
            sample = int(place - first)
            other = int(np.searchsorted(firsts, before[place], side="right")) - 1
            of = "" if compared[other] is checked else f" of {compared[other].name}"
            key = checked.key(sample)
            message = f"{key} is also the key of sample {before[place] - firsts[other]}{of}"
            checked.add("duplicate key", message, sample, key)
        if (more := int(stop - start) - NAMED_DUPLICATES) > 0:
            checked.counts["duplicate key"] += more


def missing_shards(found: list[Checked], index: Index) -> list[Checked]:
    """The tars of an index that no longer exist, for an index of local tars."""
    root = common_root([checked.url for checked in found])
    folders = [folder for folder in (f"{index.path.absolute().parent}/", index.root, root) if folder]
    if any(map(is_remote, folders)):
        return []
    there = {index.find(checked.url, root) for checked in found}
    missing = []
    for number, name in enumerate(index.names):
        if number not in there and not any(Path(folder, name).exists() for folder in folders):
            missing.append(Checked(index.root + name))
            missing[-1].add("missing", f"in the index {index.path}, but not there")
    return missing


def _compare(checked: Checked, index: Index, root: str) -> None:
    known = index.table(checked.url, root)
    if known is None:
        if checked.status != "broken":  # broken tars are left out of an index
            checked.add("index", f"not in the index {index.path}")
        return
    differences = []
    if checked.bytes is not None and checked.bytes != known.bytes:
        differences.append(f"{checked.bytes:,} bytes and not {known.bytes:,}")
    if checked.table is not None:
        if len(checked.table) != len(known):
            differences.append(f"{len(checked.table):,} samples and not {len(known):,}")
        elif not np.array_equal(checked.table.keys_n, known.keys_n):
            differences.append("other keys")
        elif not (
            np.array_equal(checked.table.starts_n, known.starts_n)
            and np.array_equal(checked.table.stops_n, known.stops_n)
        ):
            differences.append("samples at other positions")
    if checked.sha256 not in (None, index.sha256(checked.url, root)):
        differences.append("other content (SHA-256)")
    if differences:
        checked.add("index", f"not as in the index {index.path}: {', '.join(differences)}")
