"""The training loop: from a recipe to a run folder."""

import json
import os
import sys
import time
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path

import torch

import data
from data import merge_states, train_batches
from model_zoo import ModelError
from model_zoo.io.sharded_tensors import ShardedTensors, run_of
from trainer import TrainerError
from trainer.checkpoint import CheckpointError, Checkpoints, checkpoint_folders, find_checkpoint, load_state
from trainer.config import GeneratorRun, RunConfig
from trainer.init_from import save_init_record
from trainer.parallel import (
    World,
    any_rank,
    gather_objects,
    mean_over_ranks,
    raise_on_all_ranks,
    run_on_main,
    start_world,
    stop_world,
)
from trainer.prefetch import Feed, summary
from trainer.randomness import random_state, restore_random_state, seed_everything
from trainer.recipes import load_recipe, load_run_config, save_config
from trainer.tasks import Task, make_task
from trainer.telemetry import Telemetry, metric_lines, scanning
from trainer.watchdog import LossSpikes, Stopped, StopSignal, Watchdog


def train(recipe: str, overrides: list[str]) -> Path:
    """Trains a recipe from the start; returns the run folder. Every process of the world calls it.

    Where torchrun starts failed processes again (--max-restarts), the same recipe in the same folder goes on.
    """
    config = load_recipe(recipe, overrides)
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if restarts and config.run is None:
        raise TrainerError("--max-restarts needs run=FOLDER: the processes started again must find what to go on with")
    config.run = config.run or f"runs/{Path(recipe).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    return _train(config, source=Path(config.run) if restarts else None, again=restarts)


def resume(source: str | Path, overrides: list[str]) -> Path:
    """Goes on from the newest whole checkpoint of a run folder, or from the very checkpoint whose folder is named;
    returns the run's folder."""
    if any(override.startswith("run=") for override in overrides):
        raise TrainerError("run= cannot be changed by resuming: name the run's folder alone")
    if any(override.startswith("init_from.") for override in overrides):
        raise TrainerError(
            "init_from. cannot be changed by resuming: start a new run with `ibq train RECIPE init_from.source=RUN`"
        )
    source = Path(source)
    run = run_of(source)
    config = load_run_config(run, overrides)
    config.run = str(run)
    return _train(config, source)


def plan_batch(config: RunConfig, world: World) -> tuple[int, int]:
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


def open_run(config: RunConfig, resume: bool) -> str:
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


def _train(config: RunConfig, source: Path | None = None, again: bool = False) -> Path:
    """source: what to go on from. again: a start that may find its own run folder, with a checkpoint in it or none."""
    if config.data.train is None and not config.data.sources:
        raise TrainerError(
            "data.train must be given: a folder of tars, a tar, or a pattern such as data.train='tars/{00..99}.tar'"
        )
    # A mistyped path or a damaged tar is found before anything slow starts. What a resumed run reads, its checkpoint
    # knows more of: see TrainStream.
    tokens = None
    if isinstance(config, GeneratorRun) and config.data.content == "tokens":
        config.tokenizer.fingerprint = config.tokenizer.fingerprint or data.token_header(config.data).tokenizer
        tokens = data.TokenSpec(config.tokenizer.fingerprint, config.model.vocabulary, tuple(config.model.grid))
    with scanning() as progress:
        data.check(config.data, train=source is None, progress=progress, tokens=tokens)
    if source and (metrics := Path(config.run) / "metrics.jsonl").is_file():
        metric_lines(metrics)  # damage is found before anything is written
    world = start_world(config.trainer.device, config.trainer.timeout_seconds)
    torch.set_float32_matmul_precision("high" if config.trainer.tf32 else "highest")
    try:
        start, checkpoint, notes, state, stream = 0, None, [], {"data": None}, None
        began_from = None
        # Rank 0 alone looks: another node's view of a shared disk may be older, and all must go the same way.
        if again and not run_on_main(world, lambda: _is_run_of(config)):
            source = None
        if source and not (again and not run_on_main(world, lambda: bool(checkpoint_folders(source)))):
            checkpoint, notes = find_checkpoint(source, world)
            state = run_on_main(world, lambda: _state(checkpoint))
            start = state["step"]
            if start >= config.trainer.max_steps:
                done = f"{config.run} is at step {start} already"
                if not again:
                    raise TrainerError(f"{done}; go on with trainer.max_steps={2 * start}")
                # Processes that failed after the last step, or the same job once more: nothing is wrong.
                if world.is_main:
                    sys.stderr.write(f"{done}: nothing is left to do\n")
                return Path(config.run)
        micro_batch_size, micro_batches = plan_batch(config, world)
        task = make_task(config, world, micro_batch_size, micro_batches)
        task.check()
        if not checkpoint:
            began_from = task.begin()
        stream = train_batches(
            config.data,
            global_batch_size=config.trainer.global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=world.rank,
            world_size=world.size,
            seed=config.seed,
            state=state["data"],
            tokens=tokens,
        )
        seed_everything(config.seed, start, world)
        if checkpoint:
            _restore(task, world, checkpoint, state)
        feed = Feed(stream, micro_batches, world, task.check_batch)
        feed.read_ahead()
        feed.stop_together("nothing was trained")
        if not checkpoint:
            task.fit(map(task.inputs, feed.ready))
        # Only now that everything is known to fit does anything appear on the disk.
        run = Path(run_on_main(world, lambda: open_run(config, source is not None)))
        if source and not checkpoint and world.is_main:
            (run / "metrics.jsonl").unlink(missing_ok=True)  # begun anew, so are its lines
        if began_from:
            notes.append(str(began_from))
            run_on_main(world, lambda: save_init_record(run, began_from))
        _steps(config, world, run, task, feed, start, notes, validate_first=began_from is not None)
        return run
    finally:
        if stream is not None:
            stream.close()
        stop_world()


