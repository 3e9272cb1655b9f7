"""Runs training in other processes: warm ranks, which are forked off a server that has imported everything, and real
command lines.

The fixture ``ranks`` (`Ranks`) is the usual way: a job of 1, 2, 4, ... ranks starts in a fraction of a second, because
PyTorch and DeepSpeed are already imported. Each rank is a process, so that kill -9, hangs and exit statuses are real.
The fixture ``launch`` (`Launch`) is for tests whose claim is the process itself: it starts `ibq` or torchrun as a user
does, which takes seconds.

``python ranks.py SOCKET`` is the server. All pytest processes of a session share it. It ends when the last of them
closes its connection, and a job ends with the connection that ordered it, so that nothing survives a killed pytest.
``python ranks.py`` only compiles DeepSpeed's extension modules, which takes a minute on a new machine.
"""

import atexit
import ctypes
import fcntl
import gc
import importlib
import importlib.util
import os
import pickle
import pkgutil
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import NamedTuple, NoReturn

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
INJECT = TESTS / "faults/inject.py"
TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"
JOB_SECONDS = 300.0
PROCESS_SECONDS = 300.0
SERVER_SECONDS = 300.0  # compiling DeepSpeed's CPU collectives, once per machine, takes a minute

# Settings of every run, unless a test changes them.
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


def wait_for(condition: Callable[[], bool], what: str, seconds: float, process: subprocess.Popen | None = None) -> None:
    """Waits until the condition is true. process: one that must not end before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process and process.poll() is not None and not condition():
            raise AssertionError(f"{process.args} ended while waiting for {what}:\n{process.communicate()[1]}")
        if time.monotonic() > deadline:
            raise AssertionError(f"no {what} in {seconds:g} s")
        time.sleep(0.01)


class Ended(NamedTuple):
    """What the ranks of a job ended with: exit statuses (negative for a signal), stdout and stderr of each."""

    statuses: list[int]
    outs: list[str]
    errs: list[str]

    @property
    def status(self) -> int:
        """The first rank's status that is not 0, or 0."""
        return next(filter(None, self.statuses), 0)

    @property
    def out(self) -> str:
        return "".join(self.outs)

    @property
    def err(self) -> str:
        return "".join(self.errs)

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("ibq: error:")]

    def succeeded(self) -> "Ended":
        """Itself; fails the test unless every status is 0."""
        assert self.status == 0, self.err
        return self


class Job:
    """Ranks that are running."""

    def __init__(self, server: Connection, folder: Path, what: str, timeout_seconds: float):
        self.server, self.folder, self.what = server, folder, what
        self.deadline = time.monotonic() + timeout_seconds
        self.pids: list[int] = server.recv()
        self._statuses: dict[int, int] = {}

    def signal(self, rank: int, number: int) -> None:
        """Sends a signal to one rank's process alone."""
        if not self.has_ended(rank):
            os.kill(self.pids[rank], number)

    def has_ended(self, rank: int) -> bool:
        while rank not in self._statuses and self.server.poll(0):
            self._receive()
        return rank in self._statuses

    def out(self, rank: int) -> str:
        return (self.folder / f"out_{rank}").read_text()

    def err(self, rank: int) -> str:
        return (self.folder / f"err_{rank}").read_text()

    def wait(self) -> Ended:
        """Waits for all ranks. At the job's timeout it kills them and fails the test with what they wrote."""
        while len(self._statuses) < len(self.pids):
            if not self.server.poll(max(self.deadline - time.monotonic(), 0)):
                self.end()
                said = "\n".join(f"rank {rank}:\n{self.out(rank)}{self.err(rank)}" for rank in range(len(self.pids)))
                raise AssertionError(f"timeout of {self.what}; ended before: {self._statuses}\n{said}")
            self._receive()
        self.end()
        ranks = range(len(self.pids))
        return Ended([self._statuses[r] for r in ranks], [self.out(r) for r in ranks], [self.err(r) for r in ranks])

    def end(self) -> None:
        """Kills what is still running."""
        self.server.close()

    def _receive(self) -> None:
        rank, status = self.server.recv()
        self._statuses[rank] = status


