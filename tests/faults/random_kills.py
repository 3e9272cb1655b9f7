"""Kills training at random moments, resumes it, and checks that no sample was lost or repeated.

    PYTHONPATH=tests python -m faults.random_kills --kills 200 --out /tmp/kills

Trains `debug` on small generated tars under torchrun. Each run is killed (kill -9) KILLS_PER_RUN times and resumed each
time, with another engine on another number of ranks. The kills go through all combinations of a victim (one rank, one
data worker, the launcher, or all processes), a number of ranks and an engine, in a random order. Each run ends with
SIGTERM, so that its last step is saved. Then four things must hold:

- Each step was trained on exactly the samples that one uninterrupted process reads for that step (`RUN/audit`).
- The first two steps after a saved one have the same losses when they are trained again, up to rounding.
- `metrics.jsonl` has one line for each step.
- After each kill all other processes of the job have ended ALIVE_SECONDS after the launcher at the latest.

Prints a line per kill, writes the lines to `OUT/kills.jsonl`, and exits with status 1 if anything failed. A kill takes
about 12 s on two cores. Run it from the repository's root.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ranks import ROOT, TORCHRUN
from samples import Steps, write_tars

from data.config import DataConfig
from trainer.prefetch import read_audit

VICTIMS = ("rank", "worker", "launcher", "all")
RANKS = (1, 2, 3)
DEEPSPEED = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
FSDP2 = {"kind": "fsdp2", "reshard": "true", "offload": "false", "shard_over": "null"}
ENGINES = {
    "ddp": {"kind": "ddp"},
    **{name: {"kind": "deepspeed", "config": name} for name in DEEPSPEED},
    "fsdp2": FSDP2,
    "fsdp2, not resharded": {**FSDP2, "reshard": "false"},
    "fsdp2, offload": {**FSDP2, "offload": "true"},
    "fsdp2, hybrid": {**FSDP2, "shard_over": "1"},
}
KILLS_PER_RUN = 10
EARLY = 0.2  # the share of kills that come while the job starts
EARLY_SECONDS = 10.0
LATE_SECONDS = 6.0  # other kills come up to this long after the job's first step
ALIVE_SECONDS = 10.0
STEP_SECONDS = 300.0  # the longest wait for a job's first step or its end, on a busy machine
BATCH, SEED = 12, 3
TARS = (41, 30, 26)  # pictures
LOSS_TOLERANCE = 1e-4  # relative; another engine on another number of ranks rounds otherwise
MARK = "IBQ_RANDOM_KILLS"  # variable of the environment by which a job's processes are found


class Plan(NamedTuple):
    """A kill to come. early_seconds: after the start; late_seconds: after the first step, where early is None."""

    victim: str
    ranks: int
    engine: str
    early_seconds: float | None
    late_seconds: float


def plans(count: int, seed: int) -> list[Plan]:
    chance = random.Random(seed)
    cells = [cell for cell in itertools.product(VICTIMS, RANKS, ENGINES)]
    chance.shuffle(cells)
    found = []
    for cell in itertools.islice(itertools.cycle(cells), count):
        early = chance.uniform(0, EARLY_SECONDS) if chance.random() < EARLY else None
        found.append(Plan(*cell, early, chance.uniform(0, LATE_SECONDS)))
    return found


class Process(NamedTuple):
    """name: PyTorch calls a data worker pt_data_worker."""

    pid: int
    parent: int
    name: str
    command: str


def processes(mark: str) -> list[Process]:
    """All living processes of a job, whoever their parents are now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            name = (folder / "comm").read_text().strip()
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or is another user's
            continue
        if state != "Z":
            found.append(Process(int(folder.name), int(parent), name, command))
    return found


