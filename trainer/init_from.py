"""Fine-tuning: reads the initial weights of a run, and keeps a record of them in its folder."""

import contextlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import data
from data.classes import CLASSES_NAME, merged_classes, read_classes
from model_zoo import ModelError, Tokenizer, Transformer
from model_zoo.conditions import trained_grids
from model_zoo.config import TokenizerConfig, TransformerConfig, grid_name
from model_zoo.io.hashing import fingerprint_of
from model_zoo.io.run_layout import run_folder
from model_zoo.io.weights import Weights, check_weights
from trainer import TrainerError
from trainer.config import GeneratorRun, TokenizerRun
from trainer.files import write_json, writing
from trainer.telemetry import metric_lines

FILE, FORMER_FILE = "init_from.json", "start.json"  # in a run's folder; the former one is still read
# Fields of a model's configuration that change neither its weights nor its codes. A generator's grids are compared
# on their own.
NO_SHAPE = (
    *("codebook_init", "codebook_init_std", "codes", "groups"),
    *("logit_scale", "codebook_decay", "restart_below"),
    *("grid", "grids", "dropout", "gate_init"),
)
GRID_TABLE = "grid_emb.weight"


class InitRecord(NamedTuple):
    """What a run was initialized from.

    origin: description of the weights. fingerprint: of their tokenizer, or of a generator's weights. freeze: the part
    that is not trained, or None. discriminator: description of its initial weights; None: of a generator. grids:
    description of what a generator's grids start from; None: there is nothing to say.
    """

    origin: str
    fingerprint: str
    freeze: str | None = None
    discriminator: str | None = None
    grids: str | None = None

    def __str__(self) -> str:
        notes = [
            f"initialized from {self.origin}, fingerprint {self.fingerprint}",
            *([f"its {self.freeze} is frozen"] if self.freeze else []),
            *([f"discriminator: {self.discriminator}"] if self.discriminator else []),
            *([self.grids] if self.grids else []),
            f"optimizer, schedule, EMA{', LeCAM means' if self.discriminator else ''} and data start fresh",
        ]
        return "; ".join(notes)


class InitialGenerator(NamedTuple):
    """weights: they fit the recipe's model. fingerprint: of the source's weights. grids: as in `InitRecord`."""

    weights: Weights
    fingerprint: str
    grids: str | None


def read_initial_weights(config: TokenizerRun) -> tuple[Weights, str]:
    """Reads the weights that ``init_from.source`` names, and their tokenizer's fingerprint. Raises a one-line
    TrainerError if they are missing or do not fit the recipe's model."""
    with _naming_source(config):
        weights = _read(config, "tokenizer", TokenizerConfig)
        with torch.device("meta"):
            tokenizer = Tokenizer(config.model)
        check_weights(weights.tensors, tokenizer.state_dict(), f"{weights.origin}: it")
        tokenizer.load_state_dict(weights.tensors, assign=True)
    return weights, tokenizer.fingerprint()


def read_initial_generator(config: GeneratorRun) -> InitialGenerator:
    """Reads the weights that ``init_from.source`` names, with a row of ``grid_emb`` for each grid of the recipe: the
    source's row of this grid, if it was trained, or zeros, which change nothing. Raises a one-line TrainerError if they
    are missing, do not fit the recipe's model, or were trained on the codes of another tokenizer."""
    with _naming_source(config):
        weights = _read(config, "generator", TransformerConfig)
        ours = config.tokenizer.fingerprint
        if None not in (weights.tokenizer, ours) and weights.tokenizer != ours:
            raise ModelError(
                f"it was trained on codes of the tokenizer {weights.tokenizer}, and the codes here are of {ours}: name "
                "a generator of this tokenizer"
            )
        default = TransformerConfig()
        grids = {key: weights.config.get(key) or getattr(default, key) for key in ("grid", "grids")}
        source = replace(config.model, **grids)
        with torch.device("meta"):
            expected = Transformer(source).state_dict()
        check_weights(weights.tensors, expected, f"{weights.origin}: it")
        _check_classes(config)
        return _with_grids(config.model, weights, source)


