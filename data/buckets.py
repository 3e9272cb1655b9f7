"""Buckets: the sizes that pictures of different shapes are trained at.

Every picture belongs to one bucket, by its size alone. The sizes of all pictures are known before training (from an
index, or from the headers of the files), so each bucket of a source is read like a source by itself: in its own order,
each of its samples once per epoch. A step trains on one bucket. Which one is arithmetic, too, so it depends on neither
the number of processes nor on what has been read.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from data.config import DataConfig
from data.errors import DataError, ImageError
from data.folder_reader import FileShard
from data.parallel import cores, in_threads
from data.samples import Shard
from data.sources import Source
from data.tar_reader import TarShard
from data.transforms import Size, as_size, image_header

MOST_BUCKETS = 64
MOST_SIDE = 8192
PARTS = 8  # of a side
MOST_UNEQUAL = 1.5  # factor between the pixels in a step of a bucket and of the smallest one
KEEPS_NEARLY = 0.9  # of what the bucket keeps that keeps most
ONE_RESOLUTION = 1.5  # factor between areas that count as equal


@dataclass(frozen=True)
class Bucket:
    """size: of its images. batch: images in a global step."""

    size: Size
    batch: int

    @property
    def name(self) -> str:
        return str(self.size)


def bucket_sizes(config: DataConfig) -> list[Size]:
    """The sizes that a `data` section names, or that follow from `data.pixels`; empty if it has no buckets. Raises
    DataError."""
    if config.buckets and config.pixels:
        raise DataError("data.buckets and data.pixels are both given: leave one out")
    if config.pixels:
        sizes = [size for side in config.pixels for size in sizes_of(side, config.max_aspect)]
    else:
        sizes = [_parsed(text) for text in config.buckets]
    sizes = sorted(set(sizes), key=lambda size: (size.pixels, size))
    if len(sizes) > MOST_BUCKETS:
        raise DataError(f"{len(sizes)} buckets are more than {MOST_BUCKETS}: lower data.max_aspect, or give a list")
    if sizes and config.content == "tokens":
        raise DataError("data.buckets is for images: token shards have the grid that `ibq tokenize` gave them")
    if any(size.height != size.width for size in sizes) and config.resize == "adm_center_crop":
        raise DataError("data.resize=adm_center_crop is defined for squares only: use pil_antialias with data.buckets")
    return sizes


def image_sizes(config: DataConfig) -> list[Size]:
    """The sizes of training images, by ascending area: those of the buckets, or a square of `image_size`. Raises
    DataError."""
    return bucket_sizes(config) or [as_size(config.image_size)]


def parse_size(text: str) -> Size | None:
    """HEIGHTxWIDTH in pixels; None for anything else."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(text))
    size = Size(*map(int, match.groups())) if match else Size(0, 0)
    return size if 1 <= min(size) <= max(size) <= MOST_SIDE else None


def _parsed(text: str) -> Size:
    if (size := parse_size(text)) is None:
        raise DataError(f"data.buckets: {text!r} must be HEIGHTxWIDTH in pixels, 1 to {MOST_SIDE}, such as 384x640")
    return size


