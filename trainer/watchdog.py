"""What watches over a long run: signals, processes that hang, losses that jump."""

import faulthandler
import math
import os
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from itertools import pairwise

STOPPED = 75  # exit status after SIGTERM: a checkpoint was written (EX_TEMPFAIL: try again)
HUNG = 124  # exit status of the watchdog (as of timeout(1))


class Stopped(Exception):
    """A run ended early, at the wish of a signal, with everything saved."""


class StopSignal:
    """SIGTERM as a wish: ``with StopSignal() as stop: ... if stop.wished``. A second signal ends the process at once.

    Launchers and schedulers both pass a signal on, so what comes within GRACE_SECONDS of the first is still the first.
    clock, end: for tests; `end` gets the exit status.
    """

    GRACE_SECONDS = 2.0

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, end: Callable[[int], None] = os._exit):
        self.clock, self.end = clock, end
        self.wished_at: float | None = None

    @property
    def wished(self) -> bool:
        return self.wished_at is not None

    def __enter__(self) -> "StopSignal":
        # A handler in Python has to wait for the main thread to leave C code, which one that hangs in a collective
        # never does. So a thread hears of every signal too.
        hearing, self.telling = socket.socketpair()
        self.telling.setblocking(False)
        threading.Thread(target=self._listen, args=(hearing,), name="stop signal", daemon=True).start()
        self.before = signal.signal(signal.SIGTERM, self._wish)
        self.told_before = signal.set_wakeup_fd(self.telling.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self.told_before)
        signal.signal(signal.SIGTERM, self.before)
        self.telling.close()  # which ends the thread

    def _wish(self, *_) -> None:
        if self.wished_at is None:
            self.wished_at = self.clock()

    def _listen(self, hearing: socket.socket) -> None:
        with hearing:
            while numbers := hearing.recv(1):
                if numbers[0] == signal.SIGTERM:
                    self._wish()
                    if self.clock() - self.wished_at > self.GRACE_SECONDS:
                        self.end(128 + signal.SIGTERM)


class Watchdog:
    """Ends a process that makes no progress: ``with Watchdog(...) as watchdog: ... watchdog.beat(step)``.

    Where ``timeout_seconds`` pass without a beat, the process writes the stack of each of its threads to stderr and
    exits with status HUNG. Where one rank hangs all do, so each of them tells where it stands.
    """

    # From the report to the exit: other ranks, whose last beat was later, are to report before they lose a peer.
    PARTING_SECONDS = 5.0

    def __init__(self, rank: int, size: int, timeout_seconds: float, clock: Callable[[], float] = time.monotonic):
        self.rank, self.size, self.timeout_seconds, self.clock = rank, size, timeout_seconds, clock
        self.ended = threading.Event()
        self.last, self.step = clock(), 0

    def beat(self, step: int | None = None) -> None:
        """There was progress; ``step``: which one is under way."""
        self.last = self.clock()
        if step is not None:
            self.step = step
        # Written in C: it also fires where a hung call keeps the interpreter's lock.
        faulthandler.dump_traceback_later(2 * self.timeout_seconds, exit=True)

    def seconds_left(self) -> float:
        """Until the process ends, unless there is a beat before."""
        return self.last + self.timeout_seconds - self.clock()

    def __enter__(self) -> "Watchdog":
        self.beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self.ended.wait(max(0.05, self.seconds_left())):
            if self.seconds_left() <= 0:
                sys.stderr.write(self._report())
                sys.stderr.flush()
                time.sleep(min(self.PARTING_SECONDS, self.timeout_seconds / 4))
                os._exit(HUNG)

    def _report(self) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = [
            f"  thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
            for ident, frame in sys._current_frames().items()
            if ident != threading.get_ident()
        ]
        return (
            f"ibq: error: rank {self.rank} of {self.size} ({socket.gethostname()}, process {os.getpid()}) made no "
            f"progress for {self.timeout_seconds:g} s in step {self.step} (trainer.timeout_seconds); it stands here:\n"
            + "".join(stacks)
        )


class LossSpikes:
    """Says when the loss jumps, once there are enough steps: when for PATIENCE steps it is above the median of the last
    WINDOW by more than that median's size, and by more than STEPS times what it usually moves from step to step. (The
    entropy penalty may bring the median near 0, where any step is large beside it; and one hard batch is no jump.)
    """

    STEPS, PATIENCE, WINDOW, ENOUGH = 6.0, 3, 128, 32

    def __init__(self):
        self.losses: deque[float] = deque(maxlen=self.WINDOW)
        self.high = 0  # for so many steps

    def update(self, loss: float) -> str | None:
        """Takes the loss of a step; returns what to say where a jump begins."""
        if not math.isfinite(loss):  # of a step that was left out
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
