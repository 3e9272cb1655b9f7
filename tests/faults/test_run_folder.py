"""The folder of a run: two writers, a kill before the first checkpoint, and a folder that goes away."""

import json
import signal

import pytest
from comparing import loss_lines, refusal
from faults.outcome import CHANGES, assert_resumed, assert_whole, fault_settings, latest, newest_step
from ranks import wait_for

from trainer import TrainerError
from trainer.checkpoint import is_saved

LOST = 5
STEPS = 6


@pytest.mark.parametrize(
    "how", ["moved", pytest.param("deleted", marks=pytest.mark.full), pytest.param("replaced", marks=pytest.mark.full)]
)
def test_a_folder_that_goes_is_noticed_and_the_step_saved(two_ranks, unbroken, tmp_path, how):
    run = tmp_path / "run"
    saved = tmp_path / "run-2" if how == "replaced" else run
    ended = two_ranks.train(run, fault={"kind": "lose_folder", "step": LOST, "run": str(run), "how": how})
    assert ended.statuses == [2, 2], ended.err
    said = "the run's folder was moved or deleted, or taken by another process, while it trained"
    assert all(f"ibq: error: {said}; step {LOST} is saved: resume with `ibq resume {saved}`" in e for e in ended.errs)
    assert not (tmp_path / "run.moved" / ".lock").exists()
    assert newest_step(saved) == LOST
    assert_whole(latest(saved))
    if how == "replaced":
        assert list(run.iterdir()) == []  # it is not ours
    assert_resumed(two_ranks.resume(saved), saved, after=LOST, last=STEPS)
    assert loss_lines(saved) == loss_lines(unbroken)[LOST - 1 : STEPS]


def test_a_second_writer_is_refused_and_the_lock_of_a_killed_one_is_taken_over(ranks, two_ranks, unbroken, tmp_path):
    run = tmp_path / "run"
    fault = {"kind": "slow_steps", "seconds": 0.3}
    job = two_ranks.start("debug", f"run={run}", *fault_settings({"trainer.max_steps": 100}), fault=fault)
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"step": 3,' in metrics.read_text(), "third step", 120)
    refused = ranks.resume(1, run)
    assert refused.statuses == [2], refused.err
    assert f"{run} is being written by process {job.pids[0]} on " in refused.error_lines[0]
    for rank in range(2):
        job.signal(rank, signal.SIGKILL)
    job.wait()
    after = newest_step(run)
    resumed = two_ranks.resume(run, f"trainer.max_steps={after + 2}")
    assert f"the lock of {run} is taken over: process {job.pids[0]} on " in resumed.errs[0]
    assert_resumed(resumed, run, after=after, last=after + 2)
    lines = loss_lines(run)
    assert lines == loss_lines(unbroken)[: len(lines)] and not (run / ".lock").exists()


def test_a_run_that_was_killed_before_its_first_checkpoint_can_be_resumed(two_ranks, unbroken, tmp_path):
    run = tmp_path / "run"
    killed = two_ranks.train(run, fault={"kind": "kill_at_step", "rank": 0, "step": 2})
    assert killed.statuses[0] == -signal.SIGKILL and not (run / "checkpoints").exists()
    again = two_ranks.train(run)
    assert again.statuses == [2, 2] and f"resume it (`ibq resume {run}`)" in again.err
    resumed = two_ranks.resume(run)
    assert f"{run} has no checkpoint yet: it starts from step 1" in resumed.errs[0]
    assert_resumed(resumed, run, after=0, last=STEPS)
    assert loss_lines(run) == loss_lines(unbroken)[:STEPS]


def test_checkpoints_that_are_out_of_reach_are_not_none(tmp_path):
    """A link to a disk that is not mounted: the run must not start from step 1."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "not mounted")
    assert f"{run}/checkpoints is a link to nothing" in refusal(TrainerError, is_saved, run)


def test_changes_are_in_the_log_and_in_the_checkpoints(two_ranks, copy_of_unbroken):
    run = copy_of_unbroken
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("crop: random_resized", "crop: center"))
    resumed = two_ranks.resume(run, "trainer.max_steps=8", "ema.decay=0.5")
    assert_resumed(resumed, run, after=6, last=8)
    said = [line.partition("changed after step 6: ")[2] for line in resumed.errs[0].splitlines()]
    assert [line.split()[0] for line in said if line] == ["trainer.max_steps", "data.crop", "ema.decay"]
    changes = json.loads((latest(run) / "state.json").read_text())["changes"]
    assert [6, "data.crop", "random_resized", "center"] in changes
    more = two_ranks.resume(run, "trainer.max_steps=10")
    assert "data.crop" not in more.errs[0]
    assert json.loads((latest(run) / "state.json").read_text())["changes"][:3] == changes
    assert CHANGES["trainer.max_steps"] == STEPS
