"""Inception features of whole sets of pictures by protocol `adm`: by any number of processes, and kept from one
evaluation to the next."""

import hashlib
import itertools
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data import DataError, evaluation_images
from data.folder_reader import find_images
from data.npz import Npz
from data.parallel import cores
from model_zoo.eval_nets.inception import FEATURES, Inception, InceptionFeatures
from model_zoo.eval_nets.weights import WEIGHTS_FILES
from model_zoo.io.hashing import sha256_of
from trainer.parallel import World, as_trainer_error, gather_objects, run_on_all_ranks, run_on_main
from trainer.precision import full_precision

PROTOCOL = "adm"  # model_zoo.eval_nets.inception and docs/generator.md say what it is
DECODE_THREADS = 8  # at most, of a process


class PictureBatch(NamedTuple):
    """Pictures of consecutive places from ``first`` on, uint8 (b, 3, height, width)."""

    first: int
    levels_bchw: Tensor


class Pictures(Protocol):
    """A set of pictures of one size (pixels) in an order of its own."""

    path: Path
    count: int
    height: int
    width: int

    def content(self) -> str:
        """The SHA-256 of what the features come from."""

    def batches(self, batch_size: int, shard: tuple[int, int]) -> Iterator[PictureBatch]:
        """This shard's (index, count). The batches are the same however many shards there are."""


class NpzPictures:
    """Those of an .npz in ADM's form. Raises DataError."""

    def __init__(self, npz: Npz):
        self.npz, self.path = npz, npz.path
        self.count, self.height, self.width = npz.count, npz.height, npz.width

    def content(self) -> str:
        return sha256_of(self.path)

    def batches(self, batch_size: int, shard: tuple[int, int]) -> Iterator[PictureBatch]:
        for first, levels_bhwc in self.npz.batches(batch_size, shard):
            yield PictureBatch(first, torch.from_numpy(levels_bhwc.transpose(0, 3, 1, 2).copy()))


