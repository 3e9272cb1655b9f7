"""Writes images as token shards, tars of codes that a generator trains on (see data.tokens); by any number of
processes, and going on where a former job ended."""

import contextlib
import functools
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from webdataset.writer import TarWriter

from data import DataConfig, ImageError, Skipped, SourceConfig, catalogue, decode, pack_codes
from data.folder_reader import FolderShard
from data.index import INDEX_NAME, Index, write_index
from data.parallel import cores
from data.prep.check import check_shards
from data.prep.pack import mixed, unique_keys
from data.samples import CODES, Shard, Window, WindowLimit, is_image
from data.sources import Source, digest, open_source
from data.tar_reader import TarShard
from data.transforms import pixels_chw, resize_and_center_crop, resize_named
from model_zoo import Tokenizer, load_tokenizer
from model_zoo.io.load import find_checkpoint, stands_alone
from model_zoo.io.sharded_tensors import run_of
from trainer import TrainerError
from trainer.evaluation.run import choose_device
from trainer.jobs.resumable import check_same, writing
from trainer.parallel import (
    World,
    as_trainer_error,
    gather_objects,
    run_on_all_ranks,
    run_on_main,
    start_world,
    stop_world,
)
from trainer.precision import full_precision

VIEWS = {"original": 1, "flip": 2, "ten-crop": 10}  # kind -> views of an image
MANIFEST = "tokens.json"
SKIPPED = "skipped.jsonl"
WINDOW = WindowLimit(256, 16 << 20)  # samples and bytes that are fetched at once of a remote tar
WAIT_SECONDS = 7 * 86400.0  # of a process for the slowest


class Tokenized(NamedTuple):
    """out: the folder; shards, samples: in it; made: samples of this job, the rest was there; tokenizer: fingerprint;
    skipped: images that were left out, each with the reason, those of former jobs too."""

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
    samples_per_shard: int = 10_000,
    batch_size: int = 64,
    device: str = "auto",
    workers: int | None = None,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Tokenized | None:
    """Tokenizes images into OUT/tokens-NNNNNN.tar, with an index beside them. All processes of torchrun call it; None
    on all but the first. What is there already of a job with the same settings is kept.

    run: a run's folder, a checkpoint's in it, or a published .ckpt. images: as `data.train`. views: of VIEWS; view 0 is
    the centre crop. image_size: pixels; default the run's `data.image_size`. source: entry of the catalogue that tells
    where captions and classes are. samples_per_shard: at most; a remote tar without an index becomes one shard.
    batch_size: views at a time. workers: threads that decode. on_progress: hears of samples done, and of how many
    (None: not known). Raises TrainerError, one clear line.
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
    if device not in ("auto", "cpu", "cuda"):
        raise TrainerError(f"--device {device} is unknown: choose auto, cpu or cuda")
    choose_device(device)
    world = start_world(device, WAIT_SECONDS)
    try:
        # Of one step, should training still go on.
        checkpoint = Path(run_on_main(world, lambda: as_trainer_error(lambda: str(find_checkpoint(Path(run))))))
        job = run_on_all_ranks(lambda: _open_job(checkpoint, images, Path(out), views, image_size, weights, source))
        units = _units(job.source, samples_per_shard)
        settings = {**job.settings, "samples_per_shard": samples_per_shard}
        missing = run_on_main(world, lambda: _begin(job.out, settings, len(units)))
        made = _tokenize_units(job, world, units, missing, batch_size, workers, on_progress)
        finished = run_on_main(world, lambda: _finish(job.out, str(images)))
        return Tokenized(job.out, *finished[:2], made, settings["tokenizer"], finished[2]) if world.is_main else None
    finally:
        stop_world()


# -------------------------------------------------------------------------------------------------------------- the job


class _Job(NamedTuple):
    """settings: what must be the same for a job to go on. keys: a file's path -> its sample's key; of tars, nothing."""

    tokenizer: Tokenizer
    source: Source
    out: Path
    settings: dict
    views_of: Callable[[bytes], np.ndarray]
    keys: dict[str, str]


class _Unit(NamedTuple):
    """What becomes one token shard: samples first to stop (None: all) of a shard."""

    shard: int
    first: int
    stop: int | None


def _open_job(
    checkpoint: Path, images, out: Path, views: str, image_size: int | None, weights: str, source: str
) -> _Job:
    tokenizer = load_tokenizer(checkpoint, weights)
    config = _data_config(checkpoint)
    side, factor = config.image_size if image_size is None else image_size, tokenizer.downsampling_factor
    if side < 1 or side % factor:
        better = max(1, round(side / factor)) * factor
        raise TrainerError(f"--size {side} is not a multiple of the tokenizer's factor {factor}: take {better}")
    if source != "images" and source not in catalogue():
        raise TrainerError(f"--source {source}: the catalogue has {', '.join(catalogue())}")
    opened = open_source(SourceConfig(name=source, root=images), scan_all=True)
    if _holds_tokens(opened.shards[0]):
        raise TrainerError(f"--images {images}: these are tokens already, name images")
    keys = _arrange_files(opened.shards[0])
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
    views_of = functools.partial(image_views, kind=views, side=side, resize=config.resize)
    return _Job(tokenizer, opened, out, settings, views_of, keys)


def _holds_tokens(shard: Shard) -> bool:
    """By its first sample; of a remote tar without an index, that is not looked at."""
    if not isinstance(shard, TarShard) or not shard.table:
        return False
    try:
        members = shard.read(0).members
    except ImageError:
        return False
    return CODES in members and not any(map(is_image, members))


def _data_config(checkpoint: Path) -> DataConfig:
    """The run's `data` section; the defaults for a published checkpoint, which has none."""
    if stands_alone(checkpoint):
        return DataConfig()
    path = run_of(checkpoint) / "config.yaml"
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(path).data))
    except OmegaConfBaseException as error:
        raise TrainerError(f"the data section of {path}: {str(error).splitlines()[0]}") from error


