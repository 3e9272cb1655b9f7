"""Injects a fault into a training process at the moment that a test asks for. The trainer itself has no hooks for it:
all patches of its internals are in this file.

``torchrun ... inject.py FAULT ARGUMENTS...`` in place of ``torchrun ... -m trainer ARGUMENTS...``. FAULT is JSON:
``{"kind": "nan", "rank": 1, "step": 3}``, the name of a function here and its arguments.

Warm ranks call `run` (see tests/ranks.py).
"""

import ctypes
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

# Before DeepSpeed is imported, which chooses then.
os.environ["DS_ACCELERATOR"] = "cpu"

import torch.utils.data

import trainer.checkpoint as checkpoint
from trainer.__main__ import main
from trainer.parallel import gather_objects
from trainer.tasks.tokenizer import TokenizerTask
from trainer.watchdog import StopSignal, Watchdog, _end_without_interpreter

RANK = int(os.environ.get("RANK", 0))


def kill_in_save(rank: int, step: int, phase: str) -> None:
    """kill -9 of a rank while the checkpoint of that step is written. A part is the rank's own; what publishes is rank
    0, which kills the other where that one is meant."""
    folder = f"step_{step:08d}"
    pids = []

    def kill() -> None:
        os.kill(pids[rank] if pids else os.getpid(), signal.SIGKILL)
        while rank == RANK:  # it comes at once, but to which thread first?
            time.sleep(1)

    write_part, seal = checkpoint.write_part, checkpoint.Checkpoints._seal

    def killed_write_part(file: Path, shards: list) -> None:
        mine = rank == RANK and file.parent.stem == folder
        if mine and phase == "before the part":
            kill()
        write_part(file, shards)
        if mine and phase == "half of the part":
            os.truncate(file, file.stat().st_size // 2)
            kill()
        if mine and phase == "after the part":
            kill()

    def seal_knowing_pids(checkpoints) -> None:
        if checkpoints.writing.unfinished.stem == folder:
            pids[:] = gather_objects(os.getpid())
        seal(checkpoints)

    def around(name: str, before: str, after: str = "") -> None:
        function = getattr(checkpoint, name)

        def killing(*arguments) -> None:
            if pids and phase == before:
                kill()
            function(*arguments)
            if pids and phase == after:
                kill()

        setattr(checkpoint, name, killing)

    checkpoint.write_part = killed_write_part
    checkpoint.Checkpoints._seal = seal_knowing_pids
    around("_write_manifest", "before the manifest", "after the manifest")
    around("_rename", "before the rename", "after the rename")
    around("_point", "before latest", "after latest")

    if phase == "half of the pruning":

        class Shutil:
            @staticmethod
            def rmtree(path: Path, **options) -> None:
                if pids and path.name < folder:
                    next(path.glob("rank_*")).unlink()
                    kill()
                shutil.rmtree(path, **options)

        checkpoint.shutil = Shutil


def kill_at_step(rank: int, step: int) -> None:
    """kill -9 of a rank in a step."""
    _in_step(rank, step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def kill_worker(rank: int, step: int, number: int = signal.SIGKILL) -> None:
    """A signal ends a rank's data worker in a step. The rank notices sooner than after torch's 5 seconds."""
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2
    _in_step(rank, step, lambda: os.kill(multiprocessing.active_children()[-1].pid, number))


def hang(
    rank: int,
    step: int,
    *,
    holds_lock: bool = False,
    marker: str | None = None,
    timeout_seconds: float | None = None,
    grace_seconds: float = StopSignal.GRACE_SECONDS,
) -> None:
    """A rank hangs in a step. holds_lock: in C code, with the interpreter's lock. marker: a file that appears then.
    timeout_seconds: the watchdogs' from this step on, so that slow steps before it do not count. The waiting rank's
    begins first: it would end in its collective if the hanging rank ended before it."""

    def sleeping_beauty() -> None:
        if marker:
            Path(marker).touch()
        (ctypes.PyDLL(None).sleep if holds_lock else time.sleep)(600)  # PyDLL keeps the lock

    def beat_of_step(watchdog, beaten_step: int | None = None) -> None:
        if timeout_seconds and beaten_step == step:
            time.sleep(0.4 if rank == RANK else 0.0)
            watchdog.timeout_seconds = timeout_seconds
            _end_without_interpreter(2 * timeout_seconds)  # the watchdog's thread may not run again
        beat(watchdog, beaten_step)

    beat, Watchdog.beat = Watchdog.beat, beat_of_step
    StopSignal.GRACE_SECONDS = grace_seconds
    _in_step(rank, step, sleeping_beauty)


def terminate(rank: int, step: int, name: str = "SIGTERM") -> None:
    """A signal comes to a rank in the middle of a step."""
    _in_step(rank, step, lambda: os.kill(os.getpid(), signal.Signals[name]))


def lose_folder(step: int, run: str, how: str) -> None:
    """The run's folder is moved or deleted in a step, or moved and another one put in its place."""

    def lose() -> None:
        shutil.rmtree(run) if how == "deleted" else os.rename(run, f"{run}.moved")
        if how == "replaced":
            os.mkdir(run)

    _in_step(0, step, lose)


def slow_steps(seconds: float) -> None:
    """Every step takes longer, so that a signal from outside arrives before the run's end."""
    step = TokenizerTask.step

    def slow_step(task, *arguments):
        time.sleep(seconds)
        return step(task, *arguments)

    TokenizerTask.step = slow_step


def nan(rank: int, step: int, last: int | None = None) -> None:
    """A rank's loss of the tokenizer is NaN in a step, or from ``step`` to ``last``. After each step every rank says
    three hashes: of the weights that it holds whole, and of what it would save of the tokenizer and of all else."""
    step_of_task, tokenizer_loss = TokenizerTask.step, TokenizerTask._loss
    now = []

    def telling_step(task, images, done: int):
        now[:] = [done + 1]
        result = step_of_task(task, images, done)
        held = {
            f"{network}.{name}": parameter
            for network, (engine, *_) in task.state.trained.items()
            for name, parameter in engine.parameters.items()
            if not hasattr(parameter, "to_local") and parameter.numel()  # cut neither by FSDP2 nor by ZeRO 3
        }
        saved = {shard.name: shard.values for shard in task.state.tensors()}
        tokenizer = {name: values for name, values in saved.items() if name.startswith("tokenizer")}
        rest = {name: values for name, values in saved.items() if name not in tokenizer}
        hashes = " ".join(_hash(tensors) for tensors in (held, tokenizer, rest))
        sys.stderr.write(f"step {done + 1} hashes {hashes}\n")
        return result

    def poisoned(task, images_bchw, output, average_k, adversarial_weight, metrics):
        loss, terms = tokenizer_loss(task, images_bchw, output, average_k, adversarial_weight, metrics)
        if rank != RANK or not step <= now[0] <= (last or step):
            return loss, terms
        metrics.set("loss/total", metrics.scalars["loss/total"] * math.nan)
        return loss * math.nan, terms

    TokenizerTask.step = telling_step
    TokenizerTask._loss = poisoned


def _hash(tensors: dict) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        digest.update(name.encode() + values.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _in_step(rank: int, step: int, action) -> None:
    if rank != RANK:
        return
    step_of_task = TokenizerTask.step

    def step_with_fault(task, images, done: int):
        if done + 1 == step:
            action()
        return step_of_task(task, images, done)

    TokenizerTask.step = step_with_fault


FAULTS = {
    fault.__name__: fault
    for fault in (kill_in_save, kill_at_step, kill_worker, hang, terminate, lose_folder, slow_steps, nan)
}


def arm(fault: dict) -> None:
    """Prepares a fault, unless torchrun has restarted the processes: each fault happens once."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    FAULTS[fault["kind"]](**{name: value for name, value in fault.items() if name != "kind"})


def run(fault: dict, arguments: list[str]) -> int:
    """`python -m trainer ARGUMENTS` with a fault; returns the exit status."""
    arm(fault)
    return main(arguments)


if __name__ == "__main__":
    sys.exit(run(json.loads(sys.argv[1]), sys.argv[2:]))
