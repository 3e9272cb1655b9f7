"""The endless, deterministic training stream.

A run has L lanes. Each lane is an endless stream of images of its own, drawn from every source by the mixture's
weights; what it gives depends on the seed, the sources, the lane's number and L, and on nothing else. Ranks and loader
workers merely divide the lanes among them: each sample is read by one process and by no other.

Within a source, a lane reads one contiguous stretch of every epoch's shards (whose order is drawn anew for each epoch),
window by window, each window shuffled: so tars are read forwards, and each sample comes exactly once in an epoch. A
sample that cannot be used is passed over, and its lane goes on to the next one of the same source.

A step takes as many images from each lane as from any other, or, where there are more lanes than images in a step, one
from each of the lanes whose turn it is. The state is, for each lane, how many images it gave, and where it is in each
source: what has been delivered, never what was read ahead.
"""

import bisect
import functools
import hashlib
import heapq
import itertools
import os
import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from queue import Queue
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from data.errors import DataError
from data.shards import Limit, Sample, Skipped, TarShard, Window
from data.sources import Picked, Source
from data.storage import is_remote
from data.tokens import TokenTransform
from data.transforms import Filtered, ImageError, TrainingTransform

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: its multiples fill 0..2^64 most evenly
FETCHES = 16  # windows of remote shards that a process fetches at once
LEAST_PATIENCE = 1000  # samples that may fail a source's filters in a row, in a small source
PATIENCE_UNCOUNTED = 100_000  # and in one whose size is not known
MOST_LANES = 100_000
# Of each worker. It may begin an item when the one before the last was taken, and is copied by then: see _WorkerItems.
SLOTS = 3


def seed_of(*parts) -> int:
    """A 64-bit seed from the parts' values; the same in every process and Python version."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


@functools.lru_cache(maxsize=64)
def permutation(count: int, *parts) -> np.ndarray:
    """A random order of range(count) seeded by `parts`, from raw generator bits, which NumPy never changes."""
    return np.argsort(np.random.PCG64(seed_of(*parts)).random_raw(count), kind="stable")


# ---------------------------------------------------------------------------------------------------------- mixture


class Mixture:
    """Which source a lane's n-th image comes from: shares as even as they can be, along each lane and over all lanes.

    The n-th draw of lane l is at (start_l + n * golden ratio) mod 1 of the stacked weights. Such a sequence is never
    off by more than a few draws, where random draws would be off by the root of their number.
    """

    def __init__(self, weights: list[float], seed: int):
        total = sum(weights)
        self.seed = seed
        self.stops = [round(2**64 * sum(weights[: n + 1]) / total) for n in range(len(weights))]
        self.stops[-1] = 2**64

    def source(self, lane: int, number: int) -> int:
        """Of the lane's image `number`, from 0."""
        return bisect.bisect_right(self.stops, (_mixture_start(self.seed, lane) + number * GOLDEN) % 2**64)


@functools.lru_cache(maxsize=1 << 16)
def _mixture_start(seed: int, lane: int) -> int:
    return (seed_of(seed, "mixture") + lane * int(2**64 * 0.7548776662466927)) % 2**64  # as even over the lanes


# ------------------------------------------------------------------------------------------------ order within a source


class Piece(NamedTuple):
    """Samples first to stop (None: all that there are) of a shard."""

    shard: int
    first: int
    stop: int | None


class Part(NamedTuple):
    """What a lane reads in one go of a source: pieces of shards, of one epoch."""

    epoch: int
    pieces: list[Piece]


@dataclass(frozen=True, eq=False)
class BySample:
    """Where every shard's count is known: an epoch's samples, in the order of its shards, are cut into L stretches."""

    name: str
    samples_s: np.ndarray
    seed: int

    def part(self, lane: int, lanes: int, number: int) -> Part:
        """A lane's stretch of epoch `number`; empty for some lanes where there are more lanes than samples.

        Sample l + k * L of the endless row of epochs is lane l's k-th. So each lane has the same number of samples, up
        to one, however the count divides, and no lane is left without any.
        """
        count = int(self.samples_s.sum())
        turn = (lane - number * count) % lanes  # the lane's place among those of this epoch
        each, more = divmod(count, lanes)
        missing = each + (turn < more)
        order, stops = _epoch_order(self, number)
        first = (turn * each + min(turn, more) + seed_of(self.seed, "cut", self.name, number)) % count
        pieces = []
        while missing:
            at = int(np.searchsorted(stops, first, side="right"))
            shard = int(order[at])
            begin = int(stops[at] - self.samples_s[shard])
            length = min(missing, int(stops[at]) - first)
            pieces.append(Piece(shard, first - begin, first - begin + length))
            first, missing = (first + length) % count, missing - length
        return Part(number, pieces)


