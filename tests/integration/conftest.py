"""Runs that several tests look at, each trained once on warm ranks."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import Ended

# Name -> (number of processes, changes) of a run of the recipe `debug`.
RUNS = {
    # The reference, with the checkpoints of steps 5, 10, 15 and 20.
    "one": (1, {"trainer.max_steps": 20}),
    "one, accumulating": (1, {"trainer.micro_batch_size": 2}),
    "stopped": (1, {"trainer.max_steps": 10, "trainer.checkpoint_every_steps": 10}),
    "zero1": (2, {"engine.kind": "deepspeed", "engine.config": "zero1", "trainer.max_steps": 8}),
    "vq": (1, {"model.quantizer": "vq"}),
    "compiled": (1, {"trainer.max_steps": 2, "trainer.compile": "true"}),
}


@pytest.fixture(scope="session")
def runs(ranks, tmp_path_factory) -> Callable[[str], Path]:
    """`runs(name)`: the folder of one of RUNS, which is trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def train(name: str) -> Path:
        processes, changes = RUNS[name]
        run = folder / name.replace(", ", "_")
        ranks.train(processes, "debug", run, changes).succeeded()
        return run

    return train


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
