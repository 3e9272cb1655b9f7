"""Two nodes, which are network namespaces of this machine joined by a cable: they train as one, by torchrun and by the
deepspeed launcher; what is killed is started again, and one goes on when the other is lost."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from comparing import differences, loss_lines
from ranks import ROOT, Ended, Launch, settings

SEED = 8  # with this one the losses of one process and of two stay within 1e-5 of one another for 20 steps
PORT = 29400  # of the first node, which is nobody else's machine
DEVICE = "eth0"  # each node's end of the cable
PATIENCE_SECONDS = 120
TOLERANCE = 1e-5


class Nodes:
    """Two network namespaces with a cable between them, and processes in them."""

    def __init__(self, launch: Launch):
        self.launch = launch
        self.names = [f"ibq{os.getpid()}-{node}" for node in (0, 1)]
        self.addresses = ["10.213.77.1", "10.213.77.2"]
        self.started: list[subprocess.Popen] = []

    def plug_in(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
        first, second = (("name", DEVICE, "netns", name) for name in self.names)
        _ip("link", "add", *first, "type", "veth", "peer", *second)
        for name, address in zip(self.names, self.addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _ip("-n", name, "link", "set", device, "up")

    def start(self, node: int, *command, **environment) -> subprocess.Popen:
        """A command on a node, not waited for."""
        on_node = "ip", "netns", "exec", self.names[node]
        process = self.launch.start(*on_node, *command, GLOO_SOCKET_IFNAME=DEVICE, **environment)
        self.started.append(process)
        return process

    def torchrun(self, node: int, nodes: str, conf: str, *arguments) -> subprocess.Popen:
        """The agent of a node; its processes meet those of the other at the first node."""
        return self.start(
            node,
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", 1),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.addresses[0]}:{PORT}"),
            *("--rdzv-conf", f"is_host={int(node == 0)},{conf}", "--local-addr", self.addresses[node]),
            *arguments,
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )

    def kill_trainer(self, node: int) -> None:
        """The process that trains there, but not its agent."""
        pids = map(int, _ip("netns", "pids", self.names[node]).split())
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in pids}
        (pid,) = (p for p, command in commands.items() if "-m\0trainer" in command and ".run\0" not in command)
        os.kill(pid, signal.SIGKILL)

    def lose(self, node: int) -> None:
        """As a power failure does: nothing says goodbye, neither a process nor a connection."""
        _ip("-n", self.names[node], "link", "set", DEVICE, "down")
        self._kill(node)

    def unplug(self) -> None:
        for node, name in enumerate(self.names):
            if name in _ip("netns", "list").split():
                self._kill(node)
                _ip("netns", "delete", name)  # its end of the cable goes with it, and so the cable
        for process in self.started:
            process.communicate(timeout=PATIENCE_SECONDS)

    def _kill(self, node: int) -> None:
        while pids := _ip("netns", "pids", self.names[node]).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)


def _ip(*arguments) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def nodes(launch) -> Iterator[Nodes]:
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the command `ip` of iproute2")
    nodes = Nodes(launch)
    try:
        try:
            nodes.plug_in()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield nodes
    finally:
        nodes.unplug()


@pytest.fixture(scope="module")
def one_node(ranks, tmp_path_factory) -> Path:
    """The run of two processes on one node."""
    run = tmp_path_factory.mktemp("one_node") / "run"
    ranks.train(2, "debug", run, {"seed": SEED}).succeeded()
    return run


def losses(line: dict) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith("loss/")}


def assert_weights_equal(expected: Path, actual: Path, step: int) -> None:
    found = differences(*(run / f"checkpoints/step_{step:08d}" for run in (expected, actual)))
    for model in ("tokenizer", "tokenizer_ema", "discriminator"):
        assert found[model].whole < TOLERANCE, model


def assert_losses_equal(expected: Path, actual: Path) -> None:
    for line, true_line in zip(loss_lines(actual), loss_lines(expected), strict=True):
        assert line["step"] == true_line["step"]
        assert losses(line) == pytest.approx(losses(true_line), rel=TOLERANCE)


def finish_all(launch: Launch, processes: list[subprocess.Popen]) -> list[Ended]:
    finished = [launch.finish(process) for process in processes]
    for one in finished:
        assert one.status == 0, "\n".join(each.err for each in finished)
    return finished


def test_two_nodes_by_torchrun_are_one_node_with_two_processes(launch, nodes, one_node, tmp_path):
    run = tmp_path / "run"
    command = "-m", "trainer", "debug", f"run={run}", *settings({"seed": SEED})
    first, _ = finish_all(launch, [nodes.torchrun(node, "2", "join_timeout=60", *command) for node in (0, 1)])
    assert "2 x cpu" in first.err
    assert loss_lines(run) == loss_lines(one_node)
    checkpoints = [of_run / "checkpoints/step_00000005" for of_run in (one_node, run)]
    for rank in (0, 1):
        expected, actual = ((folder / f"rank_{rank:05d}.safetensors").read_bytes() for folder in checkpoints)
        assert actual == expected


@pytest.fixture
def deepspeed(tmp_path) -> list[str]:
    """The command with a hostfile of both nodes."""
    hosts = tmp_path / "hosts"
    hosts.write_text("node-0 slots=1\nnode-1 slots=1\n")
    return [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(hosts), "--master_port", str(PORT)]


ZERO2 = {"seed": SEED, "engine.kind": "deepspeed", "engine.config": "zero2"}


@pytest.mark.full
def test_two_nodes_by_deepspeed_started_on_each(launch, nodes, deepspeed, one_node, tmp_path):
    run = tmp_path / "run"
    command = [*deepspeed, "--no_ssh", "--master_addr", nodes.addresses[0], "--node_rank"]
    training = "--module", "trainer", "debug", f"run={run}", *settings(ZERO2)
    first, _ = finish_all(launch, [nodes.start(node, *command, node, *training) for node in (0, 1)])
    assert "2 x cpu (deepspeed zero2" in first.err
    assert_losses_equal(one_node, run)
    assert_weights_equal(one_node, run, 5)


# Where ssh leads: to the node of that name, into an environment that knows nothing of the caller's.
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do shift 2; done
node=$1; shift
exec ip netns exec "{name}-${{node#node-}}" env -i HOME="$HOME" PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin bash -c "$*"
"""
# The command on every host of -w at once, %n replaced by the host's number; it fails where one of them does.
PDSH = """#!/bin/bash
while [[ $1 == -* ]]; do
  case $1 in -S) shift;; -w) hosts=${2//,/ }; shift 2;; *) shift 2;; esac
done
number=0
for host in $hosts; do
  ssh "$host" "${*//%n/$number}" & started+=($!)
  number=$((number + 1))
done
status=0
for pid in "${started[@]}"; do wait "$pid" || status=$?; done
exit $status
"""


