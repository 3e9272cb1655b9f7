"""`ibq tokenize`: writes images as token shards, tars of codes that a generator trains on (see `data.tokens`), with any
number of processes; running it again continues."""

import contextlib
import functools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from webdataset.writer import TarWriter

from data.config import MOST_CODES, DataConfig, SourceConfig
from data.errors import ImageError
from data.loader import image_suffixes
from data.locks import folder_lock
from data.prep.pack import mixed, unique_keys
from data.samples import CODES, Shard, Skipped, Window, WindowLimit, is_image
from data.sources import Source, catalogue, classes_of, describe, digest, open_source
from data.tar_reader import TarShard
from data.tokens import pack_codes
from data.unfinished import unfinished
from model_zoo.io.load import load_tokenizer
from model_zoo.tokenizer import Tokenizer
from trainer import TrainerError
from trainer.files import writing
from trainer.jobs.setup import data_config, job_world, one_writer, threads_per_process
from trainer.jobs.token_folder import (
    begin_folder,
    check_is_folder,
    check_unchanged,
    finish_folder,
    shard_path,
    write_skipped,
)
from trainer.jobs.views import VIEWS, image_views
from trainer.loading import load_newest
from trainer.parallel import World, check_same_on_all_ranks, gather_objects, run_on_all_ranks, run_on_main
from trainer.precision import full_precision

WINDOW = WindowLimit(256, 16 << 20)  # samples and bytes that are fetched at once of a remote tar


class Tokenized(NamedTuple):
    """shards, samples: in the folder. made: samples of this job, without those of former jobs. tokenizer: fingerprint.
    skipped: images left out, each with the reason, those of former jobs included."""

    out: Path
    shards: int
    samples: int
    made: int
    tokenizer: str
    skipped: list[str]


