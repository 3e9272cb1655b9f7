"""torchrun --max-restarts: restarted processes resume from the newest checkpoint by themselves."""

import json
import os
import re
import signal

import pytest
import torch
import torch.distributed as dist
from comparing import loss_lines
from faults.outcome import assert_whole, fault_settings, latest, newest_step
from ranks import INJECT, TORCHRUN

from trainer.parallel import restarting_job, start_world

STEPS = 8
KILL_IN_SAVE = {"kind": "kill_in_save", "rank": 1, "step": 6, "phase": "half of the part"}
KILL_AT_STEP_2 = {"kind": "kill_at_step", "rank": 1, "step": 2}


def assert_restarted(err: str, run, unbroken, after: int) -> None:
    """The run started, then resumed after that step, and came to its end."""
    steps = re.findall(rf"steps (\d+) to {STEPS}$", err, re.MULTILINE)
    assert steps == ["1", str(after + 1)], err
    assert newest_step(run) == STEPS
    assert_whole(latest(run))
    assert loss_lines(run) == loss_lines(unbroken)[:STEPS]


@pytest.mark.parametrize(
    ("fault", "after"),
    [(KILL_IN_SAVE, 4), pytest.param(KILL_AT_STEP_2, 0, marks=pytest.mark.full)],
    ids=["in a save", "nothing saved yet"],
)
def test_torchrun_restarts_after_a_kill_and_the_run_completes(launch, unbroken, tmp_path, fault, after):
    run = tmp_path / "run"
    torchrun = *TORCHRUN, 2, "--max-restarts", 1  # which must be enough
    arguments = "debug", f"run={run}", *fault_settings({"trainer.max_steps": STEPS})
    ended = launch.python(*torchrun, INJECT, json.dumps(fault), *arguments).succeeded()
    assert_restarted(ended.err, run, unbroken, after)


def test_a_restart_before_the_first_checkpoint_starts_afresh(two_ranks, unbroken, tmp_path):
    run = tmp_path / "run"
    steps = {"trainer.max_steps": STEPS}
    restarts = {"TORCHELASTIC_MAX_RESTARTS": "1"}  # as torchrun sets it
    killed = two_ranks.train(run, steps, KILL_AT_STEP_2, environment=restarts)
    assert killed.statuses[1] == -signal.SIGKILL
    again = two_ranks.train(run, steps, environment=restarts)
    assert again.statuses == [0, 0], again.err
    assert_restarted(killed.err + again.err, run, unbroken, after=0)


def test_a_restart_continues_the_branch_of_a_named_checkpoint(ranks, copy_of_unbroken):
    """torchrun starts the same command again. Another job with this command begins at the named checkpoint."""
    run, named = copy_of_unbroken, copy_of_unbroken / "checkpoints" / "step_00000002"

    def attempt(job: str, max_steps: int) -> str:
        environment = {"TORCHELASTIC_MAX_RESTARTS": "2", "TORCHELASTIC_RUN_ID": job}
        return ranks.resume(2, named, f"trainer.max_steps={max_steps}", environment=environment).succeeded().err

    assert "steps 3 to 4" in attempt("first", 4)
    again = attempt("first", 6)
    assert "steps 5 to 6" in again and "this job has resumed from step_00000002 before" in again
    assert "is at step 6 already: nothing is left to do" in attempt("first", 6)
    assert "steps 3 to 4" in attempt("second", 4)
    assert newest_step(run) == 4


def test_without_a_name_the_process_of_torchrun_names_its_job(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    assert restarting_job() is None
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's default
    job = restarting_job()
    assert job == restarting_job() and f" {os.getppid()} " in job
    monkeypatch.setattr(os, "getppid", os.getpid)
    assert restarting_job() != job
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "name")
    assert restarting_job() == "name"


def sum_where_only_rank_1_counts_a_restart() -> float:
    os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ["RANK"]
    start_world("cpu", timeout_seconds=1)
    total = torch.ones(())
    dist.all_reduce(total)
    return total.item()


def test_processes_meet_though_their_agents_count_restarts_differently(ranks):
    """One node's agent counts a failure. The other's, which sees first that this node rejoins, does not."""
    assert ranks.call(2, sum_where_only_rank_1_counts_a_restart, join=False) == [2, 2]
