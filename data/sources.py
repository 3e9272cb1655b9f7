"""Data sources: their configuration, the catalogue, and which members of a raw sample are used."""

import functools
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import yaml

from data.addresses import is_remote, redacted
from data.availability import check_available
from data.cache import Access
from data.classes import classes_beside, merged_classes, read_classes
from data.config import FilterConfig, SourceConfig
from data.errors import DataError, Filtered, ImageError
from data.folder_reader import FileShard, file_shard, is_files
from data.grouping import KNOWN_SUFFIXES
from data.index import INDEX_NAME, Index, common_root, without_query
from data.key_lists import check_not_keys, read_keys
from data.parallel import in_threads
from data.samples import CODES, NO_CLASS, Sample, Shard, Skipped, fields_of, text_of
from data.shards import check_different, expand
from data.storage import DEFAULT_TIMEOUTS, PROBING_THREADS, Timeouts, content_state
from data.tar_reader import PIPE, TarShard

SMALLEST_SHARE = 1e-12  # of the weights
# A source with more tars without an index is looked at one tar at a time during the run.
MOST_SCANNED = 256


class Layout(NamedTuple):
    """Where things are in a sample. image: suffixes in order of preference, empty: any image; caption, label: suffixes;
    caption_field: field of the member `json`; fields: a filter's score -> field of the member `json`."""

    image: tuple[str, ...] = ()
    caption: str | None = "txt"
    caption_field: str | None = None
    label: str | None = "cls"
    fields: Mapping[str, str] = MappingProxyType({})

    @property
    def suffixes(self) -> frozenset[str]:
        """The suffixes that end a sample's key."""
        named = {suffix for suffix in (self.caption, self.label) if suffix}
        return frozenset(named) | (frozenset((*self.image, "txt", "cls", "json")) if self.image else KNOWN_SUFFIXES)


IMAGES = Layout()  # of a source that the catalogue does not know
TOKENS = Layout(image=(CODES,))  # written by `ibq tokenize`


class Picked(NamedTuple):
    """The parts of a raw sample that are used. content: the image, or its tokens; label: the class, or None. unread:
    why its caption cannot be read, which is then None."""

    content: bytes
    caption: str | None
    label: int | None
    unread: ImageError | None = None

    def whole(self) -> "Picked":
        """The same, for those who use the caption. Raises ImageError if it cannot be read."""
        if self.unread is not None:
            raise self.unread
        return self


@functools.cache
def catalogue() -> dict[str, dict]:
    """`data/sources.yaml`: name -> entry."""
    return yaml.safe_load((resources.files("data") / "sources.yaml").read_text(encoding="utf-8"))


def layout_of(config: SourceConfig) -> Layout:
    """The catalogue's layout for the source's name, overridden by the recipe."""
    if config.like is not None and config.like not in catalogue():
        raise DataError(f"source {config.name}: the catalogue has no {config.like}; it has {', '.join(catalogue())}")
    entry = catalogue().get(config.like or config.name, {})
    known = entry.get("layout", {})
    return Layout(
        tuple(config.image or known.get("image") or ()),
        config.caption or known.get("caption", "txt"),
        config.caption_field or known.get("caption_field"),
        config.class_from or known.get("class") or "cls",
        {**entry.get("fields", {}), **config.fields},
    )


