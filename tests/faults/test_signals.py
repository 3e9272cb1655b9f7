"""SIGTERM ends a run after its step with everything saved; a second one ends it at once, also where it hangs."""

import json
import signal
import sys
import time

import pytest
from comparing import loss_lines
from faults.outcome import assert_resumed, assert_whole, fault_settings, latest, newest_step
from ranks import INJECT, TORCHRUN, wait_for

LONG = {"trainer.max_steps": 1000, "trainer.checkpoint_every_steps": 1000}  # only a signal saves
LAST = 12  # of the unbroken run


def assert_stopped(err: str, run, name: str = "SIGTERM") -> int:
    """It said after which step it stopped, and saved that step; returns it."""
    step = newest_step(run)
    assert f"ibq: stopped by {name} after step {step}, which is saved: resume with `ibq resume {run}`" in err
    assert loss_lines(run)[-1]["step"] == step
    return step


@pytest.mark.parametrize(
    ("name", "status"),
    [
        pytest.param("SIGTERM", 75, marks=pytest.mark.full),
        ("SIGHUP", 75),
        pytest.param("SIGINT", 130, marks=pytest.mark.full),
    ],
)
def test_one_process_stops_after_its_step(ranks, two_ranks, unbroken, tmp_path, name, status):
    run = tmp_path / "run"
    fault = {"kind": "terminate", "rank": 0, "step": 3, "name": name}
    stopped = ranks.start(1, "debug", f"run={run}", *fault_settings(LONG), fault=fault).wait()
    assert stopped.statuses == [status], stopped.err
    assert assert_stopped(stopped.err, run, name) == 3
    assert_resumed(two_ranks.resume(run, f"trainer.max_steps={LAST}"), run, after=3, last=LAST)
    for line, true_line in zip(loss_lines(run), loss_lines(unbroken), strict=True):
        assert line == pytest.approx(true_line, rel=1e-4, abs=1e-6)  # one process, then two


def test_torchrun_passes_it_on_to_all_ranks(launch, two_ranks, unbroken, tmp_path):
    """... and to their loaders' workers, which must leave it to their parents."""
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    settings = fault_settings({**LONG, "data.workers": 1})
    slow = json.dumps({"kind": "slow_steps", "seconds": 0.2})
    process = launch.start(sys.executable, *TORCHRUN, 2, INJECT, slow, "debug", f"run={run}", *settings)
    wait_for(lambda: metrics.exists() and '"step": 2,' in metrics.read_text(), "second step", 120, process)
    process.send_signal(signal.SIGTERM)
    stopped = launch.finish(process)
    assert stopped.status != 0
    step = assert_stopped(stopped.err, run)
    assert 2 <= step < LAST
    assert_whole(latest(run))
    assert_resumed(two_ranks.resume(run, f"trainer.max_steps={LAST}"), run, after=step, last=LAST)
    assert loss_lines(run) == loss_lines(unbroken)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.full), 1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(two_ranks, unbroken, tmp_path, rank):
    run = tmp_path / "run"
    stopped = two_ranks.train(run, LONG, {"kind": "terminate", "rank": rank, "step": 3})
    assert stopped.statuses == [75, 75], stopped.err
    assert assert_stopped(stopped.errs[0], run) == 3
    assert_whole(latest(run))
    assert_resumed(two_ranks.resume(run, f"trainer.max_steps={LAST}"), run, after=3, last=LAST)
    assert loss_lines(run) == loss_lines(unbroken)


@pytest.mark.parametrize(
    "rank", [0, pytest.param(1, marks=pytest.mark.full)], ids=["waiting in a collective", "hanging"]
)
def test_a_second_signal_ends_a_run_that_hangs_at_once(two_ranks, unbroken, tmp_path, rank):
    """Rank 1 hangs in step 5. Rank 0 waits for it in a collective: C code, in which no Python signal handler runs."""
    run, marker = tmp_path / "run", tmp_path / "asleep"
    fault = {"kind": "hang", "rank": 1, "step": 5, "marker": str(marker), "grace_seconds": 0.3}
    job = two_ranks.start("debug", f"run={run}", *fault_settings(), fault=fault)
    wait_for(marker.exists, "hanging rank", 60)
    time.sleep(0.5)  # until rank 0 waits
    job.signal(rank, signal.SIGTERM)
    time.sleep(0.6)  # longer than the grace period, within which launchers repeat a signal
    assert not job.has_ended(rank)  # the first signal only asks for a stop
    job.signal(rank, signal.SIGTERM)
    wait_for(lambda: job.has_ended(rank), "end of the signalled rank", 5)
    if rank == 0:
        job.signal(1, signal.SIGKILL)
    ended = job.wait()
    assert ended.statuses[rank] == 143, ended.err

    newest = newest_step(run)
    assert newest in (2, 4)  # the latter may not have been finished
    assert_resumed(two_ranks.resume(run), run, after=newest, last=6)
    assert loss_lines(run) == loss_lines(unbroken)[:6]
