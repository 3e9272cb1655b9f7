"""The watchdog, the stop signal and loss spikes, with injected clocks. tests/faults tests signals and hangs on real
processes."""

import os
import signal
import socket
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from data.stop_signals import STOP_SIGNALS
from trainer import TrainerError, watchdog
from trainer.watchdog import HUNG, STOPPED, LossSpikes, Stopped, StopSignal, Watchdog, end_with_launcher


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


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_only_the_same_signal_after_the_grace_period_ends_the_process(number):
    clock, statuses = Clock(), []
    stop = StopSignal(clock=clock, end=statuses.append)
    listen(stop, signal.SIGWINCH, signal.SIGCHLD)
    assert not stop.requested
    listen(stop, number)
    assert stop.requested == number
    # A launcher and a scheduler that both pass the signal on send it twice: this is still the first request.
    clock.now = StopSignal.GRACE_SECONDS
    listen(stop, number, number)
    clock.now += 0.1
    # LSF sends INT, then TERM, then KILL: what can still be saved is saved.
    listen(stop, signal.SIGWINCH, *(other for other in STOP_SIGNALS if other != number))
    assert statuses == [] and stop.requested == number
    listen(stop, number)
    assert statuses == [128 + number]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_reaches_the_handler_and_the_thread_and_afterwards_the_former_handler(number):
    heard, statuses, clock = [], [], Clock()
    before = signal.signal(number, lambda *_: heard.append("outer"))
    wakeup_before = signal.set_wakeup_fd(-1)
    try:
        with pytest.raises(RuntimeError, match="inside"), StopSignal(clock=clock, end=statuses.append) as stop:
            assert not stop.requested
            os.kill(os.getpid(), number)
            assert stop.requested == number and heard == []
            (listening,) = [thread for thread in threading.enumerate() if thread.name == "stop signal"]
            clock.now = 2 * StopSignal.GRACE_SECONDS
            os.kill(os.getpid(), number)
            raise RuntimeError("inside")
        listening.join(60)
        assert not listening.is_alive()
        # The thread may hear of the first signal late.
        assert statuses in ([128 + number], [128 + number] * 2)
        os.kill(os.getpid(), number)
        assert heard == ["outer"]
    finally:
        signal.set_wakeup_fd(wakeup_before)
        signal.signal(number, before)


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_ends_with_its_own_status():
    assert [Stopped(number, 3, Path("run")).status for number in STOP_SIGNALS] == [
        130 if number == signal.SIGINT else 75 for number in STOP_SIGNALS
    ]
    said = "stopped by SIGUSR1 after step 3, which is saved: resume with `ibq resume run`"
    assert str(Stopped(signal.SIGUSR1, 3, Path("run"))) == said


def test_each_beat_postpones_the_end():
    clock = Clock()
    watchdog = Watchdog(0, 1, timeout_seconds=1000, clock=clock)
    for step in range(7):
        clock.now += 900
        watchdog.beat(step)
        assert watchdog.seconds_left() == 1000 and watchdog.step == step
    watchdog.beat()
    assert watchdog.step == 6
    clock.now += 1001
    assert watchdog.seconds_left() == -1


def test_the_alarms_are_off_after_training():
    with Watchdog(0, 1, timeout_seconds=0.2):
        time.sleep(0.1)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.SIGALRM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


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


LIBRARIES = "/usr/lib/x86_64-linux-gnu/libc.so.6", "/opt/conda/envs/torch/bin/python3.11"
TORCH = "/opt/conda/lib/python3.11/site-packages/torch/lib/libtorch_cpu.so"


def write_process(folder: Path, libraries: tuple[str, ...], environment: str) -> None:
    folder.mkdir()
    (folder / "maps").write_text("".join(f"7f00-7f01 r-xp 0000 08:01 77    {library}\n" for library in libraries))
    (folder / "environ").write_text(environment)


@pytest.mark.parametrize(
    ("parent", "libraries", "environment", "begins"),
    [
        (700, (*LIBRARIES, TORCH), "PATH=/bin\0", True),  # torchrun
        (1, (*LIBRARIES, TORCH), "PATH=/bin\0", True),  # torchrun in a container
        (700, LIBRARIES, "PATH=/bin\0TORCHELASTIC_RUN_ID=none\0", True),  # torchrun --no-python script.sh
        (700, LIBRARIES, "CROSS_RANK=0\0PATH=/bin\0", True),  # deepspeed --no_python script.sh
        (1, LIBRARIES[:1], "PATH=/bin\0", False),  # init
        (700, LIBRARIES[:1], "PATH=/bin\0", False),  # systemd --user, containerd-shim, tini -s, dumb-init, conmon
        (700, LIBRARIES, "PATH=/torch/lib\0NOT_TORCHELASTIC_RUN_ID=1\0", False),  # a supervisor written in Python
        (700, (), "", False),  # it is just ending: its memory is gone
        (None, (), "", False),  # it has just ended
    ],
)
def test_a_rank_whose_launcher_ended_while_it_started_does_not_begin(
    monkeypatch, tmp_path, parent, libraries, environment, begins
):
    """The kernel has then made another process its parent."""
    monkeypatch.setattr(watchdog.LIBC, "prctl", lambda *_: 0, raising=False)
    monkeypatch.setattr(watchdog, "PROCESSES", tmp_path)
    monkeypatch.setattr(os, "getppid", lambda: parent or 701)
    if parent:
        write_process(tmp_path / str(parent), libraries, environment)
    end_with_launcher()  # not started by a launcher
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    said = r"has ended: start it again \(without a launcher, unset TORCHELASTIC_RUN_ID\)"
    with nullcontext() if begins else pytest.raises(TrainerError, match=said):
        end_with_launcher()


def test_a_process_that_has_loaded_pytorch_may_be_a_launcher(monkeypatch):
    monkeypatch.setattr(watchdog.LIBC, "prctl", lambda *_: 0, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(os, "getppid", os.getpid)  # torch is loaded here
    end_with_launcher()
