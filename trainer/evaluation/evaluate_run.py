"""`ibq evaluate reconstruction`, which measures a tokenizer and writes the report's files, and `ibq reconstruct`."""

import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from data.buckets import parse_size
from data.config import DataConfig
from data.evaluation import EvaluationImages, evaluation_images
from data.file_names import fitted
from data.held_out import is_trained_on
from data.loader import image_suffixes, validation_sizes
from data.locks import LOCK_NAME, file_lock, folder_lock
from data.transforms import RESIZES
from model_zoo.config import TokenizerConfig
from model_zoo.io.hashing import fingerprint_of
from model_zoo.io.load import build_model, find_checkpoint, is_standalone, load_tokenizer, read_weights
from model_zoo.io.run_layout import checkpoint_step, run_folder
from model_zoo.tokenizer import Tokenizer
from trainer import TrainerError
from trainer.evaluation.provenance import StageTimer, environment, image_list_hash, weights_files
from trainer.evaluation.reconstruction import (
    Networks,
    describe_skipped,
    evaluate_reconstruction,
    first_reason,
    load_networks,
    reconstruct_images,
)
from trainer.evaluation.reconstruction_report import (
    EvaluatedRun,
    ReconstructionReport,
    check_report,
    report_files,
    write_evaluated_run,
)
from trainer.evaluation.reference_results import (
    DEFAULT_RECIPE,
    EvaluationRecipe,
    comparison_table,
    differences,
    load_evaluation_recipe,
    reference_rows,
)
from trainer.files import write_json, writing
from trainer.init_from import read_init_record
from trainer.jobs.setup import (
    choose_device,
    data_config,
    decode_threads,
    job_world,
    one_writer,
    read_record,
    sole_writer,
)
from trainer.loading import common_checkpoint, load_newest
from trainer.metrics.image import SSIM_WINDOW, psnr, to_levels
from trainer.parallel import World, check_same_on_all_ranks, run_on_main
from trainer.reports.image_grid import EXAMPLE_COUNT, ORDERS, Example, pair, side_by_side

RUN_REPORT = "report.json"
ORIGINAL = "original"  # --size of images that are not resized
RECONSTRUCTIONS = "reconstruct.json"  # marks a folder of `ibq reconstruct`
FEW_IMAGES = 10_000  # fewer than these bias rFID
SIZE, RESIZE = 256, "cv2_bilinear"  # of published tokenizers on ImageNet; used if neither options nor a run say more


class ImageSource(NamedTuple):
    """One process's share of the images."""

    images: EvaluationImages
    path: str | list[str]
    image_size: int | str  # pixels of a square, ``original``, or sizes such as ``384x640``, separated by commas
    resize: str
    batch_size: int

    @property
    def shortest_side(self) -> int | None:
        """Of the images, in pixels; None if they keep their sizes."""
        if self.images.buckets:
            return min(min(size) for size in self.images.buckets)
        return self.images.image_size


def open_images(
    checkpoint: Path,
    images: str | list[str] | None,
    image_size: int | str | None,
    resize: str | None,
    world: World,
    batch_size: int,
    image: list[str] | None = None,
) -> ImageSource:
    """Opens the images. What is None comes from the run's ``data`` section (``val``, the sizes of validation images,
    ``resize``); without a run, size and resize are those of the published ImageNet results. image: suffixes of the
    images in tars. Raises TrainerError or DataError."""
    config = data_config(checkpoint)
    path = images if images is not None or config is None else config.val
    if path is None and config is None:
        raise TrainerError(f"{checkpoint} is not a run with a data.val: name the images with --images PATH")
    if path is None:
        raise TrainerError(f"{run_folder(checkpoint)} was trained without data.val: name the images with --images PATH")
    if resize is None:
        resize = RESIZE if config is None else config.resize
    if resize not in RESIZES:
        raise TrainerError(f"--resize {resize} is unknown: choose one of {', '.join(RESIZES)}")
    if image_size is None:
        sizes = {"image_size": SIZE} if config is None else validation_sizes(config)
    else:
        sizes = _sizes(str(image_size))
    if sizes["image_size"] is None and not sizes.get("buckets"):
        batch_size = 1
    options = dict(resize=resize, shard=(world.rank, world.size), block=batch_size, threads=decode_threads())
    options["image"] = _image_suffixes(config, path, images is None, image)
    opened = evaluation_images(path, **sizes, **options)
    named = sizes["image_size"] or ",".join(map(str, sizes.get("buckets", ()))) or ORIGINAL
    return ImageSource(opened, path, named, resize, batch_size)


def _sizes(text: str) -> dict:
    """``--size`` as options of `evaluation_images`. Raises TrainerError."""
    if text == ORIGINAL:
        return {"image_size": None}
    buckets = [parse_size(part) for part in text.split(",")]
    if None not in buckets and min(min(size) for size in buckets) >= SSIM_WINDOW:
        return {"image_size": None, "buckets": buckets, "enlargement": math.inf}
    if not text.isdecimal() or int(text) < SSIM_WINDOW:
        raise TrainerError(
            f"--size {text}: give at least {SSIM_WINDOW} pixels, sizes such as 384x640 or 256x256,192x352, or "
            f"'{ORIGINAL}'"
        )
    return {"image_size": int(text)}