def saved_classes(checkpoint: Path) -> dict[str, int] | None:
    """The classes.json of a generator's run or export, by a path from `find_checkpoint`; None if there is none. Raises
    DataError."""
    from model_zoo.io.load import is_standalone  # slow to import

    path = (checkpoint if is_standalone(checkpoint) else run_folder(checkpoint)) / CLASSES_NAME
    return read_classes(path) if path.is_file() else None


def _check_classes(config: GeneratorRun) -> None:
    """Raises DataError where the data number classes otherwise than the source did."""
    from model_zoo.io.load import find_checkpoint  # slow to import

    if config.loss.label_dropout == 1:
        return
    source = Path(config.init_from.source)
    theirs = saved_classes(find_checkpoint(source))
    if theirs and (ours := data.class_numbers(config.data)):
        merged_classes([("the data", ours), (f"init_from.source={source}", theirs)])


def _with_grids(model: TransformerConfig, weights: Weights, source: TransformerConfig) -> InitialGenerator:
    """Fits the source's ``grid_emb`` to the recipe's grids. Raises ModelError where the recipe has no such table."""
    fingerprint = fingerprint_of(weights.tensors)
    there, here = (", ".join(map(grid_name, config.all_grids)) for config in (source, model))
    learned = trained_grids(source, weights.trained_g)
    if source.grids and not model.grids:
        raise ModelError(f"it has embeddings of the grids {there}: give model.grids, a list of these or of others")
    if not model.grids:
        return InitialGenerator(weights, fingerprint, None if here == there else f"grid {here}, of the source {there}")
    table_gw = torch.zeros(len(model.grids), model.width)
    kept = [grid for grid in model.all_grids if source.grids and grid in learned]
    for grid in kept:
        table_gw[model.all_grids.index(grid)] = weights.tensors[GRID_TABLE][source.all_grids.index(grid)]
    new = [grid for grid in model.all_grids if grid not in kept]
    parts = [f"{', '.join(map(grid_name, kept))} of the source"] if kept else []
    parts += [f"{', '.join(map(grid_name, new))} start at zero"] if new else []
    trained_g = torch.tensor([grid in learned for grid in model.all_grids])
    found = weights._replace(tensors=weights.tensors | {GRID_TABLE: table_gw}, trained_g=trained_g)
    return InitialGenerator(found, fingerprint, f"embeddings of grids: {', '.join(parts)} (the source has {there})")


def _read(config: TokenizerRun | GeneratorRun, kind: str, schema: type) -> Weights:
    """The weights that ``init_from`` names, of a model of the recipe's shape. Raises ModelError."""
    from model_zoo.io.load import available_weights, read_newest, read_weights  # slow to import, only needed here

    def read(checkpoint: Path) -> Weights:
        first, *_ = available_weights(checkpoint).get(kind, ["raw"])  # the EMA's if it has any
        return read_weights(checkpoint, kind, config.init_from.weights or first)

    weights = read_newest(Path(config.init_from.source), read)
    _check_shape(vars(config.model), weights, vars(schema()))
    return weights


@contextlib.contextmanager
def _naming_source(config: TokenizerRun | GeneratorRun) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        init_from = config.init_from
        weights = f" (init_from.weights={init_from.weights})" if init_from.weights else ""
        raise TrainerError(f"init_from.source={init_from.source}{weights}: {error}") from error


def _check_shape(ours: dict, weights: Weights, defaults: dict) -> None:
    """Raises ModelError if the source's model differs from the recipe's."""
    # A key that an older source does not have has its default. The published layout names no quantizer.
    theirs = {key: value for key, value in defaults.items() if key != "quantizer"} | weights.config
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
