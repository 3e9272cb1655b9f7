"""The training loop: from a recipe to a run folder."""

import itertools
import math
import pickle
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError
from torchvision.utils import make_grid, save_image

import data
from data import EvaluationImage, evaluation_images, merge_states, train_batches
from model_zoo import ModelError
from trainer import TrainerError
from trainer.checkpoint import latest_checkpoint, load_state, save_checkpoint
from trainer.config import Config, load_recipe, load_run_config, save_config
from trainer.metrics.codebook import CodebookUsage
from trainer.metrics.image import psnr
from trainer.parallel import (
    World,
    agree,
    fail_together,
    gather_objects,
    mean_over_ranks,
    start_world,
    stop_world,
    sum_over_ranks,
)
from trainer.tasks.tokenizer import TokenizerTask
from trainer.telemetry import Telemetry, metric_lines

PICTURES = 8  # validation images whose reconstructions are shown as training goes
LOADING_ERRORS = (  # what damaged or unfitting files raise in torch, safetensors and DeepSpeed
    *(OSError, RuntimeError, KeyError, ValueError, AssertionError, AttributeError, TypeError, EOFError),
    *(pickle.UnpicklingError, SafetensorError, ModelError),
)
WATCHED = ("loss/total", "grad_norm/generator", "grad_norm/discriminator")  # training ends where one is not finite


def train(recipe: str, overrides: list[str]) -> Path:
    """Trains a recipe from the start; returns the run folder. Every process of the world calls it."""
    config = load_recipe(recipe, overrides)
    config.run = config.run or f"runs/{Path(recipe).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    return _train(config, resume=False)


def resume(run: str | Path, overrides: list[str]) -> Path:
    """Goes on from the newest checkpoint of a run folder; returns it."""
    if any(override.startswith("run=") for override in overrides):
        raise TrainerError("run= cannot be changed by resuming: name the run's folder alone")
    config = load_run_config(run, overrides)
    config.run = str(run)
    return _train(config, resume=True)


def plan_batch(config: Config, world: World) -> tuple[int, int]:
    """(images of a rank's micro-batch, micro-batches of a rank's step), from the global batch."""
    total, micro = config.trainer.global_batch_size, config.trainer.micro_batch_size
    if total % world.size:
        raise TrainerError(f"trainer.global_batch_size={total} must be a multiple of the {world.size} processes")
    share = total // world.size
    micro = micro or share
    if share % micro:
        raise TrainerError(
            f"trainer.micro_batch_size={micro} must divide the {share} images that each of {world.size} processes "
            f"takes of trainer.global_batch_size={total}"
        )
    return micro, share // micro


def open_run(config: Config, resume: bool) -> str:
    """Writes config.yaml into the run's folder, which it makes for a new run; returns it. Refuses to mix two runs."""
    run = Path(config.run)
    if not resume and ((run / "config.yaml").exists() or (run / "checkpoints").exists()):
        raise TrainerError(f"{run} already holds a run: `ibq resume {run}` goes on with it, run=FOLDER starts another")
    try:
        (run / "samples").mkdir(parents=True, exist_ok=True)
        save_config(config, run / "config.yaml")
    except OSError as error:
        raise TrainerError(
            f"cannot write the run folder {run}: {error.strerror}; choose another with run=FOLDER"
        ) from error
    return str(run)


def _train(config: Config, resume: bool) -> Path:
    if config.data.train is None:
        raise TrainerError(
            "data.train must be given: a folder of tars, a tar, or a pattern such as data.train='tars/{00..99}.tar'"
        )
    data.check(config.data)  # a mistyped path or a damaged tar is found before anything slow starts
    start, checkpoint, state = 0, None, {"data": None}
    if resume:
        checkpoint = latest_checkpoint(Path(config.run))
        state = load_state(checkpoint)
        if not {"step", "data", "engine", "world_size"} <= state.keys():
            raise TrainerError(f"{checkpoint / 'state.json'} is damaged: write another checkpoint's name into latest")
        start = state["step"]
        if (metrics := Path(config.run) / "metrics.jsonl").is_file():
            metric_lines(metrics)  # damage is found before anything is written
        if start >= config.trainer.max_steps:
            raise TrainerError(f"{config.run} is at step {start} already; go on with trainer.max_steps={2 * start}")
    world = start_world(config.trainer.device)
    torch.set_float32_matmul_precision("high" if config.trainer.tf32 else "highest")
    try:
        micro_batch_size, micro_batches = plan_batch(config, world)
        task = TokenizerTask(config, world, micro_batch_size, micro_batches)
        task.check()
        batches = train_batches(
            config.data,
            global_batch_size=config.trainer.global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=world.rank,
            world_size=world.size,
            seed=config.seed,
            state=state["data"],
        )
        if checkpoint:
            _restore(task, config, world, checkpoint, state)
        # Only now that everything is known to fit does anything appear on the disk.
        run = Path(agree(world, lambda: open_run(config, resume)))
        _steps(config, world, run, task, batches, start)
        return run
    finally:
        stop_world()


