"""Runs that several tests look at, each trained once on warm ranks."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from ranks import Ended, Ranks, settings


class Run(NamedTuple):
    """The recipe `debug` on so many processes with these changes."""

    processes: int
    changes: dict[str, str | int | float]


RUNS = {
    # The reference, with the checkpoints of steps 5, 10, 15 and 20.
    "one": Run(1, {"trainer.max_steps": 20}),
    "one, accumulating": Run(1, {"trainer.micro_batch_size": 2}),
    "stopped": Run(1, {"trainer.max_steps": 10, "trainer.checkpoint_every_steps": 10}),
    "zero1": Run(2, {"engine.kind": "deepspeed", "engine.config": "zero1", "trainer.max_steps": 8}),
    "vq": Run(1, {"model.quantizer": "vq"}),
    "compiled": Run(1, {"trainer.max_steps": 2, "trainer.compile": "true"}),
}


class Runs:
    """``runs[name]``: the folder of one of RUNS, which is trained when it is first asked for."""

    def __init__(self, ranks: Ranks, folder: Path):
        self.ranks, self.folder = ranks, folder
        self.ended: dict[str, Ended] = {}

    def __getitem__(self, name: str) -> Path:
        run = self.folder / name.replace(", ", "_")
        if name not in self.ended:
            processes, changes = RUNS[name]
            self.ended[name] = self.ranks.train(processes, "debug", run, changes)
        assert self.ended[name].status == 0, self.ended[name].err
        return run


@pytest.fixture(scope="session")
def runs(ranks, tmp_path_factory) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("runs"))


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

    def check(finished: Ended, *said: str) -> None:
        assert finished.status == 2, finished.err
        assert finished.err.count("\n") == 1, finished.err
        assert finished.error_lines, finished.err
        for text in said:
            assert text in finished.err

    return check


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """What commands in this process keep in IBQ_CACHE."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def ibq_here(cache, monkeypatch, capfd) -> Callable[..., Ended]:
    """`ibq ARGUMENTS` in this process."""
    from tools import cli

    monkeypatch.setenv("IBQ_CACHE", str(cache))
    # The trainer sets these two; monkeypatch restores them.
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")

    def run(*arguments) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Ended([exited.value.code or 0], [out], [err])

    return run
