"""Samples a generator's images into a folder, an .npz as ADM's evaluation reads it, or one picture; by any number of
processes, and going on where a former job ended."""

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from data.folder_reader import find_images
from model_zoo import ModelError, Sampler, Sampling, Tokenizer, load_generator, load_tokenizer
from model_zoo.io.hashing import fingerprint_of, sha256_of
from model_zoo.io.hub import is_hub_name
from model_zoo.io.load import find_checkpoint, stands_alone
from model_zoo.io.sharded_tensors import run_of
from model_zoo.sampler import keep_products_in
from trainer import TrainerError
from trainer.config import GeneratorRun, load_run_config
from trainer.evaluation.run import choose_device
from trainer.jobs.resumable import check_same, writing
from trainer.parallel import World, gather_objects, raise_on_all_ranks, run_on_main, start_world, stop_world
from trainer.precision import autocast_dtype

SEEDS = "the first 63 bits of SHA-256 of 'SEED CLASS NTH', NTH the image's number among those of its class, from 0"
MOST_IMAGES = 10_000_000  # of one job
GRID_IMAGES = 1024  # most of one picture, which is held in memory
COUNT_SECONDS = 5.0  # at least, between looks at what all processes have made
WAIT_SECONDS = 7 * 86400.0  # of a process for the slowest
MANIFEST = "sample.json"
NO_FOLDERS = (".jpg", ".jpeg", ".webp", ".gif", ".tar", ".zip")  # of whose names nobody means one


class Sampled(NamedTuple):
    """images: of the whole output; made: by this job, the rest was there; images_per_second: of all processes."""

    out: Path
    report: Path
    images: int
    made: int
    images_per_second: float


def sample(
    source: str | Path,
    *,
    classes: str | None = None,
    count: int = 16,
    out: str | Path | None = None,
    seed: int = 0,
    sampling: dict | None = None,
    batch_size: int = 32,
    tokenizer: str | Path | None = None,
    weights: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    compile: bool = False,
    on_progress: Callable[[int, int, float], None] = lambda done, count, per_second: None,
) -> Sampled | None:
    """Samples ``count`` images, image n of class ``classes[n % len(classes)]``, and writes them and a report of all
    settings. All processes of torchrun call it; None on all but the first. What is there already of a job with the same
    settings is kept.

    source: a run's folder, a checkpoint's in it, or a published .ckpt. classes: as in ``1,2,7-9``, or ``none``; default
    all. out: a folder of PNGs, FILE.npz or FILE.png; default RUN/sampled. sampling: fields of `Sampling` that differ
    from the run's. tokenizer: default the run's, or that in the published checkpoint. weights: ``ema`` or ``raw``,
    default ema where the run keeps one. on_progress: hears of images done and asked for, and of images per second.
    Raises TrainerError or ModelError, one clear line.
    """
    if count < 1:
        raise TrainerError(f"--count {count} must be at least 1")
    if count > MOST_IMAGES:
        raise TrainerError(f"--count {count} is too large: at most {MOST_IMAGES:,}, in several jobs of other --seed")
    if batch_size < 1:
        raise TrainerError(f"--batch-size {batch_size} must be at least 1")
    if not 0 <= seed < 2**63:
        raise TrainerError(f"--seed {seed} must lie between 0 and 2^63")
    if precision not in ("fp32", "bf16"):
        raise TrainerError(f"--precision {precision} is unknown: choose fp32 or bf16")
    if device not in ("auto", "cpu", "cuda"):
        raise TrainerError(f"--device {device} is unknown: choose auto, cpu or cuda")
    choose_device(device)
    world = start_world(device, WAIT_SECONDS)
    try:
        checkpoint = Path(run_on_main(world, lambda: _find(Path(source))))  # of one step, should training still go on
        recipe = None if stands_alone(checkpoint) else _recipe(checkpoint)
        settings = Sampling(**{**(asdict(recipe.sampling) if recipe else {}), **(sampling or {})})
        if weights is None:
            weights = "raw" if recipe and not recipe.ema.decay else "ema"
        generator = load_generator(checkpoint, weights)
        vocabulary = generator.config.vocabulary
        decoder = _tokenizer(checkpoint, recipe, tokenizer)
        if decoder.config.codebook_size != vocabulary:
            raise TrainerError(
                f"the tokenizer has {decoder.config.codebook_size} codes, the generator {vocabulary}: name the one it "
                "was trained with, by --tokenizer"
            )
        chosen = _classes(classes, generator.config.classes, recipe)
        manifest = {
            "settings": {
                "generator": run_on_main(world, lambda: fingerprint_of(generator.state_dict())),
                "weights": weights,
                # Its decoder too, unlike `Tokenizer.fingerprint`.
                "tokenizer": run_on_main(world, lambda: fingerprint_of(decoder.state_dict())),
                "classes": chosen,
                "count": count,
                "seed": seed,
                **asdict(settings),
                "batch_size": batch_size,
                "precision": precision,
            },
            "source": str(source),
            "checkpoint": checkpoint.name,
            "seeds": SEEDS,
        }
        job = Job(_out(Path(source), out), chosen, count, seed, batch_size, generator.config.classes)
        if run_on_main(world, lambda: job.begin(manifest)):
            return Sampled(job.out, job.report, count, 0, 0.0) if world.is_main else None
        dtype = autocast_dtype(precision)
        generator.to(world.device)
        if dtype is not None:
            keep_products_in(generator, dtype)
        sampler = Sampler(generator, batch_size, dtype, compile)
        began = time.monotonic()
        made = _make_chunks(job, world, sampler, decoder.to(world.device), settings, on_progress)
        seconds = time.monotonic() - began
        finished = {
            "images_made": made,
            "seconds": round(seconds, 3),
            "images_per_second": round(made / seconds, 3),
            "processes": world.size,
            "device": torch.cuda.get_device_name() if world.device.type == "cuda" else f"CPU ({platform.machine()})",
            "torch": torch.__version__,
            "compile": compile,
        }
        run_on_main(world, lambda: job.finish({**manifest, "finished": finished}))
        return Sampled(job.out, job.report, count, made, made / seconds) if world.is_main else None
    finally:
        stop_world()


