"""Supervision of a long run: signals to stop, processes that hang, loss spikes."""

import ctypes
import faulthandler
import math
import os
import re
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path

from data.stop_signals import STOP_SIGNALS
from trainer import TrainerError

STOPPED = 75  # exit status after a signal to stop: a checkpoint was written (EX_TEMPFAIL: try again)
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
PROCESSES = Path("/proc")
PYTORCH = re.compile(rb"/torch/(lib/lib|_C)[^/\n]*\.so")  # what a process maps that has loaded it
LAUNCHED = {"TORCHELASTIC_RUN_ID", "CROSS_RANK"}  # set by torchrun and by the deepspeed launcher
HUNG = 124  # exit status of the watchdog (as of timeout(1))


class Stopped(Exception):
    """A run ended early, after a signal, with everything saved. status: the exit status."""

    def __init__(self, number: int, step: int, run: Path):
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}, which is saved: resume with `ibq resume {run}`")
        self.status = 128 + signal.SIGINT if number == signal.SIGINT else STOPPED


class StopSignal:
    """Makes each of STOP_SIGNALS a request to stop: ``with StopSignal() as stop: ... if stop.requested``. The same
    signal again ends the process at once: schedulers send another one when they are about to kill it.

    Launchers and schedulers both forward a signal, so signals within GRACE_SECONDS of the first count as one. A signal
    that is ignored when training begins, as SIGHUP after nohup, stays ignored.
    clock, end: for tests; `end` gets the exit status.
    """

    GRACE_SECONDS = 2.0

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, end: Callable[[int], None] = os._exit):
        self.clock, self.end = clock, end
        self.requested_at: dict[int, float] = {}  # by the signal's number

    @property
    def requested(self) -> int:
        """The number of the signal that came first, or 0."""
        return next(iter(self.requested_at), 0)

    def __enter__(self) -> "StopSignal":
        # Python runs signal handlers in the main thread, after it has left C code. A main thread that hangs in a
        # collective never does, so another thread is notified too.
        receiver, self.sender = socket.socketpair()
        self.sender.setblocking(False)
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        threading.Thread(target=self._listen, args=(receiver, heard), name="stop signal", daemon=True).start()
        self.handlers_before = {number: signal.signal(number, self._request) for number in heard}
        self.wakeup_before = signal.set_wakeup_fd(self.sender.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self.wakeup_before)
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)
        self.sender.close()  # ends the thread

    def _request(self, number: int, _=None) -> None:
        self.requested_at.setdefault(number, self.clock())

    def _listen(self, receiver: socket.socket, heard: Collection[int] = STOP_SIGNALS) -> None:
        with receiver:
            while numbers := receiver.recv(1):
                (number,) = numbers
                if number in heard:
                    self._request(number)
                    if self.clock() - self.requested_at[number] > self.GRACE_SECONDS:
                        self.end(128 + number)


class Watchdog:
    """Ends a process that makes no progress: ``with Watchdog(...) as watchdog: ... watchdog.beat(step)``.

    If there is no beat for ``timeout_seconds``, the process prints the stack traces of its threads and exits with
    status HUNG. If one rank hangs, all do, so each prints its own. Time in which the process was suspended does not
    count. A process whose launcher is gone, so that nothing else would end it, may hang for ORPHAN_SECONDS only.
    """

    # Time between the report and the exit, so that ranks whose last beat was later can report before they lose a peer.
    EXIT_DELAY_SECONDS = 5.0
    ORPHAN_SECONDS = 6.0

    def __init__(self, rank: int, size: int, timeout_seconds: float, clock: Callable[[], float] = time.monotonic):
        self.rank, self.size, self.timeout_seconds, self.clock = rank, size, timeout_seconds, clock
        self.ended = threading.Event()
        self.last, self.step, self.launcher = clock(), 0, launcher()

    def beat(self, step: int | None = None) -> None:
        """Call it after any progress. step: the step in progress."""
        self.last = self.clock()
        if step is not None:
            self.step = step

    def seconds_left(self) -> float:
        """Time until the process ends, unless there is a beat before."""
        return self.last + self.timeout_seconds - self.clock()

    def __enter__(self) -> "Watchdog":
        self.beat()
        # The alarm of a suspended process would interrupt what the main thread waits for.
        self.mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask_before)

    def _watch(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        woke = self.clock()
        while not self.ended.wait(tick_seconds := min(1.0, self.timeout_seconds / 10)):
            _end_without_interpreter(2 * self.timeout_seconds)
            woke, slept = self.clock(), self.clock() - woke
            if slept > tick_seconds + min(5.0, self.timeout_seconds / 2):
                self._tell(f"did not run for {slept:.0f} s, as if suspended: trainer.timeout_seconds start again")
                self.last = woke
            elif self.seconds_left() <= 0:
                sys.stderr.write(self._report())
                sys.stderr.flush()
                time.sleep(min(self.EXIT_DELAY_SECONDS, self.timeout_seconds / 4))
                os._exit(HUNG)
            if self.launcher not in (None, os.getppid()):
                self._tell("has lost its launcher and ends")
                self.launcher, self.timeout_seconds = None, min(self.timeout_seconds, self.ORPHAN_SECONDS)

    def _tell(self, what: str) -> None:
        sys.stderr.write(f"ibq: rank {self.rank} of {self.size} (process {os.getpid()}) {what}\n")
        sys.stderr.flush()

    def _report(self) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"  thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
            for ident, frame in sys._current_frames().items()
            if ident != threading.get_ident()
        ]
        return (
            f"ibq: error: rank {self.rank} of {self.size} ({socket.gethostname()}, process {os.getpid()}) made no "
            f"progress for {self.timeout_seconds:g} s in step {self.step} (trainer.timeout_seconds). Stack traces:\n"
            + "".join(stacks)
        )