def _is_run_of(config: RunConfig) -> bool:
    """Whether the run's folder holds a run with these very settings."""
    if not (Path(config.run) / "config.yaml").is_file():
        return False
    saved = load_run_config(config.run, [])
    if isinstance(saved, GeneratorRun) and isinstance(config, GeneratorRun) and config.tokenizer.fingerprint is None:
        saved.tokenizer.fingerprint = None  # which the tokenizer will tell
    return saved == config


def _state(checkpoint: Path) -> dict:
    state = load_state(checkpoint)
    if not {"step", "data", "task", "world_size"} <= state.keys():
        raise TrainerError(f"{checkpoint / 'state.json'} is of another version of ibq: its run cannot be resumed")
    return state


def _restore(task: Task, world: World, checkpoint: Path, state: dict) -> None:
    """Loads a checkpoint into the task; settings that do not fit it end in one line."""
    failed = None
    try:
        files = ShardedTensors(checkpoint)
        task.load(files, state["task"])
        if state["world_size"] == world.size:
            restore_random_state(files, world)
    except ModelError as error:
        failed = f"cannot go on from {checkpoint}: it was written with other settings ({error})"
    raise_on_all_ranks(failed)


def _steps(
    config: RunConfig,
    world: World,
    run: Path,
    task: Task,
    feed: Feed,
    start: int,
    notes: list[str],
    validate_first: bool,
) -> None:
    settings = config.trainer
    telemetry = _open_telemetry(run, start, settings.max_steps, world)
    say = telemetry.say if telemetry else lambda _: None
    for note in notes:
        say(note)
    say(describe(config, world, task, run, start))
    say(feed.stream.describe(settings.max_steps - start))
    feed.keep_account(run, config.data.audit, start)
    checkpoints = Checkpoints(
        run,
        world,
        keep_last=settings.keep_last,
        keep_every_steps=settings.keep_every_steps,
        asynchronous=settings.async_checkpoints,
        beat=lambda: watchdog.beat(),
    )
    skips, spikes = Skips(run, world, settings.max_skipped_steps), LossSpikes()

    def save(step: int) -> None:
        state = {
            "data": merge_states(gather_objects(data_state)),
            "task": task.state(),
            "world_size": world.size,
        }
        checkpoints.save(step, state, task.pieces() + random_state(world))

    def validate(step: int) -> None:
        validation = task.validate(watchdog.beat)
        for note in validation.notes:
            say(f"step {step}: {note}")
        if telemetry:
            for name, picture_chw in validation.pictures.items():
                telemetry.picture(step, name, picture_chw)
            if validation.scalars:
                telemetry.log(step, validation.scalars)

    with telemetry or nullcontext(), StopSignal() as stop, Watchdog(*world[:2], settings.timeout_seconds) as watchdog:
        step, checkpoint_due = start, False
        try:
            if validate_first and config.data.val is not None:
                validate(step)
            began, began_step = time.perf_counter(), start
            for step in range(start + 1, settings.max_steps + 1):
                watchdog.beat(step)
                batches = feed.take(step)
                data_state = batches[-1].state
                result = task.step([task.inputs(batch) for batch in batches], step - 1)
                if step < settings.max_steps:
                    feed.read_ahead()
                stopping, starving = any_rank(world, stop.wished, feed.failed is not None)
                last = stopping or starving or step == settings.max_steps
                keys = [key for batch in batches for key in batch.keys]
                try:
                    told = skips.update(step, result.skipped, keys, step == settings.max_steps)
                except TrainerError:
                    checkpoints.finish()  # what is still being written is of a good step
                    raise
                if told:
                    say(told)
                elif told := spikes.update(float(result.scalars["loss/total"])):
                    say(f"step {step}: {told}")
                # One that falls on a step that was left out waits for a good one: weights that give no finite loss any
                # more would push out the checkpoints from which to go on.
                checkpoint_due = last or checkpoint_due or step % settings.checkpoint_every_steps == 0
                save_now = checkpoint_due and (last or not result.skipped)
                validation_due = step == settings.max_steps or step % settings.validate_every_steps == 0
                log_due = save_now or last or step % settings.log_every_steps == 0
                if telemetry:
                    telemetry.advance(step)
                if log_due:
                    logged = _global_scalars(result.scalars, task, world, step) | feed.report(step)
                    seconds = time.perf_counter() - began
                    logged |= task.speed((step - began_step) * settings.global_batch_size / seconds)
                    if telemetry:
                        telemetry.alarm(step, task.alarm)
                        telemetry.log(step, logged)
                paused = time.perf_counter()
                if last:
                    for line in summary(logged):
                        say(line)
                if validation_due and not stopping and not starving and config.data.val is not None:
                    validate(step)
                try:
                    if save_now:
                        checkpoint_due = False
                        save(step)
                        if last:
                            checkpoints.finish()
                    else:
                        checkpoints.poll()
                except CheckpointError as error:
                    if last:
                        raise
                    say(f"ALARM at step {step}: {error}; training goes on, the next checkpoint is tried at its time")
                if starving:
                    saved = f"step {step} is saved: `ibq resume {run}` goes on" if save_now else "nothing more is saved"
                    feed.stop_together(saved)
                if stopping:
                    raise Stopped(f"stopped by SIGTERM after step {step}, which is saved: `ibq resume {run}` goes on")
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


