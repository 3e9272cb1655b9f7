"""Inception features of whole image sets by protocol ``adm``, computed by any number of processes and cached."""

import hashlib
import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import DataError
from data.evaluation import evaluation_images
from data.folder_reader import find_images
from data.npz import Npz
from data.sources import digest
from data.unfinished import complete_file, remove_dead
from model_zoo.eval_nets.inception import FEATURES, Inception, InceptionFeatures
from model_zoo.eval_nets.weights import WEIGHTS_FILES
from model_zoo.io.hashing import sha256_of
from trainer import TrainerError
from trainer.jobs.setup import decode_threads
from trainer.parallel import World, check_same_on_all_ranks, gather_objects, run_on_all_ranks, run_on_main
from trainer.precision import full_precision

PROTOCOL = "adm"  # defined by model_zoo.eval_nets.inception and docs/generator.md


class ImageBatch(NamedTuple):
    """Images at consecutive positions from ``first`` on, uint8 (b, 3, height, width)."""

    first: int
    levels_bchw: Tensor


class NpzImages:
    """Images of an .npz in ADM's format, in a fixed order. Raises DataError."""

    def __init__(self, npz: Npz):
        self.npz, self.path = npz, npz.path
        self.count, self.height, self.width = npz.count, npz.height, npz.width

    def seen(self) -> str:
        """What a rank finds, without reading the pixels."""
        return f"{self.count:,} images of {self.width}x{self.height} pixels in {self.path.stat().st_size:,} bytes"

    def sha256(self) -> str:
        """Identifies the pixels that the features come from."""
        return sha256_of(self.path)

    def batches(self, batch_size: int, shard: tuple[int, int]) -> Iterator[ImageBatch]:
        """The batches of one shard (index, count); how batches are formed does not depend on the number of shards."""
        for first, levels_bhwc in self.npz.batches(batch_size, shard):
            yield ImageBatch(first, torch.from_numpy(levels_bhwc.transpose(0, 3, 1, 2).copy()))