class FolderPictures:
    """Those of a folder and its sub-folders, in the order of their names. Raises DataError: none may be unreadable."""

    def __init__(self, path: Path):
        self.path = path
        self.files = find_images(path)
        self.count = len(self.files)
        self.height = self.width = 0
        if self.files:
            first = next(self.batches(1, (0, self.count)))
            self.height, self.width = first.levels_bchw.shape[2:]

    def content(self) -> str:
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(bytes.fromhex(sha256_of(self.path / file)))
        return digest.hexdigest()

    def batches(self, batch_size: int, shard: tuple[int, int]) -> Iterator[PictureBatch]:
        threads = min(DECODE_THREADS, max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        images = evaluation_images(str(self.path), image_size=None, shard=shard, block=batch_size, threads=threads)
        for _, group in itertools.groupby(images, key=lambda image: image.index // batch_size):
            batch = list(group)
            for image in batch:
                height, width = image.image_chw.shape[1:]
                if self.height and (height, width) != (self.height, self.width):
                    raise DataError(
                        f"{self.path}/{image.key} is {width}x{height}, {self.files[0]} is {self.width}x{self.height}: "
                        "the pictures must be of one size"
                    )
            self._check_read(images.skipped)
            yield PictureBatch(batch[0].index, torch.stack([image.image_chw for image in batch]))
        self._check_read(images.skipped)

    @staticmethod
    def _check_read(skipped: list) -> None:
        if skipped:
            raise DataError(f"{skipped[0].source}: {skipped[0].reason}; mend it or take it away")


class Made(NamedTuple):
    """content: the pictures' SHA-256. features: on the first process's CPU, None on the others. was_kept: by a former
    evaluation."""

    content: str
    features: InceptionFeatures | None
    was_kept: bool


class FeatureMaker:
    """Makes features with one Inception a process, which is loaded when it is first needed. All processes call it.

    cache: a folder where features are kept under the hashes of pictures and weights and the protocol; None keeps none.
    Raises TrainerError, one line.
    """

    def __init__(self, world: World, batch_size: int, cache: Path | None):
        self.world, self.batch_size, self.cache = world, batch_size, cache
        self.warnings: list[str] = []
        self._inception: Inception | None = None

    def make(self, pictures: Pictures, on_progress: Callable[[int, int], None]) -> Made:
        """Of all pictures, in their order. on_progress: hears of pictures done, about, and of how many."""
        content = run_on_main(self.world, lambda: as_trainer_error(pictures.content))
        key = {"pictures": content, "weights": WEIGHTS_FILES["inception"].sha256, "protocol": PROTOCOL}
        name = hashlib.sha256("\n".join(key.values()).encode()).hexdigest()
        path = self.cache and self.cache / f"features_{PROTOCOL}_{name[:32]}.npz"
        kept = _read(path, key, pictures.count) if path and self.world.is_main else None
        if run_on_main(self.world, lambda: kept is not None):
            return Made(content, kept, True)
        if self._inception is None:
            self._inception = run_on_all_ranks(Inception).to(self.world.device)
        features = _gathered(self.world, *run_on_all_ranks(lambda: self._part(pictures, on_progress)))
        if path and features:
            try:
                _write(path, key, features)
            except OSError as error:  # what was computed is at hand all the same
                self.warnings.append(f"features were not kept in {path.parent}: {error.strerror or error}")
        return Made(content, features, False)

    def _part(self, pictures: Pictures, on_progress: Callable[[int, int], None]) -> tuple[list[int], Tensor]:
        """This process's places and rows: pooled features and logits side by side."""
        places, rows = [], []
        for batch in pictures.batches(self.batch_size, (self.world.rank, self.world.size)):
            with full_precision(self.world.device.type):
                features = self._inception.adm(batch.levels_bchw.to(self.world.device))
            rows.append(torch.cat(features, dim=1))
            places += range(batch.first, batch.first + len(batch.levels_bchw))
            if self.world.is_main:
                on_progress(min(len(places) * self.world.size, pictures.count), pictures.count)
        width = sum(self._inception.head.weight.shape)
        return places, torch.cat(rows) if rows else torch.empty(0, width, device=self.world.device)


def _gathered(world: World, places: list[int], rows_nd: Tensor) -> InceptionFeatures | None:
    """All processes' rows in order, on the first one's CPU."""
    places_of = gather_objects(places)
    if not world.is_main:
        if places:
            dist.send(rows_nd.contiguous(), 0)
        return None
    assert sorted(itertools.chain(*places_of)) == list(range(sum(map(len, places_of)))), "each picture exactly once"
    whole_nd = torch.empty(sum(map(len, places_of)), rows_nd.shape[1])
    for rank, own in enumerate(places_of):
        if rank and own:
            rows_nd = torch.empty(len(own), whole_nd.shape[1], device=world.device)
            dist.recv(rows_nd, rank)
        if own:
            whole_nd[own] = rows_nd.cpu()
    return InceptionFeatures(*whole_nd.split([FEATURES, whole_nd.shape[1] - FEATURES], dim=1))


def _read(path: Path, key: dict[str, str], count: int) -> InceptionFeatures | None:
    """What is kept there; None where nothing is, or nothing whole, or other features."""
    try:
        with np.load(path, allow_pickle=False) as arrays:  # zip's checksums tell of damage
            kept = {name: str(arrays[name]) for name in key}
            features = InceptionFeatures(*(torch.from_numpy(arrays[name]) for name in InceptionFeatures._fields))
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
        return None
    return features if kept == key and all(len(rows) == count for rows in features) else None


def _write(path: Path, key: dict[str, str], features: InceptionFeatures) -> None:
    """At once or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: rows.numpy() for name, rows in features._asdict().items()}
    with tempfile.NamedTemporaryFile(prefix=".unfinished_", dir=path.parent, delete=False) as file:
        unfinished = Path(file.name)
        try:
            np.savez(file, **arrays, **key)
            file.close()
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
