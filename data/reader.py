"""Reading the samples of lanes, in the order of `data.sampler`.

A sample that cannot be used is skipped, and its lane continues with the next sample of the same source.
"""

import functools
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Queue
from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError, Filtered, ImageError
from data.sampler import BySample, ByShard, Mixture, SamplePosition, permutation, seed_of
from data.samples import Sample, Skipped, Window, WindowLimit
from data.sources import Picked, Source
from data.tokens import TokenTransform
from data.transforms import TrainingTransform

CONCURRENT_FETCHES = 16  # windows of remote shards that a process fetches at once
# Samples in a row that may fail a source's filters: as many as the source has, but at least this many; or, if its size
# is unknown, the second number.
LEAST_FILTERED_IN_A_ROW = 1000
FILTERED_IN_A_ROW_UNKNOWN_SIZE = 100_000


def order_of(source: Source, seed: int) -> BySample | ByShard:
    """How the lanes divide a source."""
    if source.counts is None:
        return ByShard(source.name, len(source.shards), seed)
    return BySample(source.name, np.array(source.counts, np.int64), seed)


class _ChunkWindow(NamedTuple):
    """A window, `offset` samples after the start of the lane's chunk `number`."""

    number: int
    offset: int
    epoch: int
    shard: int
    window: Window


class Cursor:
    """A lane's position in a source: it has read `position` samples of its chunk `number`."""

    def __init__(
        self, source: Source, order: BySample | ByShard, lane: int, lanes: int, limit: WindowLimit, state=(0, 0)
    ):
        self.source, self.order, self.lane, self.lanes, self.limit = source, order, lane, lanes, limit
        self.number, self.position = state
        self.current: _ChunkWindow | None = None
        self.windows: Iterator[_ChunkWindow] | None = None
        self.shuffled = None

    def draw(self) -> tuple[SamplePosition, Sample | ImageError]:
        """The next sample, or why it cannot be used. Raises DataError if the shard cannot be read."""
        if self.current is None or self.position >= self.current.offset + len(self.current.window):
            self._next_window()
        window = self.current.window
        n = int(self.shuffled[self.position - self.current.offset])
        position = SamplePosition(self.current.epoch, self.current.shard, int(window.numbers[n]))
        self.position += 1
        try:
            return position, window.read(n)
        except ImageError as error:
            return position, error

    def _next_window(self) -> None:
        if self.windows is None:
            self.windows = self._windows(self.number, self.position)
            if any(shard.is_streamed for shard in self.source.shards):
                self.windows = _prefetched(self.windows)
        before = self.number, self.position
        self.current = next(self.windows)
        self.number = self.current.number
        # A resumed stream starts in the middle of its first window.
        inside = before[0] == self.number and self.current.offset <= before[1]
        self.position = max(self.current.offset, before[1]) if inside else self.current.offset
        parts = self.source.name, self.current.epoch, self.current.shard, int(self.current.window.numbers[0])
        self.shuffled = permutation(len(self.current.window), self.order.seed, "window", *parts)

    def _windows(self, number: int, position: int) -> Iterator[_ChunkWindow]:
        """All windows from that position on, without end."""
        empty = 0
        while True:
            epoch, ranges = self.order.chunk(self.lane, self.lanes, number)
            offset, empty = 0, empty + 1
            for shard, first, stop in ranges:
                count = None if stop is None else stop - first
                if shard in self.source.quarantined or (count is not None and offset + count <= position):
                    offset += count or 0
                    continue
                numbers = self.source.numbers[shard] if self.source.numbers is not None else None
                for window in self.source.shards[shard].windows(first, stop, self.limit, numbers):
                    if offset + len(window) > position:
                        empty = 0
                        yield _ChunkWindow(number, offset, epoch, shard, window)
                    offset += len(window)
            if empty > self.lanes * max(2, len(self.source.shards)):
                raise DataError(f"source {self.source.name}: lane {self.lane} finds no sample: use fewer data.lanes")
            number, position = number + 1, 0


@functools.cache
def _fetch_slots(_process: int) -> threading.Semaphore:
    """One semaphore per process: a fork must not inherit slots that its parent's threads hold."""
    return threading.Semaphore(CONCURRENT_FETCHES)


def _prefetched(windows: Iterator[_ChunkWindow]) -> Iterator[_ChunkWindow]:
    """The same windows; a thread fetches each one while the previous one is being used."""
    fetched: Queue = Queue(1)

    def fetch() -> None:
        try:
            with _fetch_slots(os.getpid()):
                one = next(windows)
                one.window.fetch()
            fetched.put(one)
        except BaseException as error:  # raised again when the window is requested
            fetched.put(error)

    def start() -> None:
        # A daemon thread, since a worker that ends must not wait for a server.
        threading.Thread(target=fetch, name="prefetch", daemon=True).start()

    start()
    while True:
        one = fetched.get()
        if isinstance(one, BaseException):
            raise one
        start()
        yield one


