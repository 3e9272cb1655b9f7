"""Fine-tuning: reads the initial weights of a run, and keeps a record of them in its folder."""

import json
import shlex
from pathlib import Path
from typing import NamedTuple

import torch

from model_zoo import ModelError, Tokenizer
from model_zoo.config import TokenizerConfig
from model_zoo.io.weights import Weights, check_weights
from trainer import TrainerError
from trainer.config import TokenizerRun
from trainer.files import write_json, writing
from trainer.telemetry import metric_lines

FILE, FORMER_FILE = "init_from.json", "start.json"  # in a run's folder; the former one is still read
# Fields of a model's configuration that change neither its weights nor its codes.
NO_SHAPE = (
    *("codebook_init", "codebook_init_std", "codes", "groups"),
    *("logit_scale", "codebook_decay", "restart_below"),
)


class InitRecord(NamedTuple):
    """What a run was initialized from.

    origin: description of the weights. fingerprint: of their tokenizer. freeze: the part that is not trained, or None.
    discriminator: description of its initial weights.
    """

    origin: str
    fingerprint: str
    freeze: str | None
    discriminator: str

    def __str__(self) -> str:
        frozen = f"; its {self.freeze} is frozen" if self.freeze else ""
        return (
            f"initialized from {self.origin}, fingerprint {self.fingerprint}{frozen}; discriminator: "
            f"{self.discriminator}; optimizer, schedule, EMA, LeCAM means and data start fresh"
        )


def read_initial_weights(config: TokenizerRun) -> tuple[Weights, str]:
    """Reads the weights that ``init_from.source`` names, and their tokenizer's fingerprint. Raises a one-line
    TrainerError if they are missing or do not fit the recipe's model."""
    from model_zoo.io.load import read_weights  # slow to import, and only fine-tuning needs it

    init_from = config.init_from
    try:
        weights = read_weights(init_from.source, "tokenizer", init_from.weights)
        _check_shape(config, weights)
        with torch.device("meta"):
            tokenizer = Tokenizer(config.model)
        check_weights(weights.tensors, tokenizer.state_dict(), f"{weights.origin}: it")
        tokenizer.load_state_dict(weights.tensors, assign=True)
    except ModelError as error:
        raise TrainerError(
            f"init_from.source={init_from.source} (init_from.weights={init_from.weights}): {error}"
        ) from error
    return weights, tokenizer.fingerprint()


def _check_shape(config: TokenizerRun, weights: Weights) -> None:
    """Raises ModelError if the source's model differs from the recipe's."""
    ours = vars(config.model)
    # A key that an older source does not have has its default. The published layout names no quantizer.
    theirs = {key: value for key, value in vars(TokenizerConfig()).items() if key != "quantizer"} | weights.config
    theirs = {key: value for key, value in theirs.items() if key not in NO_SHAPE and value != ours.get(key)}
    if theirs:
        found = ", ".join(
            f"model.{key} is {_typed(value)} there and {_typed(ours.get(key))} here" for key, value in theirs.items()
        )
        fix = " ".join(shlex.quote(f"model.{key}={_typed(value)}") for key, value in theirs.items())
        raise ModelError(f"its model is not the recipe's: {found}; use {fix}")


def _typed(value) -> str:
    """The value as the user types it after ``key=``."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def save_init_record(run: Path, record: InitRecord) -> None:
    """Writes the record to the run's folder. Raises TrainerError if that fails."""
    with writing(run / FILE, "run=FOLDER"):
        write_json(run / FILE, record._asdict())


def read_init_record(run: Path) -> dict | None:
    """Reads what a run was initialized from, and its validations. Returns None if it started from random weights.

    The result has the fields of `InitRecord`. If the run was validated, it also has ``validation``: ``start`` and
    ``now``, each with ``step``, ``psnr`` in dB, ``l1`` and ``usage``. Raises TrainerError for a damaged file.
    """
    path = run / FILE if (run / FILE).is_file() else run / FORMER_FILE
    if not path.is_file():
        return None
    try:
        record = InitRecord(**json.loads(path.read_text(encoding="utf-8")))._asdict()
    except (ValueError, TypeError) as error:
        raise TrainerError(f"{path} is damaged: delete it") from error
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for _, line in metric_lines(metrics)] if metrics.is_file() else []
    validations = [
        {name.removeprefix("val/"): value for name, value in line.items() if name == "step" or name.startswith("val/")}
        for line in lines
        if isinstance(line.get("val/psnr"), float)  # null if it was not finite
    ]
    if validations:
        record["validation"] = {"start": validations[0], "now": validations[-1]}
    return record
