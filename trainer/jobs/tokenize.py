"""`ibq tokenize`: writes images as token shards, tars of codes that a generator trains on (see `data.tokens`), with any
number of processes; running it again continues."""

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from webdataset.writer import TarWriter

from data.errors import ImageError
from data.locks import folder_lock
from data.samples import Skipped, Window, WindowLimit
from data.sources import Source
from data.tar_reader import TarShard
from data.tokens import pack_codes
from data.unfinished import unfinished
from model_zoo.tokenizer import Tokenizer
from trainer import TrainerError
from trainer.files import writing
from trainer.jobs.setup import job_world, one_writer, threads_per_process
from trainer.jobs.token_folder import (
    begin_folder,
    check_is_folder,
    check_unchanged,
    finish_folder,
    shard_path,
    write_skipped,
)
from trainer.jobs.token_inputs import TokenizeInputs, open_inputs, seen
from trainer.jobs.views import VIEWS, SizeOptions, listed_sizes
from trainer.loading import load_newest
from trainer.parallel import World, check_same_on_all_ranks, gather_objects, run_on_all_ranks, run_on_main
from trainer.precision import full_precision

WINDOW = WindowLimit(256, 16 << 20)  # samples and bytes that are fetched at once of a remote tar
LEAST_AHEAD = 8  # samples that are decoded in advance, however large they are
BATCHES_AT_ONCE = 4  # of the smallest size: what is read before it is sorted by size


class Tokenized(NamedTuple):
    """shards, samples: in the folder. made: samples of this job, without those of former jobs. tokenizer: fingerprint.
    skipped: images left out, each with the reason, those of former jobs included. grids: ROWSxCOLUMNS -> samples in the
    folder, by ascending number of codes."""

    out: Path
    shards: int
    samples: int
    made: int
    tokenizer: str
    skipped: list[str]
    grids: dict[str, int]


def tokenize(
    run: str | Path,
    *,
    images: str | list[str],
    out: str | Path,
    views: str = "original",
    image_size: int | str | None = None,
    pixels: str | None = None,
    max_aspect: float | None = None,
    max_enlargement: float | None = None,
    weights: str = "ema",
    source: str = "images",
    classes: str | Path | None = None,
    image: list[str] | None = None,
    samples_per_shard: int = 10_000,
    batch_size: int = 64,
    device: str = "auto",
    workers: int | None = None,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
    on_note: Callable[[str], None] = lambda line: None,
) -> Tokenized | None:
    """Tokenizes images into OUT/tokens-NNNNNN.tar, with an index in OUT. All processes of torchrun call it; returns
    None on all ranks but 0. Shards that a job with the same settings wrote before are kept.

    run: a run folder, a checkpoint folder in it, or a published .ckpt. images: as ``data.train``. views: of VIEWS.
    image_size, pixels, max_aspect, max_enlargement: as of `SizeOptions`; with several sizes, an image has the one that
    `data.buckets.bucket_of` gives, and one that is too small for it is left out. source: the entry of the catalogue
    that says where captions and classes are. classes: a classes.json that numbers class folders; its numbers, or those
    that the input has, are written to OUT/classes.json. image: suffixes of the images in tars, default those of the
    source, or of the run's source with the same root. samples_per_shard: at most; a remote tar without an index becomes
    one shard. batch_size: views of the smallest size at a time. workers: decoding threads. on_progress: called with the
    number of processed samples and the total (None: unknown). on_note: called with lines to print before that. Raises
    TrainerError or DataError, one line.
    """
    for option, number in (
        ("--samples-per-shard", samples_per_shard),
        ("--batch-size", batch_size),
        ("--workers", workers),
    ):
        if number is not None and number < 1:
            raise TrainerError(f"{option} {number} must be at least 1")
    if views not in VIEWS:
        raise TrainerError(f"--views {views} is unknown: choose one of {', '.join(VIEWS)}")
    sizes = SizeOptions(image_size, pixels, max_aspect, max_enlargement)
    listed_sizes(sizes)  # raises before the tokenizer is loaded
    shards = {"samples_per_shard": samples_per_shard, "batch_size": batch_size, "out": str(out)}
    samples = {"views": views, "weights": weights, "source": source, "image": image}
    with job_world(device, **samples, **sizes._asdict(), **shards) as world:
        inputs = load_newest(
            world, run, lambda found: open_inputs(found, images, views, sizes, weights, source, classes, image)
        )
        for note in inputs.notes if world.is_main else ():
            on_note(note)
        check_same_on_all_ranks("the tokenizer", f"fingerprint {inputs.settings['tokenizer']}")
        check_same_on_all_ranks(f"--images {images}", run_on_all_ranks(lambda: seen(inputs)))
        settings = {**inputs.settings, "samples_per_shard": samples_per_shard}
        job = _Job(world, inputs, Path(out), settings, _units(inputs.source, samples_per_shard), batch_size)
        run_on_main(world, lambda: check_is_folder(job.out))
        with one_writer(world, folder_lock(job.out), job.out):
            state = run_on_main(world, inputs.source.state)
            missing = run_on_main(world, lambda: begin_folder(job.out, settings, state, len(job.units), inputs.classes))
            made = _tokenize_units(job, missing, workers, on_progress)
            if missing:
                run_on_main(world, lambda: check_unchanged(job.out, state, inputs.source.state()))
            expected = {*range(len(job.units))}.difference(missing) | made.shards
            has_sizes = inputs.views.enlargement is not None
            advice = ": raise --max-enlargement, or give smaller sizes" if has_sizes else ""
            finished = run_on_main(world, lambda: finish_folder(job.out, str(images), expected, advice))
        if not world.is_main:
            return None
        shards, samples, skipped, grids = finished
        return Tokenized(job.out, shards, samples, made.samples, settings["tokenizer"], skipped, grids)


