"""A few kills by random_kills.py, which is run by hand with hundreds of them."""

import sys

import pytest
from ranks import TESTS


@pytest.mark.full
def test_a_few_random_kills_lose_and_repeat_nothing(launch, tmp_path):
    script = "faults.random_kills", "--kills", 5, "--seed", 4, "--out", tmp_path / "out"
    ended = launch.finish(launch.start(sys.executable, "-m", *script, PYTHONPATH=str(TESTS))).succeeded()
    assert "0 lost, 0 repeated" in ended.out and ended.out.endswith("5 kills: 0 faults\n")
