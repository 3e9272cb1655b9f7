import os
import signal
import subprocess
import sys
import time

import pytest

from trainer.watchdog import HUNG, STOPPED, LossSpikes, StopSignal

PATIENCE_SECONDS = 60


def start(script: str) -> subprocess.Popen:
    """A process that runs the script; its output is read line by line."""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end_of(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit status, what it wrote after what was read, stderr)."""
    try:
        out, errors = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    return process.returncode, out, errors


def test_exit_statuses_are_those_that_schedulers_know():
    assert (STOPPED, HUNG) == (75, 124)  # EX_TEMPFAIL of sysexits.h, and of timeout(1)


STOPPING = """
import time
from trainer.watchdog import StopSignal

StopSignal.GRACE_SECONDS = {grace}
with StopSignal() as stop:
    print("ready")
    while not stop.wished:
        time.sleep(0.01)
    print("wished")
    time.sleep({work})  # the step that is under way, and its checkpoint
    print("saved")
"""


def test_sigterm_is_a_wish_and_the_step_under_way_is_finished():
    process = start(STOPPING.format(grace=60, work=0.3))
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGTERM)
    assert process.stdout.readline() == "wished\n"
    # A launcher and a scheduler that both pass the signal on send it twice: still the one wish.
    os.kill(process.pid, signal.SIGTERM)
    assert end_of(process) == (0, "saved\n", "")


def test_a_second_sigterm_after_the_grace_ends_the_process_at_once():
    process = start(STOPPING.format(grace=0.2, work=PATIENCE_SECONDS))
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGTERM)
    assert process.stdout.readline() == "wished\n"
    time.sleep(0.4)
    sent = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    assert end_of(process) == (143, "", "")
    assert time.monotonic() - sent < PATIENCE_SECONDS / 2


def test_afterwards_signals_are_handled_as_before():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("outer"))
    try:
        with pytest.raises(RuntimeError, match="inside"), StopSignal() as stop:
            assert not stop.wished
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.wished and heard == []
            raise RuntimeError("inside")
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == ["outer"]
    finally:
        signal.signal(signal.SIGTERM, before)


WATCHED = """
import threading
import time
from trainer.watchdog import Watchdog

def hangs_in_a_collective():
    time.sleep({hang})

def waits_for_the_disk(ready):
    ready.set()
    time.sleep({hang})

with Watchdog(3, 8, timeout_seconds={timeout}) as watchdog:
    ready = threading.Event()
    threading.Thread(target=waits_for_the_disk, args=[ready], name="writing", daemon=True).start()
    ready.wait()
    for step in range(41, 43):
        watchdog.beat(step)
        time.sleep({timeout} / 4)
    hangs_in_a_collective()
print("done")
"""


def test_a_process_that_hangs_tells_where_and_ends():
    began = time.monotonic()
    status, out, errors = end_of(start(WATCHED.format(timeout=1, hang=2 * PATIENCE_SECONDS)))
    assert status == HUNG and out == ""
    first, stacks = errors.split("\n", 1)
    assert first.startswith("ibq: error: rank 3 of 8 (")
    assert "made no progress for 1 s in step 42 (trainer.timeout_seconds); it stands here:" in first
    assert "  thread MainThread:\n" in stacks and "in hangs_in_a_collective\n" in stacks
    assert "  thread writing:\n" in stacks and "in waits_for_the_disk\n" in stacks
    assert "_watch" not in stacks  # itself it leaves out
    assert time.monotonic() - began < PATIENCE_SECONDS


def test_beats_keep_it_alive_for_as_long_as_they_come():
    script = """
import time
from trainer.watchdog import Watchdog

with Watchdog(0, 1, timeout_seconds=1.5) as watchdog:
    for step in range(7):
        watchdog.beat()
        time.sleep(0.3)
    watchdog.beat()
time.sleep(3.2)  # it watches no longer, nor does what it left to the C side
print("done")
"""
    assert end_of(start(script)) == (0, "done\n", "")


def test_a_process_that_keeps_the_interpreter_to_itself_ends_too():
    """The interpreter's lock is held by C code, so that no Python thread can tell; the traceback is written in C."""
    script = """
import ctypes
from trainer.watchdog import Watchdog

def holds_the_lock():
    ctypes.PyDLL(None).sleep(PATIENCE)  # PyDLL keeps the lock

with Watchdog(0, 1, timeout_seconds=0.5) as watchdog:
    holds_the_lock()
""".replace("PATIENCE", str(2 * PATIENCE_SECONDS))
    status, _, errors = end_of(start(script))
    assert status == 1
    assert errors.startswith("Timeout (0:00:01)!") and "in holds_the_lock" in errors


def spikes_after(losses) -> LossSpikes:
    spikes = LossSpikes()
    assert [spikes.update(loss) for loss in losses] == [None] * len(losses)
    return spikes


def told(spikes, loss) -> bool:
    """Whether a loss that stays so is told, at its last step of PATIENCE."""
    said = [spikes.update(loss) for _ in range(LossSpikes.PATIENCE)]
    assert said[:-1] == [None] * (LossSpikes.PATIENCE - 1)
    return said[-1] is not None


def test_a_jump_that_stays_is_told_once():
    spikes = spikes_after([1.0, 1.2, 0.8] * 20)
    assert not told(spikes, 1.99)
    assert [spikes.update(2.5), spikes.update(2.5)] == [None, None]
    assert spikes.update(2.6) == "the loss has jumped to 2.6 from about 1: if it stays there, lower optimizer.lr"
    assert spikes.update(2.6) is None  # it is still the same jump
    assert spikes.update(1.0) is None
    assert told(spikes, 2.6)  # another


def test_one_hard_batch_is_no_jump():
    spikes = spikes_after([1.0] * 40)
    for _ in range(5):
        assert [spikes.update(loss) for loss in (9.0, 9.0, 1.0)] == [None] * 3


def test_no_jump_is_told_before_enough_is_known():
    spikes = spikes_after([1.0] * (LossSpikes.ENOUGH - 1))
    assert spikes.update(100.0) is None
    assert told(spikes, 100.0)


def test_a_loss_that_stays_higher_becomes_the_usual_one():
    spikes = spikes_after([1.0] * LossSpikes.WINDOW)
    assert told(spikes, 3.0)
    for _ in range(LossSpikes.WINDOW):
        assert spikes.update(3.0) is None
    assert not told(spikes, 5.9) and told(spikes, 6.1)


def test_losses_that_fall_or_wander_are_no_jump():
    spikes_after([10.0 * 0.98**step for step in range(300)])
    spikes_after([1.0 + 0.5 * (-1) ** step for step in range(300)])


def test_a_jump_out_of_a_falling_loss_is_told():
    spikes = spikes_after([10.0 * 0.98**step for step in range(60)])  # from 10 to 3, the median is 5.5
    assert not told(spikes, 10.5) and told(spikes, 12.5)


def test_around_and_below_zero_a_jump_goes_up():
    """An entropy term may make the total negative."""
    spikes = spikes_after([-1.0] * 40)
    assert not told(spikes, -3.0)
    assert not told(spikes, -0.1)
    assert told(spikes, 0.1)


def test_where_the_median_is_near_zero_a_wandering_loss_is_no_jump():
    spikes = spikes_after([0.04, -0.06, 0.1, 0.02, 0.15] * 10)
    assert not told(spikes, 0.5)
    assert told(spikes, 0.9)