# ---------------------------------------------------------------------------------------------------------------- units


class _Unit(NamedTuple):
    """The input of one token shard: samples first to stop (None: the last one) of an input shard."""

    shard: int
    first: int
    stop: int | None


class _Job(NamedTuple):
    """settings: those of the inputs and of the shards. batch_size: views of the smallest size at a time."""

    world: World
    inputs: TokenizeInputs
    out: Path
    settings: dict
    units: list[_Unit]
    batch_size: int

    @property
    def batch_pixels(self) -> int:
        """Pixels of the views at a time."""
        return self.batch_size * self.inputs.views.sizes[0].pixels


def _units(source: Source, samples_per_shard: int) -> list[_Unit]:
    units = []
    for number, shard in enumerate(source.shards):
        if isinstance(shard, TarShard) and shard.table is None:
            units.append(_Unit(number, 0, None))
        else:
            count = len(shard)
            starts = range(0, count, samples_per_shard)
            units += [_Unit(number, first, min(first + samples_per_shard, count)) for first in starts]
    return units


# ----------------------------------------------------------------------------------------------------------- tokenizing


class _Made(NamedTuple):
    """What all ranks wrote: numbers of shards, and how many samples."""

    shards: set[int]
    samples: int


def _tokenize_units(
    job: _Job, missing: list[int], workers: int | None, on_progress: Callable[[int, int | None], None]
) -> _Made:
    """Writes the missing shards, one on each rank per turn, so that an error on one rank ends all."""
    world = job.world
    job.inputs.tokenizer.to(world.device)
    sizes = [None if unit.stop is None else unit.stop - unit.first for unit in job.units]
    total = None if None in sizes else sum(sizes)
    done = sum(size or 0 for size in sizes) - sum(sizes[number] or 0 for number in missing)  # processed samples
    made = _Made(set(), 0)
    pool = ThreadPoolExecutor(workers or threads_per_process())
    try:
        for turn in range(0, len(missing), world.size):

            def report(processed: int, before=done) -> None:
                if world.is_main:
                    on_progress(before + processed, total)

            own = missing[turn + world.rank : turn + world.rank + 1]  # one; in the last turn possibly none
            work = functools.partial(_tokenize_unit, job, pool, report)
            counts = run_on_all_ranks(lambda work=work, own=own: [(number, *work(number)) for number in own])
            of_ranks = [count for of_rank in gather_objects(counts) for count in of_rank]
            done += sum(processed for _, processed, _ in of_ranks)
            shards = {number for number, _, written in of_ranks if written}
            made = _Made(made.shards | shards, made.samples + sum(written for *_, written in of_ranks))
            if world.is_main:
                on_progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    return made


class _UnitCounts(NamedTuple):
    """Samples of a unit: processed, and written (the rest was skipped)."""

    processed: int
    written: int


class _Prepared(NamedTuple):
    key: str
    views_vchw: np.ndarray
    members: dict[str, bytes]  # caption and class