def seed_of(seed: int, label: int, nth: int) -> int:
    """See SEEDS. It depends on neither the job's other classes nor its size."""
    return int.from_bytes(hashlib.sha256(f"{seed} {label} {nth}".encode()).digest()[:8], "big") >> 1


def bytes_of(out: Path) -> int:
    """The size of an output: of the file, or of all images in the folder."""
    return sum((out / image).stat().st_size for image in find_images(out)) if out.is_dir() else out.stat().st_size


def _make_chunks(job: "Job", world: World, sampler: Sampler, tokenizer: Tokenizer, settings: Sampling, on_progress):
    """Samples this rank's part of what is not there yet; how many images all ranks made."""
    missing = job.missing()
    raise_on_all_ranks(None)  # before any rank writes, all have looked
    before, began, made, failure = job.images_done(missing), time.monotonic(), 0, None
    counted = began
    try:
        for chunk in missing:
            if chunk % world.size != world.rank:
                continue
            images = job.images(chunk)
            class_b = torch.tensor([image.label for image in images])
            index_bhw = sampler.sample(class_b, [image.seed for image in images], settings)
            with torch.autocast(world.device.type, sampler.dtype, enabled=sampler.dtype is not None):
                images_bchw = tokenizer.detokenize(index_bhw)
            levels_bchw = ((images_bchw.float().clamp(-1, 1) + 1) / 2 * 255).round().to(torch.uint8)
            job.write(chunk, levels_bchw.permute(0, 2, 3, 1).cpu().numpy())
            made += len(images)
            if world.is_main and (world.size == 1 or time.monotonic() > counted + COUNT_SECONDS):
                done = job.images_done(job.missing()) if world.size > 1 else before + made
                counted = time.monotonic()
                on_progress(done, job.count, (done - before) / (counted - began))
    except (TrainerError, ModelError) as error:
        failure = str(error)
    raise_on_all_ranks(failure)
    return sum(gather_objects(made))


class _Image(NamedTuple):
    label: int
    seed: int


