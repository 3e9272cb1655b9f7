"""Entry points of training: a recipe to train, or a run to resume."""

from __future__ import annotations

import sys
import traceback
from datetime import datetime
from pathlib import Path

import torch

from data.errors import DataError
from data.text import printable
from model_zoo.errors import ModelError
from model_zoo.io.run_layout import run_folder
from trainer import TrainerError
from trainer.compiler import check_compiler
from trainer.config import RunConfig
from trainer.parallel import (
    World,
    check_same_on_all_ranks,
    leave_hangs_to_watchdog,
    restarting_job,
    run_on_all_ranks,
    run_on_main,
    start_world,
    stop_world,
)
from trainer.recipes import load_recipe, load_run_config
from trainer.run_folder import RESTART_SECONDS, RunFolder
from trainer.same_settings import check_same_start, common_settings
from trainer.start_plan import Inputs, Source, check_inputs, plan_start
from trainer.trainer import Trainer
from trainer.watchdog import Stopped


def train(recipe: str, overrides: list[str]) -> Path:
    """Trains a recipe from the start; every process of the world calls it. Returns the run's folder.

    Under ``torchrun --max-restarts`` the same call resumes the run where the folder holds one already.
    """
    config = load_recipe(recipe, overrides)
    restarts = restarting_job() is not None
    if restarts and config.run is None:
        raise TrainerError("--max-restarts needs run=FOLDER: restarted processes must find the run to resume")
    is_named = config.run is not None
    config.run = config.run or f"runs/{Path(recipe).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    return _train(config, Source(Path(config.run), restart=True) if restarts else Source(), is_named)


def resume(source: str | Path, overrides: list[str]) -> Path:
    """Resumes a run from its newest complete checkpoint, or from the checkpoint whose folder is given; every process
    of the world calls it. Returns the run's folder."""
    if any(override.startswith("run=") for override in overrides):
        raise TrainerError("run= cannot be changed by resuming: give the run's folder alone")
    if any(override.startswith("init_from.") for override in overrides):
        raise TrainerError(
            "init_from. cannot be changed by resuming: `ibq train RECIPE init_from.source=RUN` starts a new run"
        )
    source = Path(source)
    config = load_run_config(run_folder(source), overrides)
    config.run = str(run_folder(source))
    return _train(config, Source(source))


def _train(config: RunConfig, source: Source, is_named: bool = True) -> Path:
    """is_named: whether the user gave the run's folder; otherwise each process has its own time in the name."""
    inputs = check_inputs(config, source)
    world = start_world(config.trainer.device, config.trainer.timeout_seconds)
    torch.set_float32_matmul_precision("high" if config.trainer.tf32 else "highest")
    try:
        check_same_start(world, common_settings(config, inputs.contents, is_named))
        config.run = run_on_main(world, lambda: config.run)
        return _train_in(world, config, source, inputs)
    except (DataError, ModelError, TrainerError, Stopped, KeyboardInterrupt) as error:
        _clear_frames(error)
        raise
    finally:
        stop_world()


def _train_in(world: World, config: RunConfig, source: Source, inputs: Inputs) -> Path:
    """Trains in the process group. When it returns, no variable refers to the group, so that it can be destroyed."""
    with RunFolder(Path(config.run), world) as folder:
        if source.checkpoint and folder.path.exists():
            wait_seconds = RESTART_SECONDS if restarting_job() else 0.0
            run_on_main(world, lambda: folder.take(wait_seconds))
        check_same_on_all_ranks(f"data.val={config.data.val}", inputs.validation or "")
        plan = plan_start(config, source, world, inputs)
        if plan.done:
            if world.is_main:
                sys.stderr.write(f"{printable(config.run)} is at step {plan.step} already: nothing is left to do\n")
            return Path(config.run)
        if config.trainer.compile:
            run_on_all_ranks(lambda: check_compiler(world.device, "trainer.compile=true"))
        trainer = Trainer(config, world, plan, inputs.tokens, folder)
        try:
            trainer.setup()
            leave_hangs_to_watchdog()
            trainer.train()
        finally:
            trainer.close()
        return trainer.run


def _clear_frames(error: BaseException | None) -> None:
    """Deletes the variables of the frames that an exception and its causes hold, because they refer to process groups
    (see `stop_world`). Exceptions that are bugs keep theirs, for debuggers."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