def _end_without_interpreter(seconds: float) -> None:
    """Ends the process if this is not called again: for a call that hangs with the interpreter's lock, so that no
    Python code runs. After ``seconds`` a C thread prints the stack traces; after as many again, SIGALRM ends the
    process. It takes two alarms, because the first one comes at once when a suspended process wakes."""
    LIBC.sysv_signal(signal.SIGALRM, LIBC.abs)  # a handler that does nothing, once
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    faulthandler.dump_traceback_later(seconds)


def launcher() -> int | None:
    """The process of the launcher that started this rank, None if there is none."""
    return os.getppid() if LAUNCHED.intersection(os.environ) else None


def end_with_launcher() -> None:
    """Lets the kernel send SIGTERM when the launcher ends, however it ends: a rank without one would train and write
    beside the ranks of the next start. Call it as early as possible. Raises TrainerError if the launcher has ended."""
    if launcher():
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if not _is_launcher(PROCESSES / str(os.getppid())):
            raise TrainerError(
                "the launcher of this process has ended: start it again (without a launcher, unset "
                f"{' and '.join(sorted(LAUNCHED.intersection(os.environ)))})"
            )


def _is_launcher(process: Path) -> bool:
    """Whether a rank's parent started it, and has not become its parent because the one that did has ended.

    The kernel does not tell: process 1 and any process with PR_SET_CHILD_SUBREAPER (systemd, containerd-shim, tini -s,
    supervisors) adopt orphans, and their names are not known. Launchers are: they are Python programs that have loaded
    PyTorch. A script between a launcher and a rank has the environment that launchers give to ranks.

    process: its folder in /proc. A supervisor that has loaded PyTorch itself counts as a launcher.
    """
    try:
        variables = {entry.partition(b"=")[0] for entry in (process / "environ").read_bytes().split(b"\0")}
        is_between = any(name.encode() in variables for name in LAUNCHED)
        return is_between or PYTORCH.search((process / "maps").read_bytes()) is not None
    except OSError:  # it has just ended, or is another user's, which no launcher is
        return False


class LossSpikes:
    """Detects a sustained jump of the loss, once ENOUGH steps are known.

    A jump is reported when the loss has exceeded the median of the last WINDOW steps for PATIENCE steps, by more than
    the median's absolute value and by more than STEPS times the median change between steps. (The entropy penalty can
    bring the median near 0, where any change is relatively large; and a single hard batch is no jump.)
    """

    STEPS, PATIENCE, WINDOW, ENOUGH = 6.0, 3, 128, 32

    def __init__(self):
        self.losses: deque[float] = deque(maxlen=self.WINDOW)
        self.high = 0  # consecutive steps above the limit

    def update(self, loss: float) -> str | None:
        """Call with the loss of each step. Returns a line to print where a jump is detected, else None."""
        if not math.isfinite(loss):  # a skipped step
            return None
        usual = high = None
        if len(self.losses) >= self.ENOUGH:
            usual = statistics.median(self.losses)
            moves = statistics.median(abs(after - before) for before, after in pairwise(self.losses))
            high = loss - usual > max(abs(usual), self.STEPS * moves)
        self.high = self.high + 1 if high else 0
        self.losses.append(loss)
        if self.high == self.PATIENCE:
            return f"the loss has jumped to {loss:.4g} from about {usual:.4g}: if it stays there, lower optimizer.lr"
        return None