def _arrange_files(shard: Shard) -> dict[str, str]:
    """Puts a folder's or a zip file's images in an order that mixes classes within shards. Path -> key."""
    if isinstance(shard, TarShard):
        return {}
    is_folder = isinstance(shard, FolderShard)
    names = {PurePosixPath(name): name for name in (shard.images if is_folder else shard.names)}
    order = [names[path] for path in mixed(list(names))]
    if is_folder:
        shard.images = order
    else:
        shard.names = order
    return {str(names[path]): key for path, key in unique_keys(list(names)).items()}


def _units(source: Source, most: int) -> list[_Unit]:
    units = []
    for number, shard in enumerate(source.shards):
        if isinstance(shard, TarShard) and shard.table is None:
            units.append(_Unit(number, 0, None))
        else:
            units += [_Unit(number, first, min(first + most, len(shard))) for first in range(0, len(shard), most)]
    return units


# ----------------------------------------------------------------------------------------------------------- the folder


def _tar(out: Path, number: int) -> Path:
    return out / f"tokens-{number:06d}.tar"


def _skipped_of(out: Path, number: int) -> Path:
    return out / f".skipped-{number:06d}.jsonl"


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


def _write(path: Path, content: str) -> None:
    """The file appears when it is whole."""
    _unfinished(path).write_text(content, encoding="utf-8")
    _unfinished(path).replace(path)


def _begin(out: Path, settings: dict, units: int) -> list[int]:
    """Makes the folder, or finds what a former job left: numbers of the units that are missing. Raises TrainerError."""
    manifest = out / MANIFEST
    with writing(out):
        if out.exists() and not out.is_dir():
            raise TrainerError(f"{out} is a file: name a folder with --out")
        out.mkdir(parents=True, exist_ok=True)
        former = _former(manifest)
        if former is None and any(out.glob("*.tar")):
            raise TrainerError(f"{out} holds tars, and not by `ibq tokenize`: name another folder with --out")
        if any(out.glob("tokens-*.tar")):
            check_same(out, "tokens", former, settings, _again)
        elif former is not None:  # a job that made none binds nobody
            for path in (out / SKIPPED, *out.glob(".skipped-*.jsonl")):
                path.unlink(missing_ok=True)
        _write(manifest, json.dumps(settings, indent=1) + "\n")
    return [number for number in range(units) if not _tar(out, number).exists()]


