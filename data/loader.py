"""What training reads from: `train_batches`."""

import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.addresses import redacted
from data.buckets import (
    OF_IMAGES,
    OF_TOKENS,
    Division,
    Words,
    bucket_sizes,
    check_batches,
    check_token_shards,
    divide,
    grid_sizes,
    with_batches,
)
from data.cache import Access, Cache
from data.classes import merged_classes, read_classes
from data.config import DataConfig, SourceConfig, check_numbers
from data.errors import DataError, ImageError
from data.evaluation import evaluation_images, evaluation_tokens
from data.folder_reader import file_shard, is_files
from data.key_lists import describe_lists
from data.reader import LaneReader, ReadSamples, SampleInfo
from data.sampler import LaneAssignment, Mixture, seed_of
from data.samples import Skipped, WindowLimit, is_image
from data.shards import expand
from data.source_configs import placed_sources, source_configs
from data.sources import (
    Source,
    check_remote,
    classes_of,
    describe,
    digest,
    is_among,
    layout_of,
    open_shards,
    open_source,
)
from data.storage import Timeouts
from data.stream_state import Totals, add_totals, restore, stream_identity
from data.text import printable
from data.tokens import TokenHeader, TokenSpec, TokenTransform, first_header
from data.transforms import Size, TrainingTransform
from data.workers import LaneDataset, Part, WorkerLoader

logger = logging.getLogger(__name__)

CONTENTS = ("images", "tokens")
WARNED_SKIPS = 10  # skipped samples that each process logs; all of them are in `Batch.skipped`
BUDGET_SAMPLES = 2000  # latest samples of a source that `max_bad_fraction` refers to
PROBED = WindowLimit(64, 16 << 20)  # samples and bytes at the start of tars
BUDGET_LEAST = 20  # this many bad samples are always accepted


class Batch(NamedTuple):
    """One micro-batch of one rank.

    values: uint8 (b, 3, height, width) images, or int32 (b, rows * columns) codes; infos: one for each of them. grid:
    rows and columns of the codes; None for images.

    state: what to resume from (see `merge_states`). After a step's last micro-batch it is the state after that step;
    after an earlier one, the state before the step, so that an interrupted step is repeated as a whole.
    skipped: the unusable samples that were left out since the previous micro-batch.
    """

    values: torch.Tensor
    infos: list[SampleInfo]
    state: dict
    skipped: list[Skipped]
    grid: Size | None = None

    @property
    def keys(self) -> list[str]:
        return [info.key for info in self.infos]

    @property
    def labels(self) -> list[int | None]:
        """The samples' classes, None where there is none."""
        return [info.label for info in self.infos]


class ChangedTars(NamedTuple):
    """Hashes of the tars of a source, before and now."""

    source: str
    before: str
    now: str


@dataclass
class _Part:
    """A rank's share of the images of one size, or of the codes of one grid. name: of the bucket or grid, or empty if
    there is one only. lanes: lane -> its state after the images that were delivered."""

    name: str
    micro_batch_size: int
    reader: LaneReader
    assignment: LaneAssignment
    lanes: dict[int, list]


def _lane_key(part: str, lane: int) -> str:
    """How the state names a lane of a part."""
    return f"{part}/{lane}" if part else str(lane)


