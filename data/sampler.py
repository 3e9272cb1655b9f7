"""The order of training samples: pure arithmetic, without any reading.

A run has L lanes. A lane is one independent, infinite sample stream, drawn from all sources by the mixture's weights.
Its order depends on the seed, the sources, the lane's number and L, and on nothing else. Lanes are distributed over
ranks and loader workers, so each sample is read by exactly one process.

Within a source, a lane reads one contiguous stretch of each epoch's shards (whose order is shuffled for each epoch),
window by window, and each window is shuffled. So tars are read forwards, and each sample comes exactly once per epoch.

A step takes equally many images from each lane or, with more lanes than images in a step, one image from each of the
lanes whose turn it is.
"""

import bisect
import functools
import hashlib
import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.errors import DataError

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: its multiples fill 0..2^64 most evenly
LANE_STEP = int(2**64 * 0.7548776662466927)  # as even over the lanes
MOST_LANES = 100_000


def seed_of(*parts) -> int:
    """A 64-bit seed from the parts' values; the same in every process and Python version."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


@functools.lru_cache(maxsize=64)
def permutation(count: int, *parts) -> np.ndarray:
    """A random order of range(count) seeded by `parts`, from raw generator bits, which NumPy never changes."""
    return np.argsort(np.random.PCG64(seed_of(*parts)).random_raw(count), kind="stable")


# ---------------------------------------------------------------------------------------------------------- mixture


class Mixture:
    """Which source a lane's n-th image comes from: shares as even as possible, along each lane and over all lanes.

    Draw n of lane l is at (start_l + n * golden ratio) mod 1 of the stacked weights. Such a low-discrepancy sequence is
    never off by more than a few draws; random draws would be off by the square root of their number.
    """

    def __init__(self, weights: list[float], seed: int):
        total = sum(weights)
        self.start = seed_of(seed, "mixture")
        self.stops = [round(2**64 * sum(weights[: n + 1]) / total) for n in range(len(weights))]
        self.stops[-1] = 2**64

    def source(self, lane: int, number: int) -> int:
        """The source of the lane's image `number`, from 0."""
        place = (self.start + lane * LANE_STEP + number * GOLDEN) % 2**64
        return bisect.bisect_right(self.stops, place)


# ------------------------------------------------------------------------------------------------ order within a source


class SampleRange(NamedTuple):
    """Samples first to stop (None: to the end) of a shard."""

    shard: int
    first: int
    stop: int | None


class Chunk(NamedTuple):
    """The unit of a lane's position in a source: sample ranges of one epoch, read one after another."""

    epoch: int
    ranges: list[SampleRange]


class SamplePosition(NamedTuple):
    """Where a sample lies: sample `index` of shard number `shard`, in pass `epoch` over the source."""

    epoch: int
    shard: int
    index: int


@dataclass(frozen=True, eq=False)
class BySample:
    """For sources with known shard sizes: an epoch's samples, in the order of its shards, are cut into L stretches."""

    name: str
    samples_s: np.ndarray
    seed: int

    def chunk(self, lane: int, lanes: int, number: int) -> Chunk:
        """A lane's stretch of epoch `number`; empty for some lanes if there are more lanes than samples.

        Number the samples of all epochs consecutively; lane l gets as many samples of each epoch as the numbers
        l + k * L that fall into it. So all lanes have equally many samples, up to one, for any count, and no lane is
        left without any.
        """
        count = int(self.samples_s.sum())
        turn = (lane - number * count) % lanes  # the lane's rank among the lanes of this epoch
        each, more = divmod(count, lanes)
        missing = each + (turn < more)
        order, stops = _epoch_order(self, number)
        first = (turn * each + min(turn, more) + seed_of(self.seed, "cut", self.name, number)) % count
        ranges = []
        while missing:
            at = int(np.searchsorted(stops, first, side="right"))
            shard = int(order[at])
            begin = int(stops[at] - self.samples_s[shard])
            length = min(missing, int(stops[at]) - first)
            ranges.append(SampleRange(shard, first - begin, first - begin + length))
            first, missing = (first + length) % count, missing - length
        return Chunk(number, ranges)


