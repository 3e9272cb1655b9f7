"""Signals that end a command: by an exit that removes temporary files, and with its processes."""

import os
import signal
import threading
import time

import pytest

from data.parallel import in_processes
from data.stop_signals import ending_as_by_ctrl_c


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU])
def test_a_signal_ends_the_block_by_an_exit_once(monkeypatch, number):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as exited, ending_as_by_ctrl_c():
        assert callable(signal.getsignal(number))  # otherwise it would end the tests
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)
    assert exited.value.code == 128 + number
    assert signal.getsignal(number) == signal.SIG_DFL


def test_ignored_signals_and_those_of_a_rank_stay_as_they_are(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ending_as_by_ctrl_c():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
            assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGHUP, before)
    monkeypatch.setenv("RANK", "0")
    with ending_as_by_ctrl_c():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def wait_in_processes() -> None:
    began = time.monotonic()
    try:
        with ending_as_by_ctrl_c():
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            list(in_processes(time.sleep, [60.0] * 4, 2))
    finally:
        print(time.monotonic() - began)


def test_it_does_not_wait_for_work_in_processes(ranks):
    ended = ranks.command(1, wait_in_processes)
    assert ended.statuses == [128 + signal.SIGTERM] and float(ended.out) < 60