def _image_suffixes(
    config: DataConfig | None, path: str | list[str], is_val: bool, given: list[str] | None
) -> list[str] | None:
    if config is None:
        return given
    given = given or (config.val_image if is_val or path == config.val else None)
    return image_suffixes(config, path, given, "data.val" if is_val else "--images", "--image SUFFIX")


class _Inputs(NamedTuple):
    """held_weights: ``ema`` or ``raw``, as found; a file without EMA weights has only ``raw``."""

    checkpoint: Path
    tokenizer: Tokenizer
    held_weights: str
    fingerprint: str
    source: ImageSource
    networks: Networks


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
    image: list[str] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> EvaluatedRun | None:
    """Evaluates a tokenizer and writes FILE.json, FILE.md and grids of example images next to them. All processes of
    torchrun call it; returns None on all ranks but 0.

    source: as for `model_zoo.load_tokenizer`. images: default the run's ``data.val``. image_size: pixels, or
    "original" (one image at a time); resize: a protocol of `data.transforms`; measures: as for `load_networks`; the
    default of these three is the recipe's, else the run's (measures: auto). image: suffixes of the images in tars,
    default those of ``data.val_image`` or of the run's source with the same root. recipe: a name in
    recipes/evaluation, or a file. report_path: default RUN/report.json, or NAME_reconstruction.json in the working
    directory if the source is not a run folder. Raises TrainerError, ModelError or DataError, each with one line.
    """
    if batch_size < 1:
        raise TrainerError(f"the batch size must be at least 1, not {batch_size}")
    conditions = load_evaluation_recipe(recipe) if recipe else None
    if conditions:
        image_size = conditions.size if image_size is None else image_size
        resize = resize or conditions.resize
        measures = measures or conditions.metrics
    options = dict(size=image_size, resize=resize, metrics=measures, weights=weights, image=image)
    with job_world(device, **options, batch_size=batch_size) as world, ExitStack() as held:
        checkpoint = common_checkpoint(world, source)
        json_path = Path(report_path) if report_path is not None else _default_report(Path(source), checkpoint)
        run_on_main(world, lambda: check_report(report_files(json_path, _grid_paths(json_path).values())))
        held.enter_context(one_writer(world, file_lock(json_path), json_path, "--report"))

        def prepare(checkpoint: Path) -> _Inputs:
            opened = open_images(checkpoint, images, image_size, resize, world, batch_size, image)
            return _load(checkpoint, weights, opened, measures or "auto")

        inputs = load_newest(world, source, prepare)
        check_same_on_all_ranks("the tokenizer", f"fingerprint {inputs.fingerprint}")
        check_same_on_all_ranks(f"--images {inputs.source.path}", inputs.source.images.identity())
        # Other images than data.val may have been in the training set.
        is_held_out = run_on_main(world, lambda: images is None and not is_trained_on(data_config(inputs.checkpoint)))
        timer = StageTimer(world.device)
        report = evaluate_reconstruction(
            inputs.tokenizer.to(world.device),
            inputs.source.images,
            world=world,
            batch_size=inputs.source.batch_size,
            networks=inputs.networks.to(world.device),
            timer=timer,
            on_progress=on_progress,
        )
        evaluated = None
        if world.is_main:
            provenance = {"run": str(source), "recipe": recipe, **_provenance(inputs, report, world, json_path)}
            provenance["held_out"] = is_held_out
            provenance["seconds"] = timer.seconds()
            evaluated = _compare(report, provenance, conditions, json_path)
        run_on_main(world, lambda: write_evaluated_run(evaluated))
        return evaluated


def _load(checkpoint: Path, weights: str, source: ImageSource, measures: str) -> _Inputs:
    found = read_weights(checkpoint, "tokenizer", weights)
    tokenizer = build_model(found, "tokenizer", TokenizerConfig, Tokenizer)
    fingerprint = fingerprint_of(tokenizer.state_dict())
    image_count = sum(len(shard) for shard in source.images.shards)
    networks = load_networks(measures, source.shortest_side, image_count)
    return _Inputs(checkpoint, tokenizer, found.weights, fingerprint, source, networks)


def _provenance(inputs: _Inputs, report: ReconstructionReport, world: World, json_path: Path) -> dict:
    """What a reader needs to repeat the measurement."""
    checkpoint, source = inputs.checkpoint, inputs.source
    return {
        "checkpoint": checkpoint.name,
        "checkpoint_path": str(checkpoint),
        "step": checkpoint_step(checkpoint),
        "fingerprint": inputs.fingerprint,  # of all weights, unlike `Tokenizer.fingerprint`
        "weights": inputs.held_weights,
        "start": read_init_record(run_folder(checkpoint)),
        "images": source.path,
        "image_list": image_list_hash(score.key for score in report.images),
        "image_size": source.image_size,
        "resize": source.resize,
        "batch_size": source.batch_size,
        "pictures": {name: path.name for name, path in _grid_paths(json_path).items()},
        "weights_files": weights_files(inputs.networks.weights_keys),
        "environment": environment(world.device),
        "processes": world.size,
    }


