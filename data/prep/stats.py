"""Statistics of a data set: sizes and shapes of its images, captions, classes and scores."""

import bisect
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np

from data.buckets import bucket_of, by_area, sizes_of
from data.config import DataConfig
from data.errors import DataError, ImageError
from data.parallel import in_processes
from data.samples import CODES, Sample, Shard, WindowLimit
from data.sources import TOKENS, Source, metadata_of
from data.tokens import TokenHeader, unpack_codes
from data.transforms import Size, decode, image_header

MOST = 1e300  # of a score; JSON allows integers that are too large for a float
# Lower borders of the histograms' bins.
SIDES = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)  # pixels
LENGTHS = (10, 20, 40, 80, 160, 320, 640)  # characters
CLASS_SIZES = (2, 10, 100, 500, 1000, 1500, 10_000, 100_000)  # images
# Width : height; a sample counts for the nearest.
SHAPES = ((1, 2), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (2, 1))
# Geometric means of neighbouring shapes, so that a picture and its rotation by 90 degrees are treated alike.
SHAPE_BORDERS = [math.sqrt(a / b * c / d) for (a, b), (c, d) in itertools.pairwise(SHAPES)]

SIZE_STEP = 16  # pixels: sides of proposed buckets are multiples of it
PROPOSED_PIXELS = (1024, 512, 256, 128)
PROPOSED_COVER = 0.9  # of the images

SELECTION_SAMPLES = 2000  # that a process counts at once
WINDOW = WindowLimit(64, 16 << 20)  # fetched at once from a remote tar
NAMED_UNUSABLE = 20


class Histogram(NamedTuple):
    """name: for JSON; title: what is counted, with its unit and range; bins: label -> count."""

    name: str
    title: str
    bins: dict[str, int]


@dataclass
class Score:
    """A number in the samples' json: how many samples have it, lack it, or have a value that is not a number."""

    numbers: int = 0
    missing: int = 0
    not_numeric: int = 0
    total: float = 0.0
    least: float = math.inf
    most: float = -math.inf

    def count(self, value: Any) -> None:
        if value is None:
            self.missing += 1
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not -MOST < value < MOST:
            self.not_numeric += 1
        else:
            self.numbers += 1
            self.total += value
            self.least, self.most = min(self.least, value), max(self.most, value)

    def add(self, other: "Score") -> None:
        for name in ("numbers", "missing", "not_numeric", "total"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)

    def record(self) -> dict:
        """For JSON. min, mean and max are None if there are no numbers."""
        least, mean, most = (self.least, self.total / self.numbers, self.most) if self.numbers else (None, None, None)
        counts = {"numbers": self.numbers, "missing": self.missing, "not_numeric": self.not_numeric}
        return {**counts, "min": least, "mean": mean, "max": most}