class TrainStream:
    """A rank's infinite micro-batches; each optimizer step takes global_batch_size / (world_size * micro_batch_size).

    The global batch of a step depends only on the seed, the sources, `global_batch_size` and the number of lanes, bit
    for bit, for any number of ranks that divides the lanes and any number of workers.

    With buckets, all images of a step have the size of one bucket. A larger bucket has fewer images in a step, in as
    many micro-batches (see `data.buckets.with_batches`). So it is with tokens of several grids.

    state: a merged state to resume from: exactly for any such number; for other numbers or another batch size, without
    loss or repeats. tokens: what token shards must contain, with data.content=tokens. progress: called with (headers of
    samples read, headers to read), where buckets or grids need sizes that no index tells.
    Raises DataError, before any sample is read if the mistake is visible by then.
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
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        check_numbers(config)
        self.config, self.rank, self.world_size = config, rank, world_size
        before = state or {}
        stream = before.get("stream", {})
        sources_before = stream.get("sources", {})
        quarantine = frozenset([*config.quarantine, *before.get("quarantine", ())])
        lanes = config.lanes or stream.get("lanes") or global_batch_size
        if state is None and lanes % global_batch_size and global_batch_size % lanes:
            better = max(1, round(lanes / global_batch_size)) * global_batch_size
            raise DataError(
                f"data.lanes={lanes} must be a multiple of the global batch size {global_batch_size}, or divide it: "
                f"use {better}, or leave it out"
            )
        assignment = LaneAssignment(lanes, global_batch_size, rank, world_size, config.workers)
        if micro_batch_size < 1 or assignment.images_per_rank % micro_batch_size:
            raise DataError(
                f"micro-batch size {micro_batch_size} must divide the {assignment.images_per_rank} images of a "
                "process and step"
            )
        self.micro_batches = assignment.images_per_rank // micro_batch_size
        self.quarantine = sorted(quarantine)
        self.sources = open_sources(config, quarantine, sources_before)
        _check_enough_shards(self.sources, lanes)
        limit = WindowLimit(config.shuffle_block, int(config.shuffle_megabytes * 1e6))
        division_before = stream.get("division", {})
        self.division, buckets = None, None
        if sizes := _divided_sizes(config, tokens):
            words = OF_TOKENS if config.content == "tokens" else OF_IMAGES
            check_batches(sizes, global_batch_size, world_size, self.micro_batches, words)
            self.division = _division(config, sizes, self.sources, global_batch_size, division_before, progress)
            # The order matters: row n of the model's table belongs to grid n.
            named = [Size(*grid) for grid in tokens.grids] if config.content == "tokens" else sizes
            buckets = {f"{words.one}s": list(map(str, named)), "division": self.division.identity()}
        self.identity = stream_identity(self.sources, seed, lanes, limit, buckets)
        # Not in the identity: tars that were made again continue, and a node may have copies without an index.
        self.tar_hashes_before = before.get("tar_hashes", {})
        known = {source.name: found for source in self.sources if (found := source.tar_hash()) is not None}
        self.tar_hashes = {**self.tar_hashes_before, **known}
        self.steps, self.totals, lane_states = 0, {}, {}
        if state is not None:
            self.steps, lane_states, totals = restore(state, self.identity)
            self.totals = totals if rank == 0 else {}  # totals are summed over the ranks
            # Keep the sources that are left out now, so that they can continue later from where they were.
            self.identity["sources"] = {**sources_before, **self.identity["sources"]}
            if buckets is not None:
                merged = {
                    bucket: {**division_before.get(bucket, {}), **now} for bucket, now in buckets["division"].items()
                }
                self.identity["division"] = {**division_before, **merged}

        def part_of(name: str, sources: list[Source], transform, one: LaneAssignment) -> _Part:
            states = {lane: lane_states.get(_lane_key(name, lane), [0, {}]) for lane in one.rank_lanes}
            reader = LaneReader(sources, transform, seed, lanes, limit, config.max_bad_in_a_row, dict(states))
            return _Part(name, one.images_per_rank // self.micro_batches, reader, one, states)

        if self.division is None:
            self.parts = [part_of("", self.sources, transform_of(config, tokens), assignment)]
        else:
            self.parts = [
                part_of(
                    one.bucket.name,
                    one.sources,
                    transform_of(config, tokens, one.bucket.size),
                    replace(assignment, global_batch_size=one.bucket.batch),
                )
                for one in self.division.contents
            ]
        kept = {_lane_key(part.name, lane) for part in self.parts for lane in range(lanes)}
        # Lanes of buckets that are empty now, kept for later.
        self.other_lanes = {key: one for key, one in lane_states.items() if key not in kept} if rank == 0 else {}
        _check_lanes(self.parts, before, OF_TOKENS if config.content == "tokens" else OF_IMAGES)
        # Steps of the buckets are as evenly mixed as images of the sources.
        weights = [1.0] if self.division is None else [one.share / one.bucket.batch for one in self.division.contents]
        self.mixture = Mixture(weights, seed_of(seed, "buckets"))
        parts = [Part(part.reader, part.assignment) for part in self.parts]
        dataset = LaneDataset(parts, self.part_of_step, self.steps)
        self.reads = WorkerLoader(dataset, config.workers) if config.workers else iter(dataset)
        self.rest: ReadSamples | None = None  # the part of a read that belongs to the next micro-batch
        self.micro_batches_of_step, self.reads_of_step = 0, 0  # so far
        self.step_state = self._state()
        self.warned_skips = 0
        # Reported once in a run; they are no samples, so they count for no budget.
        is_first = rank == 0 and state is None
        self.unread = [skipped for source in self.sources for skipped in source.skipped_unread] if is_first else []
        self.budgets = {source.name: _BadSampleBudget(source.name, config.max_bad_fraction) for source in self.sources}

    def part_of_step(self, step: int) -> int:
        """The number of the part (the bucket) of step `step`, from 0."""
        return self.mixture.source(0, step)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch. Its state counts what was delivered and never what workers have read ahead."""
        part = self.parts[self.part_of_step(self.steps)]
        transform = part.reader.transform
        values = np.empty((part.micro_batch_size, *transform.shape), transform.dtype)
        infos, skipped, self.unread = [], self.unread, []
        while (missing := part.micro_batch_size - len(infos)) > 0:
            read, self.rest = self.rest or self._next_read(), None
            if len(read.infos) > missing:
                self.rest = ReadSamples(read.values[missing:], read.infos[missing:], {}, [], Counter())
                read = read._replace(values=read.values[:missing], infos=read.infos[:missing])
            # Copied by NumPy: torch's threads would compete with the workers for cores.
            values[len(infos) : len(infos) + len(read.infos)] = read.values
            infos += read.infos
            skipped += read.skipped
            part.lanes.update(read.lanes)
            self._count(read)
        self._warn(skipped)
        self.micro_batches_of_step += 1
        if self.micro_batches_of_step == self.micro_batches:
            while self.reads_of_step < part.assignment.readers:
                self._next_read()  # of readers that have no image in this step
            self.micro_batches_of_step, self.reads_of_step, self.steps = 0, 0, self.steps + 1
            self.step_state = self._state()
        grid = transform.size if isinstance(transform, TokenTransform) else None
        return Batch(torch.from_numpy(values), infos, self.step_state, skipped, grid)

    def close(self) -> None:
        """End the workers."""
        if isinstance(self.reads, WorkerLoader):
            self.reads.close()

    def seen(self) -> str:
        """What the sources hold, in a line, and a hash of all that every rank must have alike."""
        unknown = [source.unknown_addresses() for source in self.sources]
        return f"{'; '.join(map(describe, self.sources))} ({digest([self.identity, unknown])})"

    def changed_tars(self) -> list[ChangedTars]:
        """The sources whose tars have other content than in the state, although their samples have the same sizes and
        keys: tars that were made again. Known where an index was there both times."""
        before = self.tar_hashes_before
        return [
            ChangedTars(name, before[name], now)
            for name, now in self.tar_hashes.items()
            if before.get(name, now) != now
        ]

    def describe(self, steps: int) -> str:
        """Lines that say what that many steps will read."""
        batches = [part.assignment.global_batch_size for part in self.parts]
        images = steps * batches[0]
        if self.division is not None:
            shares = [one.share / batch for one, batch in zip(self.division.contents, batches, strict=True)]
            images = round(steps / sum(shares))
        total = sum(source.weight for source in self.sources)
        lines = []
        for source in self.sources:
            share = source.weight / total
            passes = f" = {images * share / source.samples:.3g} epochs" if source.samples else ""
            of_all = f", {share:.1%} of all" if len(self.sources) > 1 else ""
            lines.append(f"reads {describe(source)}: {round(images * share):,} images{passes}{of_all}")
        lines += [f"{source.name}: {besides}" for source in self.sources if (besides := source.not_read)]
        assignment = self.parts[0].assignment
        order = (
            ""
            if all(part.assignment.ordered for part in self.parts)
            else "; their order depends on the number of processes and workers"
        )
        lines.append(f"{assignment.lanes} lanes, {self.config.workers} workers a process{order}")
        lines += map(printable, describe_lists(self.sources))
        return "\n".join([*lines, *(self.division.describe() if self.division else [])])

    def _state(self) -> dict:
        """This rank's state, for JSON; see `merge_states`."""
        return {
            "stream": self.identity,
            "steps": self.steps,
            "lanes": self.other_lanes
            | {_lane_key(part.name, lane): state for part in self.parts for lane, state in sorted(part.lanes.items())},
            "totals": self.totals,
            "ranks": [self.rank],
            "world_size": self.world_size,
            "quarantine": self.quarantine,
            "tar_hashes": self.tar_hashes,
        }

    def _next_read(self) -> ReadSamples:
        read = next(self.reads)
        if isinstance(read, DataError):
            self.close()
            raise read
        self.reads_of_step += 1
        return read

    def _count(self, read: ReadSamples) -> None:
        counts = {source.name: {"delivered": 0, "skipped": 0} for source in self.sources}
        for info in read.infos:
            counts[info.source]["delivered"] += 1
        for sample in read.skipped:
            counts[sample.dataset]["skipped"] += 1
        for (name, reason), number in read.filtered.items():
            counts[name][f"filtered/{reason}"] = number
        self.totals: Totals = add_totals([self.totals, counts])
        for name, count in counts.items():
            self.budgets[name].update(count["delivered"], count["skipped"], read.skipped)

    def _warn(self, skipped: list[Skipped]) -> None:
        for sample in skipped[: max(0, WARNED_SKIPS - self.warned_skips)]:
            logger.warning("skipped %s", printable(f"{sample.key} in {sample.source}: {sample.reason}"))
        if self.warned_skips <= WARNED_SKIPS < self.warned_skips + len(skipped):
            logger.warning("more samples are skipped; further ones are not logged")
        self.warned_skips += len(skipped)


