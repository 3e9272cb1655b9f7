"""Runs that several tests look at, each trained once on warm ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import Ended, settings

# Name -> (number of processes, changes) of a run of the recipe `debug`.
RUNS = {
    # The reference, with the checkpoints of steps 5, 10, 15 and 20.
    "one": (1, {"trainer.max_steps": 20}),
    "one, accumulating": (1, {"trainer.micro_batch_size": 2}),
    "stopped": (1, {"trainer.max_steps": 10, "trainer.checkpoint_every_steps": 10}),
    "zero1": (2, {"engine.kind": "deepspeed", "engine.config": "zero1", "trainer.max_steps": 8}),
    "compiled": (1, {"trainer.max_steps": 2, "trainer.compile": "true"}),
}


@pytest.fixture(scope="session")
def trained(ranks, tmp_path_factory) -> Callable[[str, int, dict], Path]:
    """`trained(recipe, processes, changes)`: the folder of that run, which is trained when it is first asked for.
    The file `stderr` beside it holds what it said."""
    done = {}

    def train(recipe: str, processes: int, changes: dict) -> Path:
        key = recipe, processes, *settings(changes)
        if key not in done:
            run = tmp_path_factory.mktemp("trained") / "run"
            ended = ranks.train(processes, recipe, run, changes).succeeded()
            run.with_name("stderr").write_text(ended.err)
            done[key] = run
        return done[key]

    return train


@pytest.fixture(scope="session")
def runs(trained) -> Callable[[str], Path]:
    """`runs(name)`: the folder of one of RUNS."""
    return lambda name: trained("debug", *RUNS[name])


@pytest.fixture
def ibq_here(ibq, tmp_path_factory, monkeypatch) -> Callable[..., Ended]:
    """`ibq`, which may train."""
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    # The trainer sets these two; monkeypatch restores them.
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    return ibq
