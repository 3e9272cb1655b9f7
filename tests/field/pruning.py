"""A run whose newest checkpoint is removed while it is being read, as by a training that keeps only the last one."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from safetensors import safe_open

from model_zoo.io.manifest import MANIFEST, STATE, entry_of


@contextmanager
def pruned_while_reading(run: Path, opened: int = 1) -> Iterator[None]:
    """When a safetensors file of the run is opened for the n-th time, its checkpoint has gone, and ``latest`` names a
    copy of a later step."""
    checkpoints, count = run / "checkpoints", 0

    def open_after_pruning(path, *arguments, **options):
        nonlocal count
        count += 1
        if count == opened:
            newest = checkpoints / (checkpoints / "latest").read_text()
            later = checkpoints / "step_00000099"
            shutil.copytree(newest, later)
            (later / STATE).write_text(json.dumps({**json.loads((later / STATE).read_text()), "step": 99}))
            files = {**json.loads((later / MANIFEST).read_text())["files"], STATE: entry_of(later / STATE)}
            (later / MANIFEST).write_text(json.dumps({"files": files}))
            (checkpoints / "latest").write_text(later.name)
            shutil.rmtree(newest)
        return safe_open(path, *arguments, **options)

    with patch("model_zoo.io.sharded_tensors.safe_open", open_after_pruning):
        yield
    assert count >= opened and json.loads((checkpoints / "step_00000099/manifest.json").read_text())