def _compare(
    report: ReconstructionReport, provenance: dict, conditions: EvaluationRecipe | None, json_path: Path
) -> EvaluatedRun:
    """The report next to the published results of its recipe."""
    reference = conditions or load_evaluation_recipe(DEFAULT_RECIPE)
    rows = reference_rows(reference.published)
    return EvaluatedRun(
        report,
        provenance,
        _warnings(report, conditions),
        comparison_table(report.to_json(), rows),
        differences(reference, provenance, report.image_count) if rows else [],
        json_path,
        json_path.with_suffix(".md"),
        _grid_paths(json_path),
    )


def _default_report(source: Path, checkpoint: Path) -> Path:
    """report.json in a run folder; for one checkpoint, or a source that is no run, a file in the working directory."""
    if is_standalone(checkpoint):
        name = source.stem if source.is_file() else source.name
        return Path(fitted("", name, "_reconstruction.json"))
    run = run_folder(checkpoint)
    return run / RUN_REPORT if source == run else Path(fitted("", run.name, f"_{checkpoint.name}_reconstruction.json"))


def _grid_paths(json_path: Path) -> dict[str, Path]:
    return {
        name: json_path.with_name(fitted("", json_path.stem, f"{'' if name == 'first' else f'_{name}'}.png"))
        for name in ORDERS
    }


def _warnings(report: ReconstructionReport, conditions: EvaluationRecipe | None) -> list[str]:
    found, count = [], report.image_count
    if report.rfid is not None and count < FEW_IMAGES:
        found.append(
            f"rFID of {count:,} images is biased upwards: compare it only with rFID of the same number of images"
        )
    if conditions and conditions.expected_images not in (None, count):
        found.append(f"not the published set: {count:,} of {conditions.expected_images:,} images")
    return found


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
    image: list[str] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> WrittenReconstructions:
    """Writes OUT/<number>_<name>.png, each image next to its reconstruction, OUT/overview.png of the first ones, and a
    record. The pictures of a former call in OUT are removed; any other folder that is not empty is refused.

    Arguments and errors as for `evaluate_run`; one process.
    """
    out = Path(out)
    _check_reconstructions_folder(out)
    if batch_size < 1:
        raise TrainerError(f"the batch size must be at least 1, not {batch_size}")
    device = choose_device(device)
    checkpoint = find_checkpoint(Path(source))
    tokenizer = load_tokenizer(source, weights=weights).to(device)
    opened = open_images(checkpoint, images, image_size, resize, World(0, 1, device), batch_size, image)
    examples: list[Example] = []
    image_count = 0
    record = {"source": str(source), "images": str(images), "weights": weights}
    with ExitStack() as held:
        for batch in reconstruct_images(tokenizer, opened.images, batch_size=opened.batch_size, device=device):
            decibels = psnr(batch.images_bchw, batch.reconstruction_bchw).tolist()
            original_bchw = to_levels(batch.images_bchw).cpu()
            reconstruction_bchw = to_levels(batch.reconstruction_bchw).cpu()
            if not image_count:  # not before there is something to write
                held.enter_context(sole_writer(folder_lock(out), out))
                _begin_reconstructions(out, record)
            for example in map(Example, batch.keys, decibels, original_bchw, reconstruction_bchw):
                with writing(out):  # the number separates images of the same name in different folders
                    pair(example).save(out / fitted(f"{image_count:05d}_", Path(example.key).stem, ".png"))
                image_count += 1
                if len(examples) < EXAMPLE_COUNT:
                    examples.append(example)
            on_progress(image_count, len(opened.images))
        skipped = describe_skipped(opened.images)
        if not examples:
            raise TrainerError(
                f"no readable image in {images}{first_reason(skipped)}: give a folder, a tar or an image file with "
                "readable images"
            )
        with writing(out):
            side_by_side(examples).save(out / "overview.png")
    return WrittenReconstructions(image_count, out / "overview.png", skipped)


def _check_reconstructions_folder(out: Path) -> None:
    """Raises TrainerError unless the folder is new, empty or from an earlier `ibq reconstruct`."""
    error = TrainerError(f"{out} holds other files than those of `ibq reconstruct`: name a new folder with --out")
    with writing(out):
        if (
            read_record(out / RECONSTRUCTIONS, {"source", "images"}, error) is None
            and out.exists()
            and any(path.name != LOCK_NAME for path in out.iterdir())
        ):
            raise error


def _begin_reconstructions(out: Path, record: dict) -> None:
    """Writes the record, and removes the pictures of an earlier call. For one writer. Raises TrainerError."""
    _check_reconstructions_folder(out)  # again: another process may have written there meanwhile
    with writing(out):
        write_json(out / RECONSTRUCTIONS, record)
        for path in out.iterdir():
            if re.fullmatch(r"\d{5,}_.*\.png|overview\.png", path.name):
                path.unlink()
