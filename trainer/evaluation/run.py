"""`ibq evaluate reconstruction` and `ibq reconstruct`: which tokenizer, which pictures, and what is written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data import DataConfig, EvaluationImages, evaluation_images
from data.parallel import cores
from data.transforms import RESIZES
from model_zoo import Tokenizer, TokenizerConfig, load_tokenizer
from model_zoo.io.hashing import fingerprint_of
from model_zoo.io.load import as_model, find_checkpoint, read_weights, stands_alone
from model_zoo.io.sharded_tensors import run_of
from trainer import TrainerError, metrics
from trainer.evaluation.provenance import environment, image_list_hash, weights_files
from trainer.evaluation.reconstruction import (
    NETWORKS,
    Clock,
    Networks,
    ReconstructionReport,
    evaluate_reconstruction,
    first_reason,
    load_networks,
    reconstruct_images,
    tell_skipped,
)
from trainer.evaluation.reference_results import (
    YARDSTICK,
    EvaluationRecipe,
    comparison,
    differences,
    load_evaluation_recipe,
    markdown,
    published_rows,
)
from trainer.init_from import read_init_record
from trainer.jobs.resumable import writing
from trainer.parallel import World, as_trainer_error, run_on_all_ranks, run_on_main, start_world, stop_world
from trainer.reports.image_grid import EXAMPLE_COUNT, ORDERS, Example, pair, side_by_side

SIZE, RESIZE = 256, "cv2_bilinear"  # of published tokenizers on ImageNet, where no run and no recipe says others
RUN_REPORT = "report.json"
FEW_PICTURES = 10_000  # for rFID
DECODE_THREADS = 8  # at most, of a process
WAIT_SECONDS = 7 * 86400.0  # of a process for the slowest


class EvaluatedRun(NamedTuple):
    """What was measured and written. comparison: rows of words, the first of them headings, as in FILE.md; differences:
    from the conditions of the published figures in it. pictures: by name of `trainer.sheets.ORDERS`."""

    report: ReconstructionReport
    manifest: dict
    warnings: list[str]
    comparison: list[list[str]]
    differences: list[str]
    json_path: Path
    markdown_path: Path
    pictures: dict[str, Path]


def evaluate_run(
    source: str | Path,
    *,
    images: str | list[str] | None = None,
    image_size: int | str | None = None,
    resize: str | None = None,
    recipe: str | None = None,
    measures: str | None = None,
    weights: str = "ema",
    report_path: str | Path | None = None,
    batch_size: int = 16,
    device: str = "auto",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluatedRun | None:
    """Evaluates a tokenizer and writes FILE.json, FILE.md and, beside them, pictures of examples. All processes of
    torchrun call it; None on all but the first.

    source: whatever `model_zoo.load_tokenizer` takes. images: default the run's `data.val`. image_size: pixels, or
    "original" (one picture at a time); resize: a protocol of `data.transforms`; measures: as of `load_networks`. These
    three are by default the recipe's, else the run's (measures: auto). recipe: a name in recipes/evaluation, or a file.
    report_path: default RUN/report.json, or NAME_reconstruction.json in the working directory where the source is not a
    run as a whole. Raises TrainerError, ModelError or DataError, each with one clear line.
    """
    if batch_size < 1:
        raise TrainerError(f"the batch size must be at least 1, not {batch_size}")
    choose_device(device)
    conditions = load_evaluation_recipe(recipe) if recipe else None
    if conditions:
        image_size = conditions.size if image_size is None else image_size
        resize = resize or conditions.resize
        measures = measures or conditions.metrics
    yardstick = conditions or load_evaluation_recipe(YARDSTICK)
    published = published_rows(yardstick.published)
    world = start_world(device, WAIT_SECONDS)
    try:
        checkpoint = Path(run_on_main(world, lambda: as_trainer_error(lambda: str(find_checkpoint(Path(source))))))
        json_path = Path(report_path) if report_path is not None else default_report(Path(source), checkpoint)
        run_on_main(world, lambda: make_room(json_path))

        def prepare() -> tuple[Tokenizer, str, str, ImageSource, Networks]:
            found = read_weights(checkpoint, "tokenizer", weights)
            tokenizer = as_model(found, "tokenizer", TokenizerConfig, Tokenizer)
            fingerprint = fingerprint_of(tokenizer.state_dict()) if world.is_main else ""
            opened = open_images(checkpoint, images, image_size, resize, world, batch_size)
            count = sum(len(shard) for shard in opened.images.shards)
            networks = load_networks(measures or "auto", opened.image_size, count)
            return tokenizer, found.weights, fingerprint, opened, networks

        tokenizer, held_weights, fingerprint, opened, networks = run_on_all_ranks(prepare)
        for module in (tokenizer, networks.inception, *networks.lpips.values()):
            if module is not None:
                module.to(world.device)
        clock = Clock(world.device)
        report = evaluate_reconstruction(
            tokenizer,
            opened.images,
            world=world,
            batch_size=opened.batch_size,
            networks=networks,
            clock=clock,
            on_progress=on_progress,
        )
        if not world.is_main:
            run_on_main(world, lambda: None)
            return None
        used = [NETWORKS[measure] for measure in NETWORKS if measure not in networks.not_measured]
        manifest = {
            "run": str(source),
            "checkpoint": checkpoint.name,
            "checkpoint_path": str(checkpoint),
            "step": _step(checkpoint),
            "fingerprint": fingerprint,  # of all weights, unlike `Tokenizer.fingerprint`
            "weights": held_weights,  # not those asked for: a file without averages gives its only ones
            "start": read_init_record(run_of(checkpoint)),
            "recipe": recipe,
            "images": opened.path,
            "image_list": image_list_hash(score.key for score in report.images),
            "held_out": images is None,  # other pictures than data.val may have been trained on
            "image_size": "original" if opened.image_size is None else opened.image_size,
            "resize": opened.resize,
            "batch_size": opened.batch_size,
            "pictures": {name: _picture_path(json_path, name).name for name in ORDERS},
            "weights_files": weights_files(used),
            "environment": environment(world.device),
            "processes": world.size,
        }
        evaluated = EvaluatedRun(
            report,
            manifest,
            _warnings(report, conditions),
            comparison(report.to_json(), published),
            differences(yardstick, manifest, report.image_count) if published else [],
            json_path,
            json_path.with_suffix(".md"),
            {name: _picture_path(json_path, name) for name in ORDERS},
        )
        manifest["seconds"] = clock.read()
        run_on_main(world, lambda: _write(evaluated))
        return evaluated
    finally:
        stop_world()


def make_room(json_path: Path) -> None:
    """Makes the report's folder and tries to write there, before any work. Raises TrainerError."""
    if json_path.suffix != ".json" or json_path.is_dir():
        raise TrainerError(f"--report {json_path}: name a file that ends in .json")
    with writing(json_path, "--report"):
        json_path.parent.mkdir(parents=True, exist_ok=True)
        trial = json_path.with_name(f".unfinished_{json_path.name}")
        trial.touch()
        trial.unlink(missing_ok=True)  # another process may evaluate to the same place


