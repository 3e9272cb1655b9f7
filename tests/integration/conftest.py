"""Runs that several tests look at, each trained once on warm ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from ranks import Ended, Ranks


class Run(NamedTuple):
    """The recipe `debug` on so many processes with these changes."""

    processes: int
    changes: dict[str, str | int | float]


RUNS = {
    # The reference, with the checkpoints of steps 5, 10, 15 and 20.
    "one": Run(1, {"trainer.max_steps": 20}),
    "one, accumulating": Run(1, {"trainer.micro_batch_size": 2}),
    "stopped": Run(1, {"trainer.max_steps": 10, "trainer.checkpoint_every_steps": 10}),
    "zero1": Run(2, {"engine.kind": "deepspeed", "engine.config": "zero1", "trainer.max_steps": 8}),
    "vq": Run(1, {"model.quantizer": "vq"}),
    "compiled": Run(1, {"trainer.max_steps": 2, "trainer.compile": "true"}),
}


class Runs:
    """``runs[name]``: the folder of one of RUNS, which is trained when it is first asked for."""

    def __init__(self, ranks: Ranks, folder: Path):
        self.ranks, self.folder = ranks, folder
        self.ended: dict[str, Ended] = {}

    def __getitem__(self, name: str) -> Path:
        run = self.folder / name.replace(", ", "_")
        if name not in self.ended:
            processes, changes = RUNS[name]
            self.ended[name] = self.ranks.train(processes, "debug", run, changes)
        self.ended[name].succeeded()
        return run


@pytest.fixture(scope="session")
def runs(ranks, tmp_path_factory) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """What commands in this process keep in IBQ_CACHE."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def ibq_here(cache, monkeypatch, capfd) -> Callable[..., Ended]:
    """`ibq ARGUMENTS` in this process."""
    from tools import cli

    monkeypatch.setenv("IBQ_CACHE", str(cache))
    # The trainer sets these two; monkeypatch restores them.
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")

    def run(*arguments) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Ended([exited.value.code or 0], [out], [err])

    return run