@dataclass(frozen=True, eq=False)
class Filters:
    """The filters of one source, ready to use."""

    config: FilterConfig
    keys: frozenset[str] | None
    not_keys: frozenset[str]

    @property
    def bounds(self) -> list[tuple[str, float, int]]:
        """(score, bound, 1 for a lower and -1 for an upper bound)."""
        config = self.config
        named = [
            ("aesthetic", config.min_aesthetic, 1),
            ("nsfw", config.max_nsfw, -1),
            ("watermark", config.max_watermark, -1),
            ("similarity", config.min_similarity, 1),
        ]
        return [(name, bound, sign) for name, bound, sign in named if bound is not None]

    def passes_key(self, key: str) -> bool:
        return key not in self.not_keys and (self.keys is None or key in self.keys)

    def pass_sizes(self, sizes_n2: np.ndarray) -> np.ndarray:
        """Which heights and widths `check_size` lets pass."""
        shorter_n, longer_n = sizes_n2.min(axis=1), sizes_n2.max(axis=1)
        least, ratio = self.config.min_side or 0, self.config.max_aspect_ratio or math.inf
        return (shorter_n >= least) & (longer_n <= ratio * np.maximum(shorter_n, 1))

    def check_size(self, width: int, height: int) -> None:
        """Raises Filtered by the size of the displayed image, in pixels."""
        if self.config.min_side is not None and min(width, height) < self.config.min_side:
            raise Filtered("min_side")
        ratio = self.config.max_aspect_ratio
        if ratio is not None and max(width, height) > ratio * min(width, height):
            raise Filtered("max_aspect_ratio")


def open_filters(config: FilterConfig, layout: Layout, name: str) -> Filters:
    """Raises DataError for invalid bounds, and for a score that the source's samples do not have."""
    filters = Filters(config, read_keys(config.keys), read_keys(config.not_keys) or frozenset())
    for number, _, _ in filters.bounds:
        if number not in layout.fields:
            raise DataError(
                f"source {name}: no JSON field is known for {number}, only for {', '.join(layout.fields) or 'none'}; "
                f"name it with fields={{{number}: FIELD}}, or leave the filter out"
            )
    for key, bound in (("min_side", config.min_side), ("max_aspect_ratio", config.max_aspect_ratio)):
        if bound is not None and layout is TOKENS:
            raise DataError(f"source {name}: {key} is for images, and these are tokens: leave it out")
        if bound is not None and not 1 <= bound < math.inf:
            raise DataError(f"source {name}: {key}={bound} must be at least 1, and finite")
    for number, bound, _ in filters.bounds:
        if not math.isfinite(bound):
            raise DataError(f"source {name}: the bound of {number}, {bound}, must be finite")
    return filters


@dataclass(frozen=True, eq=False)
class Source:
    """An open source. counts: samples of each shard, or None if they are unknown before everything is read.
    quarantined: numbers of shards that are left out. numbers: of each shard, the numbers of the samples that belong to
    the source, ascending; None: all. check_part: raises DataError for the width and height of a picture that does not
    belong to these numbers."""

    name: str
    weight: float
    shards: list[Shard]
    layout: Layout
    filters: Filters
    counts: list[int] | None
    quarantined: frozenset[int] = frozenset()
    numbers: list[np.ndarray] | None = None
    check_part: Callable[[int, int], None] | None = None

    @functools.cached_property
    def samples(self) -> int | None:
        """Number of samples including those in quarantine, or None."""
        return None if self.counts is None else sum(self.counts)

    @property
    def skipped_unread(self) -> list[Skipped]:
        """Pictures of folders and zip files in formats that are not read."""
        files = [shard for shard in self.shards if isinstance(shard, FileShard)]
        return [skipped for shard in files for skipped in shard.skipped_unread(self.name)]

    @property
    def not_read(self) -> str:
        """What its folder or zip file holds besides, in a line; empty if there is nothing, and for tars."""
        return self.shards[0].not_read() if isinstance(self.shards[0], FileShard) else ""

    def identity(self) -> dict:
        """What must be unchanged for a position in the source to mean the same sample."""
        names = [shard.name.rsplit("/", 1)[-1] for shard in self.shards]
        counts = self.counts if self.counts is None or len(names) <= MOST_SCANNED else digest(self.counts)
        contents: list | str | None = list(map(content_of, self.shards))
        if len(names) > MOST_SCANNED:
            contents = None if None in contents else digest(contents)
        identity = {"shards": len(names), "names": digest(names), "samples": self.samples, "counts": counts}
        return {**identity, "contents": contents}

    def tar_hash(self) -> str | None:
        """A hash of the content of its tars, by the sha256 of each in their index; None without an index."""
        tables = [shard.table if isinstance(shard, TarShard) else None for shard in self.shards]
        hashes = [None if table is None else table.sha256 for table in tables]
        return None if None in hashes else digest(hashes)

    def unknown_addresses(self) -> list[str]:
        """Those of tars whose samples are not known before they are read: nothing else tells which tars they are."""
        return [without_query(one.url) for one in self.shards if isinstance(one, TarShard) and one.table is None]

    def state(self) -> str:
        """A hash that changes with the content of its files or tars; the output of commands is not looked at. Raises
        DataError."""
        if isinstance(self.shards[0], FileShard):
            return digest(self.shards[0].states())
        tars = [shard for shard in self.shards if not shard.url.startswith(PIPE)]
        versions = in_threads(lambda tar: content_state(tar.url, tar.access.timeouts), tars, PROBING_THREADS)
        return digest(list(versions))

    def pick(self, sample: Sample) -> Picked:
        """Raises ImageError if the image is missing or a member is damaged, Filtered if a filter rejects the sample."""
        self._filter(sample)
        return pick(sample, self.layout)

    def check_size(self, width: int, height: int) -> None:
        """Raises Filtered by the size of the displayed image, in pixels; DataError where `check_part` does."""
        if self.check_part is not None:
            self.check_part(width, height)
        self.filters.check_size(width, height)

    def _filter(self, sample: Sample) -> None:
        filters = self.filters
        if sample.key in filters.not_keys:
            raise Filtered("not_keys")
        if filters.keys is not None and sample.key not in filters.keys:
            raise Filtered("keys")
        if not (bounds := filters.bounds):
            return
        metadata = metadata_of(sample)
        for name, bound, sign in bounds:
            value = metadata.get(self.layout.fields[name])
            number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
            if not sign * number >= sign * bound:  # written so that NaN does not pass
                raise Filtered(name)


