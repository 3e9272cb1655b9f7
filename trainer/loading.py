"""Loads models on every rank: all from the same checkpoint, whose hashes the ranks compare together."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from model_zoo import ModelError
from model_zoo.io.load import find_checkpoint, is_hub_name
from model_zoo.io.manifest import MANIFEST
from trainer import TrainerError
from trainer.checkpoint import damage
from trainer.parallel import World, run_on_all_ranks, run_on_main

Loaded = TypeVar("Loaded")


def common_checkpoint(world: World, source: str | Path) -> Path:
    """The checkpoint that rank 0 finds, on all ranks: of one step, even while training writes new ones. A name on the
    hub is downloaded on each node."""
    if is_hub_name(Path(source)):
        return run_on_all_ranks(lambda: find_checkpoint(Path(source)))
    return run_on_main(world, lambda: find_checkpoint(Path(source)))


def load_newest(
    world: World,
    source: str | Path,
    load: Callable[[Path], Loaded],
    beside: Callable[[Path], str | Path | None] = lambda checkpoint: None,
) -> Loaded:
    """``load(common_checkpoint(world, source))`` on every rank; again for a newer checkpoint if training has removed
    that one meanwhile. beside: another source that ``load`` reads, if there is one. Raises TrainerError."""
    while True:
        checkpoint = common_checkpoint(world, source)
        try:
            other = run_on_main(world, lambda checkpoint=checkpoint: beside(checkpoint))
            for one in (checkpoint, *([] if other is None else [other])):
                check_together(world, one)
            return run_on_all_ranks(lambda checkpoint=checkpoint: load(checkpoint))
        except TrainerError:
            if common_checkpoint(world, source) == checkpoint:
                raise


def check_together(world: World, source: str | Path) -> None:
    """Compares the hashes of a run's checkpoint; all ranks call together. Each file is read by one rank, and
    `read_weights` then does not read all files again on every rank.

    Reports no damage: `read_weights` does. For sources other than a run it does nothing, because a rank reads only the
    files of an export that it needs."""

    def find() -> Path | None:
        try:
            checkpoint = find_checkpoint(Path(source))
        except ModelError:
            return None
        return checkpoint if (checkpoint / MANIFEST).exists() else None

    if (checkpoint := run_on_main(world, find)) is not None:
        damage(checkpoint, world)
