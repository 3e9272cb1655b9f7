"""`ibq bench` in this process."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from ranks import Ended

from data import tar_reader
from tools.bench import common
from tools.bench.measure import failure


@pytest.fixture
def bench(ibq) -> Callable[..., Ended]:
    """`bench(*arguments)`: `ibq bench ARGUMENTS`."""
    return partial(ibq, "bench")


@pytest.fixture
def jobs_here(monkeypatch) -> Iterator[None]:
    """Jobs run in this process instead of fresh ones."""
    threads = torch.get_num_threads()

    def run_job(module: str, job: str, **arguments) -> dict:
        tar_reader._scan.cache_clear()
        try:
            return getattr(import_module(f"tools.bench.{module}"), job)(**arguments)._asdict()
        except Exception as error:
            return {"failed": failure(error)}

    monkeypatch.setattr(common, "run_job", run_job)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def answers(monkeypatch) -> Callable[..., list[tuple[str, dict]]]:
    """`answers(function)`: jobs are answered by `function(job, arguments)`, or by a machine with this device, and
    appended to the returned list."""

    def use(function: Callable[[str, dict], dict], device: str = "cpu") -> list[tuple[str, dict]]:
        asked = []

        def run_job(module: str, job: str, **arguments) -> dict:
            asked.append((f"{module}.{job}", arguments))
            if job == "machine":
                return dict(device=device, name="one", threads=2, torch="0", python="0")
            return function(job, arguments)

        monkeypatch.setattr(common, "run_job", run_job)
        return asked

    return use


@pytest.fixture
def checkout(tmp_path) -> Callable[[Path, str], Path]:
    """`checkout(file, text)`: a folder like a checkout of the reference, with one file."""

    def make(file: Path, text: str) -> Path:
        path = tmp_path / "published" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return tmp_path / "published"

    return make