@pytest.mark.full
def test_two_nodes_by_deepspeed_over_ssh(launch, nodes, deepspeed, one_node, tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"ssh": SSH.format(name=nodes.names[0].rpartition("-")[0]), "pdsh": PDSH}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    # The launcher passes on what this file holds; nothing else of the environment reaches the nodes.
    environment = tmp_path / "deepspeed_env"
    passed_on = {name: launch.environment[name] for name in ("IBQ_CACHE", "OMP_NUM_THREADS")}
    passed_on |= {"GLOO_SOCKET_IFNAME": DEVICE, "PATH": launch.environment["PATH"]}
    environment.write_text("".join(f"{name}={value}\n" for name, value in passed_on.items()))
    run = tmp_path / "run"
    command = *deepspeed, "--master_addr", nodes.addresses[0], "--module", "trainer", "debug", f"run={run}"
    path = f"{commands}:{launch.environment['PATH']}"
    process = launch.start(*command, *settings(ZERO2), PATH=path, DS_ENV_FILE=str(environment))
    (finished,) = finish_all(launch, [process])
    assert "2 x cpu (deepspeed zero2" in finished.err
    assert_losses_equal(one_node, run)
    assert_weights_equal(one_node, run, 5)


def wait_for_checkpoint(run: Path, process: subprocess.Popen, after: int = 0) -> int:
    """The newest checkpoint's step, as soon as there is one beyond step ``after``."""
    latest, step = run / "checkpoints/latest", after
    deadline = time.monotonic() + PATIENCE_SECONDS
    while step <= after and process.poll() is None and time.monotonic() < deadline:
        step = int(latest.read_text().removeprefix("step_")) if latest.exists() else 0
        time.sleep(0.01)
    return step


@pytest.mark.full
def test_a_killed_process_is_started_again_and_the_node_that_is_left_finishes_alone(launch, ranks, nodes, tmp_path):
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    changes = {
        "seed": SEED,
        "trainer.max_steps": 16,
        "trainer.checkpoint_every_steps": 3,
        "trainer.validate_every_steps": 16,
        "trainer.timeout_seconds": 10,
    }
    conf = "last_call_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=3"
    command = "--max-restarts", 3, "-m", "trainer", "debug", *settings(changes), f"run={run}"
    _, first = (nodes.torchrun(node, "1:2", conf, *command) for node in (1, 0))
    saved = [wait_for_checkpoint(run, first)]
    nodes.kill_trainer(1)
    saved.append(wait_for_checkpoint(run, first, after=saved[0]))
    nodes.lose(1)

    # The time until the first node notices is enough for the run to compare with.
    ranks.train(1, "debug", unbroken, changes).succeeded()
    (finished,) = finish_all(launch, [first])
    # Both nodes, both again, the first one alone; each time from the newest checkpoint, which a kill may have let pass.
    starts = [tuple(map(int, found)) for found in re.findall(r"(\d) x cpu .* steps (\d+) to 16", finished.err)]
    assert [processes for processes, _ in starts] == [2, 2, 1], finished.err
    assert starts[0][1] == 1
    for (_, step), at_least in zip(starts[1:], saved, strict=True):
        assert step > at_least and step % 3 == 1
    assert "made no progress for 10 s" in finished.err  # nobody told it that the other node is gone

    assert [line["step"] for line in loss_lines(run)] == list(range(1, 17))
    assert_losses_equal(unbroken, run)
    assert_weights_equal(unbroken, run, 16)


def test_restarts_that_would_be_in_vain_are_refused(ranks):
    """What torchrun says to a process of two nodes' by default."""
    environment = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "GROUP_WORLD_SIZE": "2",
        **{"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    }
    finished = ranks.start(1, "debug", "run=never", *settings(), environment=environment).wait()
    assert finished.status == 2 and not (ROOT / "never").exists()
    assert finished.err.count("\n") == 1 and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in finished.err