class Job:
    """The output, and its parts until it is whole: a folder's PNGs, or a file's chunks in FILE.parts, each a batch. A
    part is written aside and renamed, so that one that has its name is whole."""

    def __init__(self, out: Path, classes: list[int], count: int, seed: int, batch_size: int, no_class: int):
        self.out, self.classes, self.count, self.seed, self.batch_size = out, classes, count, seed, batch_size
        self.no_class = no_class
        self.kind = out.suffix.lower() if out.suffix.lower() in (".npz", ".png") else "folder"
        self.is_folder = self.kind == "folder"
        self.parts = out if self.is_folder else out.with_name(f"{out.name}.parts")
        self.report = out / MANIFEST if self.is_folder else out.with_name(f"{out.name}.json")
        self.chunks = math.ceil(count / batch_size)

    def images(self, chunk: int) -> list[_Image]:
        """Of one chunk, in order."""
        images = []
        for number in self._numbers(chunk):
            label = self._label(number)
            images.append(_Image(label, seed_of(self.seed, label, number // len(self.classes))))
        return images

    def _numbers(self, chunk: int) -> range:
        return range(chunk * self.batch_size, min((chunk + 1) * self.batch_size, self.count))

    def _label(self, number: int) -> int:
        return self.classes[number % len(self.classes)]

    def missing(self) -> list[int]:
        """Chunks of which not all is there. Raises TrainerError."""
        with writing(self.out):
            there = set(os.listdir(self.parts))
        return [chunk for chunk in range(self.chunks) if not there.issuperset(self._names(chunk))]

    def images_done(self, missing: list[int]) -> int:
        """Without those of the missing chunks."""
        return self.count - sum(len(self._numbers(chunk)) for chunk in missing)

    def _names(self, chunk: int) -> list[str]:
        if not self.is_folder:
            return [f"chunk_{chunk:06d}.npy"]
        labels = [(number, self._label(number)) for number in self._numbers(chunk)]
        return [f"{n:06d}_class_{'none' if label == self.no_class else f'{label:04d}'}.png" for n, label in labels]

    def begin(self, manifest: dict) -> bool:
        """Makes room, or finds what a former job left; whether that is all. Raises TrainerError where other things lie
        there."""
        if self.kind == ".png" and self.count > GRID_IMAGES:
            raise TrainerError(
                f"one picture holds up to {GRID_IMAGES} images, not {self.count}: name a folder or FILE.npz"
            )
        with writing(self.out):
            self._check_name()
            finished, begun = _read(self.report), _read(self.parts / MANIFEST)
            former = finished or begun
            if former is None and self.out.exists() and not (self.is_folder and not any(self.out.iterdir())):
                raise TrainerError(f"{self.out} exists, and not by `ibq sample`: name another place with --out")
            if former is not None:
                check_same(self.out, "samples", former["settings"], manifest["settings"], _again)
                if former["finished"] and self.out.exists() and not (self.is_folder and self.missing()):
                    self._remove_parts()
                    return True
            self.parts.mkdir(parents=True, exist_ok=True)
            ours = {_unfinished(self.parts / MANIFEST).name}
            if begun is None and not self.is_folder and not {*os.listdir(self.parts)} <= ours:
                raise TrainerError(
                    f"{self.parts} is in the way, and not by `ibq sample`: name another place with --out"
                )
            _write_json(self.parts / MANIFEST, {**manifest, "finished": None})
        return False

    def write(self, chunk: int, images_bhwc: np.ndarray) -> None:
        """Raises TrainerError."""
        with writing(self.out):
            for name, image_hwc in zip(
                self._names(chunk), images_bhwc if self.is_folder else [images_bhwc], strict=True
            ):
                with _whole(self.parts / name) as file:
                    if self.is_folder:
                        Image.fromarray(image_hwc).save(file, "PNG")
                    else:
                        np.save(file, image_hwc)

    def finish(self, report: dict) -> None:
        """Puts the chunks together, writes the report, and removes the chunks. Raises TrainerError."""
        counts = np.bincount(np.arange(self.count) % len(self.classes))
        report["images_per_class"] = dict(zip(map(str, self.classes), counts.tolist(), strict=False))
        with writing(self.out):
            if not self.is_folder:
                with _whole(self.out) as file:
                    self._write_npz(file) if self.kind == ".npz" else self._grid().save(file, "PNG")
            # By these an evaluation knows that the report is of what lies there.
            report["finished"]["bytes"] = bytes_of(self.out)
            if self.kind == ".npz":
                report["finished"]["sha256"] = sha256_of(self.out)
            _write_json(self.report, report)
            self._remove_parts()

    def _check_name(self) -> None:
        """Raises TrainerError where the output is of no kind that this writes, or of another than what is there."""
        if self.out.suffix.lower() in NO_FOLDERS:
            raise TrainerError(f"{self.out} cannot be written: name a folder, FILE.npz or FILE.png with --out")
        if self.is_folder:
            if self.out.is_file():
                raise TrainerError(f"{self.out} is a file: name a folder, FILE.npz or FILE.png with --out")
        elif self.out.is_dir():
            raise TrainerError(f"{self.out} is a folder: name a file, or a folder without {self.kind}, with --out")

    def _remove_parts(self) -> None:
        """What this made of them, the manifest last; a folder's are the output itself."""
        if self.is_folder or _read(self.parts / MANIFEST) is None:
            return
        for name in os.listdir(self.parts):
            if re.fullmatch(r"chunk_\d+\.npy|\.chunk_\d+\.npy\.unfinished", name):
                (self.parts / name).unlink()
        for path in (_unfinished(self.parts / MANIFEST), self.parts / MANIFEST):
            path.unlink(missing_ok=True)
        if not os.listdir(self.parts):
            self.parts.rmdir()

    def _arrays(self) -> Iterator[np.ndarray]:
        return (np.load(self.parts / name) for chunk in range(self.chunks) for name in self._names(chunk))

    def _write_npz(self, file) -> None:
        """`arr_0` uint8 (n, h, w, 3), as ADM's evaluation has it, and `classes` int64 (n,); a chunk at a time."""
        arrays = self._arrays()
        first_bhwc = next(arrays)
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *first_bhwc.shape[1:])}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            # Members with zip's own first date: the same images give the same file.
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                member.write(first_bhwc.tobytes())
                for images_bhwc in arrays:
                    member.write(images_bhwc.tobytes())
            with archive.open(zipfile.ZipInfo("classes.npy"), "w") as member:
                labels = np.resize(np.array(self.classes, dtype=np.int64), self.count)
                np.lib.format.write_array(member, labels)

    def _grid(self) -> Image.Image:
        """A row for each class where there are several images of it; else as square as can be."""
        images_nhwc = np.concatenate(list(self._arrays()))
        classes = min(len(self.classes), self.count)
        by_class = 1 < classes < self.count
        columns = math.ceil(self.count / classes if by_class else math.sqrt(self.count))
        rows = classes if by_class else math.ceil(self.count / columns)
        height, width = images_nhwc.shape[1:3]
        sheet_hwc = np.full((rows * height, columns * width, 3), 255, dtype=np.uint8)
        for number, image_hwc in enumerate(images_nhwc):
            row, column = (number % classes, number // classes) if by_class else divmod(number, columns)
            sheet_hwc[row * height :, column * width :][:height, :width] = image_hwc
        return Image.fromarray(sheet_hwc)


# ----------------------------------------------------------------------------------------------------------- the asked


def _find(source: Path) -> str:
    try:
        return str(find_checkpoint(source))
    except ModelError as error:  # `run_on_main` tells all ranks of TrainerErrors
        raise TrainerError(str(error)) from error


def _recipe(checkpoint: Path) -> GeneratorRun:
    run = run_of(checkpoint)
    recipe = load_run_config(run, [])
    if not isinstance(recipe, GeneratorRun):
        raise TrainerError(f"{run} is a {recipe.task}'s run: name a generator's")
    return recipe


def _tokenizer(checkpoint: Path, recipe: GeneratorRun | None, asked: str | Path | None) -> Tokenizer:
    source = asked or (recipe.tokenizer.source if recipe else checkpoint)
    if source is None:
        raise TrainerError(f"{run_of(checkpoint)} knows no tokenizer: name its run or checkpoint with --tokenizer")
    try:
        tokenizer = load_tokenizer(source)
    except ModelError as error:
        raise TrainerError(f"no tokenizer: {error}; --tokenizer names another") from error
    expected = recipe.tokenizer.fingerprint if recipe else None
    if expected is not None and tokenizer.fingerprint() != expected:
        raise TrainerError(
            f"the tokenizer {source} ({tokenizer.fingerprint()}) is not the one whose codes the generator learned "
            f"({expected}): name that one with --tokenizer"
        )
    return tokenizer


def _classes(text: str | None, classes: int, recipe: GeneratorRun | None) -> list[int]:
    """Each once, in order. The number of classes stands for none."""
    if text == "none" or (text is None and recipe and recipe.loss.label_dropout == 1):
        return [classes]
    if text is None:
        return list(range(classes))
    chosen = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < classes:
            raise TrainerError(
                f"--classes {text}: {part.strip()!r} is no class from 0 to {classes - 1}, nor a range such as 0-9"
            )
        chosen.update(dict.fromkeys(range(first, last + 1)))
    return list(chosen)


def _out(source: Path, out: str | Path | None) -> Path:
    if out is not None:
        return Path(out)
    if is_hub_name(source):
        return Path(f"{source.name}_sampled")
    return source.with_name(f"{source.stem}_sampled") if stands_alone(source) else run_of(source) / "sampled"


# ----------------------------------------------------------------------------------------------------------- the files


@contextlib.contextmanager
def _whole(path: Path) -> Iterator:
    """A file to write that gets its name when it is whole."""
    with _unfinished(path).open("wb") as file:
        yield file
    _unfinished(path).replace(path)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


def _write_json(path: Path, content: dict) -> None:
    with _whole(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def _read(path: Path) -> dict | None:
    """A manifest or report; None where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict) or not {"settings", "finished"} <= content.keys():
        raise TrainerError(f"{path} is in the way, and not by `ibq sample`: name another place with --out")
    return content


def _again(key: str, former: dict) -> str:
    """What to type, or in words, for this setting of a former job."""
    value = former.get(key)
    if key == "generator":
        return "the same weights of the generator"
    option = f"--{key.replace('_', '-')}"
    return f"the same {option}" if value is None or key in ("classes", "tokenizer") else f"{option} {value}"
