"""SIGTERM ends a run after its step with everything saved; a second one, or a rank that hangs, ends it at once."""

import json
import signal
import time

import pytest
from faults.outcome import assert_resumed, assert_whole, fault_settings, latest, loss_lines, newest_step
from ranks import INJECT, TORCHRUN, wait_for

SLOW = {"kind": "slow_steps", "seconds": 0.3}  # so that a signal comes in mid-step
LONG = {"trainer.max_steps": 1000, "trainer.checkpoint_every_steps": 1000}  # a signal saves, or nothing does
LAST = 12  # of the unbroken run


def logged(run, step: int):
    """Whether the run has come so far."""
    metrics = run / "metrics.jsonl"
    return lambda: metrics.exists() and f'"step": {step},' in metrics.read_text()


def assert_stopped(err: str, run) -> int:
    """It said after which step, and saved that; returns it."""
    step = newest_step(run)
    assert f"ibq: stopped by SIGTERM after step {step}, which is saved: resume with `ibq resume {run}`" in err
    assert 2 <= step < LAST
    assert loss_lines(run)[-1]["step"] == step
    return step


def test_one_process_stops_with_status_75(launch, two_ranks, unbroken, tmp_path):
    run = tmp_path / "run"
    process = launch.start_python(INJECT, json.dumps(SLOW), "debug", f"run={run}", *fault_settings(LONG))
    wait_for(logged(run, 2), "second step", 60, process)
    process.send_signal(signal.SIGTERM)
    stopped = launch.finish(process)
    assert stopped.status == 75, stopped.err
    step = assert_stopped(stopped.err, run)
    assert_resumed(two_ranks.resume(run, f"trainer.max_steps={LAST}"), run, after=step, last=LAST)
    for line, true_line in zip(loss_lines(run), loss_lines(unbroken), strict=True):
        assert line == pytest.approx(true_line, rel=1e-4, abs=1e-6)  # begun by one process, ended by two


def test_torchrun_passes_it_on_to_all_ranks(launch, two_ranks, unbroken, tmp_path):
    """... and to their loaders' workers, which must leave it to their parents."""
    run = tmp_path / "run"
    settings = fault_settings({**LONG, "data.workers": 2})
    process = launch.start_python(*TORCHRUN, 2, INJECT, json.dumps(SLOW), "debug", f"run={run}", *settings)
    wait_for(logged(run, 2), "second step", 60, process)
    process.send_signal(signal.SIGTERM)
    stopped = launch.finish(process)
    assert stopped.status != 0
    step = assert_stopped(stopped.err, run)
    assert_whole(latest(run))
    assert_resumed(two_ranks.resume(run, f"trainer.max_steps={LAST}"), run, after=step, last=LAST)
    assert loss_lines(run) == loss_lines(unbroken)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(two_ranks, unbroken, tmp_path, rank):
    run = tmp_path / "run"
    job = two_ranks.start("debug", f"run={run}", *fault_settings(LONG), fault=SLOW)
    wait_for(logged(run, 2), "second step", 60)
    job.signal(rank, signal.SIGTERM)
    stopped = job.wait()
    assert stopped.statuses == [75, 75], stopped.err
    step = assert_stopped(stopped.errs[0], run)
    assert_whole(latest(run))
    assert_resumed(two_ranks.resume(run, f"trainer.max_steps={LAST}"), run, after=step, last=LAST)
    assert loss_lines(run) == loss_lines(unbroken)


@pytest.mark.parametrize("rank", [0, 1], ids=["waiting in a collective", "hanging"])
def test_a_second_signal_ends_a_run_that_hangs_at_once(two_ranks, unbroken, tmp_path, rank):
    """Rank 1 hangs in step 5, rank 0 waits for it in a collective, which is C code that lets no Python run."""
    run, marker = tmp_path / "run", tmp_path / "asleep"
    fault = {"kind": "fall_asleep", "rank": 1, "step": 5, "marker": str(marker)}
    job = two_ranks.start("debug", f"run={run}", *fault_settings(), fault=fault)
    wait_for(marker.exists, "hanging rank", 60)
    time.sleep(1.0)  # until rank 0 waits
    job.signal(rank, signal.SIGTERM)
    time.sleep(2.5)  # longer than StopSignal.GRACE_SECONDS, within which launchers repeat a signal
    assert not job.has_ended(rank)  # the first is a wish
    job.signal(rank, signal.SIGTERM)
    began = time.monotonic()
    wait_for(lambda: job.has_ended(rank), "end of the signalled rank", 5)
    assert time.monotonic() - began < 5
    if rank == 0:
        job.signal(1, signal.SIGKILL)
    ended = job.wait()
    assert ended.statuses[rank] == 143, ended.err

    newest = newest_step(run)
    assert newest in (2, 4)  # the latter may not have been finished
    assert_resumed(two_ranks.resume(run), run, after=newest, last=6)
    assert loss_lines(run) == loss_lines(unbroken)[:6]
