"""The watchdog, the stop signal and loss spikes, with injected clocks. tests/faults tests signals and hangs on real
processes."""

import os
import signal
import socket
import threading

import pytest

from trainer.watchdog import HUNG, STOPPED, LossSpikes, StopSignal, Watchdog


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_exit_statuses_are_those_that_schedulers_know():
    assert (STOPPED, HUNG) == (75, 124)  # EX_TEMPFAIL of sysexits.h, and of timeout(1)


def listen(stop: StopSignal, *signals: int) -> None:
    """Passes signals to the loop of the listening thread."""
    telling, hearing = socket.socketpair()
    telling.send(bytes(signals))
    telling.close()
    stop._listen(hearing)


def test_only_a_sigterm_after_the_grace_period_ends_the_process():
    clock, statuses = Clock(), []
    stop = StopSignal(clock=clock, end=statuses.append)
    listen(stop, signal.SIGWINCH, signal.SIGCHLD)
    assert not stop.requested
    listen(stop, signal.SIGTERM)
    assert stop.requested
    # A launcher and a scheduler that both pass the signal on send it twice: this is still the first request.
    clock.now = StopSignal.GRACE_SECONDS
    listen(stop, signal.SIGTERM, signal.SIGTERM)
    clock.now += 0.1
    listen(stop, signal.SIGWINCH)
    assert statuses == []
    listen(stop, signal.SIGTERM)
    assert statuses == [143]


def test_a_signal_reaches_the_handler_and_the_thread_and_afterwards_the_former_handler():
    heard, statuses, clock = [], [], Clock()
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("outer"))
    wakeup_before = signal.set_wakeup_fd(-1)
    try:
        with pytest.raises(RuntimeError, match="inside"), StopSignal(clock=clock, end=statuses.append) as stop:
            assert not stop.requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested and heard == []
            (listening,) = [thread for thread in threading.enumerate() if thread.name == "stop signal"]
            clock.now = 2 * StopSignal.GRACE_SECONDS
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("inside")
        listening.join(60)
        assert not listening.is_alive()
        assert statuses in ([143], [143, 143])  # the thread may hear of the first signal late
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == ["outer"]
    finally:
        signal.set_wakeup_fd(wakeup_before)
        signal.signal(signal.SIGTERM, before)


def test_each_beat_postpones_both_ends(monkeypatch):
    """The report of the thread comes after `timeout_seconds` without a beat, that of the C side after twice as many."""
    clock, armed = Clock(), []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda seconds, exit: armed.append((seconds, exit)))
    monkeypatch.setattr("faulthandler.cancel_dump_traceback_later", lambda: armed.append("cancelled"))
    with Watchdog(0, 1, timeout_seconds=1000, clock=clock) as watchdog:
        (watching,) = [thread for thread in threading.enumerate() if thread.name == "watchdog"]
        for step in range(7):
            clock.now += 900
            assert watchdog.seconds_left() == 100
            watchdog.beat(step)
            assert watchdog.seconds_left() == 1000 and watchdog.step == step
        watchdog.beat()
        assert watchdog.step == 6
        clock.now += 1001
        assert watchdog.seconds_left() == -1
    watching.join(60)
    assert not watching.is_alive()
    assert armed == [(2000, True)] * 9 + ["cancelled"]


def test_the_report_names_rank_step_and_the_stack_of_every_thread():
    may_end, reports = threading.Event(), []

    def waits_for_the_disk() -> None:
        may_end.wait(60)

    writing = threading.Thread(target=waits_for_the_disk, name="writing")
    writing.start()
    watchdog = Watchdog(3, 8, timeout_seconds=1.5)
    watchdog.step = 42
    reporting = threading.Thread(target=lambda: reports.append(watchdog._report()), name="reporting")
    reporting.start()
    reporting.join(60)
    may_end.set()
    writing.join(60)
    first, stacks = reports[0].split("\n", 1)
    assert first.startswith("ibq: error: rank 3 of 8 (")
    assert f"process {os.getpid()}) made no progress for 1.5 s in step 42 (trainer.timeout_seconds). Stack" in first
    assert "  thread MainThread:\n" in stacks and "in test_the_report_names_rank_step" in stacks
    assert "  thread writing:\n" in stacks and "in waits_for_the_disk\n" in stacks
    assert "thread reporting" not in stacks  # itself it leaves out


def spikes_after(losses) -> LossSpikes:
    spikes = LossSpikes()
    assert [spikes.update(loss) for loss in losses] == [None] * len(losses)
    return spikes


def told(spikes, loss) -> bool:
    """Whether a loss that stays at this value is reported, in the last step of PATIENCE."""
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
