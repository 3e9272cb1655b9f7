"""A disk that is full costs the checkpoint that does not fit, never one that was written."""

import os
from pathlib import Path

import pytest
from comparing import loss_lines
from faults.outcome import assert_resumed, assert_whole, latest, newest_step
from field.disks import LIBC, MNT_DETACH, MS_REMOUNT, mount

MEGABYTE = 1 << 20
# A checkpoint of `debug` takes 11 MB: the first fits, the second does not, not even the first rank's part of it.
SMALL, LARGE = 14 * MEGABYTE, 64 * MEGABYTE


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A file system of SMALL bytes."""
    place = tmp_path / "disk"
    place.mkdir()
    if error := mount(place, SMALL):
        pytest.skip(f"a small file system cannot be mounted here (root can): {os.strerror(error)}")
    yield place
    assert LIBC.umount2(bytes(place), MNT_DETACH) == 0


@pytest.mark.parametrize("kind", ["async", pytest.param("sync", marks=pytest.mark.full)])
def test_a_checkpoint_that_does_not_fit_is_left_out_and_the_last_one_is_an_error(two_ranks, unbroken, small_disk, kind):
    run = small_disk / "run"
    ended = two_ranks.train(run, {"trainer.async_checkpoints": kind == "async"})
    assert ended.statuses == [2, 2], ended.err

    # In the middle of a run: a message, and training continues.
    (alarm,) = [line for line in ended.errs[0].splitlines() if line.startswith("ALARM")]
    assert "cannot write checkpoint step_00000004 (rank " in alarm and "o space left on device" in alarm
    assert "training continues without this checkpoint" in alarm
    assert loss_lines(run) == loss_lines(unbroken)[:6]
    # At the end: one line of each rank and status 2.
    for err in ended.errs:
        (line,) = [line for line in err.splitlines() if line.startswith("ibq: error:")]
        assert "cannot write checkpoint step_00000006 (rank " in line and "o space left on device" in line
        assert "free some space" in line and f"then `ibq resume {run}`" in line
        assert "Traceback" not in err
    # What was there is whole, what was not finished is gone.
    assert newest_step(run) == 2
    assert_whole(latest(run))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"branches.json", "latest", "step_00000002"}

    assert mount(small_disk, LARGE, MS_REMOUNT) == 0
    assert_resumed(two_ranks.resume(run), run, after=2, last=6)
    assert loss_lines(run) == loss_lines(unbroken)[:6]
