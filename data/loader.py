"""What training reads from: `train_batches`."""

import atexit
import functools
import gc
import logging
import os
import signal
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.config import DataConfig, SourceConfig, check_numbers
from data.errors import DataError
from data.evaluation import evaluation_images, evaluation_tokens
from data.shards import Access, Limit, Skipped
from data.sources import Source, check_names, describe, is_among, open_shards, open_source
from data.storage import Cache, Patience
from data.stream import (
    SLOTS,
    Deal,
    Info,
    Item,
    Items,
    Reader,
    add_totals,
    default_lanes,
    divides,
    identity,
    make_state,
    resume,
)
from data.tokens import TokenHeader, TokenSpec, TokenTransform, check_tokens, first_header
from data.transforms import TrainingTransform

logger = logging.getLogger(__name__)

SHOWN_SKIPS = 10  # samples that each process names as it leaves them out; all of them are listed in `skipped`
BUDGET_SAMPLES = 2000  # of a source, over which `max_bad_fraction` is taken
BUDGET_LEAST = 20  # so many bad ones are never too many


class Batch(NamedTuple):
    """One micro-batch of one rank.

    values: uint8 (b, 3, image_size, image_size) images, or int32 (b, t) codes; infos: one for each of them.

    state: what to resume from (see `merge_states`). After a step's last micro-batch it is the state behind that step;
    after an earlier one, the state before it, so that a step cut short is taken again whole.
    skipped: the samples that were left out on the way to this micro-batch as unusable.
    """

    values: torch.Tensor
    infos: list[Info]
    state: dict
    skipped: list[Skipped]

    @property
    def keys(self) -> list[str]:
        """The samples' keys."""
        return [info.key for info in self.infos]

    @property
    def labels(self) -> list[int | None]:
        """The samples' classes, None where there is none."""
        return [info.label for info in self.infos]


