"""Real processes with one thread each, by `ibq` or by torchrun; a run that several tests look at is made once."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file
from torch import Tensor

from model_zoo.tokenizer import CODEBOOK, codebook_rows, codebook_rows_files

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 300  # DeepSpeed compiles its CPU collectives once on a machine, which alone may take a minute
WEIGHT_FILES = ("tokenizer", "tokenizer_ema", "discriminator", "lecam")

# Of every run here, unless it says otherwise.
SETTINGS = {
    "trainer.device": "cpu",
    "trainer.max_steps": 5,
    "trainer.log_every_steps": 1,
    "trainer.validate_every_steps": 10,
    "trainer.checkpoint_every_steps": 5,
    "trainer.keep_last": 4,
}


class Run(NamedTuple):
    """A whole configuration by name: the recipe `debug` in so many processes with these changes."""

    processes: int
    changes: dict[str, str | int | float]


def deepspeed(config: str, changes: dict | None = None, processes: int = 2) -> Run:
    return Run(processes, {"engine.kind": "deepspeed", "engine.config": config, **(changes or {})})


RUNS = {
    # The truth, with the checkpoints of steps 5, 10, 15 and 20.
    "one": Run(1, {"trainer.max_steps": 20}),
    "one, accumulating": Run(1, {"trainer.micro_batch_size": 2}),
    "replicated": Run(2, {}),
    "zero0": deepspeed("zero0"),
    "zero0, accumulating": deepspeed("zero0", {"trainer.micro_batch_size": 2}),
    "zero1": deepspeed("zero1", {"trainer.max_steps": 8}),
    "zero1, one process": deepspeed("zero1", processes=1),
    "zero2": deepspeed("zero2"),
    "zero2, accumulating": deepspeed("zero2", {"trainer.micro_batch_size": 2}),
    # The weights that all of them start from.
    "adaptive": Run(1, {"loss.generator.adaptive": "true"}),
    "zero2, adaptive": deepspeed("zero2", {"loss.generator.adaptive": "true"}),
    "start": Run(1, {"trainer.max_steps": 1, "optimizer.lr": 0}),
    "stopped": Run(1, {"trainer.max_steps": 10, "trainer.checkpoint_every_steps": 10}),
    "vq": Run(1, {"model.quantizer": "vq"}),
    "vq, shards": Run(2, {"model.quantizer": "vq", "codebook_parallel": 2}),
    "shards": Run(2, {"codebook_parallel": 2}),
    "shards, replicas, accumulating": Run(4, {"codebook_parallel": 2, "trainer.micro_batch_size": 1}),
    "zero2, shards": deepspeed("zero2", {"codebook_parallel": 2}),
    # Small enough to clip at every step: by the norm of codebook and rest together, whoever holds them.
    "clipped": Run(1, {"trainer.gradient_clip_norm": 0.05}),
    "clipped, shards": Run(2, {"trainer.gradient_clip_norm": 0.05, "codebook_parallel": 2}),
    "clipped, zero0, shards": deepspeed("zero0", {"trainer.gradient_clip_norm": 0.05, "codebook_parallel": 2}),
    "clipped, zero2, shards": deepspeed("zero2", {"trainer.gradient_clip_norm": 0.05, "codebook_parallel": 2}),
    "compiled": Run(1, {"trainer.max_steps": 2, "trainer.compile": "true"}),
}


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
        return self._finish(self.start("tools.cli", *arguments, **environment))

    def torchrun(self, *arguments, processes: int = 2) -> Finished:
        """`torchrun --nproc-per-node PROCESSES -m trainer ARGUMENTS` on a free port."""
        launcher = "torch.distributed.run", "--nproc-per-node", processes, "--standalone", "-m", "trainer"
        return self._finish(self.start(*launcher, *arguments))

    def start(self, module: str, *arguments, **environment) -> subprocess.Popen:
        """`python -m MODULE ARGUMENTS`, not waited for."""
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def _finish(process: subprocess.Popen) -> Finished:
        try:
            out, err = process.communicate(timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # torchrun then ends its processes
            out, err = process.communicate(timeout=60)
            pytest.fail(f"{process.args} took more than {TIMEOUT_SECONDS} s\n{out}\n{err}")
        return Finished(process.returncode, out, err)


class Runs:
    """Trains each of RUNS once, two at a time. ``start`` begins several; ``runs[name]`` waits for one."""

    def __init__(self, launch: Launch, folder: Path):
        self.launch = launch
        self.folder = folder
        self.pool = ThreadPoolExecutor(2)
        self.started: dict[str, Future] = {}

    def start(self, *names: str) -> None:
        for name in names:
            if name not in self.started:
                self.started[name] = self.pool.submit(self._train, name)

    def __getitem__(self, name: str) -> Path:
        """The run's folder."""
        self.start(name)
        finished = self.started[name].result()
        assert finished.status == 0, finished.err
        return self._place(name)

    def _place(self, name: str) -> Path:
        return self.folder / name.replace(", ", "_")

    def _train(self, name: str) -> Finished:
        processes, changes = RUNS[name]
        arguments = "debug", f"run={self._place(name)}", *settings(changes)
        if processes == 1:
            return self.launch.ibq("train", *arguments)
        return self.launch.torchrun(*arguments, processes=processes)


