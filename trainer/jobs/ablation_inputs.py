"""`ibq ablate`: whether rows with the same settings also had the same inputs. Files may change between two rows."""

import json
from typing import NamedTuple

from data.loader import open_sources
from data.stream_state import differ
from trainer import TrainerError
from trainer.changes import settings_of
from trainer.checkpoint import load_state
from trainer.config import RunConfig, TokenizerRun
from trainer.init_from import read_init_record, read_initial_weights
from trainer.jobs.ablation import Cell, newest
from trainer.recipes import load_recipe, load_run_config

# Settings that name what a run reads; rows that differ in one are meant to differ in their inputs.
NAMING = ("data.train", "data.sources", "data.val", "init_from.source", "init_from.weights")


class Inputs(NamedTuple):
    """What a run has read. sources: their identities by name; init: the fingerprint of the initial weights; validation:
    what ``data.val`` held. None: not known."""

    sources: dict[str, dict]
    init: str | None = None
    validation: str | None = None

    def differs(self, other: "Inputs") -> str | None:
        """In what, or None."""
        names = self.sources.keys()
        if names != other.sources.keys() or any(differ(self.sources[name], other.sources[name]) for name in names):
            return "training data"
        for what, values in (
            ("initial weights", (self.init, other.init)),
            ("images of data.val", (self.validation, other.validation)),
        ):
            if None not in values and values[0] != values[1]:
                return what
        return None


def check_same_inputs(cells: list[Cell]) -> None:
    """Raises TrainerError where runs with the same settings have read different inputs."""
    first: dict[str, tuple[Cell, Inputs]] = {}
    for cell in cells:
        if (found := _inputs(cell)) is None:
            continue
        other, before = first.setdefault(_named(load_run_config(cell.run, [])), (cell, found))
        if what := before.differs(found):
            raise TrainerError(
                f"{other.row} (seed {other.seed}) and {cell.row} (seed {cell.seed}) were trained with different "
                f"{what}: files were changed in between; remove {other.run} or {cell.run} to train it again, and "
                "repeat the command"
            )


def check_inputs_of_new(cell: Cell, others: list[Cell]) -> None:
    """Raises TrainerError where a run that has not begun would read other training data or initial weights than one of
    the others with the same settings, before it is trained."""
    config = load_recipe(cell.recipe, cell.overrides)
    for other in others:
        found = _inputs(other)
        if found is None or _named(load_run_config(other.run, [])) != _named(config):
            continue
        init = None
        if isinstance(config, TokenizerRun) and config.init_from.source is not None:
            _, init = read_initial_weights(config)
        if what := Inputs({source.name: source.identity() for source in open_sources(config.data)}, init).differs(
            found
        ):
            raise TrainerError(
                f"the {what} are no longer those of {other.row} (seed {other.seed}): put them back, or name another "
                "folder with --out"
            )
        return


def _inputs(cell: Cell) -> Inputs | None:
    """None if the run has no checkpoint yet."""
    checkpoint = newest(cell.run)
    if checkpoint is None:
        return None
    state, init = load_state(checkpoint), read_init_record(cell.run) or {}
    return Inputs(state["data"]["stream"]["sources"], init.get("fingerprint"), state.get("validation"))


def _named(config: RunConfig) -> str:
    return json.dumps({name: value for name, value in settings_of(config).items() if name in NAMING})