def pick(sample: Sample, layout: Layout) -> Picked:
    """The parts of a sample that are used. Raises ImageError if the image is missing or a member is damaged, except the
    caption, without which pictures can be trained on and evaluated: see `Picked.whole`."""
    members, text, caption, unread = sample.members, None, None, None
    if layout.caption_field and "json" in members:
        field = metadata_of(sample).get(layout.caption_field)
        field = field[0] if isinstance(field, list) and field else field
        text = field.encode("utf-8", "surrogatepass") if isinstance(field, str) else None
    text = members.get(layout.caption) if text is None else text
    try:
        caption = None if text is None else text_of(text)
    except ImageError as error:
        unread = error
    return Picked(sample.image(layout.image), caption, label_of(members, layout), unread)


def label_of(members: dict[str, bytes], layout: Layout) -> int | None:
    """A sample's class; None if there is none, or if it is empty or -1, as data sets mark pictures without a class.
    Raises ImageError if it is not a number."""
    text = text_of(members.get(layout.label, b""), errors="replace").strip()
    if text in NO_CLASS:
        return None
    if not text.isdecimal() or len(text) > 18:
        raise ImageError(f"the class {text[:40]!r} is no number from 0", "bad class")
    return int(text)


def metadata_of(sample: Sample) -> dict:
    """The member `json`, or an empty dict. Raises ImageError if it is damaged."""
    return fields_of(sample.members.get("json", b"{}"))


# ---------------------------------------------------------------------------------------------------------- opening