def _tokenize_unit(job: _Job, pool: ThreadPoolExecutor, report: Callable[[int], None], number: int) -> _UnitCounts:
    """Writes one token shard, or none if no image is readable. report: called with the processed samples so far."""
    inputs, unit, path = job.inputs, job.units[number], shard_path(job.out, number)
    # A batch never spans units, so codes do not depend on the number of processes.
    samples_per_batch = max(1, job.batch_size // VIEWS[inputs.views.kind])
    # With several sizes, larger batches have enough images of each. Their pixels are limited, so their memory is, too.
    sizes = inputs.views.sizes
    most_pixels = samples_per_batch * sizes[0].pixels * min(len(sizes), BATCHES_AT_ONCE)
    ahead = max(LEAST_AHEAD, 2 * samples_per_batch * sizes[0].pixels // sizes[-1].pixels)
    skipped, written, key = [], 0, None
    with writing(job.out), contextlib.ExitStack() as stack:
        file = stack.enter_context(open(unfinished(path), "wb"))
        stack.callback(unfinished(path).unlink, missing_ok=True)  # if it was not renamed
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for batch in _batches(_prepared(inputs, unit, pool, ahead), most_pixels):
                usable = [one for one in batch if isinstance(one, _Prepared)]
                skipped += [one._asdict() for one in batch if isinstance(one, Skipped)]
                views = [one.views_vchw for one in usable]
                codes = _encode(inputs.tokenizer, views, job.batch_pixels, job.world.device)
                for one, index_vhw in zip(usable, codes, strict=True):
                    content = pack_codes(index_vhw, job.settings["tokenizer"], job.settings["codes"])
                    # Readers take members of one key in a row as one sample; what was between these two is skipped.
                    key = f"{one.key}-2" if one.key == key else one.key
                    tar.write({"__key__": key, "codes": content, **one.members})
                written += len(usable)
                report(written + len(skipped))
        unread = inputs.source.skipped_unread if number == 0 else []
        write_skipped(job.out, number, [*skipped, *(one._asdict() for one in unread)])
        if written:
            file.flush()
            os.fsync(file.fileno())
            unfinished(path).replace(path)
    return _UnitCounts(written + len(skipped), written)


def _prepared(
    inputs: TokenizeInputs, unit: _Unit, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[_Prepared | Skipped]:
    """The unit's samples in order; the pool reads and decodes up to ``ahead`` of them in advance."""
    waiting, shard = deque(), inputs.source.shards[unit.shard]
    for window in _fetched(shard.windows(unit.first, unit.stop, WINDOW), pool):
        for n in range(len(window)):
            waiting.append(pool.submit(_prepare, inputs, shard.name, window, n))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _fetched(windows: Iterator[Window], pool: ThreadPoolExecutor) -> Iterator[Window]:
    """The windows; the next one is fetched while one is in use."""

    def fetch() -> Window | None:
        if (window := next(windows, None)) is not None:
            window.fetch()
        return window

    future = pool.submit(fetch)
    while (window := future.result()) is not None:
        future = pool.submit(fetch)
        yield window


def _prepare(inputs: TokenizeInputs, name: str, window: Window, n: int) -> _Prepared | Skipped:
    key = f"sample {window.numbers[n]}"
    try:
        sample = window.read(n)
        key = sample.key
        picked = inputs.source.pick(sample).whole()
        views_vchw = inputs.views(picked.content)
    except ImageError as error:
        return Skipped(name, error.key or key, str(error), inputs.source.name)
    members = {} if picked.label is None else {"cls": str(picked.label).encode()}
    if picked.caption is not None:
        members["txt"] = picked.caption.encode()
    return _Prepared(inputs.keys.get(key, key), views_vchw, members)


def _batches(samples: Iterator, pixels: int) -> Iterator[list]:
    """Usable samples of ``pixels`` pixels in one view of each, and the unusable ones between them; the last batch may
    be smaller."""
    batch, usable = [], 0
    for one in samples:
        batch.append(one)
        usable += one.views_vchw[0, 0].size if isinstance(one, _Prepared) else 0
        if usable >= pixels:
            yield batch
            batch, usable = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, views: list[np.ndarray], pixels: int, device: torch.device) -> list[np.ndarray]:
    """uint8 (views, 3, height, width) of each sample -> its codes (views, rows, columns); in fp32 whatever the
    precision of training. Samples of one size are encoded together. pixels: of the views at a time."""
    codes: dict[int, np.ndarray] = {}  # by the sample's number
    for height, width in dict.fromkeys(one.shape[2:] for one in views):
        numbers = [number for number, one in enumerate(views) if one.shape[2:] == (height, width)]
        levels_bchw = torch.from_numpy(np.concatenate([views[number] for number in numbers]))
        parts = []
        with full_precision(device.type):
            for part_bchw in levels_bchw.split(max(1, pixels // (height * width))):
                parts.append(tokenizer.tokenize((part_bchw.to(device).double() / 127.5 - 1).float()).cpu())
        codes |= zip(numbers, np.split(torch.cat(parts).numpy(), len(numbers)), strict=True)
    return [codes[number] for number in range(len(views))]