@dataclass
class Counted:
    """Statistics of samples.

    bytes: of all members. formats: JPEG, PNG, WEBP -> images. sides: pixels of the shorter side -> images. shapes:
    index in SHAPES -> images. sizes: (height, width), rounded down to SIZE_STEP -> images. tokens: header of the codes
    -> samples. lengths: characters of the caption -> samples. classes: class -> samples. scores: a filter's score ->
    Score. unusable_samples: those that training would skip; unusable: the first of them with reasons.
    """

    samples: int = 0
    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    tokens: Counter[TokenHeader] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)
    shapes: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    missing_captions: int = 0
    classes: Counter[int] = field(default_factory=Counter)
    missing_classes: int = 0
    scores: dict[str, Score] = field(default_factory=dict)
    unusable_samples: int = 0
    unusable: list[str] = field(default_factory=list)

    def add(self, other: "Counted") -> None:
        for name, score in other.scores.items():
            self.scores.setdefault(name, Score()).add(score)
        self.unusable = (self.unusable + other.unusable)[:NAMED_UNUSABLE]
        for one in fields(self):
            if one.name not in ("scores", "unusable"):
                setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))

    def histograms(self) -> list[Histogram]:
        """The histograms that are not empty."""
        names = [f"{width}:{height}" for width, height in SHAPES]
        names[0], names[-1] = f"{names[0]} or taller", f"{names[-1]} or wider"
        shapes = {name: self.shapes[number] for number, name in enumerate(names)}
        sizes = Counter(self.classes.values())
        histograms = [
            Histogram("shorter_side", f"shorter side, pixels{_in_words(self.sides)}", _bins(self.sides, SIDES)),
            Histogram("shape", "shape, width : height, the nearest", _trimmed(shapes)),
            *self._proposed_buckets(),
            *self._grids(),
            Histogram("captions", f"captions, characters{_in_words(self.lengths)}", _bins(self.lengths, LENGTHS)),
            Histogram("classes", f"classes by number of images{_in_words(sizes)}", _bins(sizes, CLASS_SIZES)),
        ]
        return [histogram for histogram in histograms if histogram.bins]

    def _proposed_buckets(self) -> list[Histogram]:
        """The buckets of the highest resolution that nearly all images cover (PROPOSED_COVER), if there is one and the
        images have several shapes."""
        if not self.sizes:
            return []
        sizes_n2, count_n = np.array(list(self.sizes)), np.array(list(self.sizes.values()))
        for side in PROPOSED_PIXELS:
            buckets = sizes_of(side, DataConfig.max_aspect)
            bucket_n, fits_n = bucket_of(buckets, sizes_n2, 1.0)
            if (share := count_n[fits_n].sum() / count_n.sum()) >= PROPOSED_COVER:
                count_k = np.bincount(bucket_n[fits_n], count_n[fits_n], len(buckets)).astype(int)
                bins = {str(size): count for size, count in zip(buckets, count_k.tolist(), strict=True) if count}
                title = f"buckets of data.pixels=[{side}], which {share:.0%} of the images cover, height x width"
                return [Histogram("buckets", title, bins)] if len(bins) > 1 else []
        return []

    def _grids(self) -> list[Histogram]:
        """The grids of token samples, if there are several."""
        bins = Counter()
        for header, samples in self.tokens.items():
            bins[Size(*header.grid)] += samples
        named = {str(size): bins[size] for size in by_area(bins)}
        title = f"grids of codes, rows x columns: model.grids=[{','.join(named)}]"
        return [Histogram("grids", title, named)] if len(named) > 1 else []

    def record(self) -> dict:
        """For JSON. A distribution is given as min, median and max, or None if it is empty."""

        def spread_of(values: Counter[int]) -> dict[str, int] | None:
            return found._asdict() if (found := spread(values)) else None

        return {
            "samples": self.samples,
            "bytes": self.bytes,
            "mean_sample_bytes": self.bytes / self.samples if self.samples else None,
            "unusable": self.unusable_samples,
            "unusable_first": self.unusable,
            "formats": dict(self.formats.most_common()),
            "tokens": [{**header._asdict(), "samples": samples} for header, samples in self.tokens.most_common()],
            "shorter_side": spread_of(self.sides),
            "captions": {"missing": self.missing_captions, "characters": spread_of(self.lengths)},
            "classes": {
                "count": len(self.classes),
                "missing": self.missing_classes,
                "images": spread_of(Counter(self.classes.values())),
            },
            "scores": {name: score.record() for name, score in self.scores.items()},
            "histograms": {histogram.name: histogram.bins for histogram in self.histograms()},
        }


class Spread(NamedTuple):
    min: int
    median: int
    max: int


def spread(values: Counter[int]) -> Spread | None:
    """The spread of value -> count; None if it is empty."""
    if not values:
        return None
    ordered = sorted(values)
    stops = list(itertools.accumulate(values[value] for value in ordered))
    return Spread(ordered[0], ordered[bisect.bisect_left(stops, stops[-1] / 2)], ordered[-1])


def _in_words(values: Counter[int]) -> str:
    found = spread(values)
    return f": {found.min:,} to {found.max:,}, median {found.median:,}" if found else ""


def _bins(values: Counter[int], borders: tuple[int, ...]) -> dict[str, int]:
    counts = [0] * (len(borders) + 1)
    for value, count in values.items():
        counts[bisect.bisect_right(borders, value)] += count
    between = [
        f"{low:,} to {high - 1:,}" if low < high - 1 else f"{low:,}" for low, high in itertools.pairwise(borders)
    ]
    labels = [f"below {borders[0]:,}", *between, f"{borders[-1]:,} or more"]
    return _trimmed(dict(zip(labels, counts, strict=True)))


def _trimmed(bins: dict[str, int]) -> dict[str, int]:
    """Without the empty bins at both ends."""
    filled = [number for number, count in enumerate(bins.values()) if count]
    return dict(list(bins.items())[filled[0] : filled[-1] + 1]) if filled else {}


# ------------------------------------------------------------------------------------------------------------ counting