def _restore(task: TokenizerTask, config: Config, world: World, checkpoint: Path, state: dict) -> None:
    """Loads a checkpoint into the task; settings that do not fit it, or a damaged file, end in one line."""
    for key, value in _engine(config).items():
        if value != state["engine"].get(key):
            raise TrainerError(
                f"{checkpoint} was written with engine.{key}={state['engine'].get(key)}: resume with that"
            )
    if config.engine.kind == "deepspeed" and world.size != state["world_size"]:
        raise TrainerError(
            f"{checkpoint} was written by {state['world_size']} processes, and DeepSpeed's optimiser state is split "
            f"into as many parts: resume with {state['world_size']} processes, not {world.size}"
        )
    failed = None
    try:
        task.load(checkpoint)
    except torch.OutOfMemoryError:
        raise
    except LOADING_ERRORS as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        failed = f"cannot go on from {checkpoint}: it is damaged, or was written with other settings ({what})"
    fail_together(failed)  # each rank reads files of its own


def _engine(config: Config) -> dict[str, str]:
    """What a checkpoint's optimiser files depend on."""
    engine = {"kind": config.engine.kind}
    return {**engine, "config": config.engine.config} if config.engine.kind == "deepspeed" else engine


def _steps(config: Config, world: World, run: Path, task: TokenizerTask, batches, start: int) -> None:
    settings = config.trainer
    micro_batches = task.generator.micro_batches
    telemetry = Telemetry(run, start, settings.max_steps) if world.is_main else None
    if telemetry:
        telemetry.say(describe(config, world, task, run, start))

    def save(step: int) -> None:
        state = {
            "step": step,
            "data": merge_states(gather_objects(data_state)),
            "engine": _engine(config),
            "world_size": world.size,
        }
        save_checkpoint(run, step, state, task.save, world, settings.keep_checkpoints)

    with telemetry or nullcontext():
        began, began_step, step = time.perf_counter(), start, start
        try:
            for step in range(start + 1, settings.max_steps + 1):
                step_batches = [next(batches) for _ in range(micro_batches)]
                data_state = step_batches[-1].state
                images = [batch.images_bchw.to(world.device, non_blocking=True) for batch in step_batches]
                scalars = task.step(images, step - 1)
                last = step == settings.max_steps
                checkpoint_due = last or step % settings.checkpoint_every_steps == 0
                validation_due = last or step % settings.validate_every_steps == 0
                log_due = checkpoint_due or step % settings.log_every_steps == 0  # only finite weights are saved
                if telemetry:
                    telemetry.advance(step)
                if log_due:
                    logged = _global_scalars(scalars, task, world, step)
                    seconds = time.perf_counter() - began
                    logged["images_per_second"] = (step - began_step) * settings.global_batch_size / seconds
                    if telemetry:
                        telemetry.alarm(step, task.health.alarm)
                        telemetry.log(step, logged)
                    bad = [name for name in WATCHED if not math.isfinite(logged.get(name, 0.0))]
                    if bad:
                        raise TrainerError(
                            f"{bad[0]} is not finite at step {step}; checkpoints written before are untouched: go on "
                            "from one, or anew, with a lower optimizer.lr or trainer.gradient_clip_norm=1"
                        )
                paused = time.perf_counter()
                if validation_due and config.data.val is not None:
                    _validate(config, world, task, telemetry, run, step)
                if checkpoint_due:
                    save(step)
                if log_due:
                    began, began_step = time.perf_counter(), step
                else:
                    began += time.perf_counter() - paused
        except KeyboardInterrupt:
            if telemetry:
                saved = (run / "checkpoints" / "latest").is_file()
                mend = f"`ibq resume {run}` goes on from the newest checkpoint" if saved else "nothing was saved yet"
                telemetry.say(f"stopped after step {step}; {mend}")
            raise


