"""`ibq sample`: samples images of a generator with any number of processes; running it again continues."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from data.file_names import fitted
from data.transforms import Size
from model_zoo.conditions import parse_classes, trained_grids
from model_zoo.config import Sampling
from model_zoo.errors import ModelError
from model_zoo.io.hashing import fingerprint_of
from model_zoo.io.load import build_generator, is_hub_name, is_standalone, load_tokenizer, read_weights
from model_zoo.io.run_layout import run_folder
from model_zoo.sampler import Sampler, check_conditions, keep_products_in
from model_zoo.tokenizer import Tokenizer
from model_zoo.transformer import Transformer
from trainer import TrainerError
from trainer.compiler import check_compiler
from trainer.config import GeneratorRun
from trainer.evaluation.provenance import environment
from trainer.jobs.sample_output import SEEDS, SampleOutput
from trainer.jobs.setup import job_world, one_writer, run_config
from trainer.loading import load_newest
from trainer.parallel import World, check_same_on_all_ranks, gather_objects, run_on_all_ranks, run_on_main
from trainer.precision import autocast_dtype

MAX_IMAGES = 10_000_000  # of one job
COUNT_SECONDS = 5.0  # at least, between two counts of what all processes have finished

Progress = Callable[[int, int, float], None]


class Sampled(NamedTuple):
    """images: of the whole output. made: by this job, without those of former jobs. images_per_second: of all
    processes."""

    out: Path
    report: Path
    images: int
    made: int
    images_per_second: float


class _Models(NamedTuple):
    """recipe: None if the checkpoint belongs to no run. held_weights: ``ema`` or ``raw``, as found; an export or a file
    without EMA weights has only ``raw``."""

    checkpoint: Path
    recipe: GeneratorRun | None
    held_weights: str
    generator: Transformer
    tokenizer: Tokenizer


def sample(
    source: str | Path,
    *,
    classes: str | None = None,
    count: int = 16,
    out: str | Path | None = None,
    size: str | None = None,
    seed: int = 0,
    sampling: dict | None = None,
    batch_size: int = 32,
    tokenizer: str | Path | None = None,
    weights: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    compile: bool = False,
    on_progress: Progress = lambda done, count, per_second: None,
) -> Sampled | None:
    """Samples ``count`` images, image n of class ``classes[n % len(classes)]``, and writes them and a record of all
    settings. All processes of torchrun call it; returns None on all ranks but 0. Images that a job with the same
    settings wrote before are kept.

    source: a run folder, a checkpoint folder in it, or a published .ckpt. classes: such as ``1,2,7-9``, or ``none``;
    default all that were trained, or none if only that was. out: a folder of PNGs, FILE.npz or FILE.png; default
    RUN/sampled. size: HEIGHTxWIDTH in pixels, of one of the generator's grids; default that of ``model.grid``.
    sampling: fields of `Sampling` that differ from the run's. tokenizer: default the run's, or the one in the published
    checkpoint. weights: ``ema`` or ``raw``, default ema if the run has an EMA. on_progress: called with finished
    images, the total, and images per second. Raises TrainerError or ModelError, one line.
    """
    _check_options(count, batch_size, seed, precision)
    images = {"classes": classes, "count": count, "size": size, "seed": seed, "out": None if out is None else str(out)}
    numerics = {"weights": weights, "batch_size": batch_size, "precision": precision, "compile": compile}
    with job_world(device, **images, **(sampling or {}), **numerics) as world:
        if compile:
            run_on_all_ranks(lambda: check_compiler(world.device, "--compile"))
        models = load_newest(
            world,
            source,
            lambda checkpoint: _load_models(checkpoint, weights, tokenizer),
            beside=lambda checkpoint: _tokenizer_source(checkpoint, _recipe(checkpoint), tokenizer),
        )
        generator, recipe = models.generator, models.recipe
        settings = Sampling(**{**(asdict(recipe.sampling) if recipe else {}), **(sampling or {})})
        labels = _labels(classes, generator)
        check_conditions(generator, torch.tensor(labels), settings)
        grid = _chosen_grid(size, generator, models.tokenizer)
        chosen = dict(count=count, seed=seed, **asdict(settings), batch_size=batch_size, precision=precision)
        chosen["size"] = _pixels(grid, models.tokenizer)
        record = {
            "settings": {**_fingerprints(models), "classes": labels, **chosen},
            "source": str(source),
            "checkpoint": models.checkpoint.name,
            "seeds": SEEDS,
        }
        output = SampleOutput(_out(Path(source), out), labels, count, seed, batch_size, generator.config.classes)
        with one_writer(world, output.lock, output.out):
            if run_on_main(world, lambda: output.begin(record)):
                return Sampled(output.out, output.record, count, 0, 0.0) if world.is_main else None
            sampler = _make_sampler(generator.to(world.device), batch_size, precision, compile)
            start = time.monotonic()
            made = _sample_missing(
                output, world, sampler, models.tokenizer.to(world.device), settings, grid, on_progress
            )
            seconds = time.monotonic() - start
            finished = _finished(world, made, seconds, compile)
            run_on_main(world, lambda: output.finish({**record, "finished": finished}))
        return Sampled(output.out, output.record, count, made, made / seconds) if world.is_main else None


def _fingerprints(models: _Models) -> dict[str, str]:
    """What tells the models' weights, in the order of the record; all ranks call together. Raises TrainerError where
    nodes have different copies."""
    found = {
        "generator": fingerprint_of(models.generator.state_dict()),
        "weights": models.held_weights,
        # Includes the decoder, unlike `Tokenizer.fingerprint`.
        "tokenizer": fingerprint_of(models.tokenizer.state_dict()),
    }
    for name in ("generator", "tokenizer"):
        check_same_on_all_ranks(f"the {name}", f"fingerprint {found[name]}")
    return found


def _check_options(count: int, batch_size: int, seed: int, precision: str) -> None:
    if count < 1:
        raise TrainerError(f"--count {count} must be at least 1")
    if count > MAX_IMAGES:
        raise TrainerError(f"--count {count} is too large: at most {MAX_IMAGES:,}; start several jobs of other --seed")
    if batch_size < 1:
        raise TrainerError(f"--batch-size {batch_size} must be at least 1")
    if not 0 <= seed < 2**63:
        raise TrainerError(f"--seed {seed} must lie between 0 and 2^63")
    if precision not in ("fp32", "bf16"):
        raise TrainerError(f"--precision {precision} is unknown: choose fp32 or bf16")


def _make_sampler(generator: Transformer, batch_size: int, precision: str, compile: bool) -> Sampler:
    dtype = autocast_dtype(precision)
    if dtype is not None:
        keep_products_in(generator, dtype)
    return Sampler(generator, batch_size, dtype, compile)


def _recipe(checkpoint: Path) -> GeneratorRun | None:
    """The recipe of the checkpoint's run; None if it belongs to no run."""
    if is_standalone(checkpoint):
        return None
    recipe = run_config(checkpoint)
    if not isinstance(recipe, GeneratorRun):
        raise TrainerError(f"{run_folder(checkpoint)} is a {recipe.task} run: `ibq sample` needs a generator run")
    return recipe