def open_source(
    config: SourceConfig,
    access: Access | None = None,
    *,
    content: str = "images",
    allow_pipes: bool = False,
    quarantine: frozenset[str] = frozenset(),
    before: dict | None = None,
    scan_all: bool = False,
    classes: dict[str, int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Source:
    """Find a source's shards and their sizes, without reading any sample.

    content: `images` or `tokens`. quarantine: paths or URLs of shards, or their ends after a /. before: the identity of
    the source when the run began, to keep dividing it by samples or by shards as before. scan_all: scan all tars
    without an index that are local or can be copied into the cache, however many there are. classes: the number of each
    class folder, where these are the classes; default: in sorted order. progress: called with
    (tars scanned, tars in total).
    Raises DataError.
    """
    if not (isinstance(config.weight, (int, float)) and 0 < config.weight < math.inf):
        raise DataError(f"source {config.name}: weight={config.weight} must be positive and finite")
    layout = layout_of(config) if content == "images" else TOKENS
    options = {"layout": layout, "classes": classes, "allow_pipes": allow_pipes, "quarantine": quarantine}
    access = access or Access()
    shards = open_shards(config, access, **options)
    if layout.label == "folder":
        layout = layout._replace(label="cls")
    quarantined = frozenset(n for n, shard in enumerate(shards) if is_among(shard.url, quarantine))
    if len(quarantined) == len(shards):
        raise DataError(f"source {config.name}: every shard is in quarantine")
    unknown = [n for n, shard in enumerate(shards) if isinstance(shard, TarShard) and shard.table is None]
    local = [n for n in unknown if not shards[n].is_streamed]
    # A run asks for more, and for indexed ones, in one process: see `data.loader.check_remote_data`.
    asked = range(len(shards)) if scan_all else unknown if len(unknown) <= MOST_SCANNED else []
    check_remote([shards[n].url for n in asked if n not in quarantined], access)
    by_shard = before is not None and before["counts"] is None
    if not by_shard and (scan_all or len(local) <= MOST_SCANNED):
        copied = [n for n in unknown if scan_all and shards[n].access.is_copied(shards[n].url)]
        to_scan = [shards[n] for n in local + copied if n not in quarantined]
        tables = in_threads(TarShard.scan, to_scan, threads=8)
        for done, (shard, table) in enumerate(zip(to_scan, tables, strict=True), start=1):
            shard.table = table
            progress(done, len(to_scan))
    counts = None if by_shard else _counts(shards, quarantined, before)
    filters = open_filters(config.filters, layout, config.name)
    check_not_keys(config.name, config.filters.not_keys, filters.not_keys, shards)
    return Source(config.name, config.weight, shards, layout, filters, counts, quarantined)


def check_remote(
    urls: list[str], access: Access, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Raises DataError that names all of the tars that would have to be fetched and cannot be. progress: called with
    (tars asked for, tars to ask for)."""
    remote = [url for url in urls if is_remote(url)]
    held = access.cache.held(remote) if access.cache else {}
    if fetched := [url for url in remote if url not in held]:
        check_available(fetched, access.timeouts, progress)


def content_of(shard: Shard) -> str | None:
    """A hash of what is known of a shard's samples: their keys, and in a tar their places; None if nothing is known."""
    if not isinstance(shard, TarShard):
        return digest([str(path) for path in getattr(shard, "images", None) or shard.names])
    if shard.table is None:
        return None
    table = shard.table
    return digest([table.bytes, *(array.tobytes() for array in (table.starts_n, table.stops_n, table.keys_n))])


def _counts(shards: list[Shard], quarantined: frozenset[int], before: dict | None) -> list[int] | None:
    """A shard in quarantine whose size is unknown counts as it did before, or as empty."""
    counts = []
    for number, shard in enumerate(shards):
        if not isinstance(shard, TarShard) or shard.table is not None:
            counts.append(len(shard))
        elif number not in quarantined:
            return None
        else:
            known = before is not None and isinstance(before["counts"], list) and len(before["counts"]) == len(shards)
            counts.append(before["counts"][number] if known else 0)
    return counts


def digest(values: list) -> str:
    """A hash of the list, 16 digits."""
    return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()


def is_among(url: str, quarantine: frozenset[str]) -> bool:
    """Whether the quarantine list contains a shard."""
    url = without_query(url)
    return any(url == part or url.endswith(f"/{part.lstrip('/')}") for part in quarantine)


def open_shards(
    config: SourceConfig,
    access: Access,
    *,
    layout: Layout = TOKENS,
    classes: dict[str, int] | None = None,
    allow_pipes: bool = False,
    quarantine: frozenset[str] = frozenset(),
) -> list[Shard]:
    """The shards of a root: a folder of images or a zip file as one shard, or the tars with their tables if indexed."""
    root = config.root
    if is_files(root):
        return [file_shard(str(root), layout.label == "folder", classes)]
    urls = expand(root, allow_pipes=allow_pipes, timeouts=access.timeouts)
    check_different(urls)
    shards = [TarShard(url, access=access, suffixes=layout.suffixes) for url in urls]
    shared = common_root([url for url in urls if not url.startswith(PIPE)]) if urls else ""
    index = _index(config, shared)
    if index is not None:
        for shard in shards:
            shard.table = index.table(shard.url, shared, layout.image)
        unknown = [shard for shard in shards if shard.table is None and not is_among(shard.url, quarantine)]
        if unknown:
            raise DataError(
                f"the index {index.path} lacks {len(unknown)} of {len(shards)} shards, first {unknown[0].name}: write "
                f"it again with `ibq shards check --write-index --index {index.path}`"
            )
        whole_folder = isinstance(root, (str, os.PathLike)) and os.path.isdir(root)
        if whole_folder and (gone := _gone(index, shards, shared, quarantine)):
            more = f" and {len(gone) - 1:,} more" if len(gone) > 1 else ""
            raise DataError(
                f"the index {index.path} names {gone[0]}{more}, which {root} does not hold: copy what is missing "
                f"there, or write the index again with `ibq shards check {root} --write-index`"
            )
        if empty := next((shard for shard in shards if shard.table is not None and not len(shard)), None):
            raise DataError(f"the shard {empty.name} holds no sample by its index: leave it out")
    return shards


def _gone(index: Index, shards: list[TarShard], root: str, quarantine: frozenset[str]) -> list[str]:
    """The names in the index of tars that are not among the shards and not in quarantine."""
    there = {index.find(shard.url, root) for shard in shards} - {None}
    folders = {os.path.dirname(index.names[number]) for number in there}  # an index may be of several
    rest = [name for number, name in enumerate(index.names) if number not in there]
    return [name for name in rest if os.path.dirname(name) in folders and not is_among(name, quarantine)]


def classes_of(
    configs: list[SourceConfig],
    given: str | None,
    *,
    content: str = "images",
    allow_pipes: bool = False,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
) -> dict[str, int] | None:
    """The number of each class, from the classes.json beside tars, the class folders and the file `given`; None if
    nothing tells it. Raises DataError if they disagree."""
    classes = None if given is None else read_classes(given, timeouts)
    parts = [] if classes is None else [(redacted(given), classes)]
    for config in configs:
        if is_files(config.root):
            if content == "images" and layout_of(config).label == "folder":
                parts.append((str(config.root), file_shard(str(config.root), True, classes).classes))
        else:
            urls = expand(config.root, allow_pipes=allow_pipes, timeouts=timeouts)
            parts += classes_beside(urls, timeouts)
    return merged_classes(parts)


def _index(config: SourceConfig, root: str) -> Index | None:
    if config.index is not None:
        return Index(config.index)
    beside = Path(root) / INDEX_NAME
    return Index(beside) if root and not is_remote(root) and beside.is_file() else None


def check_weights(configs: list[SourceConfig]) -> None:
    """Raises DataError unless the sources have different, valid names."""
    names = [config.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"two sources are called {name}: give each its own name")
        if "/" in name or not name:
            raise DataError(f"the source name {name!r} must not be empty or hold a /")
    total = sum(config.weight for config in configs)
    for config in configs:
        if not math.isfinite(total) or 0 < config.weight < total * SMALLEST_SHARE:  # others are refused elsewhere
            raise DataError(
                f"source {config.name}: of weight={config.weight:g} and {total:g} in total no sample is ever read: use "
                "weights of similar size"
            )


def describe(source: Source) -> str:
    """One line: the source's size."""
    samples = source.samples
    count = (
        f"{samples:,} sample{'s' * (samples != 1)}" if samples is not None else "not counted, since there is no index"
    )
    more = f", {len(source.quarantined)} in quarantine" if source.quarantined else ""
    shards = f"{len(source.shards):,} shard{'s' * (len(source.shards) != 1)}"
    return f"{source.name}: {shards}, {count}{more}"
