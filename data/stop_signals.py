"""The signals that ask a job to stop. (A module that imports no package: a rank needs it before it imports PyTorch.)"""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator

# By which terminals, schedulers and launchers end jobs or warn them that they will (SLURM, PBS and Kubernetes TERM, LSF
# INT, TERM and USR2, Grid Engine USR1, USR2 and XCPU, terminals INT, QUIT and HUP; SLURM and others let users choose).
STOP_SIGNALS = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGPWR),
)


@contextlib.contextmanager
def ending_as_by_ctrl_c() -> Iterator[None]:
    """Within it, each of STOP_SIGNALS ends this process by SystemExit (128 + its number), so that temporary files are
    removed, and its child processes by SIGTERM. Only signals that would have ended it at once are changed, none of a
    rank: it may wait for others in code that no handler interrupts, and the next job removes what it leaves."""
    at_once = [number for number in STOP_SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    handled = [] if "RANK" in os.environ else at_once

    def end(number: int, _) -> None:
        for one in handled:  # launchers and schedulers may both send one; the second must not disturb the removal
            signal.signal(one, signal.SIG_IGN)
        for child in multiprocessing.active_children():
            child.terminate()
        sys.exit(128 + number)

    for number in handled:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
