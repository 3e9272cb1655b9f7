"""Two ranks that carry out what tests order, and what is expected of a run that a fault has met."""

import hashlib
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from launching import Launch, settings

INJECT = Path(__file__).with_name("inject.py")
RANKS = 2
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", RANKS, "--standalone")
ORDER_SECONDS = 120.0  # DeepSpeed compiles once on a machine

# Of every run here, unless it says otherwise.
CHANGES = {"trainer.max_steps": 6, "trainer.validate_every_steps": 100, "trainer.checkpoint_every_steps": 2}


class Ended(NamedTuple):
    """An order carried out: each rank's exit status, negative for a signal, and what each said."""

    statuses: list[int]
    errs: list[str]

    @property
    def err(self) -> str:
        return "\n".join(self.errs)


class Order:
    """What the ranks are busy with."""

    def __init__(self, path: Path, torchrun):
        self.path, self.torchrun = path, torchrun

    def wait(self) -> Ended:
        statuses = [int(self._file(f"status_{rank}")) for rank in range(RANKS)]
        return Ended(statuses, [self.path.with_suffix(f".err_{rank}").read_text() for rank in range(RANKS)])

    def pid(self, rank: int) -> int:
        return int(self._file(f"pid_{rank}"))

    def has_ended(self, rank: int) -> bool:
        return self.path.with_suffix(f".status_{rank}").exists()

    def signal(self, rank: int, number: int) -> None:
        """To the rank's process alone."""
        os.kill(self.pid(rank), number)

    def _file(self, suffix: str) -> str:
        path = self.path.with_suffix(f".{suffix}")
        wait_for(path.exists, f"{path.name} of {self.path.read_text()}", ORDER_SECONDS, self.torchrun)
        return path.read_text()


class Ranks:
    """``ranks.run(arguments, fault)``: ``torchrun --nproc-per-node 2 -m trainer ARGUMENTS``, whose fresh processes are
    forked off those of one torchrun that has imported everything (see inject.py)."""

    def __init__(self, launch: Launch, folder: Path):
        self.folder = folder
        self.started: list[Order] = []
        self.torchrun = launch.start_python(*TORCHRUN, INJECT, "--orders", folder)

    def start(self, *arguments, fault: dict | None = None) -> Order:
        path = self.folder / f"{len(self.started):04d}.json"
        wanted = {"arguments": [*map(str, arguments)], "fault": fault or {"kind": "nothing"}, "port": free_port()}
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(wanted))
        unfinished.replace(path)
        self.started.append(Order(path, self.torchrun))
        return self.started[-1]

    def run(self, *arguments, fault: dict | None = None) -> Ended:
        return self.start(*arguments, fault=fault).wait()

    def end(self) -> None:
        """Also of what a test that failed has left hanging."""
        for order in self.started:
            for rank in range(RANKS):
                if not order.has_ended(rank):
                    order.signal(rank, signal.SIGKILL)
        (self.folder / "end").touch()

    def train(self, run: Path, changes: dict | None = None, fault: dict | None = None) -> Ended:
        """A new run of `debug`."""
        return self.run("debug", f"run={run}", *fault_settings(changes), fault=fault)

    def resume(self, source: Path, *overrides: str, fault: dict | None = None) -> Ended:
        return self.run("--resume", source, *overrides, fault=fault)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def fault_settings(changes: dict | None = None) -> list[str]:
    return settings({**CHANGES, **(changes or {})})


def wait_for(condition, what: str, seconds: float, process=None) -> None:
    """Until it is true. process: one that must not end before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process and process.poll() is not None and not condition():
            pytest.fail(f"{process.args} ended while waiting for {what}:\n{process.communicate()[1]}")
        if time.monotonic() > deadline:
            pytest.fail(f"no {what} in {seconds:g} s")
        time.sleep(0.01)


def loss_lines(run: Path) -> list[dict]:
    """Of every step in metrics.jsonl, without the speed, which is never the same twice."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: line[name] for name in line if name != "images_per_second"} for line in lines if "loss/total" in line
    ]


def latest(run: Path) -> Path:
    """The checkpoint that ``latest`` names."""
    return run / "checkpoints" / (run / "checkpoints/latest").read_text()


def newest_step(run: Path) -> int:
    return int(latest(run).name.removeprefix("step_"))


def assert_whole(checkpoint: Path) -> None:
    """Every file is there and is what was written, both ranks' parts among them."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert {"state.json", *(f"rank_{rank:05d}.safetensors" for rank in range(RANKS))} == files.keys()
    for name, entry in files.items():
        content = (checkpoint / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}, name


def assert_resumed(ended: Ended, run: Path, after: int, last: int) -> None:
    """It went on after that step to the last one, and left nothing unfinished."""
    assert ended.statuses == [0] * RANKS, ended.err
    assert re.findall(r"steps (\d+) to (\d+)", ended.err) == [(str(after + 1), str(last))]
    assert newest_step(run) == last
    assert_whole(latest(run))
    assert not list(run.rglob("*.unfinished")) and not list(run.rglob(".tmp*"))
