"""Fixtures of the tests that inject a fault into a run of two ranks and look at what is left of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from comparing import copy_until
from faults.outcome import CHANGES
from ranks import Ranks


@pytest.fixture(scope="session")
def two_ranks(ranks: Ranks) -> SimpleNamespace:
    """`train(run, changes, fault)`, `resume(source, *overrides)` and `start(*arguments)` of `Ranks` on two ranks."""
    return SimpleNamespace(
        train=lambda run, changes=None, fault=None, **options: ranks.train(
            2, "debug", run, {**CHANGES, **(changes or {})}, fault=fault, **options
        ),
        resume=lambda source, *overrides, fault=None: ranks.resume(2, source, *overrides, fault=fault),
        start=lambda *arguments, fault=None: ranks.start(2, *arguments, fault=fault),
    )


@pytest.fixture(scope="session")
def unbroken(two_ranks, tmp_path_factory) -> Path:
    """A run without a fault: 12 steps, checkpoints of steps 2, 4, ... 12."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    two_ranks.train(run, {"trainer.max_steps": 12, "trainer.keep_last": 6}).succeeded()
    return run


@pytest.fixture
def copy_of_unbroken(unbroken, tmp_path) -> Path:
    """A copy of it as it was at step 6."""
    return copy_until(unbroken, 6, tmp_path / "copy")
