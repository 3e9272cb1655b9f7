"""Checkpoints: written aside by all ranks, renamed when whole, then named in ``latest``."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from trainer import TrainerError
from trainer.parallel import World


def save_checkpoint(run: Path, step: int, state: dict, write: Callable[[Path], None], world: World, keep: int) -> Path:
    """Writes ``checkpoints/step_XXXXXXXX``; all ranks call it. A kill at any moment leaves the former one in force.

    state: small JSON-able values (step, data position). write: every rank's part, given the folder.
    keep: how many of the newest checkpoints stay.
    """
    folder = run / "checkpoints" / f"step_{step:08d}"
    unfinished = folder.with_suffix(".unfinished")
    if world.is_main:
        for left_over in folder.parent.glob("step_*.unfinished"):
            shutil.rmtree(left_over)
        unfinished.mkdir(parents=True)
    dist.barrier()
    write(unfinished)
    dist.barrier()
    if world.is_main:
        (unfinished / "state.json").write_text(json.dumps(state))
        for file in unfinished.rglob("*"):
            if file.is_file():
                _sync(file)
        shutil.rmtree(folder, ignore_errors=True)  # the same step of a run that was resumed from before it
        unfinished.rename(folder)
        pointer = folder.parent / "latest.unfinished"
        pointer.write_text(folder.name)
        _sync(pointer)
        pointer.replace(folder.parent / "latest")
        _sync(folder.parent)
        # Later ones, of a run that was resumed from before them, must not push out the one just written.
        for old in sorted(path for path in folder.parent.glob("step_*[0-9]") if path <= folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return folder


def latest_checkpoint(run: Path) -> Path:
    """The folder that ``latest`` names. Raises TrainerError where there is none."""
    pointer = run / "checkpoints" / "latest"
    if not pointer.is_file():
        raise TrainerError(f"{run} holds no finished checkpoint to resume from; start it anew with `ibq train`")
    folder = pointer.parent / pointer.read_text(errors="replace").strip()
    if not (folder / "state.json").is_file() or not re.fullmatch(r"step_\d+", folder.name):
        raise TrainerError(
            f"{pointer} names {folder.name}, which is no finished checkpoint; write another one's name there"
        )
    return folder


def load_state(folder: Path) -> dict:
    """The small state that `save_checkpoint` was given. Raises TrainerError where the file is damaged."""
    try:
        return {**json.loads((folder / "state.json").read_text())}
    except (OSError, ValueError, TypeError) as error:
        raise TrainerError(
            f"{folder / 'state.json'} is damaged: write another checkpoint's name into latest"
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
