"""The data of each step: read one step ahead, checked, and counted by source; and the audit of a run, which says which
samples it was trained on: written to ``RUN/audit`` and read back."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import data
from data.errors import DataError
from trainer import TrainerError
from trainer.files import LineFile, os_errors
from trainer.parallel import World, gather_objects, raise_on_all_ranks, run_on_all_ranks, run_on_main

if TYPE_CHECKING:
    from data import Batch, Skipped, TrainStream

logger = logging.getLogger(__name__)

MAX_LISTED = 1000  # skipped samples that a rank lists between two reports; all are counted


class Prefetcher:
    """Reads one rank's stream one step ahead, so that a rank whose data fails can end all ranks together, after a step
    that can be saved.

    check: raises TrainerError for a batch that cannot be trained on.
    """

    def __init__(self, stream: TrainStream, micro_batches: int, world: World, check: Callable[[Batch], None]):
        self.stream, self.micro_batches, self.world, self.check = stream, micro_batches, world, check
        self.ready: list[Batch] = []
        self.failed: str | None = None
        self.skipped: list[Skipped] = []
        self.totals = stream.totals
        self.list: LineFile | None = None
        self.audit: LineFile | None = None

    def open_logs(self, run: Path, audit: bool, start: int) -> None:
        """Lists skipped samples in the run's folder from now on; all ranks call together. audit: also the key of every
        delivered sample. start: steps that are done. Raises TrainerError on all ranks."""
        self.list = LineFile(run / "skipped.jsonl")
        run_on_main(self.world, lambda: _set_aside(run, start))
        if audit:
            self.audit = run_on_all_ranks(lambda: self._open_audit(run / "audit", start))

    def move_to(self, run: Path) -> None:
        """Lists skipped samples in another run's folder from now on. The audit is not continued there."""
        self.list.move_to(run)

    def _open_audit(self, folder: Path, start: int) -> LineFile:
        with os_errors(f"cannot write into {folder}", "fix that, or set data.audit=false"):
            folder.mkdir(exist_ok=True)
            file = folder / f"from_{start:08d}_rank_{self.world.rank:05d}.jsonl"
            sizes = {source.name: source.samples for source in self.stream.sources}
            file.write_text(json.dumps({"samples_of_sources": sizes}) + "\n", encoding="utf-8")
            return LineFile(file)

    def read_ahead(self) -> None:
        """Reads the next step's micro-batches; an error is kept in ``failed``."""
        try:
            self.ready = [next(self.stream) for _ in range(self.micro_batches)]
            for batch in self.ready:
                self.check(batch)
        except (DataError, TrainerError) as error:
            self.failed = str(error)

    def take(self, step: int) -> list[Batch]:
        """Returns the micro-batches of step ``step`` (from 1), which `read_ahead` has read."""
        batches, self.ready = self.ready, []
        for batch in batches:
            self.skipped += batch.skipped
        self.totals = batches[-1].state["totals"]
        if self.audit:
            infos = [info for batch in batches for info in batch.infos]
            samples = [[info.source, info.position.epoch, info.shard, info.key] for info in infos]
            self.audit.append(json.dumps({"step": step, "samples": samples}))
            if self.audit.waiting:
                self.failed = f"cannot write the audit {self.audit.path}: repair its disk, or set data.audit=false"
        return batches

    def report(self, step: int) -> dict[str, float]:
        """Returns counts of all ranks' data so far; rank 0 lists skipped samples in ``skipped.jsonl``. All ranks call
        together."""
        gathered = gather_objects([self.totals, self.skipped[:MAX_LISTED], len(self.skipped[MAX_LISTED:])])
        self.skipped = []
        lines = [
            json.dumps({"step": step, "source": one[3], "shard": one[0], "key": one[1], "reason": one[2]})
            for _, skipped, _ in gathered
            for one in skipped
        ]
        if more := sum(unlisted for *_, unlisted in gathered):
            lines.append(json.dumps({"step": step, "more_that_are_not_listed": more}))
        if self.world.is_main and (said := self.list.append(*lines)):
            logger.warning(said)
        scalars = {}
        for name, counts in data.add_totals(totals for totals, *_ in gathered).items():
            for what, count in counts.items():
                scalars[f"data/{name}/{what}"] = float(count)
        return scalars

    def stop_together(self, saved: str) -> None:
        """Raises the first failed rank's message on all ranks, if any rank has failed. saved: what to say of the steps
        that are done."""
        raise_on_all_ranks(f"{self.failed}; {saved}" if self.failed else None)