@functools.lru_cache(maxsize=32)
def _epoch_order(source: BySample, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    order = permutation(len(source.samples_s), source.seed, "shards", source.name, epoch)
    return order, np.cumsum(source.samples_s[order])


@dataclass(frozen=True, eq=False)
class ByShard:
    """Where counts are not known: whole shards are dealt to the lanes."""

    name: str
    shards: int
    seed: int

    def part(self, lane: int, lanes: int, number: int) -> Part:
        """The lane's shard `number`, of the endless row of epochs."""
        epoch, place = divmod(lane + number * lanes, self.shards)
        return Part(
            epoch, [Piece(int(permutation(self.shards, self.seed, "shards", self.name, epoch)[place]), 0, None)]
        )


def order_of(source: Source, seed: int) -> BySample | ByShard:
    """How lanes divide a source."""
    if source.counts is None:
        return ByShard(source.name, len(source.shards), seed)
    return BySample(source.name, np.array(source.counts, np.int64), seed)


class Place(NamedTuple):
    """Where a sample lies: sample `index` of shard number `shard`, in pass `epoch` over the source."""

    epoch: int
    shard: int
    index: int


class _Here(NamedTuple):
    """A window in its part: `behind` samples of part `number` lie before it."""

    number: int
    behind: int
    epoch: int
    shard: int
    window: Window


class Cursor:
    """A lane's place in a source: `position` samples of its part `number` are behind it."""

    def __init__(self, source: Source, order: BySample | ByShard, lane: int, lanes: int, limit: Limit, state=(0, 0)):
        self.source, self.order, self.lane, self.lanes, self.limit = source, order, lane, lanes, limit
        self.number, self.position = state
        self.here: _Here | None = None
        self.windows: Iterator[_Here] | None = None
        self.shuffled = None

    def draw(self) -> tuple[Place, Sample | ImageError]:
        """The next sample, or why it cannot be used. Raises DataError where the shard cannot be read."""
        if self.here is None or self.position >= self.here.behind + len(self.here.window):
            self._next_window()
        window = self.here.window
        n = int(self.shuffled[self.position - self.here.behind])
        place = Place(self.here.epoch, self.here.shard, window.first + n)
        self.position += 1
        try:
            return place, window.read(n)
        except ImageError as error:
            return place, error

    def _next_window(self) -> None:
        if self.windows is None:
            self.windows = self._windows(self.number, self.position)
            if any(isinstance(shard, TarShard) and _is_far(shard) for shard in self.source.shards):
                self.windows = _ahead(self.windows)
        before = self.number, self.position
        self.here = next(self.windows)
        self.number = self.here.number
        # The first window of a resumed stream is entered in its middle.
        inside = before[0] == self.number and self.here.behind <= before[1]
        self.position = max(self.here.behind, before[1]) if inside else self.here.behind
        parts = self.source.name, self.here.epoch, self.here.shard, self.here.window.first
        self.shuffled = permutation(len(self.here.window), self.order.seed, "window", *parts)

    def _windows(self, number: int, position: int) -> Iterator[_Here]:
        """The windows from that position on, without end."""
        empty = 0
        while True:
            epoch, pieces = self.order.part(self.lane, self.lanes, number)
            behind, empty = 0, empty + 1
            for piece in pieces:
                count = None if piece.stop is None else piece.stop - piece.first
                if piece.shard in self.source.quarantined or (count is not None and behind + count <= position):
                    behind += count or 0
                    continue
                for window in self.source.shards[piece.shard].windows(piece.first, piece.stop, self.limit):
                    if behind + len(window) > position:
                        empty = 0
                        yield _Here(number, behind, epoch, piece.shard, window)
                    behind += len(window)
            if empty > self.lanes * max(2, len(self.source.shards)):
                raise DataError(f"source {self.source.name}: lane {self.lane} finds no sample: use fewer data.lanes")
            number, position = number + 1, 0


def _is_far(shard: TarShard) -> bool:
    return is_remote(shard.url) or shard.url.startswith("pipe:")


@functools.cache
def _fetches(_process: int) -> threading.Semaphore:
    """Of each process: a fork must not inherit slots that its parent's threads hold."""
    return threading.Semaphore(FETCHES)


def _ahead(windows: Iterator[_Here]) -> Iterator[_Here]:
    """The same windows, each fetched by a thread while the one before it is being used."""
    found: Queue = Queue(1)

    def fetch() -> None:
        try:
            with _fetches(os.getpid()):
                here = next(windows)
                here.window.fetch()
            found.put(here)
        except BaseException as error:  # it is raised again where the window is asked for
            found.put(error)

    # Daemons, since a worker that ends must not wait for a server.
    threading.Thread(target=fetch, daemon=True).start()
    while True:
        here = found.get()
        if isinstance(here, BaseException):
            raise here
        threading.Thread(target=fetch, daemon=True).start()
        yield here


# --------------------------------------------------------------------------------------------------------- dealing


@dataclass(frozen=True)
class Deal:
    """How lanes are dealt to the readers (loader workers, or ranks without any). DataError where they cannot be.

    In order, where lanes, batch, ranks and workers divide each other: the global batches are then the same for all of
    them. Otherwise each reader has its own lanes, and whichever lane of a reader gave least is next: nothing is lost
    or repeated, but the order depends on the number of readers.
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
        if self.lanes < self.readers * self.world_size:
            enough = default_lanes(self.global_batch_size, self.world_size, self.workers)
            raise DataError(
                f"data.lanes={self.lanes} are too few for {self.world_size} processes x {self.readers} workers: set "
                f"data.workers={self.lanes // self.world_size}, or start with data.lanes={enough}"
            )

    @property
    def readers(self) -> int:
        """Of each rank."""
        return max(1, self.workers)

    @property
    def share(self) -> int:
        """Images of a rank in each step."""
        return self.global_batch_size // self.world_size

    @property
    def ordered(self) -> bool:
        """Whether the global batches do not depend on ranks and workers."""
        return divides(self.lanes, self.global_batch_size, self.world_size, self.readers)

    @property
    def rank_lanes(self) -> list[int]:
        """The rank's lanes, in their order."""
        if not self.ordered:
            return list(range(self.rank, self.lanes, self.world_size))
        in_step = min(self.lanes, self.global_batch_size)
        each = in_step // self.world_size
        return [lane for lane in range(self.lanes) if lane % in_step // each == self.rank]

    @property
    def images_of_lane(self) -> int:
        """Images that a lane gives in a row."""
        return max(1, self.global_batch_size // self.lanes) if self.ordered else 1

    @property
    def item(self) -> int:
        """Images that a reader hands over at once."""
        if not self.ordered:
            return self.share // self.readers if self.share % self.readers == 0 else 1
        lanes_of_reader, lanes_of_step = len(self.rank_lanes) // self.readers, self.share // self.images_of_lane
        lanes = next(n for n in range(lanes_of_step, 0, -1) if lanes_of_step % n == 0 and lanes_of_reader % n == 0)
        return lanes * self.images_of_lane

    def reader_lanes(self, reader: int) -> list[int]:
        """A reader's lanes, in their order."""
        lanes = self.rank_lanes
        in_item = self.item // self.images_of_lane if self.ordered else 1
        return [lane for n, lane in enumerate(lanes) if n // in_item % self.readers == reader]

    def first_reader(self, given: dict[int, int]) -> int:
        """Whose turn it is, from the images that each of the rank's lanes gave."""
        if not self.ordered:
            return 0
        lanes = self.rank_lanes
        least = min(given[lane] for lane in lanes)
        behind = sum(given[lane] > least for lane in lanes)
        return behind // (self.item // self.images_of_lane) % self.readers


def divides(lanes: int, batch: int, world_size: int, readers: int) -> bool:
    """Whether the global batches do not depend on ranks and workers."""
    if lanes % batch and batch % lanes:
        return False
    return min(lanes, batch) % world_size == 0 and lanes // world_size % readers == 0


def default_lanes(batch: int, world_size: int, workers: int) -> int:
    """One for each image of the global batch, or as many times that as the workers of a rank need."""
    readers = max(1, workers)
    return next(batch * n for n in itertools.count(1) if batch * n // world_size % readers == 0)


# ---------------------------------------------------------------------------------------------------------- reading


class Info(NamedTuple):
    """What is told of a delivered image. place: see `Place`; shard: the shard's name; label: the class, or None."""

    source: str
    key: str
    shard: str
    place: Place
    caption: str | None
    label: int | None


class Item(NamedTuple):
    """What a reader hands over. values: uint8 (n, 3, side, side) images or int32 (n, t) codes, or None: in
    `Items.shared`; lanes: the states that its lanes now have; filtered: (source, filter) -> samples left out."""

    values: np.ndarray | None
    infos: list[Info]
    lanes: dict[int, list]
    skipped: list[Skipped]
    filtered: Counter


@dataclass
class Reader:
    """Reads lanes. `states`: lane -> [images given, [part, position] of each source by its name]."""

    sources: list[Source]
    transform: TrainingTransform | TokenTransform
    seed: int
    lanes: int
    limit: Limit
    most_bad_in_a_row: int
    states: dict[int, Any]

    def __post_init__(self):
        self.mixture = Mixture([source.weight for source in self.sources], self.seed)
        self.orders = [order_of(source, self.seed) for source in self.sources]
        self.cursors: dict[tuple[int, int], Cursor] = {}
        # A lane meets other samples in every epoch, so that what it passes over tells of the whole source.
        self.patience = [max(LEAST_PATIENCE, source.samples or PATIENCE_UNCOUNTED) for source in self.sources]
        self.given = {lane: state[0] for lane, state in self.states.items()}

    def item(self, lanes: list[int], values: np.ndarray) -> Item:
        """One sample from each of `lanes`, which may name a lane several times, put into `values`."""
        infos, skipped, filtered = [], [], Counter()
        for value, lane in zip(values, lanes, strict=True):
            infos.append(self._sample(lane, value, skipped, filtered))
        return Item(values, infos, {lane: self._state(lane) for lane in set(lanes)}, skipped, filtered)

    def _cursor(self, lane: int, number: int) -> Cursor:
        if (lane, number) not in self.cursors:
            source = self.sources[number]
            state = self.states[lane][1].get(source.name, (0, 0))
            self.cursors[lane, number] = Cursor(source, self.orders[number], lane, self.lanes, self.limit, state)
        return self.cursors[lane, number]

    def _state(self, lane: int) -> list:
        places = dict(self.states[lane][1])
        for number, source in enumerate(self.sources):
            if cursor := self.cursors.get((lane, number)):
                places[source.name] = [cursor.number, cursor.position]
        return [self.given[lane], places]

    def _sample(self, lane: int, value: np.ndarray, skipped: list[Skipped], filtered: Counter) -> Info:
        """Fills `value` with the lane's next image or codes."""
        number = self.mixture.source(lane, self.given[lane])
        source, cursor = self.sources[number], self._cursor(lane, number)
        bad, left_out = 0, 0
        while True:
            place, sample = cursor.draw()
            shard = source.shards[place.shard].name
            key = f"sample {place.index}"
            try:
                if isinstance(sample, ImageError):
                    raise sample
                key = sample.key
                picked: Picked = source.pick(sample)
                rng = random.Random(seed_of(self.seed, "augment", source.name, *place))
                self.transform(picked.content, rng, source.filters.check_size, value)
                self.given[lane] += 1
                return Info(source.name, key, shard, place, picked.caption, picked.label)
            except DataError as error:
                raise DataError(f"source {source.name}, {key} in {shard}: {error}") from error
            except Filtered as error:
                filtered[source.name, str(error)] += 1
                left_out, bad = left_out + 1, 0
            except ImageError as error:
                skipped.append(Skipped(shard, key, str(error), source.name))
                bad += 1
            if bad > self.most_bad_in_a_row:
                raise DataError(
                    f"source {source.name}: {bad} images in a row cannot be used, last {key} in {shard} "
                    f"({skipped[-1].reason}); `ibq shards check` finds damaged shards, data.quarantine leaves them out"
                )
            if left_out >= self.patience[number]:
                raise DataError(
                    f"source {source.name}: {left_out:,} samples in a row do not pass its filters, last {key} in "
                    f"{shard}: loosen them"
                )


@dataclass
class Items(IterableDataset):
    """A rank's endless items, dealt by turn to the DataLoader's workers.

    A worker hands over a DataError as an item, since a DataLoader would bury its one line in a traceback.
    """

    reader: Reader
    deal: Deal
    first_reader: int = 0
    # (workers, SLOTS, images of an item, *shape of an image or its codes), which the workers write to by turn: fresh
    # shared memory for each item would cost as much as a tenth of decoding its images.
    shared: np.ndarray | None = None

    def __iter__(self) -> Iterator[Item | DataError]:
        worker = get_worker_info()
        turn = (worker.id if worker else 0) + self.first_reader
        given = self.reader.given
        # Whichever lane gave least is next, the first among equals.
        waiting = [(given[lane], n, lane) for n, lane in enumerate(self.deal.reader_lanes(turn % self.deal.readers))]
        heapq.heapify(waiting)
        images_of_item, images_of_lane, transform = self.deal.item, self.deal.images_of_lane, self.reader.transform
        try:
            for number in itertools.count():
                lanes = []
                while len(lanes) < images_of_item:
                    count, n, lane = waiting[0]
                    lanes += [lane] * images_of_lane
                    heapq.heapreplace(waiting, (count + images_of_lane, n, lane))
                if worker is None:
                    yield self.reader.item(lanes, np.empty((images_of_item, *transform.shape), transform.dtype))
                else:
                    item = self.reader.item(lanes, self.shared[worker.id, number % SLOTS])
                    yield item._replace(values=None)  # they are where the other side looks for them
        except DataError as error:
            yield error


# ------------------------------------------------------------------------------------------------------------ state


def identity(sources: list[Source], seed: int, lanes: int, limit: Limit) -> dict:
    """What must be the same for a state to mean the same images. Weights may change: lanes go on where they are."""
    return {
        "seed": seed,
        "lanes": lanes,
        "shuffle_block": limit.samples,
        "shuffle_bytes": limit.bytes,
        "sources": {source.name: source.identity() for source in sources},
    }


def make_state(of: dict, deal: Deal, steps: int, lanes: dict[int, list], totals: dict[str, dict[str, int]]) -> dict:
    """The JSON-able state of this rank behind `steps` steps. totals: source -> what (``delivered``, ``skipped``,
    ``filtered/FILTER``) -> number of samples."""
    return {
        "stream": of,
        "steps": steps,
        "lanes": {str(lane): state for lane, state in sorted(lanes.items())},
        "totals": totals,
        "ranks": [deal.rank],
        "world_size": deal.world_size,
    }


def merge_states(states: list[dict]) -> dict:
    """One state from those of all ranks' latest batches; the ranks must have taken equally many steps."""
    if not states:
        raise DataError("no data states to merge: give one of each rank")
    first = states[0]
    for state in states[1:]:
        for name in ("stream", "steps", "world_size"):
            if state[name] != first[name]:
                raise DataError(
                    f"data states differ in {name}: {first[name]} and {state[name]}; merge those of one moment"
                )
    lanes = {lane: place for state in states for lane, place in state["lanes"].items()}
    ranks = sorted({rank for state in states for rank in state["ranks"]})
    totals = add_totals(state["totals"] for state in states)
    lanes = dict(sorted(lanes.items(), key=lambda item: int(item[0])))
    return {**first, "lanes": lanes, "totals": totals, "ranks": ranks}


def add_totals(many: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """Sums of source -> what -> number of samples."""
    total: dict[str, dict[str, int]] = {}
    for totals in many:
        for name, counts in totals.items():
            of_source = total.setdefault(name, {})
            for what, count in counts.items():
                of_source[what] = of_source.get(what, 0) + count
    return total


def resume(state: dict, of: dict) -> tuple[int, dict[int, list], dict[str, dict[str, int]]]:
    """(steps, lanes' states, totals) from a merged state, once it is shown to fit this stream."""
    if not {"stream", "steps", "world_size", "lanes", "totals", "ranks"} <= state.keys():
        raise DataError("the checkpoint's data state is damaged or of another version: resume from another checkpoint")
    if state["ranks"] != list(range(state["world_size"])):
        raise DataError(
            f"the data state holds ranks {state['ranks']} of {state['world_size']}: merge all ranks' states first"
        )
    before = state["stream"]
    for name, value in of.items():
        if name != "sources" and before[name] != value:
            raise DataError(f"cannot resume: {name} was {before[name]} and is now {value}; set it back")
    for name, value in of["sources"].items():
        if (then := before["sources"].get(name, value)) != value:
            told = ["{shards} shards with {samples} samples".format(**one) for one in (then, value)]
            raise DataError(
                f"cannot resume: source {name} was {told[0]} and is now {told[1]}, or other ones of that number; give "
                "the same shards, or call the changed source by another name (in data.sources), which starts it anew"
            )
    return state["steps"], {int(lane): place for lane, place in state["lanes"].items()}, state["totals"]
