"""The endless, deterministic training stream.

All images form one sequence of raw samples: epoch after epoch, shards in a seeded order, shuffled within blocks. Lane l
of L reads positions l, l + L, l + 2L, ... of it. An optimiser step with a global batch of B takes one image from each
of B lanes: step t takes those of round t mod (L / B). An image that cannot be decoded is skipped, and its lane, and no
other, goes on to its next position. So the images of step t depend on the seed, the data, B and L only: ranks,
micro-batches and loader workers merely divide the lanes among them. The state is the step and how many positions each
lane has skipped.

Positions are computed, never searched for, and a sample is read by its place in the tar: each worker reads its own part
only, and resuming costs nothing.
"""

import functools
import hashlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from data import DataError
from data.shards import Shard, Skipped
from data.transforms import ImageError, TrainingTransform

LEAST_FAILURE_LIMIT = 100


def seed_of(*parts) -> int:
    """A 64-bit seed from the parts' values; the same in every process and Python version."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


@functools.lru_cache(maxsize=256)
def permutation(count: int, *parts) -> np.ndarray:
    """A random order of range(count) seeded by `parts`, from raw generator bits, which NumPy never changes."""
    return np.argsort(np.random.PCG64(seed_of(*parts)).random_raw(count), kind="stable")


class Place(NamedTuple):
    """Where a position of the sequence lies: sample `index` of shard number `shard` in pass `epoch` over the data."""

    epoch: int
    shard: int
    index: int


@dataclass(frozen=True)
class Order:
    """The raw sequence: every sample exactly once in each epoch.

    samples_per_shard: counts; shuffle_block: samples shuffled among each other (consecutive ones of the shard order).
    """

    samples_per_shard: np.ndarray
    shuffle_block: int
    seed: int

    def __len__(self):
        return int(self.samples_per_shard.sum())

    def place(self, position: int) -> Place:
        """The place of a position, from 0 without end."""
        epoch, offset = divmod(position, len(self))
        block, offset = divmod(offset, self.shuffle_block)
        first = block * self.shuffle_block
        size = min(self.shuffle_block, len(self) - first)
        offset = first + permutation(size, self.seed, "block", epoch, block)[offset]
        shard_order = permutation(len(self.samples_per_shard), self.seed, "shards", epoch)
        stops = np.cumsum(self.samples_per_shard[shard_order])
        turn = int(np.searchsorted(stops, offset, side="right"))
        shard = int(shard_order[turn])
        return Place(epoch, shard, int(offset - stops[turn] + self.samples_per_shard[shard]))


@dataclass(frozen=True)
class Division:
    """How the lanes of each step are divided among ranks and micro-batches. DataError where they do not divide."""

    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    lanes: int

    def __post_init__(self):
        share = self.world_size * self.micro_batch_size
        if min(self.global_batch_size, self.micro_batch_size, self.world_size) < 1:
            raise DataError("batch sizes and the number of processes must be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise DataError(f"rank {self.rank} must lie in 0..{self.world_size - 1}")
        if self.global_batch_size % share:
            raise DataError(
                f"trainer.global_batch_size={self.global_batch_size} is not divisible by {self.world_size} processes x "
                f"micro-batch size {self.micro_batch_size}: set it to a multiple of {share}"
            )
        if self.lanes < 1 or self.lanes % self.global_batch_size:
            raise DataError(
                f"data.lanes={self.lanes} must be a multiple of the global batch size {self.global_batch_size}: "
                f"use {max(1, round(self.lanes / self.global_batch_size)) * self.global_batch_size}, or leave it out"
            )

    @property
    def rounds(self) -> int:
        """Steps until the same lanes are read again."""
        return self.lanes // self.global_batch_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches that each rank contributes to a step."""
        return self.global_batch_size // (self.world_size * self.micro_batch_size)

    def micro_batch_lanes(self, step: int, micro_batch: int) -> range:
        """The lanes of one of this rank's micro-batches."""
        within = (self.rank * self.micro_batches + micro_batch) * self.micro_batch_size
        first = step % self.rounds * self.global_batch_size + within
        return range(first, first + self.micro_batch_size)

    def own(self, lane: int) -> bool:
        """Whether this rank reads the lane."""
        return lane % self.global_batch_size // (self.global_batch_size // self.world_size) == self.rank

    def usable_workers(self, workers: int) -> int:
        """The most loader workers, up to `workers`, that can deal micro-batches by turn with each lane kept by one."""
        deal = self.rounds * self.micro_batches
        return max((n for n in range(1, workers + 1) if deal % n == 0), default=0)


class MicroBatch(NamedTuple):
    """What a worker hands over: `skips` are new totals of the lanes that skipped samples for this micro-batch."""

    images_bchw: torch.Tensor
    keys: list[str]
    skips: dict[int, int]
    skipped: list[Skipped]


