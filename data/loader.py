"""What training and evaluation read from: `train_batches` and `evaluation_images`."""

import atexit
import logging
import os
import signal
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from data import DataError
from data.shards import IMAGE_SUFFIXES, Shard, Skipped, expand, find_images, scan
from data.stream import Division, MicroBatches, Order, identity, make_state, resume
from data.transforms import ImageError, TrainingTransform, decode, pixels_chw, resize_and_center_crop, resize_named

logger = logging.getLogger(__name__)

DEFAULT_ROUNDS = 8  # lanes for each image of the global batch


@dataclass
class DataConfig:
    """The recipe's `data` section. Sizes in pixels, shuffle_block in samples, crop_scale as parts of the area."""

    train: Any = None
    val: Any = None
    image_size: int = 256
    # Side of validation crops; None: as in training. Convolutional models may be judged at another size.
    val_image_size: int | None = None
    workers: int = 4
    lanes: int | None = None
    crop: str = "random"
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    resize: str = "pil_antialias"
    flip: bool = True
    # Strength of random contrast, saturation, hue and brightness, 0 to 1: for small sets of pictures.
    color_jitter: float = 0.0
    shuffle_block: int = 1024


class Batch(NamedTuple):
    """One micro-batch of one rank. images_bchw: uint8 (b, 3, image_size, image_size).

    state: what to resume from (see `merge_states`). After a step's last micro-batch it is the state behind that step;
    after an earlier one, the state before it, so that a step cut short is taken again whole.
    skipped: the samples that were left out on the way to this micro-batch.
    """

    images_bchw: torch.Tensor
    keys: list[str]
    state: dict
    skipped: list[Skipped]


def train_batches(
    config: DataConfig,
    *,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    state: dict | None = None,
) -> Iterator[Batch]:
    """The rank's endless micro-batches; each optimiser step takes global_batch_size / (world_size * micro_batch_size).

    The global batch of a step depends on the seed, the data, `global_batch_size` and `config.lanes` only, bit for bit.
    state: a merged state to resume from, at any world size, micro-batch size and number of workers.
    Raises DataError, before anything is read for training where the mistake can be seen by then.
    """
    transform = _transform(config)
    lanes = global_batch_size * DEFAULT_ROUNDS if config.lanes is None else config.lanes
    division = Division(global_batch_size, micro_batch_size, rank, world_size, lanes)
    shards = [scan(path) for path in expand(config.train)]
    order = Order(np.array([len(shard) for shard in shards]), config.shuffle_block, seed)
    of = identity(shards, order, division)
    step, skips = (0, {}) if state is None else resume(state, of)
    skips = {lane: count for lane, count in skips.items() if division.own(lane)}
    micro_batches = MicroBatches(shards, order, division, transform, step, dict(skips))
    workers = division.usable_workers(config.workers)
    if workers < config.workers:
        logger.warning("data.workers=%d: %d are used, as many as deal the lanes evenly", config.workers, workers)
    return _deliver(micro_batches, workers, of, step, skips)


def check(config: DataConfig) -> None:
    """Raises the DataError that training or validation with this configuration would end in, before a run begins.

    It reads every tar's headers, so that an empty or damaged one is named here.
    """
    _transform(config)
    for path in expand(config.train):
        scan(path)
    if config.val is not None:
        evaluation_images(config.val, image_size=config.val_image_size or config.image_size, resize=config.resize)


def _transform(config: DataConfig) -> TrainingTransform:
    if config.workers < 0 or config.shuffle_block < 1:
        raise DataError("data.workers must be at least 0 and data.shuffle_block at least 1")
    return TrainingTransform(
        config.image_size, config.crop, tuple(config.crop_scale), config.resize, config.flip, config.color_jitter
    )


def _deliver(micro_batches: MicroBatches, workers: int, of: dict, step: int, skips: dict[int, int]) -> Iterator[Batch]:
    """Gives each micro-batch its state, which counts what was delivered and never what workers have prefetched."""
    division = micro_batches.division
    warned = set()
    items = _load(micro_batches, workers)
    while True:
        state = make_state(of, division, step, skips)
        for number in range(division.micro_batches):
            item = next(items)
            if isinstance(item, DataError):
                raise item
            skips.update(item.skips)
            for skipped in item.skipped:
                if (skipped.source, skipped.key) not in warned:
                    logger.warning("skipped %s in %s: %s", skipped.key, skipped.source, skipped.reason)
                    warned.add((skipped.source, skipped.key))
            if number == division.micro_batches - 1:
                state = make_state(of, division, step + 1, skips)
            yield Batch(item.images_bchw, item.keys, state, item.skipped)
        step += 1