class Job:
    """Training under torchrun, from step 1 or from the newest checkpoint."""

    def __init__(self, run: Path, tars: Path, plan: Plan, log: Path):
        self.log, self.mark = log, log.stem + run.parent.name
        engine = [f"engine.{key}={value}" for key, value in ENGINES[plan.engine].items()]
        begun = (run / "config.yaml").exists()
        what = ["--resume", run] if begun else ["debug", f"run={run}", *settings(tars)]
        with log.open("w") as output:
            self.launcher = subprocess.Popen(
                [sys.executable, "-m", *TORCHRUN[1:], str(plan.ranks), "-m", "trainer", *map(str, what), *engine],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", MARK: self.mark},
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )

    def processes(self, kind: str) -> list[int]:
        """The process ids of a kind of `VICTIMS`."""
        alive = processes(self.mark)
        ranks = {one.pid for one in alive if one.parent == self.launcher.pid and "trainer" in one.command}
        workers = [one.pid for one in alive if one.parent in ranks and one.name == "pt_data_worker"]
        return {
            "rank": [*ranks],
            "worker": workers,
            "launcher": [self.launcher.pid],
            "all": [one.pid for one in alive],
        }[kind]

    def wait_for_step(self) -> None:
        self._wait(lambda: "\nstep " in self.log.read_text(), "a step")

    def kill(self, victim: str, chance: random.Random) -> int:
        """Kills one process of the kind, or all of them. Waits until there is one. Returns how many it killed."""
        self._wait(lambda: bool(self.processes(victim)), f"a {victim}")
        found = self.processes(victim)
        chosen = found if victim == "all" else [chance.choice(found)]
        for pid in chosen:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                if victim != "all":
                    raise
        return len(chosen)

    def end(self) -> tuple[float, float, int]:
        """Waits until every process has ended. Returns the seconds until the launcher and until the last one ended, and
        how many were alive ALIVE_SECONDS after the launcher. Raises JobFailed if the launcher does not end."""
        began = time.monotonic()
        try:
            self.launcher.wait(STEP_SECONDS)
        except subprocess.TimeoutExpired:
            for one in processes(self.mark):
                os.kill(one.pid, signal.SIGKILL)
            raise JobFailed(f"the job did not end within {STEP_SECONDS:g} s") from None
        ended = time.monotonic()
        while processes(self.mark) and time.monotonic() < ended + ALIVE_SECONDS:
            time.sleep(0.1)
        orphans = processes(self.mark)
        for one in orphans:
            os.kill(one.pid, signal.SIGKILL)
        return ended - began, time.monotonic() - began, len(orphans)

    def _wait(self, condition, what: str) -> None:
        deadline = time.monotonic() + STEP_SECONDS
        while not condition():
            if self.launcher.poll() is not None:
                raise JobFailed(f"the job ended with status {self.launcher.returncode} before {what}")
            if time.monotonic() > deadline:
                raise JobFailed(f"no {what} within {STEP_SECONDS:g} s")
            time.sleep(0.02)


class JobFailed(Exception):
    """A job did not get as far as it must."""


def settings(tars: Path) -> list[str]:
    return [
        *(f"data.{key}" for key in (f"train={tars}", f"val={tars}/00000.tar", "audit=true", "workers=1")),
        *(f"seed={SEED}", f"trainer.global_batch_size={BATCH}", "trainer.device=cpu", "trainer.max_steps=100000"),
        *("trainer.log_every_steps=1", "trainer.validate_every_steps=100000", "trainer.checkpoint_every_steps=4"),
    ]


def newest_step(run: Path) -> int:
    latest = run / "checkpoints/latest"
    return int(latest.read_text().removeprefix("step_")) if latest.exists() else 0


