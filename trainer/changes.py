"""What a resumed run changes of its settings: refused where the weights would mean something else, else reported."""

import functools
import json
import operator
from typing import NamedTuple

from omegaconf import OmegaConf

from trainer import TrainerError
from trainer.config import RunConfig
from trainer.recipes import leaves

# Sections and keys that say what the weights are. (The training stream refuses another seed and other data.)
FIXED = ("task", "model", "discriminator", "init_from.freeze", "data.content", "tokenizer.fingerprint")
NOT_COMPARED = ("run",)  # a run may be moved


class Change(NamedTuple):
    """A setting that differs from step ``after`` on."""

    after: int
    key: str
    before: object
    now: object

    def __str__(self) -> str:
        before, now = json.dumps(self.before), json.dumps(self.now)
        return f"changed after step {self.after}: {self.key} was {before} and is now {now}"


def settings_of(config: RunConfig) -> dict:
    """All settings by dotted key, as JSON has them."""
    node = OmegaConf.structured(config)
    plain = OmegaConf.to_container(node)
    return {key: functools.reduce(operator.getitem, key.split("."), plain) for key in leaves(node)}


def changes_since(before: dict, config: RunConfig, step: int) -> list[Change]:
    """The settings that differ from those by which training came to a step; settings that one version of ibq has and
    the other has not are left out. Raises TrainerError for a change that is not allowed."""
    now = settings_of(config)
    keys = [key for key in now if key in before and before[key] != now[key] and key not in NOT_COMPARED]
    changes = [Change(step, key, before[key], now[key]) for key in keys]
    for change in changes:
        # A fingerprint may not have been known yet.
        if _is_fixed(change.key) and not (change.key == "tokenizer.fingerprint" and None in change):
            raise TrainerError(
                f"cannot resume: the checkpoint was written with other settings: {change.key} was "
                f"{json.dumps(change.before)} and is now {json.dumps(change.now)}; set it back"
            )
    return changes


def _is_fixed(key: str) -> bool:
    return any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED)


def read_changes(state: dict) -> list[Change]:
    """The changes that a checkpoint's state lists."""
    return [Change(*change) for change in state.get("changes", ())]
