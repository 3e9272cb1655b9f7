"""Supervision of a long run: SIGTERM, processes that hang, loss spikes."""

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
    """A run ended early, after SIGTERM, with everything saved."""


class StopSignal:
    """Makes SIGTERM a request to stop: ``with StopSignal() as stop: ... if stop.requested``. A second SIGTERM ends the
    process at once.

    Launchers and schedulers both forward a signal, so signals within GRACE_SECONDS of the first count as one.
    clock, end: for tests; `end` gets the exit status.
    """

    GRACE_SECONDS = 2.0

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, end: Callable[[int], None] = os._exit):
        self.clock, self.end = clock, end
        self.requested_at: float | None = None

    @property
    def requested(self) -> bool:
        return self.requested_at is not None

    def __enter__(self) -> "StopSignal":
        # Python runs signal handlers in the main thread, after it has left C code. A main thread that hangs in a
        # collective never does, so another thread is notified too.
        receiver, self.sender = socket.socketpair()
        self.sender.setblocking(False)
        threading.Thread(target=self._listen, args=(receiver,), name="stop signal", daemon=True).start()
        self.handler_before = signal.signal(signal.SIGTERM, self._request)
        self.wakeup_before = signal.set_wakeup_fd(self.sender.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self.wakeup_before)
        signal.signal(signal.SIGTERM, self.handler_before)
        self.sender.close()  # ends the thread

    def _request(self, *_) -> None:
        if self.requested_at is None:
            self.requested_at = self.clock()

    def _listen(self, receiver: socket.socket) -> None:
        with receiver:
            while numbers := receiver.recv(1):
                if numbers[0] == signal.SIGTERM:
                    self._request()
                    if self.clock() - self.requested_at > self.GRACE_SECONDS:
                        self.end(128 + signal.SIGTERM)


class Watchdog:
    """Ends a process that makes no progress: ``with Watchdog(...) as watchdog: ... watchdog.beat(step)``.

    If there is no beat for ``timeout_seconds``, the process prints the stack traces of its threads and exits with
    status HUNG. If one rank hangs, all do, so each prints its own.
    """

    # Time between the report and the exit, so that ranks whose last beat was later can report before they lose a peer.
    EXIT_DELAY_SECONDS = 5.0

    def __init__(self, rank: int, size: int, timeout_seconds: float, clock: Callable[[], float] = time.monotonic):
        self.rank, self.size, self.timeout_seconds, self.clock = rank, size, timeout_seconds, clock
        self.ended = threading.Event()
        self.last, self.step = clock(), 0

    def beat(self, step: int | None = None) -> None:
        """Call it after any progress. step: the step in progress."""
        self.last = self.clock()
        if step is not None:
            self.step = step
        # Implemented in C, so it also works when a hung call holds the GIL.
        faulthandler.dump_traceback_later(2 * self.timeout_seconds, exit=True)

    def seconds_left(self) -> float:
        """Time until the process ends, unless there is a beat before."""
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
                time.sleep(min(self.EXIT_DELAY_SECONDS, self.timeout_seconds / 4))
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
            f"progress for {self.timeout_seconds:g} s in step {self.step} (trainer.timeout_seconds). Stack traces:\n"
            + "".join(stacks)
        )


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