@functools.lru_cache(maxsize=32)
def _epoch_order(source: BySample, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    order = permutation(len(source.samples_s), source.seed, "shards", source.name, epoch)
    return order, np.cumsum(source.samples_s[order])


@dataclass(frozen=True, eq=False)
class ByShard:
    """For sources with unknown shard sizes: whole shards are distributed over the lanes."""

    name: str
    shards: int
    seed: int

    def chunk(self, lane: int, lanes: int, number: int) -> Chunk:
        """The lane's shard `number`, counted over all epochs."""
        epoch, index = divmod(lane + number * lanes, self.shards)
        shard = int(permutation(self.shards, self.seed, "shards", self.name, epoch)[index])
        return Chunk(epoch, [SampleRange(shard, 0, None)])


# ------------------------------------------------------------------------------------------------- lanes and readers


class DueLanes:
    """A reader's lanes, of which the one that has delivered the fewest images is due, the first one among equals.
    delivered: lane -> images."""

    def __init__(self, assignment: "LaneAssignment", reader: int, delivered: dict[int, int]):
        self.images, self.images_per_turn = assignment.images_of_reader(reader), assignment.images_per_turn
        self.waiting = [(delivered[lane], n, lane) for n, lane in enumerate(assignment.reader_lanes(reader))]
        heapq.heapify(self.waiting)

    def take(self) -> list[int]:
        """The lanes of the reader's images in the next step, one for each image."""
        lanes: list[int] = []
        while len(lanes) < self.images:
            count, n, lane = self.waiting[0]
            lanes += [lane] * self.images_per_turn
            heapq.heapreplace(self.waiting, (count + self.images_per_turn, n, lane))
        return lanes


@dataclass(frozen=True)
class LaneAssignment:
    """How lanes are distributed over the readers (loader workers, or ranks without workers).

    In each step every reader delivers its part of the rank's images at once, so a reader always has the same lanes.
    If lanes, batch and ranks divide each other, the assignment is `ordered`: the global batches do not depend on ranks
    and workers. Otherwise each reader always continues with the lane that has delivered the fewest images: nothing is
    lost or repeated, but the order depends on the number of readers.
    Raises DataError if the lanes cannot be distributed.
    """

    lanes: int
    global_batch_size: int
    rank: int
    world_size: int
    workers: int

    def __post_init__(self):
        if min(self.global_batch_size, self.world_size) < 1 or self.workers < 0:
            raise DataError("batch size and number of processes must be at least 1, data.workers at least 0")
        if not 0 <= self.rank < self.world_size:
            raise DataError(f"rank {self.rank} must lie in 0..{self.world_size - 1}")
        if self.global_batch_size % self.world_size:
            raise DataError(
                f"trainer.global_batch_size={self.global_batch_size} is not divisible by {self.world_size} processes: "
                f"set it to a multiple of {self.world_size}"
            )
        if self.lanes > MOST_LANES:
            raise DataError(f"data.lanes={self.lanes} must be at most {MOST_LANES}")
        if self.lanes < self.world_size:
            raise DataError(
                f"data.lanes={self.lanes} are too few for {self.world_size} processes: start at most {self.lanes}, or "
                "a new run with more lanes"
            )
        if not self.ordered and self.lanes < self.readers * self.world_size:
            raise DataError(
                f"data.lanes={self.lanes} are too few for {self.world_size} processes x {self.readers} workers: set "
                f"data.workers={self.lanes // self.world_size}, or start with data.lanes={self.global_batch_size}"
            )

    @property
    def readers(self) -> int:
        """Readers of each rank."""
        return max(1, self.workers)

    @property
    def images_per_rank(self) -> int:
        """Images of each rank in a step."""
        return self.global_batch_size // self.world_size

    @property
    def ordered(self) -> bool:
        """Whether the global batches do not depend on ranks and workers."""
        return divides(self.lanes, self.global_batch_size, self.world_size)

    @property
    def images_per_turn(self) -> int:
        """Images that a lane delivers in a row."""
        return max(1, self.global_batch_size // self.lanes) if self.ordered else 1

    @property
    def rank_lanes(self) -> list[int]:
        """The rank's lanes, in their order."""
        return [lane for lane in range(self.lanes) if self._rank_of(lane) == self.rank]

    def reader_lanes(self, reader: int) -> list[int]:
        """A reader's lanes, in their order."""
        lanes = self.rank_lanes
        if not self.ordered:
            return lanes[reader :: self.readers]
        first, stop = self._part(self._lanes_of_step, reader)
        return [lane for lane in lanes if first <= lane % self._lanes_of_step < stop]

    def images_of_reader(self, reader: int) -> int:
        """Images that a reader delivers in each step; 0 for some if there are more readers than images."""
        if not self.ordered:
            first, stop = self._part(self.images_per_rank, reader)
            return stop - first
        first, stop = self._part(self._lanes_of_step, reader)
        return (stop - first) * self.images_per_turn

    @property
    def _lanes_of_step(self) -> int:
        """Lanes of a rank whose turn it is in a step."""
        return min(self.lanes, self.global_batch_size) // self.world_size

    def _rank_of(self, lane: int) -> int:
        if not self.ordered:
            return lane % self.world_size
        return lane % (self._lanes_of_step * self.world_size) // self._lanes_of_step

    def _part(self, count: int, reader: int) -> tuple[int, int]:
        """The reader's share of range(count): first, stop."""
        return count * reader // self.readers, count * (reader + 1) // self.readers


def divides(lanes: int, batch: int, world_size: int) -> bool:
    """Whether the global batches do not depend on ranks and workers."""
    return (lanes % batch == 0 or batch % lanes == 0) and min(lanes, batch) % world_size == 0
