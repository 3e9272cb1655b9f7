"""For all tests: the tiers, and the fixtures that start processes."""

import gc
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator

import pytest

# Before PyTorch is imported. Each of pytest's processes would have a thread per core, and these wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from ranks import Ended, Launch, Ranks

from tools import cli

pytest.register_assert_rewrite("comparing")

# Triton reads this once, where it decorates a kernel: without a GPU its interpreter runs the kernels on the CPU. Set
# here, before any test module imports them.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup and some servers ignore it, and so would every process of a test

# Fixtures that start processes -> the marker of the tests that use them.
MARKERS = {"ranks": "ranks", "launch": "process"}
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec")

_may_start = True
_started: list[str] = []


def _refuse_process(event: str, arguments: tuple) -> None:
    # matplotlib lists the fonts the first time that it draws on a machine.
    if event in STARTS and not _may_start and arguments[:1] != ("fc-list",):
        started = f"{event} {arguments[:2] or ''}"
        _started.append(started)
        raise AssertionError(f"a test without the marker `process` starts a process: {started}")


sys.addaudithook(_refuse_process)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture, marker in MARKERS.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    global _may_start
    # `stop_world` collects reference cycles, which takes 0.3 s if it has to look at everything that is imported.
    if len(gc.get_objects()) > 50_000:
        gc.collect()
        gc.freeze()
    _may_start = any(item.get_closest_marker(marker) for marker in ("ranks", "process"))


@pytest.fixture(autouse=True)
def no_process() -> Iterator[list[str]]:
    """Fails a test that starts a process, or tries to in another thread, unless it is marked `process` or `ranks`."""
    _started.clear()
    yield _started
    assert not _started, f"mark this test `process`, or use the fixture `ranks`: it started {_started}"


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> Iterator[Ranks]:
    """Warm ranks: see ranks.py."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", uuid.uuid4().hex)
    ranks = Ranks(tmp_path_factory.mktemp("ranks"), session)
    yield ranks
    ranks.end()


@pytest.fixture(scope="session")
def launch(tmp_path_factory) -> Launch:
    """Real command lines: see ranks.py."""
    return Launch(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def ibq(capfd) -> Callable[..., Ended]:
    """`ibq(*arguments)`: `ibq ARGUMENTS` in this process."""

    def run(*arguments) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            cli.main([*map(str, arguments)])
        out, err = capfd.readouterr()
        return Ended([exited.value.code or 0], [out], [err])

    return run


@pytest.fixture
def refused_by_ibq(ibq) -> Callable[..., str]:
    """`refused_by_ibq(*arguments)`: the one line with which `ibq ARGUMENTS` refuses a mistake, with status 2."""

    def run(*arguments) -> str:
        (status,), (out,), (err,) = ibq(*arguments)
        assert (status, out) == (2, ""), err
        assert err.startswith("ibq: error: ") and err.count("\n") == 1, err
        return err

    return run