def default_report(source: Path, checkpoint: Path) -> Path:
    """report.json of a run as a whole; of one checkpoint, or of what is no run, a file in the working directory."""
    if stands_alone(checkpoint):
        return Path(f"{source.name.removesuffix('.ckpt')}_reconstruction.json")
    run = run_of(checkpoint)
    return run / RUN_REPORT if source == run else Path(f"{run.name}_{checkpoint.name}_reconstruction.json")


def _picture_path(json_path: Path, name: str) -> Path:
    return json_path.with_name(f"{json_path.stem}{'' if name == 'first' else f'_{name}'}.png")


def _step(checkpoint: Path) -> int | None:
    step = checkpoint.name.removeprefix("step_")
    return int(step) if step.isdecimal() else None


def _warnings(report: ReconstructionReport, conditions: EvaluationRecipe | None) -> list[str]:
    found, count = [], report.image_count
    if report.rfid is not None and count < FEW_PICTURES:
        found.append(
            f"rFID of {count:,} pictures is higher than that of many: compare it with rFIDs of as many pictures only"
        )
    if conditions and conditions.expected_images not in (None, count):
        found.append(f"not the published set: {count:,} of {conditions.expected_images:,} images")
    return found


def _write(evaluated: EvaluatedRun) -> None:
    """The files one after the other, each whole or not at all; the numbers last."""
    report, json_path = evaluated.report, evaluated.json_path
    numbers = {**report.to_json(), "warnings": evaluated.warnings, "manifest": evaluated.manifest}
    writers = {
        **{evaluated.pictures[name]: side_by_side(examples).save for name, examples in report.examples.items()},
        evaluated.markdown_path: lambda path: path.write_text(markdown(evaluated), encoding="utf-8"),
        json_path: lambda path: path.write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n"),
    }
    for path, write in writers.items():
        with writing(path, "--report"):
            unfinished = path.with_name(f".unfinished_{path.name}")
            write(unfinished)
            unfinished.replace(path)