def summary(scalars: dict[str, float]) -> list[str]:
    """One line for each source, from the scalars of `Prefetcher.report`."""
    lines = []
    for name in [key.split("/")[1] for key in scalars if key.startswith("data/") and key.endswith("/delivered")]:
        filtered = {
            key.rsplit("/", 1)[1]: count for key, count in scalars.items() if key.startswith(f"data/{name}/filtered/")
        }
        by = f" ({', '.join(f'{filter_}: {count:,.0f}' for filter_, count in filtered.items())})" if filtered else ""
        lines.append(
            f"data {name}: {scalars[f'data/{name}/delivered']:,.0f} images, {scalars[f'data/{name}/skipped']:,.0f} "
            f"skipped as unusable, {sum(filtered.values()):,.0f} filtered out{by}"
        )
    return lines


# ------------------------------------------------------------------------------------------------------------ the audit


def _set_aside(run: Path, start: int) -> None:
    """Renames the files of steps after ``start``, which are trained again, so that they do not count any more."""
    with os_errors(f"cannot write into {run / 'audit'}", "fix that and resume"):
        for file in (run / "audit").glob("from_*_rank_*.jsonl"):
            if _start_of(file) >= start:
                file.rename(file.with_suffix(".superseded"))


class Delivered(NamedTuple):
    """A sample that was trained on: step (from 1), rank, and the sample's source, epoch, shard and key."""

    step: int
    rank: int
    source: str
    epoch: int
    shard: str
    key: str


class Audit(NamedTuple):
    """delivered: every sample that counts towards the run's weights. samples_of_sources: the number of samples in each
    source, or None where it is unknown. missing_steps: steps that were trained without an audit."""

    delivered: Iterator[Delivered]
    samples_of_sources: dict[str, int | None]
    missing_steps: list[range]


def read_audit(run: str | Path) -> Audit:
    """Reads a run's audit. Steps that were trained again after a resume count once. Raises TrainerError."""
    files = sorted((Path(run) / "audit").glob("from_*_rank_*.jsonl"))
    if not files:
        raise TrainerError(f"{run} holds no audit: train with data.audit=true")
    starts = sorted({_start_of(file) for file in files})
    next_start = dict(zip(starts, [*starts[1:], None], strict=True))
    sizes: dict[str, int | None] = {}
    last_steps = {}
    for file in files:
        first, *steps = _entries(file)
        sizes |= first["samples_of_sources"]
        start, stop = _start_of(file), next_start[_start_of(file)]
        trained = [entry["step"] for entry in steps if stop is None or entry["step"] <= stop]
        last_steps[start] = max(last_steps.get(start, start), *trained, start)
    missing, done = [], 0
    for start in starts:
        if start > done:
            missing.append(range(done + 1, start + 1))
        done = last_steps[start]
    return Audit(_delivered(files, next_start), sizes, missing)


def _delivered(files: list[Path], next_start: dict[int, int | None]) -> Iterator[Delivered]:
    for file in files:
        stop = next_start[_start_of(file)]
        rank = int(file.stem.rsplit("_", 1)[1])
        for entry in itertools.islice(_entries(file), 1, None):
            if stop is None or entry["step"] <= stop:
                for sample in entry["samples"]:
                    yield Delivered(entry["step"], rank, *sample)


def _entries(file: Path) -> Iterator[dict]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                if not line.endswith("\n"):
                    return  # cut off by a kill; its step was not saved
                raise TrainerError(f"{file} is damaged in line {number}: the audit cannot be read") from error


def _start_of(file: Path) -> int:
    return int(file.stem.split("_")[1])
