"""Real processes with one thread each, by `ibq` or by torchrun; a run that several tests look at is made once."""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from launching import Finished, Launch, settings


class Run(NamedTuple):
    """A whole configuration by name: the recipe `debug` in so many processes with these changes."""

    processes: int
    changes: dict[str, str | int | float]


RUNS = {
    # The truth, with the checkpoints of steps 5, 10, 15 and 20.
    "one": Run(1, {"trainer.max_steps": 20}),
    "one, accumulating": Run(1, {"trainer.micro_batch_size": 2}),
    "stopped": Run(1, {"trainer.max_steps": 10, "trainer.checkpoint_every_steps": 10}),
    "zero1": Run(2, {"engine.kind": "deepspeed", "engine.config": "zero1", "trainer.max_steps": 8}),
    "vq": Run(1, {"model.quantizer": "vq"}),
    "compiled": Run(1, {"trainer.max_steps": 2, "trainer.compile": "true"}),
}


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