class WrittenReconstructions(NamedTuple):
    image_count: int
    overview_path: Path
    skipped: list[str]


def write_reconstructions(
    source: str | Path,
    *,
    images: str | list[str],
    out: str | Path,
    image_size: int | str | None = None,
    resize: str | None = None,
    weights: str = "ema",
    batch_size: int = 16,
    device: str = "auto",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> WrittenReconstructions:
    """Writes OUT/<place>_<name>.png, each picture beside its reconstruction, and OUT/overview.png of the first ones.

    Arguments and errors as in `evaluate_run`; one process.
    """
    out = Path(out)
    if batch_size < 1:
        raise TrainerError(f"the batch size must be at least 1, not {batch_size}")
    device = choose_device(device)
    checkpoint = find_checkpoint(Path(source))
    tokenizer = load_tokenizer(checkpoint, weights=weights).to(device)
    opened = open_images(checkpoint, images, image_size, resize, World(0, 1, device), batch_size)
    examples: list[Example] = []
    image_count = 0
    for batch in reconstruct_images(tokenizer, opened.images, batch_size=opened.batch_size, device=device):
        psnr = metrics.psnr(batch.images_bchw, batch.reconstruction_bchw).tolist()
        original_bchw = metrics.to_levels(batch.images_bchw).cpu()
        reconstruction_bchw = metrics.to_levels(batch.reconstruction_bchw).cpu()
        for example in map(Example, batch.keys, psnr, original_bchw, reconstruction_bchw):
            with writing(out):  # the place keeps pictures of one name in several folders apart
                out.mkdir(parents=True, exist_ok=True)
                pair(example).save(out / f"{image_count:05d}_{Path(example.key).stem}.png")
            image_count += 1
            if len(examples) < EXAMPLE_COUNT:
                examples.append(example)
        on_progress(image_count, len(opened.images))
    skipped = tell_skipped(opened.images)
    if not examples:
        raise TrainerError(
            f"no readable picture in {images}{first_reason(skipped)}: give a folder, a tar or an image file that holds "
            "some"
        )
    with writing(out):
        side_by_side(examples).save(out / "overview.png")
    return WrittenReconstructions(image_count, out / "overview.png", skipped)


class ImageSource(NamedTuple):
    """One process's part of the pictures."""

    images: EvaluationImages
    path: str | list[str]
    image_size: int | None  # pixels, None for the pictures' own
    resize: str
    batch_size: int


def open_images(
    checkpoint: Path,
    images: str | list[str] | None,
    image_size: int | str | None,
    resize: str | None,
    world: World,
    batch_size: int,
) -> ImageSource:
    """The pictures asked for. What is not asked is as the run's data has it (`val`, `val_image_size`, `resize`), and
    without a run as in the published ImageNet tables."""
    config = None if stands_alone(checkpoint) else _data_config(run_of(checkpoint))
    path = images if images is not None or config is None else OmegaConf.to_container(config).get("val")
    if path is None and config is None:
        raise TrainerError(f"{checkpoint} is no run with a data.val: say which pictures with --images PATH")
    if path is None:
        raise TrainerError(f"{run_of(checkpoint)} was trained without data.val: say which pictures with --images PATH")
    if resize is None:
        resize = RESIZE if config is None else config.resize
    if resize not in RESIZES:
        raise TrainerError(f"--resize {resize} is unknown: choose one of {', '.join(RESIZES)}")
    if image_size is None:
        image_size = SIZE if config is None else config.val_image_size or config.image_size
    if image_size != "original" and (not str(image_size).isdecimal() or int(image_size) < metrics.SSIM_WINDOW):
        raise TrainerError(
            f"--size {image_size} is neither a number of pixels from {metrics.SSIM_WINDOW} on nor 'original'"
        )
    size = None if image_size == "original" else int(image_size)
    batch_size = 1 if size is None else batch_size
    opened = evaluation_images(
        path,
        image_size=size,
        resize=resize,
        shard=(world.rank, world.size),
        block=batch_size,
        threads=min(DECODE_THREADS, max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))),
    )
    return ImageSource(opened, path, size, resize, batch_size)


def _data_config(run: Path) -> DictConfig:
    try:
        return OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(run / "config.yaml").data)
    except OmegaConfBaseException as error:
        raise TrainerError(f"the data section of {run}/config.yaml: {str(error).splitlines()[0]}") from error


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises TrainerError for a device that this machine has not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise TrainerError(f"--device {name} is unknown: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainerError("--device cuda: this machine has 0 GPUs; choose auto or cpu")
    return torch.device(name)
