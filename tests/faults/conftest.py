"""Fixtures of the tests that do a fault to a run and look at what is left of it."""

import shutil
from pathlib import Path

import pytest
from faults.ranks import RANKS, Ranks
from launching import Launch


@pytest.fixture(scope="session")
def launch(tmp_path_factory) -> Launch:
    return Launch(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def ranks(launch, tmp_path_factory):
    ranks = Ranks(launch, tmp_path_factory.mktemp("orders"))
    yield ranks
    ranks.end()
    assert launch.finish(ranks.torchrun).status == 0


@pytest.fixture(scope="session")
def unbroken(ranks, tmp_path_factory) -> Path:
    """The run that no fault has met: 12 steps, checkpoints of steps 2, 4, ... 12."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    ended = ranks.train(run, {"trainer.max_steps": 12, "trainer.keep_last": 6})
    assert ended.statuses == [0] * RANKS, ended.err
    return run


@pytest.fixture
def copy_of_unbroken(unbroken, tmp_path) -> Path:
    """A copy of it as it was at step 6."""
    run = shutil.copytree(unbroken, tmp_path / "copy")
    for step in (8, 10, 12):
        shutil.rmtree(run / f"checkpoints/step_{step:08d}")
    (run / "checkpoints/latest").write_text("step_00000006")
    return run
