"""Steps that are skipped because a loss or gradient is not finite."""

import json
import logging
from pathlib import Path

from trainer import TrainerError
from trainer.files import LineFile
from trainer.parallel import World, gather_objects

logger = logging.getLogger(__name__)


class SkippedSteps:
    """Counts consecutive skipped steps, and lists the keys of their samples in ``skipped_steps.jsonl``.

    Raises TrainerError once more than ``limit`` steps in a row were skipped, or a run would end with several of them.
    """

    SHOWN_KEYS = 8

    def __init__(self, run: Path, world: World, limit: int):
        self.lines, self.world, self.limit = LineFile(run / "skipped_steps.jsonl"), world, limit
        self.number = 0

    def move_to(self, run: Path) -> None:
        """Writes into another run's folder from now on."""
        self.lines.move_to(run)

    def update(self, step: int, skipped: list[str], keys: list[str], last: bool = False) -> str | None:
        """Call after each step on all ranks; returns a line to print, or None. last: this is the run's last step."""
        if not skipped:
            self.number = 0
            self._write()
            return None
        self.number += 1
        keys = gather_objects(keys)
        self._write(json.dumps({"step": step, "not_finite": skipped, "keys_of_ranks": keys}))
        what = f"loss or gradient of the {' and '.join(skipped)} is not finite"
        if self.number > (min(1, self.limit) if last else self.limit):
            keys = [key for of_rank in keys for key in of_rank]
            unlisted, lost = len(keys) - self.SHOWN_KEYS, len(self.lines.waiting)
            more = f" and {unlisted:,} more" if unlisted > 0 else ""
            if lost:
                more += f" ({lost:,} line{'s' * (lost > 1)} of {self.lines.path} lost: it cannot be written)"
            elif more:
                more += f", see {self.lines.path}"
            raise TrainerError(
                f"{what} at step {step}, number {self.number} in a row (trainer.max_skipped_steps={self.limit}); its "
                f"samples: {', '.join(keys[: self.SHOWN_KEYS])}{more}. Checkpoints hold finite weights: resume from "
                "one with a lower optimizer.lr or trainer.gradient_clip_norm=1"
            )
        return f"step {step} is skipped: {what}; the keys of its samples are in {self.lines.path.name}"

    def _write(self, *lines: str) -> None:
        """Appends lines, and those that wait, on rank 0; an alarm is logged, whatever happens next."""
        if self.world.is_main and (said := self.lines.append(*lines)):
            logger.warning(said)