def _former(manifest: Path) -> dict | None:
    """The settings of the job that began there; None where none did. Raises TrainerError."""
    try:
        former = json.loads(manifest.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        former = None
    if not isinstance(former, dict) or not {"tokenizer", "views", "input"} <= former.keys():
        raise TrainerError(f"{manifest} is damaged, or not by `ibq tokenize`: name another folder with --out")
    return former


def _again(name: str, former: dict) -> str:
    """What to give for this setting of a former job."""
    if name in ("views", "source", "samples_per_shard"):
        return f"--{name.replace('_', '-')} {former.get(name)}"
    if name in ("grid", "image_size"):
        return f"--size {former.get('image_size')}"
    return "the same --images" if name == "input" else "the same tokenizer and --weights"


def _finish(out: Path, images: str) -> tuple[int, int, list[str]]:
    """Collects what was left out, checks the tars and writes their index. Shards, samples, what was left out."""
    with writing(out):
        skipped = _collect_skipped(out)
    urls = sorted(str(path) for path in out.glob("tokens-*.tar"))
    if not urls:
        raise TrainerError(f"none of the {len(skipped):,} images in {images} can be read: {skipped[0]}")
    place = out / INDEX_NAME
    if (index := as_trainer_error(lambda: Index(place)) if place.exists() else None) and _is_of(index, urls):
        return len(urls), int(index.first[-1]), skipped
    found = as_trainer_error(lambda: list(check_shards(urls, jobs=min(cores(), len(urls)))))
    if bad := next((checked for checked in found if checked.table is None), None):
        raise TrainerError(f"{bad.name} is damaged ({bad.problems[0].message}): remove it and start again")
    digests = [checked.sha256 for checked in found]
    as_trainer_error(lambda: write_index(place, urls, [checked.table for checked in found], digests))
    return len(urls), sum(checked.samples for checked in found), skipped


def _is_of(index: Index, urls: list[str]) -> bool:
    sizes = [os.path.getsize(url) for url in urls]
    return index.names == [os.path.basename(url) for url in urls] and index.tensors["bytes"].tolist() == sizes


def _collect_skipped(out: Path) -> list[str]:
    """Puts the units' lists together as skipped.jsonl, in their order; those of former jobs stay."""
    lines: dict[int, list[str]] = {}
    whole = out / SKIPPED
    for line in whole.read_text(encoding="utf-8").splitlines() if whole.exists() else []:
        lines.setdefault(json.loads(line)["shard"], []).append(line)
    parts = sorted(out.glob(".skipped-*.jsonl"))
    for part in parts:
        lines[int(part.stem.rpartition("-")[2])] = part.read_text(encoding="utf-8").splitlines()
    ordered = [line for _, of_shard in sorted(lines.items()) for line in of_shard]
    if ordered:
        _write(whole, "".join(f"{line}\n" for line in ordered))
    for part in parts:
        part.unlink()
    records = [json.loads(line) for line in ordered]
    return [f"{record['source']}, {record['key']}: {record['reason']}" for record in records]


# ------------------------------------------------------------------------------------------------------------- the work


def _tokenize_units(
    job: _Job,
    world: World,
    units: list[_Unit],
    missing: list[int],
    batch_size: int,
    workers: int | None,
    on_progress: Callable[[int, int | None], None],
) -> int:
    """Writes the missing units, one on each rank at a time, so that a mistake on one ends all. Samples written."""
    job.tokenizer.to(world.device)
    sizes = [None if unit.stop is None else unit.stop - unit.first for unit in units]
    total = None if None in sizes else sum(sizes)
    kept = sum(size or 0 for size in sizes) - sum(sizes[number] or 0 for number in missing)
    made, done = 0, kept  # of all ranks; samples that were written, and that were looked at
    threads = workers or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    pool = ThreadPoolExecutor(threads)
    try:
        for turn in range(0, len(missing), world.size):

            def tell(looked_at: int, before=done) -> None:
                if world.is_main:
                    on_progress(before + looked_at, total)

            mine = missing[turn + world.rank : turn + world.rank + 1]  # one, or in the last turn perhaps none
            work = functools.partial(_tokenize_unit, job, world, units, batch_size, pool, tell)
            counts = run_on_all_ranks(lambda work=work, mine=mine: [work(number) for number in mine])
            of_ranks = [count for of_rank in gather_objects(counts) for count in of_rank]
            done += sum(looked_at for looked_at, _ in of_ranks)
            made += sum(written for _, written in of_ranks)
            if world.is_main:
                on_progress(done, total)
    finally:
        pool.shutdown(cancel_futures=True)
    return made


class _Prepared(NamedTuple):
    key: str
    views_vchw: np.ndarray
    members: dict[str, bytes]  # caption and class


def _tokenize_unit(
    job: _Job,
    world: World,
    units: list[_Unit],
    batch_size: int,
    pool: ThreadPoolExecutor,
    tell: Callable[[int], None],
    number: int,
) -> tuple[int, int]:
    """Writes one token shard, or none where no image can be read. How many samples it looked at (`tell` hears of them
    meanwhile), and how many it wrote."""
    unit, path = units[number], _tar(job.out, number)
    shard, vocabulary = job.source.shards[unit.shard], job.settings["codes"]
    # Batches end with the unit, and so depend on it alone: any number of processes gives the same codes.
    samples_of_batch = max(1, batch_size // VIEWS[job.settings["views"]])
    skipped, written = [], 0
    with writing(job.out), contextlib.ExitStack() as stack:
        file = stack.enter_context(open(_unfinished(path), "wb"))
        stack.callback(_unfinished(path).unlink, missing_ok=True)  # where it is not whole
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for batch in _batches(_prepared(job, shard, unit, pool, 2 * samples_of_batch), samples_of_batch):
                usable = [one for one in batch if isinstance(one, _Prepared)]
                skipped += [one for one in batch if isinstance(one, Skipped)]
                codes = _codes_of(job.tokenizer, [one.views_vchw for one in usable], batch_size, world.device)
                for one, index_vhw in zip(usable, codes, strict=True):
                    content = pack_codes(index_vhw, job.settings["tokenizer"], vocabulary)
                    tar.write({"__key__": one.key, "codes": content, **one.members})
                written += len(usable)
                tell(written + len(skipped))
        lines = [json.dumps({"shard": number, **one._asdict()}) for one in skipped]
        if lines:
            _write(_skipped_of(job.out, number), "".join(f"{line}\n" for line in lines))
        else:
            _skipped_of(job.out, number).unlink(missing_ok=True)
        if written:
            file.flush()
            os.fsync(file.fileno())
            _unfinished(path).replace(path)
    return written + len(skipped), written


def _prepared(
    job: _Job, shard: Shard, unit: _Unit, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[_Prepared | Skipped]:
    """The unit's samples in order; the pool reads and decodes `ahead` of them."""
    waiting: deque = deque()
    for window in _fetched(shard.windows(unit.first, unit.stop, WINDOW), pool):
        for n in range(len(window)):
            waiting.append(pool.submit(_prepare, job, shard.name, window, n))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _fetched(windows: Iterator[Window], pool: ThreadPoolExecutor) -> Iterator[Window]:
    """The windows, the next one being fetched meanwhile."""

    def fetch() -> Window | None:
        if (window := next(windows, None)) is not None:
            window.fetch()
        return window

    future = pool.submit(fetch)
    while (window := future.result()) is not None:
        future = pool.submit(fetch)
        yield window


def _prepare(job: _Job, name: str, window: Window, n: int) -> _Prepared | Skipped:
    key = f"sample {window.first + n}"
    try:
        sample = window.read(n)
        key = sample.key
        picked = job.source.pick(sample)
        views_vchw = job.views_of(picked.content)
    except ImageError as error:
        return Skipped(name, key, str(error), job.source.name)
    members = {} if picked.label is None else {"cls": str(picked.label).encode()}
    if picked.caption is not None:
        members["txt"] = picked.caption.encode("utf-8", "replace")
    return _Prepared(job.keys.get(key, key), views_vchw, members)


def _batches(samples: Iterator, most: int) -> Iterator[list]:
    """`most` usable samples each, and the unusable ones between them; the last may be smaller."""
    batch, usable = [], 0
    for one in samples:
        batch.append(one)
        usable += isinstance(one, _Prepared)
        if usable == most:
            yield batch
            batch, usable = [], 0
    if batch:
        yield batch


def _codes_of(tokenizer: Tokenizer, views: list[np.ndarray], batch_size: int, device: torch.device) -> list[np.ndarray]:
    """uint8 (views, 3, side, side) of each sample -> its codes (views, rows, columns). fp32, whatever the run trained
    with."""
    if not views:
        return []
    levels_bchw = torch.from_numpy(np.concatenate(views))
    codes = []
    with full_precision(device.type):
        for part_bchw in levels_bchw.split(batch_size):
            codes.append(tokenizer.tokenize((part_bchw.to(device).double() / 127.5 - 1).float()).cpu())
    return np.split(torch.cat(codes).numpy(), len(views))


def image_views(content: bytes, kind: str, side: int, resize: str) -> np.ndarray:
    """An image file's bytes -> uint8 (views, 3, side, side) as VIEWS says; view 0 is the centre crop, not mirrored.

    ten-crop: the centre square at 1.1 times the side, of which centre and four corners are cut, and the mirror images
    of all five behind them. Raises ImageError."""
    image, protocol = decode(content), resize_named(resize)
    if kind == "ten-crop":
        larger = round(1.1 * side)
        crops = _five_crops(resize_and_center_crop(image, larger, protocol), side, protocol.margin(larger - side))
    else:
        crops = [resize_and_center_crop(image, side, protocol)]
    views_vchw = np.stack([pixels_chw(crop) for crop in crops])
    return views_vchw if kind == "original" else np.concatenate([views_vchw, views_vchw[..., ::-1]])


def _five_crops(image: Image.Image, side: int, margin: int) -> list[Image.Image]:
    far = image.width - side
    places = [(margin, margin), (0, 0), (far, 0), (0, far), (far, far)]
    return [image.crop((left, top, left + side, top + side)) for left, top in places]
