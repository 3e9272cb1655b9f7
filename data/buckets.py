"""Buckets: the sizes that pictures of different shapes are trained at.

Every picture belongs to one bucket, by its size alone. The sizes of all pictures are known before training (from an
index, or from the headers of the files), so each bucket of a source is read like a source by itself: in its own order,
each of its samples once per epoch. A step trains on one bucket. Which one is arithmetic, too, so it depends on neither
the number of processes nor on what has been read.

Token shards with several grids are read in the same way. A sample belongs to the bucket of exactly its grid; sizes are
rows and columns then.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.config import DataConfig
from data.errors import DataError, ImageError
from data.folder_reader import FileShard
from data.index import key_hashes
from data.parallel import cores, in_threads
from data.samples import CODES, Shard
from data.sources import MOST_SCANNED, TOKENS, Source, digest
from data.tar_reader import PIPE, TarShard
from data.tokens import TokenSpec, check_grids, check_tokens, first_header, grid_number, grid_of_codes
from data.transforms import Size, as_size, image_header

MOST_BUCKETS = 64
MOST_SIDE = 8192
PARTS = 8  # sides of made sizes are multiples of 1/8 of the given side
MOST_UNEQUAL = 1.5  # factor between the pixels in a step of a bucket and of the smallest one
KEEPS_NEARLY = 0.9  # a bucket competes if it keeps this part of what the best one keeps
ONE_RESOLUTION = 1.5  # factor between areas that count as equal


class Words(NamedTuple):
    """What messages call a bucket, its samples, and their area; and how to train without it."""

    one: str
    samples: str
    area: str
    without: str


OF_IMAGES = Words("bucket", "pictures", "pixels", "leave the bucket out")
# A grid that token shards hold cannot be left out of `model.grids`.
OF_TOKENS = Words("grid", "samples", "codes", "write token shards without it by `ibq tokenize --size`")


@dataclass(frozen=True)
class Bucket:
    """size: of its images in pixels, or rows and columns of their codes. batch: images in a global step."""

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
    sizes = by_area(sizes)
    if len(sizes) > MOST_BUCKETS:
        raise DataError(f"{len(sizes)} buckets are more than {MOST_BUCKETS}: lower data.max_aspect, or give a list")
    if sizes and config.content == "tokens":
        raise DataError(
            "data.buckets is for images: token shards have the grids that `ibq tokenize` gave them; name these in "
            "model.grids"
        )
    if any(size.height != size.width for size in sizes) and config.resize == "adm_center_crop":
        raise DataError("data.resize=adm_center_crop is defined for squares only: use pil_antialias with data.buckets")
    return sizes


def image_sizes(config: DataConfig) -> list[Size]:
    """The sizes of training images, by ascending area: those of the buckets, or a square of `image_size`. Raises
    DataError."""
    return bucket_sizes(config) or [as_size(config.image_size)]


def by_area(sizes: Iterable[Size]) -> list[Size]:
    """Each size once, by ascending area."""
    return sorted(set(sizes), key=lambda size: (size.pixels, size))


def grid_sizes(grids: Iterable[tuple[int, int]]) -> list[Size]:
    """Grids of codes, by ascending number of codes, each once. Raises DataError."""
    sizes = by_area(Size(*grid) for grid in grids)
    if len(sizes) > MOST_BUCKETS:
        raise DataError(f"{len(sizes)} model.grids are more than {MOST_BUCKETS}: leave some out")
    return sizes


def parse_size(text: str) -> Size | None:
    """HEIGHTxWIDTH in pixels; None for anything else."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(text))
    size = Size(*map(int, match.groups())) if match else Size(0, 0)
    return size if 1 <= min(size) <= max(size) <= MOST_SIDE else None


def _parsed(text: str) -> Size:
    if (size := parse_size(text)) is None:
        raise DataError(f"data.buckets: {text!r} must be HEIGHTxWIDTH in pixels, 1 to {MOST_SIDE}, such as 384x640")
    return size