class _BadSampleBudget:
    """Raises DataError when too many of a source's latest samples cannot be used."""

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


train_batches = TrainStream


def check(
    config: DataConfig,
    train: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    tokens: TokenSpec | None = None,
) -> str | None:
    """Raises DataError for settings or shards that training could not start with; returns what `data.val` holds, as
    `EvaluationImages.identity` says it, or None without it. train: whether the shards to train on are looked at, too.
    progress: called with (tars scanned, tars in all). tokens: what is expected of token shards, with
    data.content=tokens; the first sample of each source is compared with it, and the grids in its index."""
    check_numbers(config)
    transform_of(config, tokens)
    bucket_sizes(config)
    if train:
        sources = open_sources(config, frozenset(config.quarantine), progress=progress)
        for source in sources if config.content == "tokens" else []:
            shards = [shard for n, shard in enumerate(source.shards) if n not in source.quarantined]
            check_token_shards(shards, tokens, f"source {source.name}")
    if config.val is None:
        return None
    if config.content == "tokens":
        return evaluation_tokens(config.val, tokens, access=access_of(config)).identity()
    return evaluation_images(config.val, resize=config.resize, **validation_options(config)).identity()


def check_remote_data(
    config: DataConfig, state: dict | None, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Raises DataError that names all remote tars to train on that are missing or denied, however many there are, and
    with an index, too. Only one process of a run calls it, because it may ask for very many. state: of the run that is
    resumed. progress: called with (tars asked for, tars to ask for)."""
    access, quarantine = access_of(config), frozenset([*config.quarantine, *(state or {}).get("quarantine", ())])
    options = {"allow_pipes": config.allow_pipes, "timeouts": access.timeouts}
    roots = [one.root for one in source_configs(config).found if not is_files(one.root)]
    urls = [url for root in roots for url in expand(root, **options) if not is_among(url, quarantine)]
    check_remote(urls, access, progress)


def class_numbers(config: DataConfig, saved: str | None = None) -> dict[str, int] | None:
    """The number of each class in the sources and `data.val`; None if nothing tells it. saved: a classes.json that they
    must agree with, too. Raises DataError if they disagree."""
    configs = [*source_configs(config).found]
    if config.val is not None:
        has_classes = class_from_folder(config) and is_files(config.val) and file_shard(config.val).has_class_folders
        class_from = "folder" if has_classes else None
        configs.append(SourceConfig(name="data.val", root=config.val, class_from=class_from))
    options = {"content": config.content, "allow_pipes": config.allow_pipes, "timeouts": access_of(config).timeouts}
    found = classes_of(configs, config.classes, **options)
    parts = [(saved, read_classes(saved))] if saved is not None else []
    return merged_classes(parts + ([("the data", found)] if found else []))


def token_header(config: DataConfig) -> TokenHeader:
    """What the first token sample of the first source tells; nothing more is read. Raises DataError."""
    (one, *_), access = source_configs(config).found, access_of(config)
    shards = open_shards(one, access, allow_pipes=config.allow_pipes, quarantine=frozenset(config.quarantine))
    kept = [shard for shard in shards if not is_among(shard.url, frozenset(config.quarantine))]
    return first_header(kept, f"source {one.name}")


def class_from_folder(config: DataConfig) -> bool:
    """Whether a source of a `data` section takes the class of an image from its folder; ``data.val`` then does, too."""
    return any(layout_of(one).label == "folder" for one in placed_sources(config))


def validation_options(config: DataConfig) -> dict:
    """How the images of ``data.val`` are opened, cut and numbered: options of `evaluation_images`. Raises DataError."""
    classes = None if config.classes is None else read_classes(config.classes)
    image = image_suffixes(config, config.val, config.val_image, "data.val", "data.val_image=[SUFFIX]")
    options = {"access": access_of(config), "class_from_folder": class_from_folder(config)}
    return {**options, "classes": classes, "image": image, **validation_sizes(config)}


def validation_sizes(config: DataConfig) -> dict:
    """The sizes of validation images, as options of `evaluation_images`: `val_image_size`, or as in training. Raises
    DataError."""
    if config.val_image_size is None and (sizes := bucket_sizes(config)):
        return {"image_size": None, "buckets": sizes, "enlargement": config.max_enlargement}
    return {"image_size": config.val_image_size or config.image_size}


def image_suffixes(config: DataConfig, root, given: list[str] | None, name: str, option: str) -> list[str] | None:
    """The suffixes of the pictures in tars that are read beside the training data: those that are given, or those of
    the source with the same root; None: every image is one. name: what names the root; option: what gives the suffixes.

    Raises DataError where the sources name their pictures, and these tars hold several under one key: masks, which are
    no pictures of training, would be among them."""
    if given or config.content == "tokens" or not (config.train or config.sources):
        return given
    layouts = {str(one.root): layout_of(one).image for one in placed_sources(config)}
    if str(root) in layouts:
        return [*layouts[str(root)]] or None
    named = next((image for image in layouts.values() if image), None)
    if named and not is_files(root) and (keys := _key_within_key(root, access_of(config))):
        raise DataError(
            f"{name} {redacted(str(root))} holds {keys[0]} and {keys[1]} as two pictures, and training takes only "
            f"{', '.join(named)} of a key: name the suffix of pictures with {option}"
        )
    return None


def _key_within_key(root, access: Access) -> tuple[str, str] | None:
    """KEY and KEY.part, if both are samples among the first of the tars."""
    if isinstance(root, (str, Path)) and is_image(str(root)):
        return None
    shard, keys = open_shards(SourceConfig(root=root), access)[0], []
    for window in itertools.islice(shard.windows(0, None, PROBED), 1):
        for n in range(len(window)):
            try:
                keys.append(window.read(n).key)
            except ImageError as error:
                keys += [error.key] if error.key else []
    ordered = sorted(keys)
    return next((pair for pair in itertools.pairwise(ordered) if pair[1].startswith(f"{pair[0]}.")), None)


def access_of(config: DataConfig) -> Access:
    """How the remote shards of a `data` section are reached. Raises DataError."""
    timeouts = Timeouts(config.request_seconds, config.retry_seconds)
    if config.cache is None:
        return Access(timeouts)
    return Access(timeouts, Cache(Path(config.cache).expanduser(), int(config.cache_gigabytes * 1e9), timeouts))


def open_sources(
    config: DataConfig,
    quarantine: frozenset[str] = frozenset(),
    before: dict[str, dict] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Source]:
    """The sources of a `data` section, opened. before: source -> its identity when the run began. Raises DataError."""
    (configs, missing), access, before = source_configs(config), access_of(config), before or {}
    if lost := [name for name in missing if name in before]:
        raise DataError(
            f"data.root={redacted(config.root)} lacks {', '.join(lost)}, which this run has read: bring "
            f"{'them' if len(lost) > 1 else 'it'} back, or take {'them' if len(lost) > 1 else 'it'} out of "
            "data.sources in the run's config.yaml to continue without"
        )
    if missing:
        logger.warning("data.missing=skip: without %s, not in %s", ", ".join(missing), printable(redacted(config.root)))
    options = {"content": config.content, "allow_pipes": config.allow_pipes, "quarantine": quarantine}
    options["classes"] = None if config.classes is None else read_classes(config.classes, access.timeouts)
    sources = [open_source(one, access, before=before.get(one.name), progress=progress, **options) for one in configs]
    urls = [shard.url for source in sources for shard in source.shards]
    for part in sorted(quarantine):
        named = [url for url in dict.fromkeys(urls) if is_among(url, frozenset([part]))]
        if not named:
            logger.warning("data.quarantine names %s, which is not one of the shards", printable(part))
        if len(named) > 1 and part in config.quarantine:  # not that of a run's checkpoint, which nobody can change
            raise DataError(
                f"data.quarantine: {part} is the end of {len(named):,} shards, among them {redacted(named[0])} and "
                f"{redacted(named[1])}: give more of the path"
            )
    return sources


def transform_of(
    config: DataConfig, tokens: TokenSpec | None = None, size: Size | None = None
) -> TrainingTransform | TokenTransform:
    """The training transform of a `data` section. size: of a bucket, or the grid where `tokens` has several. Raises
    DataError."""
    if config.content not in CONTENTS:
        raise DataError(f"unknown data.content {config.content!r}: choose one of {', '.join(CONTENTS)}")
    if config.content == "tokens":
        if tokens is None:
            raise DataError("data.content=tokens is for a run that trains on tokens: set data.content=images")
        return TokenTransform(tokens._replace(grids=(size or tokens.grids[0],)))
    return TrainingTransform(config) if size is None else TrainingTransform(config, size, config.max_enlargement)


def _divided_sizes(config: DataConfig, tokens: TokenSpec | None) -> list[Size]:
    """The sizes or grids that samples are divided among; empty if all have one. Raises DataError."""
    sizes = bucket_sizes(config)
    if config.content != "tokens" or tokens is None:
        return sizes
    grids = grid_sizes(tokens.grids)
    return grids if len(grids) > 1 else []


def _division(
    config: DataConfig, sizes: list[Size], sources: list[Source], global_batch_size: int, before: dict, progress
) -> Division:
    """How samples are divided among buckets or grids. Named buckets must have pictures. Of those made from
    `data.pixels`, and of the grids of a model, empty ones are left out. before: of the run that is resumed. Raises
    DataError."""
    division = divide(sources, with_batches(sizes, global_batch_size), config.max_enlargement, before, progress)
    empty = [one.bucket.name for one in division.contents if not one.pictures]
    if empty and config.buckets and not before:
        raise DataError(
            f"data.buckets: no picture belongs to {', '.join(empty)}: leave {'them' if len(empty) > 1 else 'it'} out"
        )
    return division._replace(contents=[one for one in division.contents if one.pictures], empty=empty)


def _check_lanes(parts: list[_Part], before: dict, words: Words) -> None:
    """Raises DataError where the lanes of a new run do not fit the batch of a bucket: its global batches would depend
    on the number of processes."""
    for part in parts:
        lanes, batch = part.assignment.lanes, part.assignment.global_batch_size
        if not before and lanes % batch and batch % lanes:
            raise DataError(
                f"data.lanes={lanes} must be a multiple of the {batch} images in a step of {words.one} {part.name}, or "
                "divide them: leave data.lanes out"
            )


def _check_enough_shards(sources: list[Source], lanes: int) -> None:
    for source in sources:
        if source.counts is None and len(source.shards) < lanes:
            raise DataError(
                f"source {source.name}: {len(source.shards)} shards without an index cannot be divided among "
                f"data.lanes={lanes}: write one with `ibq shards check PATH --write-index --index FILE`, or start "
                f"with at most {len(source.shards)} lanes"
            )
