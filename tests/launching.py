"""What tests of whole runs share: the recipe `debug` in real processes of one thread each, by `ibq` or torchrun."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_SECONDS = 300  # DeepSpeed compiles its CPU collectives once on a machine, which alone may take a minute

# Of every run, unless it says otherwise.
SETTINGS = {
    "trainer.device": "cpu",
    "trainer.max_steps": 5,
    "trainer.log_every_steps": 1,
    "trainer.validate_every_steps": 10,
    "trainer.checkpoint_every_steps": 5,
    "trainer.keep_last": 4,
}


def settings(changes: dict | None = None) -> list[str]:
    """SETTINGS with changes, as KEY=VALUE."""
    return [f"{key}={value}" for key, value in {**SETTINGS, **(changes or {})}.items()]


class Finished(NamedTuple):
    """A command that ended: its exit status and what it said."""

    status: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("ibq: error:")]


class Launch:
    """Starts the commands as a user does, in processes of their own."""

    def __init__(self, cache: Path):
        self.environment = {**os.environ, "IBQ_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        self.environment.pop("TRITON_INTERPRET", None)  # tests/conftest.py sets it; a user's process has none

    def ibq(self, *arguments, **environment) -> Finished:
        """`ibq ARGUMENTS`."""
        return self.finish(self.start("tools.cli", *arguments, **environment))

    def torchrun(self, *arguments, processes: int = 2) -> Finished:
        """`torchrun --nproc-per-node PROCESSES -m trainer ARGUMENTS` on a free port."""
        launcher = "torch.distributed.run", "--nproc-per-node", processes, "--standalone", "-m", "trainer"
        return self.finish(self.start(*launcher, *arguments))

    def several(self, runs: list[list[str]], arguments: Path, *, processes: int, timeout_seconds: float) -> Finished:
        """Trains runs, each by its arguments of `python -m trainer`, one after another in the same processes; writes
        `arguments`. What it says: `FOLDER ended with status STATUS` for each."""
        arguments.write_text(json.dumps(runs))
        several = Path(__file__).with_name("integration") / "several.py"
        launcher = "-m", "torch.distributed.run", "--nproc-per-node", processes, "--standalone", several, arguments
        return self.finish(self.start_python(*launcher, PYTHONPATH=str(ROOT)), timeout_seconds)

    def start(self, module: str, *arguments, **environment) -> subprocess.Popen:
        """`python -m MODULE ARGUMENTS`, not waited for."""
        return self.start_python("-m", module, *arguments, **environment)

    def start_python(self, *arguments, **environment) -> subprocess.Popen:
        """`python ARGUMENTS`, not waited for."""
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def finish(process: subprocess.Popen, timeout_seconds: float = TIMEOUT_SECONDS) -> Finished:
        """Waits for what `start` began."""
        try:
            out, err = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # torchrun then ends its processes
            out, err = process.communicate(timeout=60)
            pytest.fail(f"{process.args} took more than {timeout_seconds} s\n{out}\n{err}")
        return Finished(process.returncode, out, err)