class SampleInfo(NamedTuple):
    """What is known of a delivered image. shard: the shard's name; label: the class, or None."""

    source: str
    key: str
    shard: str
    position: SamplePosition
    caption: str | None
    label: int | None


class ReadSamples(NamedTuple):
    """What a reader delivers at once.

    values: uint8 (n, 3, side, side) images or int32 (n, t) codes, or None if they are in shared memory. lanes: lane ->
    its state after these samples. filtered: (source, filter) -> number of samples that were left out.
    """

    values: np.ndarray | None
    infos: list[SampleInfo]
    lanes: dict[int, list]
    skipped: list[Skipped]
    filtered: Counter


@dataclass
class LaneReader:
    """Reads lanes. states: lane -> [images delivered, {source name: [chunk number, position in the chunk]}]."""

    sources: list[Source]
    transform: TrainingTransform | TokenTransform
    seed: int
    lanes: int
    limit: WindowLimit
    most_bad_in_a_row: int
    states: dict[int, Any]

    def __post_init__(self):
        self.mixture = Mixture([source.weight for source in self.sources], self.seed)
        self.orders = [order_of(source, self.seed) for source in self.sources]
        self.cursors: dict[tuple[int, int], Cursor] = {}
        self.delivered = {lane: state[0] for lane, state in self.states.items()}

    def read(self, lanes: list[int], values: np.ndarray) -> ReadSamples:
        """One sample from each of `lanes`, which may name a lane several times, written into `values`."""
        skipped, filtered = [], Counter()
        infos = [self._read_sample(lane, value, skipped, filtered) for value, lane in zip(values, lanes, strict=True)]
        return ReadSamples(values, infos, {lane: self._lane_state(lane) for lane in set(lanes)}, skipped, filtered)

    def _or_leave_out(self) -> str:
        has_buckets = self.sources[0].numbers is not None and not isinstance(self.transform, TokenTransform)
        return f", or leave bucket {self.transform.size} out" if has_buckets else ""

    def _cursor(self, lane: int, number: int) -> Cursor:
        if (lane, number) not in self.cursors:
            source = self.sources[number]
            state = self.states[lane][1].get(source.name, (0, 0))
            self.cursors[lane, number] = Cursor(source, self.orders[number], lane, self.lanes, self.limit, state)
        return self.cursors[lane, number]

    def _lane_state(self, lane: int) -> list:
        positions = dict(self.states[lane][1])
        for number, source in enumerate(self.sources):
            if cursor := self.cursors.get((lane, number)):
                positions[source.name] = [cursor.number, cursor.position]
        return [self.delivered[lane], positions]

    def _read_sample(self, lane: int, value: np.ndarray, skipped: list[Skipped], filtered: Counter) -> SampleInfo:
        """Fill `value` with the lane's next image or codes."""
        number = self.mixture.source(lane, self.delivered[lane])
        source, cursor = self.sources[number], self._cursor(lane, number)
        bad_in_a_row, filtered_in_a_row = 0, 0
        while True:
            position, sample = cursor.draw()
            shard = source.shards[position.shard].name
            key = f"sample {position.index}"
            try:
                if isinstance(sample, ImageError):
                    raise sample
                key = sample.key
                picked: Picked = source.pick(sample)
                rng = random.Random(seed_of(self.seed, "augment", source.name, *position))
                self.transform(picked.content, rng, source.check_size, value)
                self.delivered[lane] += 1
                return SampleInfo(source.name, key, shard, position, picked.caption, picked.label)
            except DataError as error:
                raise DataError(f"source {source.name}, {key} in {shard}: {error}") from error
            except Filtered as error:
                filtered[source.name, str(error)] += 1
                filtered_in_a_row, bad_in_a_row = filtered_in_a_row + 1, 0
            except ImageError as error:
                key = error.key or key
                skipped.append(Skipped(shard, key, str(error), source.name))
                bad_in_a_row += 1
            if bad_in_a_row > self.most_bad_in_a_row:
                raise DataError(
                    f"source {source.name}: {bad_in_a_row} images in a row cannot be used, last {key} in {shard} "
                    f"({skipped[-1].reason}); `ibq shards check` finds damaged shards, data.quarantine leaves them out"
                )
            # A lane reads other samples in every epoch, so what it leaves out is representative of the whole source.
            if filtered_in_a_row >= max(LEAST_FILTERED_IN_A_ROW, source.samples or FILTERED_IN_A_ROW_UNKNOWN_SIZE):
                raise DataError(
                    f"source {source.name}: {filtered_in_a_row:,} samples in a row do not pass its filters, last {key} "
                    f"in {shard}: loosen them{self._or_leave_out()}"
                )