def sizes_of(side: int, max_aspect: float) -> list[Size]:
    """The sizes with about side x side pixels and sides that are multiples of side / 8, from 1:max_aspect to
    max_aspect:1. All resolutions so have the same shapes. Raises DataError."""
    if side % PARTS or not PARTS <= side <= MOST_SIDE:
        raise DataError(f"data.pixels: {side} must be a multiple of {PARTS} of at most {MOST_SIDE}")
    nearest: dict[int, tuple[int, int]] = {}  # height -> of the widths with that height, the one nearest in area
    for width in range(1, PARTS**2 + 1):
        height = round(PARTS**2 / width)
        if height and 1 / max_aspect <= height / width <= max_aspect:
            nearest[height] = min(nearest.get(height, (height, width)), (height, width), key=_area_error)
    return [Size(height * side // PARTS, width * side // PARTS) for height, width in nearest.values()]


def _area_error(shape: tuple[int, int]) -> int:
    return abs(shape[0] * shape[1] - PARTS**2)


def with_batches(sizes: list[Size], global_batch_size: int) -> list[Bucket]:
    """The buckets and their batches: that of the smallest one is `global_batch_size`; the others have about as many
    pixels in a step. Each batch divides the global batch size, so that lanes and processes that divide it in a run of
    one size can divide all of them."""
    divisors = [number for number in range(1, global_batch_size + 1) if global_batch_size % number == 0]
    buckets = []
    for size in sizes:
        wanted = global_batch_size * sizes[0].pixels / size.pixels
        buckets.append(Bucket(size, min(divisors, key=lambda number: abs(math.log(number / wanted)))))
    return buckets


def check_batches(sizes: list[Size], global_batch_size: int, world_size: int, micro_batches: int) -> None:
    """Raises DataError where the images of a bucket cannot be divided among the processes and micro-batches, or where
    its steps would have much more or fewer pixels than those of the others."""
    pixels = sizes[0].pixels * global_batch_size
    for bucket in with_batches(sizes, global_batch_size):
        if not 1 / MOST_UNEQUAL <= bucket.batch * bucket.size.pixels / pixels <= MOST_UNEQUAL:
            raise DataError(
                f"bucket {bucket.name}: no divisor of trainer.global_batch_size={global_batch_size} gives its steps "
                f"about as many pixels as {global_batch_size} images of {sizes[0]}: set the batch size to a larger "
                "power of 2, or leave the bucket out"
            )
        if bucket.batch % (world_size * micro_batches):
            raise DataError(
                f"bucket {bucket.name} has {bucket.batch} images a step, which {world_size} processes x "
                f"{micro_batches} micro-batches do not divide: raise trainer.global_batch_size={global_batch_size}, or "
                "leave out large buckets"
            )


def bucket_of(sizes: Sequence[Size], sizes_n2: np.ndarray, enlargement: float) -> tuple[np.ndarray, np.ndarray]:
    """The bucket of each picture, and whether the picture is large enough for it.

    sizes_n2: height and width of each picture as it is displayed.

    - Only buckets that the picture covers count; it may be enlarged by at most `enlargement`.
    - Of these, only those that keep nearly as much of the picture's area as the best one (KEEPS_NEARLY).
    - Of these, only those with the most pixels; areas within ONE_RESOLUTION are equal.
    - Of these, the one that keeps most of the picture; the first in the list if several do.

    A picture that covers no bucket belongs to the one that would keep most of it.
    """
    if not len(sizes_n2):
        return np.zeros(0, int), np.zeros(0, bool)
    height_nk, width_nk = (np.maximum(sizes_n2[:, side, None], 1).astype(float) for side in (0, 1))
    height_k, width_k = np.array(sizes, float).T
    covers_nk = np.maximum(height_k / height_nk, width_k / width_nk) <= enlargement
    ratio_nk = width_nk / height_nk * height_k / width_k
    kept_nk = np.minimum(ratio_nk, 1 / ratio_nk)  # of the picture's area by the crop of the bucket's shape
    fits_n = covers_nk.any(axis=1)
    allowed_nk = covers_nk | ~fits_n[:, None]
    best_n1 = np.where(allowed_nk, kept_nk, 0).max(axis=1, keepdims=True)
    allowed_nk &= kept_nk >= KEEPS_NEARLY * best_n1
    pixels_nk = np.where(allowed_nk, height_k * width_k, 0)
    allowed_nk &= (ONE_RESOLUTION * pixels_nk >= pixels_nk.max(axis=1, keepdims=True)) | ~fits_n[:, None]
    return np.where(allowed_nk, kept_nk, 0).argmax(axis=1), fits_n


# -------------------------------------------------------------------------------------------------- sizes of a source


def sizes_of_source(
    source: Source, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[np.ndarray]:
    """Height and width of each sample of each shard, int32 (samples, 2), 0 where its header cannot be read: from the
    index, else from the headers of the images, of which as many are read at once as there are cores.

    progress: called with (headers read, headers to read). Raises DataError for tars that would have to be downloaded.
    """
    known = [_known_sizes(source, number) for number in range(len(source.shards))]
    unknown = [number for number, sizes_n2 in enumerate(known) if sizes_n2 is None]
    if remote := [source.shards[number] for number in unknown if source.shards[number].is_streamed]:
        raise DataError(
            f"source {source.name}: buckets need the size of every image, which {len(remote)} of {len(source.shards)} "
            f"remote shards do not tell, first {remote[0].name}: write an index with `ibq shards check --write-index`"
        )
    todo = [(number, sample) for number in unknown for sample in range(len(source.shards[number]))]
    for number in unknown:
        known[number] = np.zeros((len(source.shards[number]), 2), np.int32)
    read = in_threads(lambda one: _size_of(source, *one), todo, cores())
    for done, ((number, sample), size) in enumerate(zip(todo, read, strict=True), start=1):
        known[number][sample] = size
        if done % 1000 == 0 or done == len(todo):
            progress(done, len(todo))
    return known


def _known_sizes(source: Source, number: int) -> np.ndarray | None:
    shard = source.shards[number]
    if isinstance(shard, TarShard) and shard.table is not None:
        return shard.table.sizes_n2
    # In quarantine, so nothing is known of it and nothing is read.
    return np.zeros((source.counts[number], 2), np.int32) if number in source.quarantined else None


def _size_of(source: Source, number: int, sample: int) -> tuple[int, int]:
    shard: Shard = source.shards[number]
    try:
        if isinstance(shard, FileShard):
            header = shard.header(sample)
        else:
            header = image_header(shard.read(sample).image(source.layout.image))
        return header.height, header.width
    except ImageError:
        return 0, 0  # training will meet it again, and say why it is left out


@dataclass(frozen=True)
class Contents:
    """What a bucket holds. sources: the parts of the sources that belong to it; their weights are their shares of all
    images. pictures: those that pass the filters by size. share: of all images that training reads."""

    bucket: Bucket
    sources: list[Source]
    pictures: int
    share: float


class Division(NamedTuple):
    """How samples are divided. contents: of each bucket. too_small: name of a source -> its pictures that are left out,
    because they would have to be enlarged by more than `data.max_enlargement`."""

    contents: list[Contents]
    too_small: dict[str, int]

    @property
    def names(self) -> list[str]:
        """The buckets that have pictures."""
        return [one.bucket.name for one in self.contents if one.pictures]

    def describe(self) -> list[str]:
        """Lines: what is in each bucket, and what is in none."""
        lines = [
            f"bucket {one.bucket.name}: {one.pictures:,} pictures, {one.share:.1%} of all, {one.bucket.batch} in a step"
            + (", fewer than one step takes" if one.pictures < one.bucket.batch else "")
            for one in self.contents
        ]
        return lines + [
            f"{name}: {count:,} pictures are smaller than their bucket and left out (data.max_enlargement)"
            for name, count in self.too_small.items()
            if count
        ]


def divide(
    sources: list[Source],
    buckets: list[Bucket],
    enlargement: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Division:
    """Which samples each bucket has, and how often it comes.

    Over all buckets, each source has the share of its weight, and each of its samples that pass the filters by size
    comes equally often. Filters by score are not known before a sample is read, and count as passed.
    progress: as of `sizes_of_source`. Raises DataError.
    """
    sizes, total = [bucket.size for bucket in buckets], sum(source.weight for source in sources)
    parts: list[list[Source]] = [[] for _ in buckets]
    share_k, pictures_k, too_small = np.zeros(len(buckets)), np.zeros(len(buckets), int), {}
    for source in sources:
        if source.counts is None:
            raise DataError(
                f"source {source.name}: buckets need the size of every image: write an index with `ibq shards check "
                "PATH --write-index --index FILE`"
            )
        bucket_n, fits_n, passes_n, unknown_n = _placed(source, sizes, enlargement, progress)
        passing_k = np.bincount(bucket_n[fits_n & passes_n], minlength=len(buckets))
        if not passing_k.any():
            raise DataError(
                f"source {source.name}: none of its {len(bucket_n):,} pictures covers a bucket ({_named(sizes)}): give "
                f"smaller ones, or raise data.max_enlargement={enlargement:g}"
            )
        too_small[source.name] = int((~fits_n & ~unknown_n).sum())
        bucket_n[unknown_n] = passing_k.argmax()  # a bucket that comes, so that they are met and listed
        borders = np.cumsum(source.counts)[:-1]
        for k, passing in enumerate(passing_k.tolist()):
            if passing:
                chosen = np.split((bucket_n == k) & (fits_n | unknown_n), borders)
                numbers = [np.flatnonzero(some) for some in chosen]
                weight = source.weight / total * passing / passing_k.sum()
                counts = [len(some) for some in numbers]
                parts[k].append(replace(source, weight=weight, counts=counts, numbers=numbers))
                share_k[k], pictures_k[k] = share_k[k] + weight, pictures_k[k] + passing
    contents = map(Contents, buckets, parts, pictures_k.tolist(), share_k.tolist())
    return Division(list(contents), too_small)


def _placed(source: Source, sizes: list[Size], enlargement: float, progress) -> tuple[np.ndarray, ...]:
    """Of each sample of a source: its bucket, whether it is large enough, whether it passes the filters by size, and
    whether its size is unknown."""
    sizes_n2 = np.concatenate(sizes_of_source(source, progress))
    bucket_n, fits_n = bucket_of(sizes, sizes_n2, enlargement)
    shorter_n, longer_n = sizes_n2.min(axis=1), sizes_n2.max(axis=1)
    limits, passes_n = source.filters.config, np.ones(len(sizes_n2), bool)
    if limits.min_side is not None:
        passes_n &= shorter_n >= limits.min_side
    if limits.max_aspect_ratio is not None:
        passes_n &= longer_n <= limits.max_aspect_ratio * shorter_n
    return bucket_n, fits_n, passes_n, shorter_n == 0


def _named(sizes: list[Size]) -> str:
    return ", ".join(map(str, sizes[:8])) + (", …" if len(sizes) > 8 else "")