class TrainStream:
    """A rank's endless micro-batches; each optimiser step takes global_batch_size / (world_size * micro_batch_size).

    The global batch of a step depends on the seed, the sources, `global_batch_size` and the number of lanes only, bit
    for bit, at any number of ranks and workers that divides the lanes.
    state: a merged state to resume from: at any such division exactly; at any other division or batch size without
    loss or repeats. tokens: what is expected of token shards, with data.content=tokens.
    Raises DataError, before anything is read for training where the mistake can be seen by then.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        state: dict | None = None,
        tokens: TokenSpec | None = None,
    ):
        check_numbers(config)
        self.config, self.micro_batch_size = config, micro_batch_size
        self.steps, self.totals, lanes_states = 0, {}, {}
        lanes, quarantine, before = config.lanes, frozenset(config.quarantine), {}
        if state is not None:
            stream = state.get("stream", {})
            lanes, before = lanes or stream.get("lanes"), stream.get("sources", {})
            quarantine |= frozenset(state.get("quarantine", ()))
        lanes = lanes or default_lanes(global_batch_size, world_size, config.workers)
        if state is None and lanes % global_batch_size and global_batch_size % lanes:
            better = max(1, round(lanes / global_batch_size)) * global_batch_size
            raise DataError(
                f"data.lanes={lanes} must be a multiple of the global batch size {global_batch_size}, or divide it: "
                f"use {better}, or leave it out"
            )
        self.deal = _deal(config, lanes, global_batch_size, rank, world_size)
        if micro_batch_size < 1 or self.deal.share % micro_batch_size:
            raise DataError(
                f"micro-batch size {micro_batch_size} must divide the {self.deal.share} images of a process and step"
            )
        self.quarantine = sorted(quarantine)
        self.sources = open_sources(config, quarantine, before)
        limit = Limit(config.shuffle_block, int(config.shuffle_megabytes * 1e6))
        self.of = identity(self.sources, seed, lanes, limit)
        for source in self.sources:
            if source.counts is None and len(source.shards) < lanes:
                raise DataError(
                    f"source {source.name}: {len(source.shards)} shards without an index cannot be divided among "
                    f"data.lanes={lanes}: write one with `ibq shards check PATH --write-index --index FILE`, or start "
                    f"with at most {len(source.shards)} lanes"
                )
        if state is not None:
            self.steps, lanes_states, totals = resume(state, self.of)
            self.totals = totals if rank == 0 else {}  # the ranks' are added up
            # A source that is left out for a while comes back to where it was.
            self.of["sources"] = {**before, **self.of["sources"]}
        self.lanes = {lane: lanes_states.get(lane, [0, {}]) for lane in self.deal.rank_lanes}
        self.transform = transform_of(config, tokens)
        self.reader = Reader(
            self.sources, self.transform, seed, lanes, limit, config.max_bad_in_a_row, dict(self.lanes)
        )
        first = self.deal.first_reader({lane: place[0] for lane, place in self.lanes.items()})
        items = Items(self.reader, self.deal, first)
        self.items = _WorkerItems(items, self.deal.workers) if self.deal.workers else iter(items)
        self.rest: Item | None = None  # what of an item belongs to the next micro-batch
        self.in_step = 0  # micro-batches of this step that were delivered
        self.behind = self._state()
        self.shown = 0
        self.budgets = {source.name: _Budget(source.name, config.max_bad_fraction) for source in self.sources}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch. Its state counts what was delivered and never what workers have read ahead."""
        values = np.empty((self.micro_batch_size, *self.transform.shape), self.transform.dtype)
        infos, skipped = [], []
        while (missing := self.micro_batch_size - len(infos)) > 0:
            item, self.rest = self.rest or self._next_item(), None
            if len(item.infos) > missing:
                self.rest = Item(item.values[missing:], item.infos[missing:], {}, [], Counter())
                item = item._replace(values=item.values[:missing], infos=item.infos[:missing])
            # Not by torch, whose many threads would wait for the cores that the workers use.
            values[len(infos) : len(infos) + len(item.infos)] = item.values
            infos += item.infos
            skipped += item.skipped
            self.lanes.update(item.lanes)
            self._count(item)
        self._show(skipped)
        self.in_step += 1
        if self.in_step * self.micro_batch_size == self.deal.share:
            self.in_step, self.steps = 0, self.steps + 1
            self.behind = self._state()
        return Batch(torch.from_numpy(values), infos, self.behind, skipped)

    def close(self) -> None:
        """Ends the workers."""
        if isinstance(self.items, _WorkerItems):
            self.items.close()

    def describe(self, steps: int) -> str:
        """Lines that say what will be read in so many steps."""
        images = steps * self.deal.global_batch_size
        total = sum(source.weight for source in self.sources)
        lines = []
        for source in self.sources:
            share = source.weight / total
            passes = f" = {images * share / source.samples:.3g} epochs" if source.samples else ""
            of_all = f", {share:.1%} of all" if len(self.sources) > 1 else ""
            lines.append(f"reads {describe(source)}: {round(images * share):,} images{passes}{of_all}")
        order = "" if self.deal.ordered else "; their order depends on the number of processes and workers"
        return "\n".join([*lines, f"{self.deal.lanes} lanes, {self.deal.workers} workers a process{order}"])

    def _state(self) -> dict:
        state = make_state(self.of, self.deal, self.steps, self.lanes, self.totals)
        return {**state, "quarantine": self.quarantine}

    def _next_item(self) -> Item:
        item = next(self.items)
        if isinstance(item, DataError):
            self.close()
            raise item
        return item

    def _count(self, item: Item) -> None:
        counts = {source.name: {"delivered": 0, "skipped": 0} for source in self.sources}
        for info in item.infos:
            counts[info.source]["delivered"] += 1
        for sample in item.skipped:
            counts[sample.dataset]["skipped"] += 1
        for (name, reason), number in item.filtered.items():
            counts[name][f"filtered/{reason}"] = number
        self.totals = add_totals([self.totals, counts])
        for name, count in counts.items():
            self.budgets[name].update(count["delivered"], count["skipped"], item.skipped)

    def _show(self, skipped: list[Skipped]) -> None:
        for sample in skipped[: max(0, SHOWN_SKIPS - self.shown)]:
            logger.warning("skipped %s in %s: %s", sample.key, sample.source, sample.reason)
        if self.shown <= SHOWN_SKIPS < self.shown + len(skipped):
            logger.warning("more samples are skipped; they are not named here any more")
        self.shown += len(skipped)


