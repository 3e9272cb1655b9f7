"""Fine-tuning: the weights that a run starts from, and the account of them that its folder keeps."""

import json
import shlex
from pathlib import Path
from typing import NamedTuple

import torch

from model_zoo import ModelError, Tokenizer
from model_zoo.io.load import read_weights
from model_zoo.io.weights import Weights, check_names
from trainer import TrainerError
from trainer.config import TokenizerRun
from trainer.files import writing
from trainer.telemetry import metric_lines

FILE = "start.json"  # in a run's folder
NO_SHAPE = ("codebook_init", "codebook_init_std")  # fields of a model's configuration that its weights do not depend on


class Start(NamedTuple):
    """What a run started from, in words: the weights, the tokenizer's fingerprint, what is frozen (None: nothing), and
    where the discriminator came from."""

    origin: str
    fingerprint: str
    freeze: str | None
    discriminator: str

    def __str__(self) -> str:
        frozen = f"; its {self.freeze} is frozen" if self.freeze else ""
        return (
            f"starts from {self.origin}, fingerprint {self.fingerprint}{frozen}; discriminator: {self.discriminator}; "
            "optimiser, schedule, EMA, LeCAM's means and data begin anew"
        )


def load_start(config: TokenizerRun) -> tuple[Weights, str]:
    """The weights that ``start.source`` names, and their tokenizer's fingerprint. Raises TrainerError, one line, where
    they are missing or those of another model than the recipe's."""
    source = config.start.source
    try:
        weights = read_weights(source, "tokenizer", config.start.weights)
        _check_shape(config, weights)
        with torch.device("meta"):
            tokenizer = Tokenizer(config.model)
        check_names(weights.tensors, tokenizer.state_dict(), f"{weights.origin}: it")
        tokenizer.load_state_dict(weights.tensors, assign=True)
    except ModelError as error:
        raise TrainerError(f"start.source={source} (start.weights={config.start.weights}): {error}") from error
    return weights, tokenizer.fingerprint()


def _check_shape(config: TokenizerRun, weights: Weights) -> None:
    """Raises ModelError where the source's model is not the recipe's."""
    ours = vars(config.model)
    theirs = {key: value for key, value in weights.config.items() if key not in NO_SHAPE and value != ours.get(key)}
    if theirs:
        found = ", ".join(
            f"model.{key} is {_typed(value)} there and {_typed(ours.get(key))} here" for key, value in theirs.items()
        )
        mend = " ".join(shlex.quote(f"model.{key}={_typed(value)}") for key, value in theirs.items())
        raise ModelError(f"it is another model than the recipe's: {found}; give {mend}")


def _typed(value) -> str:
    """As one types it behind key=."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def save_start(run: Path, start: Start) -> None:
    """Keeps the account in the run's folder. Raises TrainerError where it cannot be written."""
    with writing(run / FILE, "run=FOLDER"):
        (run / FILE).write_text(json.dumps(start._asdict(), indent=1) + "\n", encoding="utf-8")


def read_start(run: Path) -> dict | None:
    """What a run started from and how far it has come; None where it started from scratch.

    The fields of `Start`; and ``validation``, where there was any: ``start`` and ``now``, each with ``step``, ``psnr``
    in dB, ``l1`` and ``usage``. Raises TrainerError for a damaged file.
    """
    path = run / FILE
    if not path.is_file():
        return None
    try:
        account = Start(**json.loads(path.read_text(encoding="utf-8")))._asdict()
    except (ValueError, TypeError) as error:
        raise TrainerError(f"{path} is damaged: delete it") from error
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for _, line in metric_lines(metrics)] if metrics.is_file() else []
    validations = [
        {name.removeprefix("val/"): value for name, value in line.items() if name == "step" or name.startswith("val/")}
        for line in lines
        if isinstance(line.get("val/psnr"), float)  # null where it is no number
    ]
    if validations:
        account["validation"] = {"start": validations[0], "now": validations[-1]}
    return account