def settings(changes: dict | None = None) -> list[str]:
    """SETTINGS with changes, as KEY=VALUE."""
    return [f"{key}={value}" for key, value in {**SETTINGS, **(changes or {})}.items()]


class Difference(NamedTuple):
    """|a - b| / |a| of two checkpoints' weights: of all tensors of a file together, and of the worst tensor."""

    whole: float
    worst: float


def weights(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """A checkpoint's tensors of that name; the codebook's rows put together from its shards' files."""
    state = load_file(checkpoint / f"{name}.safetensors")
    if name.startswith("tokenizer"):
        assert CODEBOOK not in state  # whose rows are nowhere but in the shards' files
        codes = codebook_rows_files(checkpoint, name)[-1][1]
        state[CODEBOOK] = codebook_rows(checkpoint, name, CODEBOOK, 0, codes, codes)
    return state


def _difference(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> Difference:
    assert actual.keys() == expected.keys()
    differences = {name: float((actual[name].double() - value.double()).norm()) for name, value in expected.items()}
    norms = {name: float(value.double().norm()) for name, value in expected.items()}
    whole = math.hypot(*differences.values()) / math.hypot(*norms.values())
    different = [name for name, difference in differences.items() if difference]
    # A tensor that is zero in one of them alone, as a bias before its first step, is infinitely different.
    worst = max((differences[name] / norms[name] if norms[name] else math.inf for name in different), default=0.0)
    return Difference(whole, worst)


@pytest.fixture(scope="session")
def launch(tmp_path_factory) -> Launch:
    return Launch(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def runs(launch, tmp_path_factory):
    runs = Runs(launch, tmp_path_factory.mktemp("runs"))
    yield runs
    runs.pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def debug_settings() -> Callable[..., list[str]]:
    """`debug_settings(changes)`: the arguments that every run of this folder has, with changes."""
    return settings


@pytest.fixture(scope="session")
def differences() -> Callable[[Path, Path], dict[str, Difference]]:
    """`differences(expected, actual)`: of two checkpoint folders, for each file of weights."""

    def compare(expected: Path, actual: Path) -> dict[str, Difference]:
        return {name: _difference(weights(expected, name), weights(actual, name)) for name in WEIGHT_FILES}

    return compare


@pytest.fixture(scope="session")
def read_metrics() -> Callable[[Path], list[dict]]:
    """`read_metrics(run)`: the lines of metrics.jsonl, without the speed, which is never the same twice."""

    def read(run: Path) -> list[dict]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]

    return read


@pytest.fixture(scope="session")
def fingerprint() -> Callable[[Path], dict[str, str]]:
    """`fingerprint(folder)`: every path under it, hidden ones too, with the hash of a file's content."""

    def take(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in sorted(folder.rglob("*"))
        }

    return take


@pytest.fixture(scope="session")
def assert_refused() -> Callable[..., None]:
    """`assert_refused(finished, *said)`: a mistake of the user ends in one line, exit status 2 and no traceback."""

    def check(finished: Finished, *said: str) -> None:
        assert finished.status == 2, finished.err
        assert finished.err.count("\n") == 1, finished.err
        assert finished.error_lines, finished.err
        for text in said:
            assert text in finished.err

    return check


@pytest.fixture
def ibq_here(launch, monkeypatch, capfd) -> Callable[..., Finished]:
    """`ibq ARGUMENTS` in this process: as good as a process of its own for finding mistakes, and seconds faster."""
    from tools import cli

    for name in ("IBQ_CACHE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, launch.environment[name])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # the trainer sets these two, and here they must not stay
    monkeypatch.setenv("LOCAL_RANK", "0")

    def run(*arguments) -> Finished:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            cli.main([str(argument) for argument in arguments])
        return Finished(exited.value.code or 0, *capfd.readouterr())

    return run
