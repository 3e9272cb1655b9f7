"""The settings of runs of two ranks that meet a fault, and what is expected of such a run afterwards."""

import hashlib
import json
import re
from pathlib import Path

from ranks import Ended, settings

CHANGES = {"trainer.max_steps": 6, "trainer.validate_every_steps": 100, "trainer.checkpoint_every_steps": 2}


def fault_settings(changes: dict | None = None) -> list[str]:
    """The settings of every run here, with changes, as KEY=VALUE."""
    return settings({**CHANGES, **(changes or {})})


def latest(run: Path) -> Path:
    """The checkpoint that ``latest`` names."""
    return run / "checkpoints" / (run / "checkpoints/latest").read_text()


def newest_step(run: Path) -> int:
    return int(latest(run).name.removeprefix("step_"))


def assert_whole(checkpoint: Path) -> None:
    """Every file is there and matches the manifest, both ranks' tensors among them."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert {"state.json", *(f"rank_{rank:05d}.safetensors" for rank in range(2))} == files.keys()
    for name, entry in files.items():
        content = (checkpoint / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}, name


def assert_resumed(ended: Ended, run: Path, after: int, last: int) -> None:
    """The run continued after that step up to the last one and left no temporary files."""
    assert ended.statuses == [0, 0], ended.err
    assert re.findall(r"steps (\d+) to (\d+)", ended.err) == [(str(after + 1), str(last))]
    assert newest_step(run) == last
    assert_whole(latest(run))
    assert not list(run.rglob("*.unfinished")) and not list(run.rglob(".tmp*"))