class FolderImages:
    """Like `NpzImages`, of a folder and its sub-folders, sorted by path. Raises DataError if one is unreadable."""

    def __init__(self, path: Path):
        self.path = path
        self.files = find_images(path)
        self.count = len(self.files)
        self.height = self.width = 0
        if self.files:
            self.height, self.width = next(self.batches(1, (0, self.count))).levels_bchw.shape[2:]

    def seen(self) -> str:
        names = digest([(file.as_posix(), (self.path / file).stat().st_size) for file in self.files])
        return f"{self.count:,} images of {self.width}x{self.height} pixels ({names})"

    def sha256(self) -> str:
        hashed = hashlib.sha256()
        for file in self.files:
            hashed.update(bytes.fromhex(sha256_of(self.path / file)))
        return hashed.hexdigest()

    def batches(self, batch_size: int, shard: tuple[int, int]) -> Iterator[ImageBatch]:
        options = dict(shard=shard, block=batch_size, threads=decode_threads())
        images = evaluation_images(str(self.path), image_size=None, **options)
        if [shard.images for shard in images.shards] != [self.files]:
            raise DataError(
                f"{self.path} got or lost images while it was evaluated: start again when nothing writes there"
            )
        for _, group in itertools.groupby(images, key=lambda image: image.index // batch_size):
            batch = list(group)
            for image in batch:
                height, width = image.image_chw.shape[1:]
                if self.height and (height, width) != (self.height, self.width):
                    raise DataError(
                        f"{self.path}/{image.key} is {width}x{height}, {self.files[0]} is {self.width}x{self.height}: "
                        "all images must have one size"
                    )
            self._check_read(images.skipped)
            yield ImageBatch(batch[0].index, torch.stack([image.image_chw for image in batch]))
        self._check_read(images.skipped)

    @staticmethod
    def _check_read(skipped: list) -> None:
        if skipped:
            raise DataError(f"{skipped[0].source}: {skipped[0].reason}; repair or remove it")


ImageSet = NpzImages | FolderImages


class SetFeatures(NamedTuple):
    """sha256: of the image set. features: on rank 0's CPU, None on other ranks. from_cache: not computed now."""

    sha256: str
    features: InceptionFeatures | None
    from_cache: bool


class FeatureExtractor:
    """Computes features with one Inception per process, loaded on first use.

    cache: a folder for features, keyed by the hashes of images and weights and by the protocol; None for no cache.
    Raises TrainerError, one line.
    """

    def __init__(self, world: World, batch_size: int, cache: Path | None):
        self.world, self.batch_size, self.cache = world, batch_size, cache
        self.warnings: list[str] = []
        self._inception: Inception | None = None

    def extract(self, images: ImageSet, on_progress: Callable[[int, int], None]) -> SetFeatures:
        """The features of all images, in order; all processes call it together. on_progress: called with the
        approximate number of finished images and the total."""
        check_same_on_all_ranks(str(images.path), images.seen())
        sha256 = run_on_main(self.world, images.sha256)
        key = {"pictures": sha256, "weights": WEIGHTS_FILES["inception"].sha256, "protocol": PROTOCOL}
        name = hashlib.sha256("\n".join(key.values()).encode()).hexdigest()
        path = self.cache and self.cache / f"features_{PROTOCOL}_{name[:32]}.npz"
        cached = _read(path, key, images.count) if path and self.world.is_main else None
        if run_on_main(self.world, lambda: cached is not None):
            return SetFeatures(sha256, cached, True)
        if self._inception is None:
            self._inception = run_on_all_ranks(Inception).to(self.world.device)
        features = _gathered(self.world, *run_on_all_ranks(lambda: self._own_features(images, on_progress)))
        run_on_main(self.world, lambda: _check_unchanged(images, sha256))  # or the cache has features of other pixels
        if path and features:
            try:
                _write(path, key, features)
            except OSError as error:  # the evaluation itself can continue
                self.warnings.append(f"features were not cached in {path.parent}: {error.strerror or error}")
        return SetFeatures(sha256, features, False)

    def _own_features(self, images: ImageSet, on_progress: Callable[[int, int], None]) -> tuple[list[int], Tensor]:
        """The positions and rows of this process's images; a row is pooled features and logits concatenated."""
        positions, rows = [], []
        for batch in images.batches(self.batch_size, (self.world.rank, self.world.size)):
            with full_precision(self.world.device.type):
                features = self._inception.adm(batch.levels_bchw.to(self.world.device))
            rows.append(torch.cat(features, dim=1))
            if not rows[-1].isfinite().all():  # they would have the precision 0
                raise TrainerError(
                    f"Inception's features of the {len(rows[-1]):,} images from number {batch.first:,} on in "
                    f"{images.path} are not finite: get its weights file again, or try --device cpu"
                )
            positions += range(batch.first, batch.first + len(batch.levels_bchw))
            if self.world.is_main:
                on_progress(min(len(positions) * self.world.size, images.count), images.count)
        width = sum(self._inception.head.weight.shape)
        return positions, torch.cat(rows) if rows else torch.empty(0, width, device=self.world.device)


def _gathered(world: World, positions: list[int], rows_nd: Tensor) -> InceptionFeatures | None:
    """All processes' rows in order, on rank 0's CPU."""
    positions_of = gather_objects(positions)
    if not world.is_main:
        if positions:
            dist.send(rows_nd.contiguous(), 0)
        return None
    assert sorted(itertools.chain(*positions_of)) == list(range(sum(map(len, positions_of)))), "each image exactly once"
    whole_nd = torch.empty(sum(map(len, positions_of)), rows_nd.shape[1])
    for rank, own in enumerate(positions_of):
        if rank and own:
            rows_nd = torch.empty(len(own), whole_nd.shape[1], device=world.device)
            dist.recv(rows_nd, rank)
        if own:
            whole_nd[own] = rows_nd.cpu()
    return InceptionFeatures(*whole_nd.split([FEATURES, whole_nd.shape[1] - FEATURES], dim=1))


def _check_unchanged(images: ImageSet, sha256: str) -> None:
    """Raises DataError where the images are not those whose hash was taken before they were read."""
    if images.sha256() != sha256:
        raise DataError(f"{images.path} was changed while it was evaluated: start again when nothing writes there")


def _read(path: Path, key: dict[str, str], count: int) -> InceptionFeatures | None:
    """Cached features; None if the file is missing, damaged or of another key."""
    try:
        with np.load(path, allow_pickle=False) as arrays:  # zip's checksums detect damage
            found = {name: str(arrays[name]) for name in key}
            features = InceptionFeatures(*(torch.from_numpy(arrays[name]) for name in InceptionFeatures._fields))
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
        return None
    is_whole = all(len(rows) == count and rows.isfinite().all() for rows in features)
    return features if found == key and is_whole else None


def _write(path: Path, key: dict[str, str], features: InceptionFeatures) -> None:
    """Concurrent writers are harmless. What killed ones left of any features is removed: it may be large."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(path.parent, "features_*")
    arrays = {name: rows.numpy() for name, rows in features._asdict().items()}
    with complete_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays, **key)