def _tokenizer_source(checkpoint: Path, recipe: GeneratorRun | None, option: str | Path | None) -> str | Path:
    source = option or (recipe.tokenizer.source if recipe else checkpoint)
    if source is None:
        raise TrainerError(f"{run_folder(checkpoint)} names no tokenizer: give its run or checkpoint with --tokenizer")
    return source


def _load_models(checkpoint: Path, weights: str | None, tokenizer: str | Path | None) -> _Models:
    recipe = _recipe(checkpoint)
    if weights is None:
        weights = "raw" if recipe and not recipe.ema.decay else "ema"
    found = read_weights(checkpoint, "generator", weights)
    generator = build_generator(found)
    vocabulary = generator.config.vocabulary
    decoder = _load_tokenizer(_tokenizer_source(checkpoint, recipe, tokenizer), found.tokenizer)
    if decoder.config.codebook_size != vocabulary:
        raise TrainerError(
            f"the tokenizer has {decoder.config.codebook_size} codes, the generator {vocabulary}: name the tokenizer "
            "that it was trained with, by --tokenizer"
        )
    return _Models(checkpoint, recipe, found.weights, generator, decoder)


def _load_tokenizer(source: str | Path, expected: str | None) -> Tokenizer:
    """expected: the fingerprint of the tokenizer that the generator was trained with, if known."""
    try:
        tokenizer = load_tokenizer(source)
    except ModelError as error:
        raise TrainerError(f"no tokenizer: {error}; name another with --tokenizer") from error
    if expected in (None, tokenizer.fingerprint()):
        return tokenizer
    with contextlib.suppress(ModelError):  # a published file or an export may have one set of weights
        raw = load_tokenizer(source, "raw")  # as after `ibq tokenize --weights raw`
        if raw.fingerprint() == expected:
            return raw
    raise TrainerError(
        f"the tokenizer {source} ({tokenizer.fingerprint()}) is not the one that the generator was trained with "
        f"({expected}), with its raw weights neither: name that one with --tokenizer"
    )