class _Budget:
    """Raises DataError once too large a part of a source's latest samples could not be used."""

    def __init__(self, name: str, most: float):
        self.name, self.most = name, most
        self.latest: deque[tuple[int, int]] = deque()
        self.good = self.bad = 0

    def update(self, good: int, bad: int, skipped: list[Skipped]) -> None:
        self.latest.append((good, bad))
        self.good, self.bad = self.good + good, self.bad + bad
        while self.good + self.bad - sum(self.latest[0]) >= BUDGET_SAMPLES:
            good_before, bad_before = self.latest.popleft()
            self.good, self.bad = self.good - good_before, self.bad - bad_before
        if bad and self.bad > max(BUDGET_LEAST, self.most * (self.good + self.bad)):
            last = [sample for sample in skipped if sample.dataset == self.name][-1]
            raise DataError(
                f"source {self.name}: {self.bad} of the latest {self.good + self.bad} samples cannot be used, more "
                f"than data.max_bad_fraction={self.most}; last {last.key} in {last.source} ({last.reason})"
            )


def train_batches(config: DataConfig, **options) -> TrainStream:
    """See `TrainStream`."""
    return TrainStream(config, **options)


def check(
    config: DataConfig,
    train: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    tokens: TokenSpec | None = None,
) -> None:
    """Raises DataError for settings or shards that training could not start with. train: whether the shards to train
    on are looked at, too. progress: called with (tars scanned, tars in all). tokens: what is expected of token shards,
    with data.content=tokens; the first sample of each source is compared with it."""
    check_numbers(config)
    transform_of(config, tokens)
    if train:
        sources = open_sources(config, frozenset(config.quarantine), progress=progress)
        for source in sources if config.content == "tokens" else []:
            shards = [shard for n, shard in enumerate(source.shards) if n not in source.quarantined]
            check_tokens(first_header(shards, f"source {source.name}"), tokens, f"source {source.name}")
    if config.val is None:
        return
    if config.content == "tokens":
        evaluation_tokens(config.val, tokens, access=access_of(config))
    else:
        side = config.val_image_size or config.image_size
        evaluation_images(config.val, image_size=side, resize=config.resize, access=access_of(config))


def token_header(config: DataConfig) -> TokenHeader:
    """What the first token sample of the first source tells; nothing more is read. Raises DataError."""
    (one, *_), access = _configs(config), access_of(config)
    shards = open_shards(one, access, allow_pipes=config.allow_pipes, quarantine=frozenset(config.quarantine))
    kept = [shard for shard in shards if not is_among(shard.url, frozenset(config.quarantine))]
    return first_header(kept, f"source {one.name}")


def access_of(config: DataConfig) -> Access:
    """How the remote shards of a `data` section are reached. Raises DataError."""
    patience = Patience(config.request_seconds, config.retry_seconds)
    if config.cache is None:
        return Access(patience)
    return Access(patience, Cache(Path(config.cache).expanduser(), int(config.cache_gigabytes * 1e9), patience))


def open_sources(
    config: DataConfig,
    quarantine: frozenset[str] = frozenset(),
    before: dict[str, dict] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Source]:
    """The sources of a `data` section, opened. before: source -> its identity when the run began. Raises DataError."""
    configs, access = _configs(config), access_of(config)
    sources = [
        open_source(
            one,
            access,
            content=config.content,
            allow_pipes=config.allow_pipes,
            quarantine=quarantine,
            before=(before or {}).get(one.name),
            progress=progress,
        )
        for one in configs
    ]
    urls = [shard.url for source in sources for shard in source.shards]
    for part in sorted(quarantine):
        if not any(is_among(url, frozenset([part])) for url in urls):
            logger.warning("data.quarantine names %s, which is none of the shards", part)
    return sources


