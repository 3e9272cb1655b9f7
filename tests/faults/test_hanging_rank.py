"""A rank that makes no progress: every rank reports where it hangs, and the run ends instead of idling."""

import json
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist
from comparing import loss_lines
from faults.outcome import assert_resumed, fault_settings, newest_step
from ranks import INJECT, TORCHRUN, wait_for

import trainer.parallel
from trainer.watchdog import Watchdog

HANG = {"kind": "hang", "rank": 1, "step": 5, "timeout_seconds": 3.0}


def assert_reported(err: str) -> None:
    """Both ranks said where they hang."""
    made_no_progress = r"^ibq: error: rank (\d) of 2 \(.*made no progress for 3 s in step 5 "
    assert sorted(re.findall(made_no_progress, err, re.MULTILINE)) == ["0", "1"], err
    assert "in sleeping_beauty" in err  # the hanging rank, by its function
    assert "in sum_over_ranks" in err or "in mean_over_ranks" in err, err  # and the rank that waits for it


def test_every_rank_reports_where_it_hangs(two_ranks, unbroken, tmp_path):
    run = tmp_path / "run"
    ended = two_ranks.train(run, fault=HANG)
    assert ended.statuses == [124, 124], ended.err
    assert_reported(ended.err)
    newest = newest_step(run)
    assert newest in (2, 4)  # the latter may not have been finished
    assert_resumed(two_ranks.resume(run), run, after=newest, last=6)
    assert loss_lines(run) == loss_lines(unbroken)[:6]


@pytest.mark.full
def test_torchrun_reports_the_exit_status(launch, tmp_path):
    arguments = "debug", f"run={tmp_path / 'run'}", *fault_settings()
    ended = launch.python(*TORCHRUN, 2, INJECT, json.dumps(HANG), *arguments)
    assert ended.status != 0
    assert_reported(ended.err)
    assert re.search(r"exitcode\s*: 124", ended.err), ended.err


def test_a_process_that_keeps_the_interpreters_lock_ends_too(ranks, tmp_path):
    """C code holds the lock, so that no Python thread can report; the traceback is written in C."""
    fault = {**HANG, "rank": 0, "holds_lock": True, "timeout_seconds": 0.5}
    ended = ranks.train(
        1, "debug", tmp_path / "run", {"trainer.checkpoint_every_steps": 100}, fault=fault, timeout_seconds=60
    )
    assert ended.statuses == [-signal.SIGALRM]
    assert "Timeout (0:00:01)!" in ended.err and "in sleeping_beauty" in ended.err


def beat_for(seconds: float, marker) -> int:
    """A process that makes progress, with a watchdog of one second."""
    with Watchdog(0, 1, timeout_seconds=1.0) as watchdog:
        marker.touch()
        end = time.process_time() + seconds
        while time.process_time() < end:
            watchdog.beat(7)
    return 0


def test_a_process_that_was_suspended_goes_on(ranks, tmp_path):
    """Longer than the watchdog's own timeout, and longer than that of a call that keeps the interpreter's lock."""
    job = ranks.start_command(1, beat_for, 1.0, tmp_path / "marker")
    wait_for((tmp_path / "marker").exists, "watchdog", 60)
    time.sleep(0.3)
    job.signal(0, signal.SIGSTOP)
    time.sleep(3.5)
    job.signal(0, signal.SIGCONT)
    ended = job.wait()
    assert ended.statuses == [0], ended.err
    assert "rank 0 of 1" in ended.err and "as if suspended: trainer.timeout_seconds start again" in ended.err


def meet_slowly(marker) -> int:
    """Rank 0 waits for rank 1 in a collective; the group's timeout is a second."""
    trainer.parallel.COLLECTIVE_MARGIN_SECONDS = 0.0
    world = trainer.parallel.start_world("cpu", timeout_seconds=1.0)
    trainer.parallel.leave_hangs_to_watchdog()
    marker.touch()
    time.sleep(0.8 * world.rank)
    dist.all_reduce(torch.ones(1))
    dist.barrier()
    trainer.parallel.stop_world()
    return 0


def test_ranks_that_were_suspended_in_a_collective_go_on(ranks, tmp_path):
    job = ranks.start_command(2, meet_slowly, tmp_path / "marker")
    wait_for((tmp_path / "marker").exists, "process group", 60)
    time.sleep(0.2)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in range(2):
            job.signal(rank, number)
        time.sleep(2.0 if number == signal.SIGSTOP else 0.0)
    ended = job.wait()
    assert ended.statuses == [0, 0], ended.err
