"""The data of each step: read one step ahead, checked, and counted by source."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import data
from data.errors import DataError
from trainer import TrainerError
from trainer.audit import AuditWriter
from trainer.parallel import World, gather_objects, raise_on_all_ranks

if TYPE_CHECKING:
    from data import Batch, Skipped, TrainStream

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
        self.run: Path | None = None
        self.audit: AuditWriter | None = None

    def open_logs(self, run: Path, audit: bool, start: int, resources: ExitStack) -> None:
        """Lists skipped samples in the run's folder from now on; all ranks call together. audit: also the key of every
        delivered sample. start: steps that are done. Raises TrainerError on all ranks."""
        self.run = run
        self.audit = AuditWriter.open(run, self.world, self.stream, start, enabled=audit)
        if self.audit:
            resources.callback(self.audit.file.close)

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
            try:
                self.audit.write(step, batches)
            except OSError as error:
                self.failed = f"cannot write the audit {self.audit.path}: {error.strerror}; free some space"
        return batches

    def report(self, step: int) -> dict[str, float]:
        """Returns counts of all ranks' data so far; rank 0 lists skipped samples in ``skipped.jsonl``. All ranks call
        together."""
        gathered = gather_objects([self.totals, self.skipped[:MAX_LISTED], len(self.skipped[MAX_LISTED:])])
        self.skipped = []
        if self.world.is_main and any(skipped for _, skipped, _ in gathered):
            lines = [
                json.dumps({"step": step, "source": one[3], "shard": one[0], "key": one[1], "reason": one[2]})
                for _, skipped, _ in gathered
                for one in skipped
            ]
            if more := sum(unlisted for *_, unlisted in gathered):
                lines.append(json.dumps({"step": step, "more_that_are_not_listed": more}))
            # A full disk is no reason to stop training.
            with suppress(OSError), (self.run / "skipped.jsonl").open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
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