def sizes_of(side: int, max_aspect: float, name: str = "data.pixels") -> list[Size]:
    """The sizes with about side x side pixels and sides that are multiples of side / 8, from 1:max_aspect to
    max_aspect:1. All resolutions so have the same shapes. name: what messages call the side. Raises DataError."""
    if side % PARTS or not PARTS <= side <= MOST_SIDE:
        raise DataError(f"{name}: {side} must be a multiple of {PARTS} of at most {MOST_SIDE}")
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
    pixels in a step. Each batch is a divisor of the global batch size."""
    divisors = [number for number in range(1, global_batch_size + 1) if global_batch_size % number == 0]
    buckets = []
    for size in sizes:
        wanted = global_batch_size * sizes[0].pixels / size.pixels
        buckets.append(Bucket(size, min(divisors, key=lambda number: abs(math.log(number / wanted)))))
    return buckets


def check_batches(
    sizes: list[Size], global_batch_size: int, world_size: int, micro_batches: int, words: Words = OF_IMAGES
) -> None:
    """Raises DataError where the images of a bucket cannot be divided among the processes and micro-batches, or where
    its step has more than MOST_UNEQUAL times or less than 1 / MOST_UNEQUAL of the pixels of the smallest bucket's."""
    pixels = sizes[0].pixels * global_batch_size
    for bucket in with_batches(sizes, global_batch_size):
        if not 1 / MOST_UNEQUAL <= bucket.batch * bucket.size.pixels / pixels <= MOST_UNEQUAL:
            raise DataError(
                f"{words.one} {bucket.name}: no divisor of trainer.global_batch_size={global_batch_size} gives its "
                f"steps about the {words.area} of {global_batch_size} x {sizes[0]}: set the batch size to a larger "
                f"power of 2, or {words.without}"
            )
        if bucket.batch % (world_size * micro_batches):
            raise DataError(
                f"{words.one} {bucket.name} has {bucket.batch} images a step, which {world_size} processes x "
                f"{micro_batches} micro-batches do not divide: raise trainer.global_batch_size={global_batch_size}, or "
                f"{words.without}"
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


@functools.lru_cache(maxsize=1 << 14)  # many pictures have the same size, and a call takes a tenth of a millisecond
def _bucket_of_one(sizes: tuple[Size, ...], height: int, width: int, enlargement: float) -> tuple[int, bool]:
    """`bucket_of` for one picture."""
    (number,), (fits,) = bucket_of(sizes, np.array([[height, width]]), enlargement)
    return int(number), bool(fits)


def check_bucket(sizes: Sequence[Size], bucket: int, enlargement: float, width: int, height: int) -> None:
    """Raises DataError for a picture of this width and height that does not belong to that bucket, by `bucket_of`. A
    wrong size put it there, so other pictures may be missing from this bucket, or be in it wrongly, without a trace."""
    number, fits = _bucket_of_one(tuple(sizes), height, width, enlargement)
    if not fits or number != bucket:
        place = f"belongs to bucket {sizes[number]}" if fits else "is too small for any bucket"
        raise DataError(
            f"its picture has {height} x {width} pixels and {place}, but is read in {sizes[bucket]}: it differs from "
            "its index, or was replaced after the start: write the index again with `ibq shards check --write-index` "
            "(and --image, if the source names its `image`), or start again"
        )


def bucket_for(sizes: Sequence[Size], image: Image.Image, enlargement: float) -> Size:
    """The bucket of an image, by `bucket_of`. Raises ImageError for an image that is too small for it."""
    number, fits = _bucket_of_one(tuple(sizes), image.height, image.width, enlargement)
    if not fits:
        raise ImageError(f"{image.height} x {image.width} pixels are smaller than its size {sizes[number]}")
    return sizes[number]


# -------------------------------------------------------------------------------------------------- sizes of a source


def sizes_of_source(
    source: Source, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[np.ndarray | None]:
    """Height and width of each sample of each shard, int32 (samples, 2), 0 where its header is damaged; None for a
    shard in quarantine of which nothing is known. They come from the index, else from the headers of the images. Those
    of token samples are rows and columns of their codes.

    progress: called with (headers read, headers to read). Raises DataError for tars that would have to be downloaded.
    """
    known = [known_sizes(shard) for shard in source.shards]
    unknown = [n for n, sizes_n2 in enumerate(known) if sizes_n2 is None and n not in source.quarantined]
    if streamed := [source.shards[number] for number in unknown if source.shards[number].is_streamed]:
        named = "" if source.layout is TOKENS else "".join(f" --image {suffix}" for suffix in source.layout.image)
        raise DataError(
            f"{_need(source)}, and {len(streamed)} of {len(source.shards)} remote shards have none in an index, first "
            f"{streamed[0].name}: write one with `ibq shards check --write-index{named}`"
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


def known_sizes(shard: Shard) -> np.ndarray | None:
    """Height and width of each sample, or rows and columns of its codes, by the index; None if it has none."""
    return shard.table.sizes_n2 if isinstance(shard, TarShard) and shard.table is not None else None


def check_token_shards(shards: Sequence[Shard], spec: TokenSpec, name: str) -> None:
    """Raises DataError unless the first sample, and the grids of all samples that an index knows, are what the reader
    expects. name: what messages call the source."""
    header = first_header(shards, name)
    if header.vocabulary == spec.vocabulary and spec.tokenizer in (None, header.tokenizer):
        known = [sizes_n2 for sizes_n2 in map(known_sizes, shards) if sizes_n2 is not None]
        check_grids(np.concatenate([np.zeros((0, 2), np.int32), *known]), spec.grids, name)
    check_tokens(header, spec, name)


def _size_of(source: Source, number: int, sample: int) -> tuple[int, int]:
    shard: Shard = source.shards[number]
    try:
        if source.layout is TOKENS:
            return grid_of_codes(shard.read(sample).image([CODES]))
        if isinstance(shard, FileShard):
            header = shard.header(sample)
        else:
            header = image_header(shard.read(sample).image(source.layout.image))
        return header.height, header.width
    except ImageError:
        return 0, 0  # training meets this sample again, and says why it is left out


@dataclass(frozen=True)
class Contents:
    """What a bucket holds. sources: the parts of the sources that belong to it; their weights are their shares of all
    images. pictures: those that can be trained on, as far as is known. share: of all images that training reads."""

    bucket: Bucket
    sources: list[Source]
    pictures: int
    share: float


class Division(NamedTuple):
    """How samples are divided. contents: of each bucket. too_small: name of a source -> its pictures that are left out,
    because they would have to be enlarged by more than `data.max_enlargement`. words: of messages. empty: names of
    buckets without samples, which are left out of the contents."""

    contents: list[Contents]
    too_small: dict[str, int]
    words: Words
    empty: Sequence[str] = ()

    def identity(self) -> dict[str, dict[str, dict]]:
        """Bucket -> source -> which samples it has, by shard: must be unchanged for positions to mean the same."""
        return {
            one.bucket.name: {source.name: _identity(source) for source in one.sources}
            for one in self.contents
            if one.pictures
        }

    def describe(self) -> list[str]:
        """One line for each bucket, and one for each source with pictures that are left out."""
        lines = [
            f"{self.words.one} {one.bucket.name}: {one.pictures:,} {self.words.samples}, {one.share:.1%} of all, "
            f"{one.bucket.batch} in a step" + (", fewer than one step takes" if one.pictures < one.bucket.batch else "")
            for one in self.contents
        ]
        if self.words is OF_TOKENS:  # sizes made from data.pixels are often empty
            lines += [f"grid {name}: no samples, so it is not trained" for name in self.empty]
        return lines + [
            f"{name}: {count:,} pictures are smaller than their bucket and left out (data.max_enlargement)"
            for name, count in self.too_small.items()
            if count
        ]


def _identity(source: Source) -> dict:
    counts: list | str = list(source.counts)
    contents = [
        None if number in source.quarantined and known_sizes(shard) is None else digest(numbers_n.tolist())
        for number, (shard, numbers_n) in enumerate(zip(source.shards, source.numbers, strict=True))
    ]
    if len(counts) > MOST_SCANNED:
        return {"counts": digest(counts), "contents": None if None in contents else digest(contents)}
    return {"counts": counts, "contents": contents}


def divide(
    sources: list[Source],
    buckets: list[Bucket],
    enlargement: float,
    before: dict[str, dict[str, dict]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Division:
    """Which samples each bucket has, and how often it comes.

    Over all buckets, each source has the share of its weight, and each of its samples that pass the filters by size and
    by key comes equally often. Filters by score are not known before a sample is read, and count as passed.
    enlargement: as of `bucket_of`; token samples belong to the bucket of exactly their grid.
    before: `Division.identity` of the run that is resumed: shards in quarantine keep their numbers of samples.
    progress: as of `sizes_of_source`. Raises DataError.
    """
    sizes, total = [bucket.size for bucket in buckets], sum(source.weight for source in sources)
    parts: list[list[Source]] = [[] for _ in buckets]
    share_k, pictures_k, too_small = np.zeros(len(buckets)), np.zeros(len(buckets), int), {}
    for source in sources:
        if source.counts is None:
            raise DataError(_no_sizes(source))
        placed = _placed(source, sizes, enlargement, progress)
        passing_k = np.bincount(placed.bucket_n[placed.passes_n], minlength=len(buckets))
        if not passing_k.any():
            raise DataError(_none_passes(source, len(placed.bucket_n), sizes, enlargement))
        too_small[source.name] = int((~placed.fits_n & ~placed.unknown_n).sum())
        # Training reads this bucket, so it meets these samples and reports them as skipped.
        placed.bucket_n[placed.unknown_n] = passing_k.argmax()
        for k, passing in enumerate(passing_k.tolist()):
            if passing:
                weight = source.weight / total * passing / passing_k.sum()
                known = (before or {}).get(buckets[k].name, {}).get(source.name, {}).get("counts")
                check = functools.partial(check_bucket, sizes, k, enlargement)
                parts[k].append(_part(source, placed, k, weight, known, check))
                share_k[k], pictures_k[k] = share_k[k] + weight, pictures_k[k] + passing
    contents = map(Contents, buckets, parts, pictures_k.tolist(), share_k.tolist())
    return Division(list(contents), too_small, OF_TOKENS if sources[0].layout is TOKENS else OF_IMAGES)


def _none_passes(source: Source, samples: int, sizes: list[Size], enlargement: float) -> str:
    if source.layout is TOKENS:
        return f"source {source.name}: none of its {samples:,} samples passes the filters: loosen them"
    return (
        f"source {source.name}: none of its {samples:,} pictures covers any bucket ({_named(sizes)}) and passes the "
        f"filters: give smaller buckets, or raise data.max_enlargement={enlargement:g}"
    )


def _need(source: Source) -> str:
    if source.layout is TOKENS:
        return f"source {source.name}: several model.grids need the grid of every sample"
    return f"source {source.name}: buckets need the size of every image"


def _no_sizes(source: Source) -> str:
    need = _need(source)
    if any(shard.url.startswith(PIPE) for shard in source.shards):
        return f"{need}, and the output of a command has no index: write it to a file"
    return f"{need}: write an index with `ibq shards check PATH --write-index --index FILE`"


class _Placed(NamedTuple):
    """Of each sample of a source, shard by shard: its bucket, whether it is large enough for it, whether it can be
    trained on (as far as is known), and whether its size is unknown. counts: samples of each shard; 0 if unknown."""

    bucket_n: np.ndarray
    fits_n: np.ndarray
    passes_n: np.ndarray
    unknown_n: np.ndarray
    counts: list[int]


def _placed(source: Source, sizes: list[Size], enlargement: float, progress) -> _Placed:
    if source.layout is TOKENS:  # says at once where they are none
        kept = [shard for number, shard in enumerate(source.shards) if number not in source.quarantined]
        first_header(kept, f"source {source.name}")
    of_shards = [
        np.zeros((0, 2), np.int32) if sizes_n2 is None else sizes_n2 for sizes_n2 in sizes_of_source(source, progress)
    ]
    counts = list(map(len, of_shards))
    sizes_n2 = np.concatenate(of_shards)
    in_quarantine_n = np.repeat([number in source.quarantined for number in range(len(counts))], counts)
    if source.layout is TOKENS:
        check_grids(sizes_n2[~in_quarantine_n], sizes, f"source {source.name}")
        number_n = grid_number(sizes, sizes_n2)
        bucket_n, fits_n = np.maximum(number_n, 0), number_n >= 0
    else:
        bucket_n, fits_n = bucket_of(sizes, sizes_n2, enlargement)
    unknown_n = sizes_n2.min(axis=1) == 0
    passes_n = fits_n & ~unknown_n & ~in_quarantine_n & source.filters.pass_sizes(sizes_n2)
    passes_n &= np.concatenate([_pass_keys(source, number, count) for number, count in enumerate(counts)])
    return _Placed(bucket_n, fits_n & ~unknown_n, passes_n, unknown_n, counts)


def _pass_keys(source: Source, number: int, count: int) -> np.ndarray:
    """Which samples of a shard pass the filters by key. Only needed to know how often a bucket comes."""
    filters, shard = source.filters, source.shards[number]
    if (filters.keys is None and not filters.not_keys) or not count:
        return np.ones(count, bool)
    if isinstance(shard, FileShard):
        return np.array([filters.passes_key(shard.key(path)) for path in shard.images])
    keys_n = (shard.table if shard.table is not None else shard.scan()).keys_n
    passes = ~np.isin(keys_n, key_hashes(filters.not_keys))
    return passes if filters.keys is None else passes & np.isin(keys_n, key_hashes(filters.keys))


def _part(
    source: Source,
    placed: _Placed,
    bucket: int,
    weight: float,
    counts_before: list[int] | str | None,
    check_part: Callable[[int, int], None],
) -> Source:
    """The samples of a source that belong to a bucket. Those of shards in quarantine are never read, but counted."""
    chosen = (placed.bucket_n == bucket) & (placed.fits_n | placed.unknown_n)
    numbers = [np.flatnonzero(some) for some in np.split(chosen, np.cumsum(placed.counts)[:-1])]
    if isinstance(counts_before, list) and len(counts_before) == len(numbers):
        for number in source.quarantined:
            if not placed.counts[number]:
                numbers[number] = np.arange(counts_before[number])
    return replace(source, weight=weight, counts=list(map(len, numbers)), numbers=numbers, check_part=check_part)


def _named(sizes: list[Size]) -> str:
    return ", ".join(map(str, sizes[:8])) + (", …" if len(sizes) > 8 else "")