@dataclass
class MicroBatches(IterableDataset):
    """One rank's endless micro-batches from `first_step` on, dealt by turn to the DataLoader's workers.

    A worker hands over a DataError as an item, since a DataLoader would bury its one line in a traceback.
    """

    shards: list[Shard]
    order: Order
    division: Division
    transform: TrainingTransform
    first_step: int = 0
    skips: dict[int, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[MicroBatch | DataError]:
        worker = get_worker_info()
        turn, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        number = self.first_step * self.division.micro_batches + turn
        try:
            while True:
                yield self._micro_batch(*divmod(number, self.division.micro_batches))
                number += workers
        except DataError as error:
            yield error

    def _micro_batch(self, step: int, micro_batch: int) -> MicroBatch:
        lanes = self.division.micro_batch_lanes(step, micro_batch)
        side = self.transform.image_size
        images_bchw = torch.empty(len(lanes), 3, side, side, dtype=torch.uint8)
        keys, skipped = [], []
        before = {lane: self.skips.get(lane, 0) for lane in lanes}
        for image_chw, lane in zip(images_bchw.numpy(), lanes, strict=True):
            keys.append(self._draw(lane, step, image_chw, skipped))
        skips = {lane: self.skips[lane] for lane in lanes if self.skips.get(lane, 0) != before[lane]}
        return MicroBatch(images_bchw, keys, skips, skipped)

    def _draw(self, lane: int, step: int, image_chw: np.ndarray, skipped: list[Skipped]) -> str:
        """Fills `image_chw` with the lane's image for this step and returns its key."""
        limit = max(LEAST_FAILURE_LIMIT, -(-len(self.order) // self.division.lanes))  # a lane's part of an epoch
        for _ in range(limit):
            turn = step // self.division.rounds + self.skips.get(lane, 0)
            place = self.order.place(lane + turn * self.division.lanes)
            shard, key = self.shards[place.shard], f"sample {place.index}"
            rng = random.Random(seed_of(self.order.seed, "augment", *place))
            try:
                key, content = shard.read(place.index)
                image_chw[:] = self.transform(content, rng)
                return key
            except ImageError as error:
                skipped.append(Skipped(shard.path, key, str(error)))
                self.skips[lane] = self.skips.get(lane, 0) + 1
        last = skipped[-1]
        raise DataError(f"{limit} images in a row cannot be used, last {last.key} in {last.source} ({last.reason})")


# ------------------------------------------------------------------------------------------------------------ state


def identity(shards: list[Shard], order: Order, division: Division) -> dict:
    """What must be the same for a state to mean the same images."""
    tars = [(os.path.basename(shard.path), len(shard)) for shard in shards]
    return {
        "seed": order.seed,
        "shards": f"{len(shards)} tars, {len(order)} samples, {seed_of(*tars):016x}",
        "shuffle_block": order.shuffle_block,
        "global_batch_size": division.global_batch_size,
        "lanes": division.lanes,
    }


def make_state(of: dict, division: Division, step: int, skips: dict[int, int]) -> dict:
    """The JSON-able state of this rank before optimiser step `step`."""
    return {
        "stream": of,
        "step": step,
        "skips": {str(lane): count for lane, count in sorted(skips.items())},
        "ranks": [division.rank],
        "world_size": division.world_size,
    }


def merge_states(states: list[dict]) -> dict:
    """One state from those of all ranks' latest batches; the ranks must have taken equally many steps."""
    if not states:
        raise DataError("no data states to merge: give one of each rank")
    first = states[0]
    for state in states[1:]:
        for name in ("stream", "step", "world_size"):
            if state[name] != first[name]:
                raise DataError(
                    f"data states differ in {name}: {first[name]} and {state[name]}; merge those of one moment"
                )
    skips = {lane: count for state in states for lane, count in state["skips"].items()}
    ranks = sorted({rank for state in states for rank in state["ranks"]})
    return {**first, "skips": dict(sorted(skips.items(), key=lambda item: int(item[0]))), "ranks": ranks}


def resume(state: dict, of: dict) -> tuple[int, dict[int, int]]:
    """The next step and the lanes' skips from a merged state, once it is shown to fit this stream."""
    if not {"stream", "step", "world_size", "skips", "ranks"} <= state.keys():
        raise DataError("the checkpoint's data state is damaged: resume from another checkpoint")
    if state["ranks"] != list(range(state["world_size"])):
        raise DataError(
            f"the data state holds ranks {state['ranks']} of {state['world_size']}: merge all ranks' states first"
        )
    for name, value in of.items():
        if state["stream"][name] != value:
            raise DataError(f"cannot resume: {name} was {state['stream'][name]} and is now {value}; set it back")
    return state["step"], {int(lane): count for lane, count in state["skips"].items()}
