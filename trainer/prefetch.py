"""The data of each step as the loop takes them, and the account that is kept of them: what was delivered, what was
skipped and why."""

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TextIO

from data import Batch, DataError, Skipped, TrainStream, add_totals
from trainer import TrainerError
from trainer.parallel import World, gather_objects, raise_on_all_ranks

MOST_LISTED = 1000  # skipped samples that a rank lists between two reports; all are counted


class Feed:
    """One rank's stream, read one step ahead: a rank that cannot go on then ends all of them together, after a whole
    step that can be saved."""

    def __init__(self, stream: TrainStream, micro_batches: int, world: World, check: Callable[[Batch], None]):
        """check: raises TrainerError for a batch that cannot be trained on."""
        self.stream, self.micro_batches, self.world, self.check = stream, micro_batches, world, check
        self.ready: list[Batch] = []
        self.failed: str | None = None
        self.skipped: list[Skipped] = []
        self.totals = stream.totals
        self.run: Path | None = None
        self.audit: TextIO | None = None

    def keep_account(self, run: Path, audit: bool, start: int) -> None:
        """From now on, in the run's folder. audit: whether every delivered sample's key is written to ``RUN/audit/``.
        start: steps that were taken before."""
        self.run = run
        failed = None
        try:
            if self.world.is_main:
                _set_aside(run, start)
        except OSError as error:
            failed = f"cannot write into {run / 'audit'}: {error.strerror}; mend that"
        raise_on_all_ranks(failed)
        try:
            if audit:
                (run / "audit").mkdir(exist_ok=True)
                path = run / "audit" / f"from_{start:08d}_rank_{self.world.rank:05d}.jsonl"
                self.audit = path.open("w", encoding="utf-8")
                sizes = {source.name: source.samples for source in self.stream.sources}
                self.audit.write(json.dumps({"samples_of_sources": sizes}) + "\n")
        except OSError as error:
            failed = f"cannot write into {run / 'audit'}: {error.strerror}; mend that, or leave out data.audit"
        raise_on_all_ranks(failed)

    def read_ahead(self) -> None:
        """Gets the next step's micro-batches ready; what goes wrong is kept in ``failed``."""
        try:
            self.ready = [next(self.stream) for _ in range(self.micro_batches)]
            for batch in self.ready:
                self.check(batch)
        except (DataError, TrainerError) as error:
            self.failed = str(error)

    def take(self, step: int) -> list[Batch]:
        """The micro-batches of step number ``step``, from 1."""
        batches, self.ready = self.ready, []
        for batch in batches:
            self.skipped += batch.skipped
        self.totals = batches[-1].state["totals"]
        if self.audit:
            samples = [
                [info.source, info.place.epoch, info.shard, info.key] for batch in batches for info in batch.infos
            ]
            try:
                self.audit.write(json.dumps({"step": step, "samples": samples}) + "\n")
                self.audit.flush()
            except OSError as error:
                self.failed = f"cannot write the audit {self.audit.name}: {error.strerror}; make room"
        return batches

    def report(self, step: int) -> dict[str, float]:
        """Scalars of all ranks' data until now; rank 0 lists what was skipped in ``skipped.jsonl``. All ranks call."""
        gathered = gather_objects([self.totals, self.skipped[:MOST_LISTED], len(self.skipped[MOST_LISTED:])])
        self.skipped = []
        if self.world.is_main and any(skipped for _, skipped, _ in gathered):
            lines = [
                json.dumps({"step": step, "source": one[3], "shard": one[0], "key": one[1], "reason": one[2]})
                for _, skipped, _ in gathered
                for one in skipped
            ]
            if more := sum(unlisted for *_, unlisted in gathered):
                lines.append(json.dumps({"step": step, "more_that_are_not_listed": more}))
            # A full disk is no reason to end the other ranks.
            with suppress(OSError), (self.run / "skipped.jsonl").open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        scalars = {}
        for name, counts in add_totals(totals for totals, *_ in gathered).items():
            for what, count in counts.items():
                scalars[f"data/{name}/{what}"] = float(count)
        return scalars

    def stop_together(self, saved: str) -> None:
        """Raises the first failed rank's message on every rank. saved: what is said of the steps before."""
        raise_on_all_ranks(f"{self.failed}; {saved}" if self.failed else None)


def summary(scalars: dict[str, float]) -> list[str]:
    """A line for each source, from the scalars of ``report``."""
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


# ------------------------------------------------------------------------------------------------------------- audit


class Delivered(NamedTuple):
    """A line of the audit: step from 1, rank, and the sample's source, epoch, shard and key."""

    step: int
    rank: int
    source: str
    epoch: int
    shard: str
    key: str


def _set_aside(run: Path, start: int) -> None:
    """What was written of steps behind ``start`` does not count any more: they are taken again."""
    for file in (run / "audit").glob("from_*_rank_*.jsonl"):
        if _start_of(file) >= start:
            file.rename(file.with_suffix(".superseded"))


class Audit(NamedTuple):
    """delivered: every sample that counts towards the run's weights; samples_of_sources: how many a source has, or
    None; missing_steps: those that were trained without an audit."""

    delivered: Iterator[Delivered]
    samples_of_sources: dict[str, int | None]
    missing_steps: list[range]


def read_audit(run: str | Path) -> Audit:
    """Steps that were taken again after a resume count once. Raises TrainerError."""
    files = sorted((Path(run) / "audit").glob("from_*_rank_*.jsonl"))
    if not files:
        raise TrainerError(f"{run} holds no audit: train with data.audit=true")
    starts = sorted({_start_of(file) for file in files})
    following = dict(zip(starts, [*starts[1:], None], strict=True))
    sizes: dict[str, int | None] = {}
    stretches = {}
    for file in files:
        first, *steps = (entry for entry in _entries(file))
        sizes |= first["samples_of_sources"]
        start, stop = _start_of(file), following[_start_of(file)]
        taken = [entry["step"] for entry in steps if stop is None or entry["step"] <= stop]
        stretches[start] = max(stretches.get(start, start), *taken, start)
    missing, behind = [], 0
    for start in starts:
        if start > behind:
            missing.append(range(behind + 1, start + 1))
        behind = stretches[start]
    return Audit(_delivered(files, following), sizes, missing)


def _delivered(files: list[Path], following: dict[int, int | None]) -> Iterator[Delivered]:
    for file in files:
        stop = following[_start_of(file)]
        rank = int(file.stem.rsplit("_", 1)[1])
        for entry in itertools.islice(_entries(file), 1, None):
            if stop is None or entry["step"] <= stop:
                for sample in entry["samples"]:
                    yield Delivered(entry["step"], rank, *sample)


def _entries(file: Path) -> Iterator[dict]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                return  # a kill cut it off: its step was not saved
            try:
                yield json.loads(line)
            except ValueError as error:
                raise TrainerError(f"{file} is damaged in line {number}: what was delivered cannot be told") from error


def _start_of(file: Path) -> int:
    return int(file.stem.split("_")[1])