def losses(run: Path) -> dict[int, float]:
    """By step. The last line may have been cut by a kill."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return {line["step"]: line["loss/total"] for line in whole if "loss/total" in line}


class Campaign:
    """All runs, and what was found."""

    def __init__(self, out: Path, count: int, seed: int):
        self.out, self.seed, self.count = out, seed, count
        self.tars = write_tars(out / "tars", TARS)
        self.faults: list[str] = []
        self.lines = (out / "kills.jsonl").open("a", buffering=1)
        self.lock = threading.Lock()
        self.numbers = itertools.count(1)
        self.slowest = 0.0  # seconds
        self.compared, self.largest = 0, 0.0

    def fault(self, what: str) -> None:
        with self.lock:
            self.faults.append(what)
            print(f"FAULT: {what}", flush=True)

    def run(self, number: int, kills: list[Plan]) -> Path:
        """Trains one run with these kills between, and at last to a saved step."""
        run, chance = self.out / f"run_{number:03d}", random.Random(1000 * self.seed + number)
        for leg, plan in enumerate(kills):
            log = self.out / f"run_{number:03d}_{leg:02d}.log"
            before, trained = newest_step(run), losses(run)
            job = Job(run, self.tars, plan, log)
            try:
                if plan.early_seconds is None:
                    job.wait_for_step()
                time.sleep(plan.late_seconds if plan.early_seconds is None else plan.early_seconds)
                killed = job.kill(plan.victim, chance)
                ended, gone, orphans = job.end()
            except JobFailed as error:
                self.fault(f"{log}: {error}")
                continue
            after = newest_step(run)
            if orphans:
                self.fault(f"{log}: {orphans} processes alive {ALIVE_SECONDS:g} s after the launcher's end")
            if after < before:
                self.fault(f"{log}: the newest checkpoint was of step {before} and is of step {after}")
            self.compare(trained, losses(run), before, log)
            self.tell(plan, log, killed, after, ended, gone, orphans)
        self.stop(run, number)
        return run

    def compare(self, first: dict[int, float], second: dict[int, float], saved: int, log: Path) -> None:
        """Compares the losses of the first two steps after the saved one, which were trained again: that of the first
        depends on the weights, that of the second also on the optimizer's moments. (In later ones rounding decides now
        and then between two codes.)"""
        for step in (saved + 1, saved + 2):
            if step in first and step in second:
                off = abs(second[step] / first[step] - 1)
                with self.lock:
                    self.compared, self.largest = self.compared + 1, max(self.largest, off)
                if not off <= LOSS_TOLERANCE:
                    self.fault(f"{log}: the loss of step {step}, trained again, is off by {off:.1e}")

    def tell(self, plan: Plan, log: Path, killed: int, step: int, ended: float, gone: float, orphans: int) -> None:
        when = "at its start" if plan.early_seconds is not None else "in training"
        with self.lock:
            self.slowest = max(self.slowest, gone - ended)
            line = {**plan._asdict(), "log": log.name, "killed": killed, "saved": step, "orphans": orphans}
            self.lines.write(json.dumps({**line, "launcher_seconds": ended, "all_seconds": gone}) + "\n")
            print(
                f"{next(self.numbers)}/{self.count} {log.stem}: {plan.victim} of {plan.ranks} ranks ({plan.engine}) "
                f"{when}; saved: step {step}; launcher ended after {ended:.1f} s, all after {gone:.1f} s",
                flush=True,
            )

    def stop(self, run: Path, number: int) -> None:
        """One more leg, which ends by SIGTERM with its step saved."""
        log = self.out / f"run_{number:03d}_last.log"
        job = Job(run, self.tars, Plan("launcher", 1, "ddp", None, 0.0), log)
        try:
            job.wait_for_step()
            job.launcher.terminate()
            *_, orphans = job.end()
        except JobFailed as error:
            self.fault(f"{log}: {error}")
            return
        if orphans or "which is saved" not in log.read_text():
            self.fault(f"{log}: SIGTERM did not end it with a saved step")

    def check_samples(self, runs: list[Path]) -> None:
        """Compares each run's audit with the stream."""
        expected = Steps(DataConfig(train=str(self.tars), image_size=32, crop="random_resized", workers=0), batch=BATCH)
        steps: list[Counter] = []
        lost = repeated = delivered = 0
        for run in runs:
            audit, taken = read_audit(run), defaultdict(Counter)
            if audit.missing_steps:
                self.fault(f"{run}: no audit of {audit.missing_steps}")
            for sample in audit.delivered:
                taken[sample.step][sample.epoch, sample.shard, sample.key] += 1
            last = newest_step(run)
            if max(taken, default=0) != last:
                self.fault(f"{run}: the audit ends with step {max(taken, default=0)}, the newest checkpoint is {last}")
            while len(steps) < last:
                infos = expected.infos(1)[0]
                steps.append(Counter((info.position.epoch, info.shard, info.key) for info, _ in infos))
            for step in range(1, last + 1):
                lost += (steps[step - 1] - taken[step]).total()
                repeated += (taken[step] - steps[step - 1]).total()
                if taken[step] != steps[step - 1]:
                    self.fault(f"{run}: step {step} has other samples than the stream")
            delivered += sum(count.total() for count in taken.values())
        print(f"{delivered:,} samples in {len(runs)} runs: {lost} lost, {repeated} repeated")

    def check_metrics(self, runs: list[Path]) -> None:
        for run in runs:
            if [*losses(run)] != [*range(1, newest_step(run) + 1)]:
                self.fault(f"{run}: metrics.jsonl has not exactly one line for each step")
        print(f"losses of {self.compared} steps that were trained twice differ by at most {self.largest:.1e}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--out", required=True, type=Path, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"--out {arguments.out} exists: name a new folder")
    arguments.out.mkdir(parents=True)
    shared_before = set(os.listdir("/dev/shm"))
    campaign = Campaign(arguments.out.resolve(), arguments.kills, arguments.seed)
    kills = plans(arguments.kills, arguments.seed)
    chains = [kills[start : start + KILLS_PER_RUN] for start in range(0, len(kills), KILLS_PER_RUN)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = [*pool.map(campaign.run, itertools.count(), chains)]
    campaign.check_samples(runs)
    campaign.check_metrics(runs)
    print(f"longest time from the launcher's end to the last process's: {campaign.slowest:.1f} s")
    print(f"{len(set(os.listdir('/dev/shm')) - shared_before)} files left in /dev/shm")
    print(f"{len(kills)} kills: {len(campaign.faults)} faults")
    if not campaign.faults:
        for run in runs:
            shutil.rmtree(run / "checkpoints")
    return int(bool(campaign.faults))


if __name__ == "__main__":
    sys.exit(main())
