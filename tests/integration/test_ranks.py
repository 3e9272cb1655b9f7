"""The harness itself: results, failures, timeouts and signals of warm ranks, and the guard against processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import ROOT, TESTS, wait_for


def sum_of_ranks(added: float) -> tuple[float, str]:
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    return total.item() + added, os.environ["LOCAL_RANK"]


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 fails")


def sleep(marker: Path) -> None:
    marker.touch()
    time.sleep(600)


def start_suppressed() -> None:
    with suppress(AssertionError):
        subprocess.run(["true"])


def test_results_come_back_from_each_rank(ranks):
    assert ranks.call(2, sum_of_ranks, 10) == [(13, "0"), (13, "1")]
    assert ranks.call(1, sum_of_ranks, 10) == [(11, "0")]


def test_a_failure_shows_the_traceback(ranks):
    with pytest.raises(AssertionError, match=r"ended with \[0, 1\][^$]*ValueError: rank 1 fails"):
        ranks.call(2, fail_on_rank_1)


def test_a_timeout_kills_the_ranks(ranks, tmp_path):
    with pytest.raises(AssertionError, match="timeout of sleep"):
        ranks.call(2, sleep, tmp_path / "began", timeout_seconds=5)
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in ranks.last_pids), "end of the ranks", 30)


def test_exit_statuses_are_real(ranks, tmp_path):
    assert ranks.ibq("train", "no-such-recipe").status == 2
    job = ranks.start(2, "debug", f"run={tmp_path / 'run'}", "trainer.device=cpu", "trainer.max_steps=100000")
    wait_for((tmp_path / "run/metrics.jsonl").exists, "run", 120)
    job.signal(1, signal.SIGKILL)
    assert job.wait().statuses == [1, -signal.SIGKILL]


def test_a_test_without_the_marker_cannot_start_a_process(no_process):
    for start in (lambda: subprocess.run(["true"]), os.fork, lambda: os.system("true")):
        with pytest.raises(AssertionError, match="without the marker"):
            start()
    thread = threading.Thread(target=start_suppressed)
    thread.start()
    thread.join()
    assert len(no_process) == 4
    no_process.clear()


KILLED = """
import sys
from pathlib import Path
from ranks import Ranks
ranks = Ranks(Path(sys.argv[1]), "killed")
job = ranks.start(2, "debug", "run=" + sys.argv[2], "trainer.device=cpu", "trainer.max_steps=100000")
print(*job.pids, flush=True)
sys.stdin.read()
"""


@pytest.mark.process
@pytest.mark.full
def test_nothing_survives_a_killed_pytest(tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path, tmp_path / "run"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{TESTS}"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as client:
        pids = [int(pid) for pid in client.stdout.readline().split()]
        pids.append(psutil.Process(pids[0]).ppid())
        assert len(pids) == 3 and pids[2] != client.pid
        client.kill()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids), "end of all ranks and of their server", 30)