def describe(config: Config, world: World, task: TokenizerTask, run: Path, start: int) -> str:
    """One line: what is about to be trained, on what."""
    codes = task.tokenizer.quantize.embedding.weight
    parameters = sum(p.numel() for p in task.tokenizer.parameters()) - codes.numel()
    millions = (parameters + config.model.codebook_size * config.model.code_dim) / 1e6
    engine = task.generator
    kind = config.engine.kind + (f" {config.engine.config}" if config.engine.kind == "deepspeed" else "")
    model = config.model
    sharded = f", codebook over {config.codebook_parallel}" if config.codebook_parallel > 1 else ""
    batch = f"{world.size} x {engine.micro_batches} x {engine.micro_batch_size} images a step"
    rule = model.quantizer + (f" {task.impl()}" if task.tokenizer.quantize.soft_assignment else "")
    return (
        f"{run}: {millions:.2f}M parameters, {model.codebook_size} codes of {model.code_dim} ({rule}), "
        f"{world.size} x {world.device.type} ({kind}, {config.trainer.precision}{sharded}), "
        f"{batch}, steps {start + 1} to {config.trainer.max_steps}"
    )


def _global_scalars(scalars: dict, task: TokenizerTask, world: World, step: int) -> dict[str, float]:
    """The step's scalars averaged over ranks, and the codebook's health."""
    names = list(scalars)
    values = torch.stack([torch.as_tensor(scalars[name], dtype=torch.float32, device=world.device) for name in names])
    logged = dict(zip(names, mean_over_ranks(values).tolist(), strict=True))
    return logged | {f"codebook/{name}": value for name, value in task.read_health(step - 1).items()}


def _in_step(images: Iterator[EvaluationImage], side: int, task: TokenizerTask, world: World):
    """(image, whether it counts): ranks that share a codebook quantize together, so that those that have no more images
    go on with a grey one until none of them has any."""
    shard = task.groups.shard
    grey = EvaluationImage("", torch.full((3, side, side), 127, dtype=torch.uint8), -1)
    for image in images if shard is None else itertools.chain(images, itertools.repeat(None)):
        if shard is not None:
            more = torch.tensor(int(image is not None), device=world.device)
            if not sum_over_ranks(more, shard.group):
                return
        yield image or grey, image is not None


@torch.no_grad()
def _validate(config: Config, world: World, task: TokenizerTask, telemetry: Telemetry | None, run: Path, step: int):
    """PSNR, L1 and usage of the EMA weights on validation images, each counted once; pictures of the first few."""
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    usage = CodebookUsage(config.model.codebook_size, world.device)
    pictures = []
    side = config.data.val_image_size or config.data.image_size
    with task.evaluation() as tokenizer:
        images = evaluation_images(
            config.data.val,
            image_size=side,
            resize=config.data.resize,
            shard=(world.rank, world.size),
        )
        here = range(world.rank, config.trainer.validation_images, world.size)
        images = (image for _, image in zip(here, images, strict=False))
        for image, counts in _in_step(images, side, task, world):
            original = image.image_chw[None].to(world.device).float() / 127.5 - 1
            index_bhw = tokenizer.tokenize(original)
            reconstruction = tokenizer.detokenize(index_bhw).clamp(-1, 1)
            if not counts:
                continue
            usage.update(index_bhw)
            sums += torch.stack(
                [
                    psnr(reconstruction, original)[0].double(),
                    (reconstruction - original).abs().mean().double(),
                    sums.new_ones(()),
                ]
            )
            if len(pictures) < PICTURES:
                pictures.append(torch.cat([original[0], reconstruction[0]], dim=1).cpu())
    sum_over_ranks(sums)
    usage = usage.merged()
    if telemetry and sums[2] > 0:
        if pictures:
            grid = make_grid(torch.stack(pictures) / 2 + 0.5, nrow=PICTURES, padding=2, pad_value=1)
            save_image(grid, run / "samples" / f"step_{step:08d}.png")
            telemetry.picture(step, "reconstructions", (grid * 255).to(torch.uint8))
        psnr_mean, l1_mean = (sums[:2] / sums[2]).tolist()
        telemetry.log(step, {"val/psnr": psnr_mean, "val/l1": l1_mean, "val/usage": usage.usage()})
