"""What evaluation reads from: images or tokens in a fixed order, each exactly once."""

import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from data.buckets import bucket_for, check_token_shards
from data.cache import Access, Cache, cache_folder
from data.config import SourceConfig
from data.errors import DataError, ImageError
from data.folder_reader import FileShard, FolderFiles, class_numbers, file_shard, find_images
from data.parallel import in_threads
from data.samples import Sample, Shard, Skipped, is_image
from data.sources import TOKENS, content_of, digest, label_of, open_source
from data.tar_reader import TarShard
from data.tokens import TokenSpec, check_tokens, unpack_codes
from data.transforms import Size, decode, pixels_chw, resize_and_center_crop, resize_named

T = TypeVar("T")
CACHE_BYTES = 50 * 10**9
PREFETCHED_PER_THREAD = 4  # samples that each thread decodes ahead


class EvaluationImage(NamedTuple):
    """key: the sample's key, or the file's path in its folder; image_chw: uint8 (3, h, w); index: number in the set;
    label: the class in its .cls, or of its class folder, or None."""

    key: str
    image_chw: torch.Tensor
    index: int
    label: int | None = None


class EvaluationToken(NamedTuple):
    """key: the sample's key; index_t: int64 (rows * columns,), codes of the first view; label: the class, or None;
    index: number in the set; grid: rows and columns."""

    key: str
    index_t: torch.Tensor
    label: int | None
    index: int
    grid: Size


