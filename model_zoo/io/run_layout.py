"""Where a run keeps its checkpoints: ``RUN/checkpoints/step_NNNNNNNN``."""

import re
from pathlib import Path


def run_folder(source: Path) -> Path:
    """The run's folder, given a checkpoint's folder in it or the run's folder itself. (A run may itself lie in a folder
    called ``checkpoints``.)"""
    return source.parent.parent if checkpoint_step(source) is not None else source


def checkpoint_step(source: Path) -> int | None:
    """The step of a checkpoint's folder; None for any other path."""
    match = re.fullmatch(r"step_(\d+)", source.name)
    return int(match[1]) if match and source.parent.name == "checkpoints" else None