def _open_telemetry(run: Path, start: int, max_steps: int, world: World) -> Telemetry | None:
    """Rank 0's; where it cannot be written, all ranks end."""
    opened = []

    def open_it() -> None:
        try:
            opened.append(Telemetry(run, start, max_steps))
        except OSError as error:
            raise TrainerError(f"cannot write into {run}: {error.strerror or error}; mend that") from error

    run_on_main(world, open_it)
    return opened[0] if opened else None


class Skips:
    """Counts the steps that were left out; keeps the keys of their samples in ``skipped_steps.jsonl``.

    Raises TrainerError once more than ``limit`` of them follow one another, or a run would end in several of them.
    """

    SHOWN_KEYS = 8

    def __init__(self, run: Path, world: World, limit: int):
        self.file, self.world, self.limit = run / "skipped_steps.jsonl", world, limit
        self.number = 0

    def update(self, step: int, skipped: list[str], keys: list[str], last: bool = False) -> str | None:
        """After each step, by all ranks; returns what to say. last: whether it is the run's last one."""
        if not skipped:
            self.number = 0
            return None
        self.number += 1
        keys = gather_objects(keys)
        if self.world.is_main:
            line = json.dumps({"step": step, "not_finite": skipped, "keys_of_ranks": keys}) + "\n"
            with suppress(OSError), self.file.open("a") as file:  # a full disk is no reason to end the other ranks
                file.write(line)
        what = f"loss or gradient of the {' and '.join(skipped)} is not finite"
        if self.number > (min(1, self.limit) if last else self.limit):
            keys = [key for of_rank in keys for key in of_rank]
            more = f" and {len(keys) - self.SHOWN_KEYS} more, see {self.file}" if len(keys) > self.SHOWN_KEYS else ""
            raise TrainerError(
                f"{what} at step {step}, the {self.number}. in a row (trainer.max_skipped_steps={self.limit}); its "
                f"samples: {', '.join(keys[: self.SHOWN_KEYS])}{more}. Checkpoints hold finite weights: go on from one "
                "with a lower optimizer.lr or trainer.gradient_clip_norm=1"
            )
        return f"step {step} is left out: {what}; the keys of its samples are in {self.file.name}"


def describe(config: RunConfig, world: World, task: Task, run: Path, start: int) -> str:
    """One line: what is about to be trained, on what."""
    engine = task.generator
    kind = config.engine.kind
    if kind == "deepspeed":
        kind += f" {config.engine.config}"
    if kind == "fsdp2":
        kind += f" over {config.engine.shard_over}" if config.engine.shard_over else ""
        kind += " offload" if config.engine.offload else ""
    what = ", ".join([f"{task.parameters / 1e6:.2f}M parameters", *task.describe()])
    batch = f"{world.size} x {engine.micro_batches} x {engine.micro_batch_size} images a step"
    return (
        f"{run}: {what}, {world.size} x {world.device.type} ({kind}, {config.trainer.precision}), {batch}, "
        f"steps {start + 1} to {config.trainer.max_steps}"
    )


def _global_scalars(scalars: dict, task: Task, world: World, step: int) -> dict[str, float]:
    """The step's scalars averaged over ranks, and what else the task tells."""
    names = list(scalars)
    values = torch.stack([torch.as_tensor(scalars[name], dtype=torch.float32, device=world.device) for name in names])
    logged = dict(zip(names, mean_over_ranks(values).tolist(), strict=True))
    return logged | task.scalars(step - 1)
