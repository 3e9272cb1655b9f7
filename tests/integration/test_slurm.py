"""tools/ibq.sbatch where `srun` starts two "nodes" on this machine, and `scontrol` keeps what it was asked."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from comparing import read_metrics, unchanged
from ranks import ROOT, Ended, Launch, settings, wait_for

SCRIPT = ROOT / "tools/ibq.sbatch"
JOB = 4711
PATIENCE_SECONDS = 120

# A task on each node, with the worst of their exit statuses as its own.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
  SLURM_NODEID=$node SLURMD_NODENAME=localhost "$@" & tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do
  wait "$task"; status=$?
  ((status > worst)) && worst=$status
done
exit $worst
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'localhost\\nlocalhost\\n'; else echo "$*" >> "$(dirname "$0")/asked"; fi
"""


class Cluster:
    """What a submitted script finds around it. ``asked``: what it wanted of scontrol, but for the nodes' names."""

    def __init__(self, launch: Launch, commands: Path):
        self.launch, self.commands = launch, commands
        self.jobs: list[subprocess.Popen] = []
        self.command("srun", SRUN)
        self.command("scontrol", SCONTROL)

    def command(self, name: str, text: str) -> None:
        path = self.commands / name
        path.write_text(text)
        path.chmod(0o755)

    @property
    def asked(self) -> list[str]:
        path = self.commands / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def submit(self, *arguments) -> subprocess.Popen:
        """`sbatch ibq.sbatch ARGUMENTS`, not waited for."""
        job = self.launch.start(
            *("bash", SCRIPT, *arguments),
            PATH=f"{self.commands}:{Path(sys.executable).parent}:/usr/bin:/bin",
            SLURM_JOB_ID=str(JOB),
            SLURM_JOB_NODELIST="localhost,localhost",
            SLURM_NNODES="2",
        )
        self.jobs.append(job)
        return job

    def run(self, *arguments) -> Ended:
        return self.launch.finish(self.submit(*arguments))

    @staticmethod
    def step_processes(job: subprocess.Popen) -> list[psutil.Process]:
        """All that `srun` started: the processes of the job's step."""
        (srun,) = (p for p in psutil.Process(job.pid).children() if str(p.cmdline()[1:2]).count("srun"))
        return srun.children(recursive=True)


@pytest.fixture
def cluster(launch, tmp_path) -> Iterator[Cluster]:
    commands = tmp_path / "bin"
    commands.mkdir()
    cluster = Cluster(launch, commands)
    yield cluster
    for job in cluster.jobs:
        if job.poll() is None:
            for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
                process.kill()
            job.communicate()


def step_said(run: Path) -> int:
    """The newest step in a run's metrics."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


@pytest.mark.full
def test_a_job_stopped_by_its_time_limit_goes_on_when_queued_again(cluster, launch, ranks, tmp_path):
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    recipe = "debug", *settings({"trainer.max_steps": 30, "trainer.checkpoint_every_steps": 100})
    job = cluster.submit(*recipe, f"run={run}")
    wait_for(lambda: step_said(run) >= 3, "third step", PATIENCE_SECONDS, job)
    # What `#SBATCH --signal=TERM@300` does: every process of the step, agents and trainers alike, not the script.
    for process in cluster.step_processes(job):
        process.terminate()
    stopped = launch.finish(job)
    assert stopped.status == 75, stopped.err
    assert stopped.err.count("stopped by SIGTERM") == 1
    assert cluster.asked == [f"requeue {JOB}"]
    saved = int((run / "checkpoints/latest").read_text().removeprefix("step_"))
    assert 3 <= saved < 30

    second = cluster.run(*recipe, f"run={run}").succeeded()
    assert f"steps {saved + 1} to 30" in second.err
    ranks.start(2, *recipe, f"run={unbroken}").wait().succeeded()
    assert read_metrics(run) == read_metrics(unbroken)

    with unchanged(run):
        third = cluster.run(*recipe, f"run={run}").succeeded()
        assert third.err.count("nothing is left to do") == 1
    assert cluster.asked == [f"requeue {JOB}"]


@pytest.mark.parametrize("status", [0, 1, 2, 75, 137])
def test_only_a_job_that_saved_something_is_queued_again(cluster, tmp_path, status):
    """Neither one that failed nor one that is stopped before its first checkpoint, which would go round for ever."""
    cluster.command("srun", f"#!/bin/bash\nexit {status}\n")
    finished = cluster.run("debug", f"run={tmp_path}")
    assert finished.status == (1 if status == 75 else status)
    assert cluster.asked == []
    assert ("before any checkpoint" in finished.err) == (status == 75)

    if status == 75:
        (tmp_path / "checkpoints").mkdir()
        cluster.command("srun", f"#!/bin/bash\necho step_00000007 > {tmp_path}/checkpoints/latest; exit 75\n")
        assert cluster.run("debug", f"run={tmp_path}").status == 75
        assert cluster.asked == [f"requeue {JOB}"]
        # No step further than the time before.
        assert cluster.run("debug", f"run={tmp_path}").status == 1
        assert cluster.asked == [f"requeue {JOB}"]


def test_a_cancelled_job_stays_cancelled(cluster, tmp_path):
    """`scancel` sends SIGTERM to the script too."""
    (tmp_path / "checkpoints").mkdir()
    saves = f"trap 'echo step_00000007 > {tmp_path}/checkpoints/latest; exit 75' TERM"
    cluster.command("srun", f"#!/bin/bash\n{saves}\ntouch {tmp_path}/began\nwhile true; do sleep 0.05; done\n")
    job = cluster.submit("debug", f"run={tmp_path}")
    wait_for((tmp_path / "began").exists, "job's step", PATIENCE_SECONDS, job)
    srun = psutil.Process(job.pid).children()
    for process in [psutil.Process(job.pid), *srun]:
        process.terminate()
    job.communicate(timeout=PATIENCE_SECONDS)
    assert job.returncode == -signal.SIGTERM
    psutil.wait_procs(srun, timeout=10)
    assert (tmp_path / "checkpoints/latest").exists()
    assert cluster.asked == []


def test_a_run_without_a_folder_is_refused(cluster):
    finished = cluster.run("debug", "trainer.max_steps=2")
    assert finished.status == 2
    assert finished.err.count("\n") == 1 and "run=FOLDER is missing" in finished.err


@pytest.mark.process
def test_what_slurm_reads_of_the_script():
    """bash takes it, and SLURM, which reads #SBATCH up to the first command, finds all options there."""
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    lines = SCRIPT.read_text().splitlines()
    command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.split(maxsplit=1)[1] for line in lines[:command] if line.startswith("#SBATCH")]
    assert not any(line.startswith("#SBATCH") for line in lines[command:])
    (seconds,) = (int(option.removeprefix("--signal=TERM@")) for option in options if option.startswith("--signal"))
    (shutdown,) = re.findall(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)$", SCRIPT.read_text(), re.MULTILINE)
    assert int(shutdown) < seconds
    assert {"--requeue", "--ntasks-per-node=1", "--open-mode=append"} <= set(options)