class _OrderedSamples:
    """Samples in a fixed order, each exactly once over all shards (index, count) of the set.

    len() counts this shard's samples including unusable ones, which are left out while iterating and listed in
    `skipped` (of the current pass).
    """

    def __init__(
        self,
        path: str | list[str],
        shard: tuple[int, int],
        access: Access | None,
        block: int = 1,
        threads: int = 0,
        class_from_folder: bool = False,
        classes: dict[str, int] | None = None,
        image: list[str] | None = None,
    ):
        self.shards = _shards(path, access or Access(), class_from_folder, classes, image)
        self.image = image if isinstance(self.shards[0], TarShard) else None
        entries = [(one, index) for one in self.shards for index in range(len(one))]
        first, count = shard
        self.entries = [(index, *entry) for index, entry in enumerate(entries) if index // block % count == first]
        self.threads = threads
        self.unread = [] if first else [one for each in self.shards for one in _unread(each)]
        self.skipped: list[Skipped] = []

    def __len__(self):
        return len(self.entries)

    def identity(self) -> str:
        """The number of samples of the whole set, and a hash of their keys and, in tars, of their places."""
        contents = [(shard.name.rsplit("/", 1)[-1], content_of(shard)) for shard in self.shards]
        count = sum(map(len, self.shards))
        return f"{count:,} {'sample' if count == 1 else 'samples'} ({digest(contents)})"

    def __iter__(self) -> Iterator:
        self.skipped = list(self.unread)
        values = map(self._read, self.entries)
        if self.threads:
            values = in_threads(self._read, self.entries, self.threads, PREFETCHED_PER_THREAD * self.threads)
        for value in values:
            if isinstance(value, Skipped):
                self.skipped.append(value)
            else:
                yield value

    def _read(self, entry: tuple[int, Shard, int]) -> NamedTuple:
        """One sample's value, or why it is skipped."""
        index, shard, number = entry
        key = f"sample {number}"
        try:
            sample = shard.read(number)
            key = sample.key
            return self._value(sample, index)
        except ImageError as error:
            name = shard.files.name(shard.images[number]) if isinstance(shard, FileShard) else shard.name
            return Skipped(name, error.key or key, str(error))

    def _value(self, sample: Sample, index: int) -> NamedTuple:
        raise NotImplementedError


class EvaluationImages(_OrderedSamples):
    """The images of a folder (recursive), an image file, a zip file or tars (as `expand` reads them), in fixed order.

    image_size: shorter side and centre crop in pixels by the protocol `resize`; None keeps the original size.
    buckets: in place of it, the sizes to choose from for each image, see `bucket_of`; images that would have to be
    enlarged by more than `enlargement` are skipped.
    shard: (index, count): only this part of the set, `block` images in turn. access: how remote tars are read; without
    a cache they are copied to `cache_folder()`. threads: threads that decode ahead; 0: decode on request.
    class_from_folder: the class of an image is its top sub-folder, as for training (`file_shard`), in a folder where
    every image has one. classes: the numbers of these folders; None: in sorted order. image: suffixes of the images in
    tars, as of a source.
    """

    def __init__(
        self,
        path: str | list[str],
        *,
        image_size: int | None,
        buckets: Sequence[Size] = (),
        enlargement: float = math.inf,
        resize: str = "pil_antialias",
        shard: tuple[int, int] = (0, 1),
        access: Access | None = None,
        block: int = 1,
        threads: int = 0,
        class_from_folder: bool = False,
        classes: dict[str, int] | None = None,
        image: list[str] | None = None,
    ):
        if image_size is not None and image_size < 1:
            raise DataError(f"image size {image_size} must be at least 1 pixel")
        self.image_size, self.resize = image_size, resize_named(resize)
        self.buckets, self.enlargement = buckets, enlargement
        super().__init__(path, shard, access, block, threads, class_from_folder, classes, image)

    def _value(self, sample: Sample, index: int) -> EvaluationImage:
        image = decode(sample.image(self.image or ()))
        if self.buckets:
            size = bucket_for(self.buckets, image, self.enlargement)
            image = resize_and_center_crop(image, size, self.resize)
        elif self.image_size is not None:
            image = resize_and_center_crop(image, self.image_size, self.resize)
        return EvaluationImage(sample.key, torch.from_numpy(pixels_chw(image)), index, label_of(sample.members, TOKENS))


class EvaluationTokens(_OrderedSamples):
    """The first view of each token sample of some tars, in fixed order; shard and access as of `EvaluationImages`.

    Raises DataError for images, and for tokens that do not match the spec: the first sample and the grids in an index
    at once, others while iterating."""

    def __init__(
        self, path: str | list[str], spec: TokenSpec, *, shard: tuple[int, int] = (0, 1), access: Access | None = None
    ):
        super().__init__(path, shard, access)
        self.spec = spec
        check_token_shards(self.shards, spec, str(path))

    def _value(self, sample: Sample, index: int) -> EvaluationToken:
        header, index_vhw = unpack_codes(sample.image(TOKENS.image))
        check_tokens(header, self.spec, sample.key)
        index_t = torch.from_numpy(index_vhw[0]).flatten().long()
        return EvaluationToken(sample.key, index_t, label_of(sample.members, TOKENS), index, Size(*header.grid))


def in_batches(samples: Iterable[T], most: int, kind: Callable[[T], Hashable]) -> Iterator[list[T]]:
    """Batches of samples of one kind, such as one size or grid: each as soon as there are `most` of the kind, and what
    is left at the end. Of one kind, they are in order."""
    waiting: dict[Hashable, list[T]] = {}
    for sample in samples:
        batch = waiting.setdefault(kind(sample), [])
        batch.append(sample)
        if len(batch) == most:
            yield waiting.pop(kind(sample))
    yield from waiting.values()


def _unread(shard: Shard) -> list[Skipped]:
    if not isinstance(shard, FileShard):
        return []
    listed = zip(shard.unread, shard.skipped_unread(), strict=True)
    return [skipped._replace(source=shard.files.name(path)) for path, skipped in listed]


def _shards(
    path: str | list[str],
    access: Access,
    class_from_folder: bool,
    classes: dict[str, int] | None,
    image: list[str] | None,
) -> list[Shard]:
    if isinstance(path, (str, os.PathLike)) and os.path.isfile(path) and is_image(str(path)):
        folder, image = os.path.dirname(path) or ".", Path(os.path.basename(path))
        return [FileShard(folder, FolderFiles(folder, image), [image])]
    if isinstance(path, (str, os.PathLike)) and os.path.isdir(path) and find_images(Path(path)):
        shard = file_shard(str(path))
        if class_from_folder and shard.has_class_folders:
            shard.classes = class_numbers(shard.files, shard.images, classes)
        return [shard]
    if access.cache is None:  # samples are read by their position, so remote tars need copies or an index
        access = access._replace(cache=Cache(cache_folder() / "shards", CACHE_BYTES, access.timeouts))
    source = open_source(SourceConfig(name="evaluation", root=path, image=image), access, scan_all=True)
    for shard in source.shards if source.counts is None else []:
        shard.scan()  # raises the reason
    return source.shards


evaluation_images = EvaluationImages
evaluation_tokens = EvaluationTokens