def _labels(text: str | None, generator: Transformer) -> list[int]:
    """Distinct classes in order. The number of classes stands for no class."""
    classes, trained_c = generator.config.classes, generator.trained_c
    if text is None:
        trained = list(range(classes)) if trained_c is None else trained_c[:-1].nonzero()[:, 0].tolist()
        return trained or [classes]
    try:
        return parse_classes(text, classes)
    except ValueError as error:
        raise TrainerError(f"--classes {text}: {error}") from error


def _chosen_grid(size: str | None, generator: Transformer, tokenizer: Tokenizer) -> tuple[int, int]:
    """The grid of images of ``--size``. Raises TrainerError for a size that no grid of the generator has, and for a
    grid that was never trained."""
    sizes = {_pixels(grid, tokenizer): grid for grid in generator.config.all_grids}
    trained = trained_grids(generator.config, generator.trained_g)
    if size is None:
        default = tuple(generator.config.grid)
        if default not in trained:
            raise TrainerError(
                f"the generator was never trained on images of its default size {_pixels(default, tokenizer)}: choose "
                f"with --size: {_choice(trained, tokenizer)}"
            )
        return default
    if size.isdecimal():  # the side of a square, as in `ibq tokenize`
        size = f"{size}x{size}"
    if size not in sizes:
        raise TrainerError(
            f"--size {size}: the generator makes no such images (HEIGHTxWIDTH in pixels, or the side of a square): "
            f"choose {_choice(trained, tokenizer)}"
        )
    if sizes[size] not in trained:
        raise TrainerError(
            f"--size {size}: the generator was never trained on such images: choose {_choice(trained, tokenizer)}"
        )
    return sizes[size]


def _choice(grids: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> str:
    return " or ".join(_pixels(grid, tokenizer) for grid in grids)


def _pixels(grid: Sequence[int], tokenizer: Tokenizer) -> str:
    """HEIGHTxWIDTH of images of a grid."""
    return str(Size(*(tokenizer.downsampling_factor * codes for codes in grid)))


def _out(source: Path, out: str | Path | None) -> Path:
    if out is not None:
        return Path(out)
    if is_hub_name(source):
        return Path(fitted("", source.name, "_sampled"))
    is_file = is_standalone(source)
    return source.with_name(fitted("", source.stem, "_sampled")) if is_file else run_folder(source) / "sampled"


def _finished(world: World, made: int, seconds: float, compile: bool) -> dict:
    """What the record says of the job that finished the output."""
    machine = environment(world.device)
    return {
        "images_made": made,
        "seconds": round(seconds, 3),
        "images_per_second": round(made / seconds, 3),
        "processes": world.size,
        "device": machine["device"],
        "torch": machine["torch"],
        "compile": compile,
    }


def _sample_missing(
    output: SampleOutput,
    world: World,
    sampler: Sampler,
    tokenizer: Tokenizer,
    settings: Sampling,
    grid: tuple[int, int],
    on_progress: Progress,
) -> int:
    """Samples this rank's share of the missing chunks; returns the number of images that all ranks made."""
    missing = run_on_all_ranks(output.missing)  # no rank may write before all ranks have listed what is missing
    before, start = output.finished_images(missing), time.monotonic()

    def sample_own() -> int:
        made, counted = 0, start
        for chunk in missing:
            if chunk % world.size != world.rank:
                continue
            images = output.images(chunk)
            class_b = torch.tensor([image.label for image in images])
            index_bhw = sampler.sample(class_b, [image.seed for image in images], settings, grid=grid)
            with torch.autocast(world.device.type, sampler.dtype, enabled=sampler.dtype is not None):
                images_bchw = tokenizer.detokenize(index_bhw)
            if not images_bchw.isfinite().all():  # before it is clamped
                raise TrainerError(
                    "the tokenizer's images are not finite: its weights have diverged; use an earlier one"
                )
            levels_bchw = ((images_bchw.float().clamp(-1, 1) + 1) / 2 * 255).round().to(torch.uint8)
            output.write(chunk, levels_bchw.permute(0, 2, 3, 1).cpu().numpy())
            made += len(images)
            if world.is_main and (world.size == 1 or time.monotonic() > counted + COUNT_SECONDS):
                done = output.finished_images(output.missing()) if world.size > 1 else before + made
                counted = time.monotonic()
                on_progress(done, output.count, (done - before) / (counted - start))
        return made

    return sum(gather_objects(run_on_all_ranks(sample_own)))