def tokenize(
    run: str | Path,
    *,
    images: str | list[str],
    out: str | Path,
    views: str = "original",
    image_size: int | None = None,
    weights: str = "ema",
    source: str = "images",
    classes: str | Path | None = None,
    image: list[str] | None = None,
    samples_per_shard: int = 10_000,
    batch_size: int = 64,
    device: str = "auto",
    workers: int | None = None,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Tokenized | None:
    """Tokenizes images into OUT/tokens-NNNNNN.tar, with an index in OUT. All processes of torchrun call it; returns
    None on all ranks but 0. Shards that a job with the same settings wrote before are kept.

    run: a run folder, a checkpoint folder in it, or a published .ckpt. images: as ``data.train``. views: of VIEWS.
    image_size: pixels; default the run's ``data.image_size``. source: the entry of the catalogue that says where
    captions and classes are. classes: a classes.json that numbers class folders; its numbers, or those that the input
    has, are written to OUT/classes.json. image: suffixes of the images in tars, default those of the source, or of the
    run's source with the same root. samples_per_shard: at most; a remote tar without an index becomes one shard.
    batch_size: views at a time. workers: decoding threads. on_progress: called with the number of processed samples and
    the total (None: unknown). Raises TrainerError or DataError, one line.
    """
    for option, number in (
        ("--samples-per-shard", samples_per_shard),
        ("--batch-size", batch_size),
        ("--size", image_size),
        ("--workers", workers),
    ):
        if number is not None and number < 1:
            raise TrainerError(f"{option} {number} must be at least 1")
    if views not in VIEWS:
        raise TrainerError(f"--views {views} is unknown: choose one of {', '.join(VIEWS)}")
    with job_world(device) as world:
        inputs = load_newest(
            world, run, lambda found: _open(found, images, views, image_size, weights, source, classes, image)
        )
        check_same_on_all_ranks("the tokenizer", f"fingerprint {inputs.settings['tokenizer']}")
        check_same_on_all_ranks(f"--images {images}", run_on_all_ranks(lambda: _seen(inputs)))
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
            finished = run_on_main(world, lambda: finish_folder(job.out, str(images), expected))
        if not world.is_main:
            return None
        return Tokenized(
            job.out, finished.shards, finished.samples, made.samples, settings["tokenizer"], finished.skipped
        )


# --------------------------------------------------------------------------------------------------------------- inputs


class _Inputs(NamedTuple):
    """settings: what a later job must have in common to continue. keys: a file's path -> its sample's key; empty for
    tars. classes: the number of each class, if it is known."""

    tokenizer: Tokenizer
    source: Source
    settings: dict
    views_of: Callable[[bytes], np.ndarray]
    keys: dict[str, str]
    classes: dict[str, int] | None


class _Unit(NamedTuple):
    """The input of one token shard: samples first to stop (None: the last one) of an input shard."""

    shard: int
    first: int
    stop: int | None


class _Job(NamedTuple):
    """settings: those of the inputs and of the shards. batch_size: views at a time."""

    world: World
    inputs: _Inputs
    out: Path
    settings: dict
    units: list[_Unit]
    batch_size: int


def _open(
    checkpoint: Path,
    images,
    views: str,
    image_size: int | None,
    weights: str,
    source: str,
    classes: str | Path | None,
    image: list[str] | None,
) -> _Inputs:
    tokenizer = load_tokenizer(checkpoint, weights)
    if (codes := tokenizer.config.codebook_size) > MOST_CODES:
        raise TrainerError(
            f"{checkpoint} has {codes:,} codes, and token shards hold at most {MOST_CODES:,} (2^24): use a tokenizer "
            "of fewer codes"
        )
    config = data_config(checkpoint) or DataConfig()
    side, factor = config.image_size if image_size is None else image_size, tokenizer.downsampling_factor
    if side < 1 or side % factor:
        better = max(1, round(side / factor)) * factor
        raise TrainerError(f"--size {side} is not a multiple of the tokenizer's factor {factor}: take {better}")
    if source != "images" and source not in catalogue():
        raise TrainerError(f"--source {source} is unknown: choose one of {', '.join(catalogue())}")
    if not catalogue().get(source, {}).get("layout", {}).get("image"):
        image = image_suffixes(config, images, image, "--images", "--image SUFFIX")
    described = SourceConfig(name=source, root=images, image=image)
    numbers = classes_of([described], None if classes is None else str(classes))
    opened = open_source(described, scan_all=True, classes=numbers)
    if _holds_tokens(opened.shards[0]):
        raise TrainerError(f"--images {images} holds tokens already: name images")
    keys = _order_files(opened.shards[0])
    settings = {
        "tokenizer": tokenizer.fingerprint(),
        "codes": tokenizer.config.codebook_size,
        "views": views,
        "grid": [side // factor, side // factor],
        "image_size": side,
        "resize": config.resize,
        "source": source,
        "input": {**opened.identity(), "files": digest(sorted(keys))},
    }
    if classes is not None:
        settings["classes"] = digest(sorted(numbers.items()))
    views_of = functools.partial(image_views, kind=views, side=side, resize=config.resize)
    return _Inputs(tokenizer, opened, settings, views_of, keys, numbers)


def _holds_tokens(shard: Shard) -> bool:
    """Looks at the first sample, unless the shard is a remote tar without an index."""
    if not isinstance(shard, TarShard) or not shard.table:
        return False
    try:
        members = shard.read(0).members
    except ImageError:
        return False
    return CODES in members and not any(map(is_image, members))


def _order_files(shard: Shard) -> dict[str, str]:
    """Orders the images of a folder or a zip file so that classes mix within shards. Returns path -> key."""
    if isinstance(shard, TarShard):
        return {}
    paths = {PurePosixPath(shard.key(path)): path for path in shard.images}
    shard.images = [paths[name] for name in mixed(list(paths))]
    return {shard.key(paths[name]): key for name, key in unique_keys(list(paths)).items()}


def _seen(inputs: _Inputs) -> str:
    """What this rank finds, in a line, with a hash. A rank whose copy of a folder lacks captions or classes would write
    samples without them."""
    shard = inputs.source.shards[0]
    files = [] if isinstance(shard, TarShard) else [path.as_posix() for path in shard.own_files()]
    return f"{describe(inputs.source)} ({digest([inputs.settings, inputs.classes, files])})"


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
    samples_per_batch = max(1, job.batch_size // VIEWS[job.settings["views"]])
    skipped, written, key = [], 0, None
    with writing(job.out), contextlib.ExitStack() as stack:
        file = stack.enter_context(open(unfinished(path), "wb"))
        stack.callback(unfinished(path).unlink, missing_ok=True)  # if it was not renamed
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for batch in _batches(_prepared(inputs, unit, pool, 2 * samples_per_batch), samples_per_batch):
                usable = [one for one in batch if isinstance(one, _Prepared)]
                skipped += [one._asdict() for one in batch if isinstance(one, Skipped)]
                codes = _encode(inputs.tokenizer, [one.views_vchw for one in usable], job.batch_size, job.world.device)
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


def _prepared(inputs: _Inputs, unit: _Unit, pool: ThreadPoolExecutor, ahead: int) -> Iterator[_Prepared | Skipped]:
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


def _prepare(inputs: _Inputs, name: str, window: Window, n: int) -> _Prepared | Skipped:
    key = f"sample {window.numbers[n]}"
    try:
        sample = window.read(n)
        key = sample.key
        picked = inputs.source.pick(sample).whole()
        views_vchw = inputs.views_of(picked.content)
    except ImageError as error:
        return Skipped(name, error.key or key, str(error), inputs.source.name)
    members = {} if picked.label is None else {"cls": str(picked.label).encode()}
    if picked.caption is not None:
        members["txt"] = picked.caption.encode()
    return _Prepared(inputs.keys.get(key, key), views_vchw, members)


def _batches(samples: Iterator, size: int) -> Iterator[list]:
    """``size`` usable samples each, and the unusable ones between them; the last batch may be smaller."""
    batch, usable = [], 0
    for one in samples:
        batch.append(one)
        usable += isinstance(one, _Prepared)
        if usable == size:
            yield batch
            batch, usable = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, views: list[np.ndarray], batch_size: int, device: torch.device) -> list[np.ndarray]:
    """uint8 (views, 3, side, side) of each sample -> its codes (views, rows, columns); in fp32 whatever the precision
    of training."""
    if not views:
        return []
    levels_bchw = torch.from_numpy(np.concatenate(views))
    codes = []
    with full_precision(device.type):
        for part_bchw in levels_bchw.split(batch_size):
            codes.append(tokenizer.tokenize((part_bchw.to(device).double() / 127.5 - 1).float()).cpu())
    return np.split(torch.cat(codes).numpy(), len(views))