def _configs(config: DataConfig) -> list[SourceConfig]:
    if config.train is not None and config.sources:
        raise DataError("data.train and data.sources are both given: leave one out")
    configs = config.sources or [SourceConfig(root=config.train)]
    check_names(configs)
    return configs


def transform_of(config: DataConfig, tokens: TokenSpec | None = None) -> TrainingTransform | TokenTransform:
    """The training transform of a `data` section. Raises DataError."""
    if config.content == "images":
        return TrainingTransform(
            config.image_size, config.crop, tuple(config.crop_scale), config.resize, config.flip, config.color_jitter
        )
    if config.content != "tokens":
        raise DataError(f"unknown data.content {config.content!r}: choose images or tokens")
    if tokens is None:
        raise DataError("data.content=tokens is for a run that trains on tokens: set data.content=images")
    return TokenTransform(tokens)


def _deal(config: DataConfig, lanes: int, batch: int, rank: int, world_size: int) -> Deal:
    """With fewer workers than wished, where only these keep the order that does not depend on them."""
    deal = Deal(lanes, batch, rank, world_size, config.workers)
    if deal.ordered or not divides(lanes, batch, world_size, 1):
        return deal
    workers = next(n for n in range(config.workers, 0, -1) if divides(lanes, batch, world_size, n))
    logger.warning("data.workers=%d: %d are used, as many as divide the lanes evenly", config.workers, workers)
    return Deal(lanes, batch, rank, world_size, workers)


class _WorkerItems:
    """The items of a DataLoader with workers, in order. `close` ends the workers, whatever they are waiting for."""

    def __init__(self, items: Items, workers: int):
        self.workers = workers
        self.told, self.tell = os.pipe()  # a byte for each worker tells it to end
        transform = items.reader.transform
        values = np.empty((workers, SLOTS, items.deal.item, *transform.shape), transform.dtype)
        items.shared = torch.from_numpy(values).share_memory_().numpy()
        self.shared, self.taken = items.shared, 0
        # Its own generator, since a DataLoader draws a seed and would move the global random state.
        self.iterator: Iterator | None = iter(
            DataLoader(
                items,
                batch_size=None,
                collate_fn=_as_is,
                num_workers=workers,
                prefetch_factor=SLOTS - 1,
                multiprocessing_context="fork",  # for the pipe, and for what is known of the shards
                worker_init_fn=functools.partial(_start_worker, self.told),
                generator=torch.Generator(),
            )
        )
        # At its end Python waits for children that it has sent SIGTERM, which these leave to us.
        atexit.register(_close, weakref.ref(self))

    def __next__(self) -> Item | DataError:
        """Its values are to be copied before the next item is asked for."""
        if self.iterator is None:
            raise StopIteration
        item = next(self.iterator)
        # A DataLoader asks a worker for its item n + 2 when item n is taken.
        number, worker = divmod(self.taken, self.workers)
        self.taken += 1
        return item if isinstance(item, DataError) else item._replace(values=self.shared[worker, number % SLOTS])

    def close(self) -> None:
        if self.iterator is not None:
            os.write(self.tell, bytes(self.workers))
            self.iterator = None  # which collects the workers
            os.close(self.told)
            os.close(self.tell)

    __del__ = close


def _close(items: weakref.ref) -> None:
    if (found := items()) is not None:
        found.close()


def _as_is(item):
    return item


def _start_worker(told: int, _: int) -> None:
    # Launchers signal whole process groups. The parent decides when a run ends, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.freeze()  # what is inherited need not be gone through for garbage
    threading.Thread(target=_end_when_told, args=(told,), daemon=True).start()


def _end_when_told(told: int) -> None:
    os.read(told, 1)
    os._exit(0)  # a worker holds nothing that is worth waiting for
