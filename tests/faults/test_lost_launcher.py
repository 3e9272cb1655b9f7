"""Ranks end when their launcher is gone, however it ended."""

import os
import signal
import time
from pathlib import Path

import pytest
from ranks import wait_for

from trainer.watchdog import StopSignal, Watchdog, end_with_launcher


def launch_and_lose(kind: str, marker: Path) -> int:
    """Forks a launcher, which forks a rank; the launcher is killed. The rank writes into the file what ended it."""
    os.environ["TORCHELASTIC_RUN_ID"] = "1"
    launcher = os.fork()
    if launcher == 0:
        if os.fork():
            time.sleep(600)
        end_with_launcher()
        Watchdog.ORPHAN_SECONDS = 1.0
        with StopSignal() as stop, Watchdog(0, 1, 600.0):
            marker.write_text(str(os.getpid()))
            while kind == "hangs" or not stop.requested:
                time.sleep(0.05)
            marker.write_text(signal.Signals(stop.requested).name)
        os._exit(0)
    wait_for(lambda: marker.exists() and marker.read_text() != "", "rank", 60)
    rank = int(marker.read_text())
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    wait_for(lambda: not Path(f"/proc/{rank}").exists() or "\nState:\tZ" in _status(rank), "end of the rank", 10)
    return 0


def _status(rank: int) -> str:
    try:
        return Path(f"/proc/{rank}/status").read_text()
    except FileNotFoundError:
        return "\nState:\tZ"


@pytest.mark.parametrize("kind", ["trains", "hangs"])
def test_a_rank_ends_when_its_launcher_is_killed(ranks, tmp_path, kind):
    """One that trains is asked to stop, and saves; one that hangs is ended."""
    marker = tmp_path / "marker"
    ended = ranks.command(1, launch_and_lose, kind, marker).succeeded()
    if kind == "trains":
        assert marker.read_text() == "SIGTERM"
    else:
        assert "has lost its launcher and ends" in ended.err and "made no progress for 1 s" in ended.err


RANK = """
import os, sys, time
from trainer import TrainerError
from trainer.watchdog import end_with_launcher
while os.getppid() != int(sys.argv[1]):
    time.sleep(0.01)
try:
    end_with_launcher()
except TrainerError as error:
    print(error)
"""
SUPERVISOR = """
import ctypes, os, subprocess, sys
assert ctypes.CDLL(None).prctl(36, 1) == 0  # PR_SET_CHILD_SUBREAPER
launcher = f'TORCHELASTIC_RUN_ID=1 "$0" -c "$1" {os.getpid()} &'
subprocess.run(["sh", "-c", launcher, sys.executable, sys.argv[1]], check=True)
os.wait()
"""


def test_a_rank_that_a_supervisor_has_adopted_does_not_begin(launch):
    """The launcher ended before the rank asked for a signal at its end. The name of the new parent proves nothing."""
    ended = launch.python("-c", SUPERVISOR, RANK).succeeded()
    assert ended.out.startswith("the launcher of this process has ended: start it again")
