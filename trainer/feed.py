"""The data of each step as the loop takes them, and the account that is kept of them: what was delivered, what was
skipped and why."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TextIO

from data import Batch, DataError, Skipped, TrainStream, add_totals
from trainer import TrainerError
from trainer.parallel import World, fail_together, gather_objects

MOST_LISTED = 1000  # skipped samples that a rank lists between two reports; all are counted


class Feed:
    """One rank's stream, read one step ahead: a rank that cannot go on then ends all of them together, after a whole
    step that can be saved."""

    def __init__(self, stream: TrainStream, micro_batches: int, world: World):
        self.stream, self.micro_batches, self.world = stream, micro_batches, world
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
        if audit:
            try:
                (run / "audit").mkdir(exist_ok=True)
                path = run / "audit" / f"from_{start:08d}_rank_{self.world.rank:05d}.jsonl"
                self.audit = path.open("w", encoding="utf-8")
            except OSError as error:
                failed = f"cannot write into {run / 'audit'}: {error.strerror}; mend that, or leave out data.audit"
        fail_together(failed)

    def read_ahead(self) -> None:
        """Gets the next step's micro-batches ready; what goes wrong is kept in ``failed``."""
        try:
            self.ready = [next(self.stream) for _ in range(self.micro_batches)]
        except DataError as error:
            self.failed = str(error)

    def take(self, step: int) -> list[Batch]:
        """The micro-batches of step number ``step``, from 1."""
        batches, self.ready = self.ready, []
        for batch in batches:
            self.skipped += batch.skipped[: MOST_LISTED - len(self.skipped)]
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
        gathered = gather_objects([self.totals, self.skipped])
        self.skipped = []
        if self.world.is_main and any(skipped for _, skipped in gathered):
            lines = [
                json.dumps({"step": step, "source": one[3], "shard": one[0], "key": one[1], "reason": one[2]})
                for _, skipped in gathered
                for one in skipped
            ]
            # A full disk is no reason to end the other ranks.
            with suppress(OSError), (self.run / "skipped.jsonl").open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        scalars = {}
        for name, counts in add_totals(totals for totals, _ in gathered).items():
            for kind, count in zip(("delivered", "skipped", "filtered"), counts, strict=True):
                scalars[f"data/{kind}/{name}"] = float(count)
        return scalars

    def stop_together(self, saved: str) -> None:
        """Raises the first failed rank's message on every rank. saved: what is said of the steps before."""
        fail_together(f"{self.failed}; {saved}" if self.failed else None)


def summary(scalars: dict[str, float]) -> list[str]:
    """A line for each source, from the scalars of ``report``."""
    names = [name.removeprefix("data/delivered/") for name in scalars if name.startswith("data/delivered/")]
    return [
        f"data {name}: {scalars[f'data/delivered/{name}']:,.0f} images, {scalars[f'data/skipped/{name}']:,.0f} skipped "
        f"as unusable, {scalars[f'data/filtered/{name}']:,.0f} filtered out"
        for name in names
    ]


# ------------------------------------------------------------------------------------------------------------- audit


class Delivered(NamedTuple):
    """A line of the audit: step from 1, rank, and the sample's source, epoch, shard and key."""

    step: int
    rank: int
    source: str
    epoch: int
    shard: str
    key: str


def read_audit(run: str | Path) -> Iterator[Delivered]:
    """Every sample that counts towards the run's weights. Steps that were taken again after a resume count once."""
    files = sorted((Path(run) / "audit").glob("from_*_rank_*.jsonl"))
    if not files:
        raise TrainerError(f"{run} holds no audit: train with data.audit=true")
    starts = sorted({_start_of(file) for file in files})
    following = dict(zip(starts, [*starts[1:], None], strict=True))
    for file in files:
        stop = following[_start_of(file)]
        rank = int(file.stem.rsplit("_", 1)[1])
        for line in file.read_text(encoding="utf-8").split("\n")[:-1]:  # behind the last break is what a kill cut off
            entry = json.loads(line)
            if stop is None or entry["step"] <= stop:
                for sample in entry["samples"]:
                    yield Delivered(entry["step"], rank, *sample)


def _start_of(file: Path) -> int:
    return int(file.stem.split("_")[1])