class Ranks:
    """Orders jobs from the server, which it starts if no other process of this test session has."""

    def __init__(self, folder: Path, session: str):
        self.folder, self.numbers = folder, count()
        self.jobs: list[Job] = []
        self.last_pids: list[int] = []
        self.place = Path(tempfile.gettempdir()) / f"ibq-ranks-{session}"
        self.environment = _environment(folder / "cache")
        self._lease: Connection | None = None

    def train(self, processes: int, recipe: str, run: Path, changes: dict | None = None, **options) -> Ended:
        """`torchrun --nproc-per-node PROCESSES -m trainer RECIPE run=RUN ...` with SETTINGS and changes."""
        return self.start(processes, recipe, f"run={run}", *settings(changes), **options).wait()

    def resume(self, processes: int, source: Path, *overrides: str, **options) -> Ended:
        """`torchrun --nproc-per-node PROCESSES -m trainer --resume SOURCE OVERRIDES`."""
        return self.start(processes, "--resume", source, *overrides, **options).wait()

    def start(self, processes: int, *arguments, fault: dict | None = None, **options) -> Job:
        """`torchrun --nproc-per-node PROCESSES -m trainer ARGUMENTS`, not waited for; one process runs without
        torchrun. fault: one of faults/inject.py."""
        arguments = [*map(str, arguments)]
        if fault:
            return self._order(processes, ("faults.inject", INJECT, "run"), (fault, arguments), **options)
        return self._order(processes, ("trainer.__main__", None, "main"), (arguments,), **options)

    def ibq(self, *arguments, **options) -> Ended:
        """`ibq ARGUMENTS`."""
        return self._order(1, ("tools.cli", None, "main"), ([*map(str, arguments)],), **options).wait()

    def command(self, processes: int, function: Callable, *arguments, **options) -> Ended:
        """Calls a function of a test module or test helper as a command: its result is the exit status."""
        return self.start_command(processes, function, *arguments, **options).wait()

    def start_command(self, processes: int, function: Callable, *arguments, **options) -> Job:
        """`command`, not waited for."""
        return self._order(processes, _target(function), arguments, **options)

    def call(self, processes: int, function: Callable, *arguments, join: bool = True, **options) -> list:
        """Calls a function of a test module or test helper on each rank; returns each rank's result. join: whether the
        ranks join a gloo process group first. Arguments and results are pickled."""
        job = self._order(processes, _target(function), arguments, returns=True, join=join, **options)
        ended = job.wait()
        if any(ended.statuses):
            raise AssertionError(f"{job.what} ended with {ended.statuses}\n{ended.out}{ended.err}")
        return [pickle.loads((job.folder / f"result_{rank}").read_bytes()) for rank in range(processes)]

    def end(self) -> None:
        """Kills the jobs that a failed test left, and leaves the server."""
        for job in self.jobs:
            job.end()
        if self._lease:
            self._lease.close()

    def _order(
        self,
        processes: int,
        target: tuple[str, str | Path | None, str],
        arguments: tuple,
        *,
        returns: bool = False,
        join: bool = False,
        cwd: Path = ROOT,
        environment: dict[str, str] | None = None,
        timeout_seconds: float = JOB_SECONDS,
    ) -> Job:
        self._lease = self._lease or self._connect()
        folder = self.folder / f"{next(self.numbers):04d}"
        folder.mkdir()
        environment = self.environment | (environment or {})
        server = Client(str(self.place / "socket"))
        server.send(Order(processes, target, pickle.dumps(arguments), returns, join, folder, cwd, environment))
        job = Job(server, folder, f"{target[-1]}{arguments} on {processes} ranks", timeout_seconds)
        self.jobs = [other for other in self.jobs if not other.server.closed] + [job]
        self.last_pids = job.pids
        return job

    def _connect(self) -> Connection:
        """Connects to the session's server; the first one to do so starts it."""
        self.place.mkdir(exist_ok=True)
        with (self.place / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            address, log = self.place / "socket", self.place / "log"
            try:
                return Client(str(address))
            except (FileNotFoundError, ConnectionRefusedError):
                address.unlink(missing_ok=True)
            with log.open("w") as output:
                server = subprocess.Popen(
                    [sys.executable, __file__, str(address)],
                    cwd=ROOT,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            deadline = time.monotonic() + SERVER_SECONDS
            while not address.exists():
                if server.poll() is not None or time.monotonic() > deadline:
                    server.kill()
                    raise AssertionError(f"the server of warm ranks did not start:\n{log.read_text()}")
                time.sleep(0.02)
            server.returncode = 0  # it outlives this object, about which subprocess would warn
            return Client(str(address))


class Launch:
    """Starts command lines as a user does."""

    def __init__(self, cache: Path):
        self.environment = _environment(cache)

    def python(self, *arguments) -> Ended:
        """`python ARGUMENTS`."""
        return self.finish(self.start(sys.executable, *arguments))

    def start(self, *command, **environment) -> subprocess.Popen:
        """A command with further variables of its environment, not waited for."""
        return subprocess.Popen(
            [*map(str, command)],
            cwd=ROOT,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def finish(process: subprocess.Popen, timeout_seconds: float = PROCESS_SECONDS) -> Ended:
        """Waits for a started command."""
        try:
            out, err = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # torchrun then ends its processes
            out, err = process.communicate(timeout=60)
            raise AssertionError(f"{process.args} took more than {timeout_seconds} s\n{out}\n{err}") from None
        return Ended([process.returncode], [out], [err])


def _target(function: Callable) -> tuple[str, str, str]:
    return function.__module__, sys.modules[function.__module__].__file__, function.__name__


def _environment(cache: Path) -> dict[str, str]:
    environment = {**os.environ, "IBQ_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # tests/conftest.py sets it; a user's process has none
    # DeepSpeed looks for ninja on PATH, and pip puts it next to python.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return environment


# ------------------------------------------------------------------ the server


class Order(NamedTuple):
    """A job: a function (module, its file where it cannot be imported by name, name) and its pickled arguments.

    returns: whether to hand back the function's result; otherwise the result is the exit status. join: whether to join
    a process group first.
    """

    processes: int
    target: tuple[str, str | Path | None, str]
    arguments: bytes
    returns: bool
    join: bool
    folder: Path
    cwd: Path
    environment: dict[str, str]


class Child(NamedTuple):
    """A rank of a job that runs."""

    pid: int
    rank: int
    client: Connection


def import_everything() -> None:
    """Imports the modules that jobs use, and the extension modules that DeepSpeed compiles."""
    sys.path[:0] = [str(ROOT), str(TESTS)]
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses when it is imported
    os.environ["TRITON_INTERPRET"] = "1"  # Triton decorates its own library when it is imported
    for package in ("data", "model_zoo", "trainer", "tools"):
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            # Triton looks at a job's TRITON_INTERPRET when it decorates a kernel.
            if not module.name.endswith("__main__") and "triton" not in module.name:
                importlib.import_module(module.name)
    for module in (
        "pytest", "comparing", "tokens", "torch.testing", "torch.utils.tensorboard", "skimage",
        # Training imports these where it first uses them.
        "torchvision", "rich.console", "rich.progress", "rich.table", "rich._emoji_codes",
        # DeepSpeed imports these with its first engine, the last three for a decorator of torch.compile.
        "deepspeed.module_inject", "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.runtime.zero.muon.muon_optimizer", "torch._inductor.lowering",
        "deepspeed.runtime.superoffload.superoffload_stage3", "deepspeed.ops.op_builder.all_ops",
    ):  # fmt: skip
        importlib.import_module(module)
    Image.init()
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder.is_compatible(verbose=False):
        builder.load(verbose=False)


def serve(address: str) -> None:
    """Carries out orders until every client has gone."""
    import_everything()
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a fork of {threads} threads could deadlock"
    gc.freeze()  # collections in ranks would copy the pages of all that is imported
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)
    clients: list[Connection] = []
    children: dict[int, Child] = {}  # by a file descriptor that becomes readable when the rank ends
    began = time.monotonic()
    while clients or time.monotonic() < began + 60:
        for ready in wait([listener, *clients, *children], timeout=60):
            if ready is listener:
                clients.append(Connection(listener.accept()[0].detach()))
            elif ready in children:
                child = children.pop(ready)
                os.close(ready)
                status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
                if child.client in clients:
                    with suppress(OSError):  # the client may just have gone
                        child.client.send((child.rank, status))
            else:
                try:
                    order = ready.recv()
                except (EOFError, ConnectionResetError):
                    clients.remove(ready)
                    for child in children.values():
                        if child.client is ready:
                            os.kill(child.pid, signal.SIGKILL)
                            with suppress(ProcessLookupError):  # it may not lead its group yet
                                os.killpg(child.pid, signal.SIGKILL)
                    ready.close()
                    began = 0.0
                    continue
                port = _free_port()
                pids = []
                for rank in range(order.processes):
                    pid = os.fork()
                    if pid == 0:
                        for file in (listener, *clients):
                            file.close()
                        _exit(_run_rank(order, rank, port))
                    pids.append(pid)
                    children[os.pidfd_open(pid)] = Child(pid, rank, ready)
                with suppress(OSError):
                    ready.send(pids)
    shutil.rmtree(Path(address).parent, ignore_errors=True)


def _run_rank(order: Order, rank: int, port: int) -> int:
    """Becomes the rank and carries out its part; returns the exit status."""
    os.setsid()  # so that it can be killed with its loader's workers
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the server
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(order.folder / f"{name}_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(order.cwd)
    os.environ.clear()
    os.environ.update(order.environment)
    if order.processes > 1 or order.join:
        os.environ |= {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            **{"WORLD_SIZE": str(order.processes), "LOCAL_WORLD_SIZE": str(order.processes)},
        }
    module, file, name = order.target
    try:
        function = getattr(_load(module, file), name)
        arguments = pickle.loads(order.arguments)
        if not order.returns:
            return function(*arguments) or 0
        from trainer.parallel import start_world, stop_world

        if order.join:
            start_world("cpu", timeout_seconds=JOB_SECONDS)
        result = function(*arguments)
        stop_world()
        (order.folder / f"result_{rank}").write_bytes(pickle.dumps(result))
    except SystemExit as exited:
        return exited.code or 0
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _exit(status: int) -> NoReturn:
    """What the interpreter does at its end, without the slow destruction of all modules."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _load(name: str, file: str | Path | None):
    """A module; pytest's own names of test modules, which no import finds, are loaded from their files."""
    if name in sys.modules or file is None:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_ports = count(os.getpid() % 10_000)


def _free_port() -> int:
    """Below the ports that the system gives to outgoing connections, so that none takes it in between."""
    while True:
        port = 20_000 + next(_ports) % 12_000
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.modules["ranks"] = sys.modules["__main__"]  # clients pickle orders under this name
        serve(sys.argv[1])
        _exit(0)
    else:
        import_everything()