class _Selection(NamedTuple):
    """Samples of a shard: those with these numbers, or (None) the first `most`, or (None) all."""

    shard: int
    numbers: np.ndarray | None
    most: int | None


def count(
    source: Source,
    most_samples: int | None = None,
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    decode_images: bool = False,
) -> Counted:
    """Count a source's samples in `jobs` processes. Only the headers of images are read, unless decode_images.

    most_samples: at most this many, spread evenly over the source; if the samples' positions are unknown, the first
    ones of evenly spread shards. progress: called with (parts done, parts in total).
    Raises DataError.
    """
    if most_samples is not None and most_samples < 1:
        raise DataError(f"{most_samples} samples are too few: count at least 1")
    selections, total = _selections(source, most_samples), Counted()
    count_one = functools.partial(_count_selection, source, decode_images)
    for done, counted in enumerate(in_processes(count_one, selections, jobs), start=1):
        total.add(counted)
        progress(done, len(selections))
    unread = source.skipped_unread
    total.unusable_samples += len(unread)
    named = [f"{skipped.key} in {skipped.source}: {skipped.reason}" for skipped in unread]
    total.unusable = (total.unusable + named)[:NAMED_UNUSABLE]
    return total


def _selections(source: Source, most_samples: int | None) -> list[_Selection]:
    if source.samples is None:
        shards = _spread_evenly(len(source.shards), most_samples)
        each = None if most_samples is None else math.ceil(most_samples / len(shards))
        return [_Selection(int(shard), None, each) for shard in shards]
    firsts = np.cumsum([0, *map(len, source.shards)])
    numbers = _spread_evenly(source.samples, most_samples)
    selections = []
    for shard, (start, stop) in enumerate(itertools.pairwise(np.searchsorted(numbers, firsts))):
        for begin in range(start, stop, SELECTION_SAMPLES):
            part = numbers[begin : min(begin + SELECTION_SAMPLES, stop)] - firsts[shard]
            selections.append(_Selection(shard, part, None))
    return selections


def _spread_evenly(count: int, most: int | None) -> np.ndarray:
    """`most` numbers of range(count), as far apart as possible."""
    most = min(count, most or count)
    return np.arange(most) * count // most


def _count_selection(source: Source, decode_images: bool, selection: _Selection) -> Counted:
    counted = Counted(scores={name: Score() for name in source.layout.fields})
    shard = source.shards[selection.shard]
    for sample in itertools.islice(_samples(shard, selection.numbers), selection.most):
        counted.samples += 1
        try:
            if isinstance(sample, ImageError):
                raise sample
            _count_sample(counted, source, sample, decode_images)
        except ImageError as error:
            counted.unusable_samples += 1
            if len(counted.unusable) < NAMED_UNUSABLE:
                key = sample.key  # of the sample, or of the error in its place
                counted.unusable.append(f"{key + ' in ' if key else ''}{shard.name}: {error}")
    return counted


def _samples(shard: Shard, numbers: np.ndarray | None) -> Iterator[Sample | ImageError]:
    """The samples with these numbers; None: all."""
    for window in shard.windows(0, None, WINDOW, numbers):
        for number in range(len(window)):
            try:
                yield window.read(number)
            except ImageError as error:
                yield error


def _count_sample(counted: Counted, source: Source, sample: Sample, decode_images: bool) -> None:
    counted.bytes += sum(map(len, sample.members.values()))
    if CODES in sample.members:
        picked = replace(source, layout=TOKENS).pick(sample).whole()
        header, _ = unpack_codes(picked.content)
        counted.tokens[header] += 1
    else:
        picked = source.pick(sample).whole()
        if decode_images:
            decode(picked.content)
        header = image_header(picked.content)
        counted.formats[header.format] += 1
        counted.sides[min(header.width, header.height)] += 1
        counted.sizes[tuple(side // SIZE_STEP * SIZE_STEP for side in (header.height, header.width))] += 1
        counted.shapes[bisect.bisect(SHAPE_BORDERS, header.width / header.height)] += 1
    scores = metadata_of(sample) if counted.scores else {}
    if caption := (picked.caption or "").strip():
        counted.lengths[len(caption)] += 1
    else:
        counted.missing_captions += 1
    if picked.label is not None:
        counted.classes[picked.label] += 1
    else:
        counted.missing_classes += 1
    for name, score in counted.scores.items():
        score.count(scores.get(source.layout.fields[name]))
