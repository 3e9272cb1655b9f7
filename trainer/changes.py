"""What a resumed run changes of its settings: refused where the weights would mean something else, else reported."""

import functools
import hashlib
import json
import operator
from pathlib import Path
from typing import NamedTuple

from omegaconf import MISSING, DictConfig, OmegaConf

from data.classes import read_classes
from model_zoo.io.hashing import sha256_of
from trainer import TrainerError
from trainer.config import RunConfig
from trainer.recipes import RENAMED_VALUES, former_defaults, leaves, renamed_key

# Sections and keys that say what the weights are. (The training stream refuses another seed and other data.)
FIXED = ("task", "model", "discriminator", "init_from.freeze", "data.content", "tokenizer.fingerprint")
NOT_FIXED = ("discriminator.weights",)  # a file may be moved; its hash is fixed
# Of a run that has the semantic term: the head belongs to this encoder.
FIXED_HEAD = tuple(f"loss.semantic.{key}" for key in ("encoder", "sha256", "width", "depth"))
# Weights of terms that have a trained network.
TERMS = {"loss.semantic.weight": "head", "loss.generator.weight": "discriminator"}
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
    return _by_key(OmegaConf.structured(config))


def _by_key(node: DictConfig) -> dict:
    plain = OmegaConf.to_container(node)
    return {key: functools.reduce(operator.getitem, key.split("."), plain) for key in leaves(node)}


def contents_of(config: RunConfig) -> dict[str, str]:
    """A hash of the content of each file that a setting names and that says what is learned: lists of keys,
    data.classes, DeepSpeed's configuration. Files that are not there are left out: whatever needs them names them.
    Raises DataError."""
    files = {}
    for source in config.data.sources if config.data.train is None else ():
        for name in ("keys", "not_keys"):
            files[f"{name} of source {source.name}"] = getattr(source.filters, name)
    if config.engine.kind == "deepspeed" and config.engine.config.endswith(".json"):
        files["engine.config"] = config.engine.config
    found = {name: sha256_of(Path(file))[:16] for name, file in files.items() if file and Path(file).is_file()}
    if config.data.classes is not None:
        numbers = sorted(read_classes(config.data.classes).items())
        found["data.classes"] = hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]
    return {f"the content of {name}": digest for name, digest in found.items()}


def changes_since(before: dict, config: RunConfig, step: int) -> list[Change]:
    """The settings that differ from those by which training came to a step. A setting that the version of ``before``
    did not have counts with its default; one that this version does not have is left out. Raises TrainerError for a
    change that is not allowed."""
    now, before = settings_of(config), _with_defaults(before, config.task)
    keys = [key for key in now if key in before and before[key] != now[key] and key not in NOT_COMPARED]
    changes = [Change(step, key, before[key], now[key]) for key in keys]
    if step:
        _check_terms(before, now)
    fixed = FIXED + (FIXED_HEAD if before.get("loss.semantic.weight") and now.get("loss.semantic.weight") else ())
    for change in changes:
        # A fingerprint may not have been known yet.
        if _is_fixed(change.key, fixed) and not (change.key == "tokenizer.fingerprint" and None in change):
            other = (
                ", or start a new run with init_from.source=RUN" if change.key in ("model.grid", "model.grids") else ""
            )
            raise TrainerError(
                f"cannot resume: the checkpoint was written with other settings: {change.key} was "
                f"{json.dumps(change.before)} and is now {json.dumps(change.now)}; set it back{other}"
            )
    return changes


def _check_terms(before: dict, now: dict) -> None:
    """Raises TrainerError where a term of the loss begins whose network the checkpoint lacks, and where the
    discriminator would be dropped from all later checkpoints."""
    for key, network in TERMS.items():
        was, wanted = before.get(key), now.get(key)
        if wanted and was == 0:
            raise TrainerError(
                f"cannot resume: {key} was 0 and is now {wanted}, but the checkpoint has no {network} for this term: "
                f"set it back, or start a new run with init_from.source=RUN {key}={wanted}"
            )
    key = "loss.generator.weight"
    if before.get(key) and now.get(key) == 0:
        raise TrainerError(
            f"cannot resume: {key} was {before[key]} and is now 0, and later checkpoints would have no discriminator: "
            "set it back. loss.discriminator.start_step above trainer.max_steps switches the term off and keeps the "
            f"discriminator; to continue without one, start a new run with init_from.source=RUN {key}=0"
        )


def _with_defaults(settings: dict, task: str) -> dict:
    """Settings by their present names, with the defaults of those that are absent."""
    defaults = {key: value for key, value in _by_key(former_defaults(task)).items() if value != MISSING}
    present = {renamed_key(key): value for key, value in settings.items()}
    for (key, old), new in RENAMED_VALUES.items():
        if present.get(key) == old:
            present[key] = new
    return defaults | present


def _is_fixed(key: str, fixed: tuple[str, ...]) -> bool:
    return key not in NOT_FIXED and any(key == name or key.startswith(f"{name}.") for name in fixed)


def read_changes(state: dict) -> list[Change]:
    """The changes that a checkpoint's state lists."""
    return [Change(*change) for change in state.get("changes", ())]