def _load(micro_batches: MicroBatches, workers: int) -> Iterator:
    if workers == 0:
        return iter(micro_batches)
    # Its own generator, since a DataLoader draws a seed and would move the global random state.
    items = iter(
        DataLoader(
            micro_batches,
            batch_size=None,
            collate_fn=_as_is,
            num_workers=workers,
            worker_init_fn=_leave_signals_to_the_parent,
            generator=torch.Generator(),
        )
    )
    # Python waits at its end for children that it has sent SIGTERM, which these leave to us.
    atexit.register(_end_workers, weakref.ref(items))
    return items


def _end_workers(items: weakref.ref) -> None:
    if (iterator := items()) is not None:
        iterator._shutdown_workers()  # what deleting it does


def _as_is(item):
    return item


def _leave_signals_to_the_parent(_: int) -> None:
    # Launchers signal whole process groups. The parent decides when a run ends, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------------------- evaluation


class EvaluationImage(NamedTuple):
    """key: the sample's key, or the file's path in its folder; image_chw: uint8 (3, h, w); index: place in the set."""

    key: str
    image_chw: torch.Tensor
    index: int


class _Entry(NamedTuple):
    source: str
    key: str  # of a file; a tar's samples have theirs inside
    shard: Shard | None
    index: int


class EvaluationImages:
    """Images in a fixed order, each exactly once over all shards (index, count) of the set.

    len() counts this shard's images, the unreadable ones included; these are left out while iterating and listed in
    `skipped`, anew for each pass.
    """

    def __init__(self, path: str | list[str], image_size: int | None, resize: str, shard: tuple[int, int]):
        if image_size is not None and image_size < 1:
            raise DataError(f"image size {image_size} must be at least 1 pixel")
        self.image_size, self.resize = image_size, resize_named(resize)
        entries = _image_files(path)
        if entries is None:
            shards = [scan(tar) for tar in expand(path)]
            entries = [_Entry(tar.path, "", tar, index) for tar in shards for index in range(len(tar))]
        first, count = shard
        self.entries = list(enumerate(entries))[first::count]
        self.skipped: list[Skipped] = []

    def __len__(self):
        return len(self.entries)

    def __iter__(self) -> Iterator[EvaluationImage]:
        self.skipped = []
        for index, entry in self.entries:
            key = entry.key or f"sample {entry.index}"
            try:
                if entry.shard is not None:
                    key, content = entry.shard.read(entry.index)
                else:
                    content = Path(entry.source).read_bytes()
                image = decode(content)
            except ImageError as error:
                self.skipped.append(Skipped(entry.source, key, str(error)))
                continue
            except OSError as error:
                self.skipped.append(Skipped(entry.source, key, error.strerror or str(error)))
                continue
            if self.image_size is not None:
                image = resize_and_center_crop(image, self.image_size, self.resize)
            yield EvaluationImage(key, torch.from_numpy(pixels_chw(image)), index)


def _image_files(path: str | list[str]) -> list[_Entry] | None:
    """Entries of one image or of a folder of images; None where `path` names tars."""
    if not isinstance(path, (str, os.PathLike)):
        return None
    path = Path(path)
    if path.is_file() and path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES:
        return [_Entry(str(path), path.name, None, 0)]
    if not path.is_dir():
        return None
    images, has_tars = find_images(path), any(path.glob("*.tar"))
    if images and has_tars:
        raise DataError(f"{path} holds images and tars: name a folder with one kind only, or the tars as {path}/*.tar")
    if not images and not has_tars:
        raise DataError(f"neither {', '.join(IMAGE_SUFFIXES)} nor tars under {path}: name a folder that holds images")
    return [_Entry(str(path / image), image.as_posix(), None, 0) for image in images] if images else None


def evaluation_images(
    path: str | list[str], *, image_size: int | None, resize: str = "pil_antialias", shard: tuple[int, int] = (0, 1)
) -> EvaluationImages:
    """The images of a folder (recursive), of one image file or of tars (as `expand` reads them), in a fixed order.

    image_size: shorter side and centre crop in pixels by the protocol `resize`; None keeps the original size.
    shard: (index, count): this part of the set only, image by image in turn.
    """
    return EvaluationImages(path, image_size, resize, shard)
