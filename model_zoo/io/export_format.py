"""Exported models: a folder of safetensors files with plain parameter names, a configuration, and a model card.

``model.safetensors`` holds the EMA weights if there are any, otherwise the raw weights. ``raw.safetensors`` holds the
raw weights if ``model.safetensors`` holds EMA weights. ``discriminator.safetensors`` and
``discriminator_ema.safetensors`` hold the discriminator trained with a tokenizer. A generator's folder may contain its
tokenizer's, ``tokenizer/``, and the names of its classes, ``classes.json``.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model_zoo.errors import ModelError
from model_zoo.io.hashing import is_known_sha256, remember_sha256, sha256_of
from model_zoo.io.sharded_tensors import save_tensors
from model_zoo.io.weights import (
    KINDS,
    SETS,
    Average,
    Weights,
    read_codes_of,
    read_trained_classes,
    read_trained_grids,
)

MODEL, RAW, CONFIG, CARD = "model.safetensors", "raw.safetensors", "config.yaml", "README.md"
DISCRIMINATOR, DISCRIMINATOR_EMA = "discriminator.safetensors", "discriminator_ema.safetensors"
TOKENIZER = "tokenizer"
HEADS_ENCODER = "discriminator_encoder"  # the key of `Weights.heads_encoder`


def is_export(source: Path) -> bool:
    """Whether the path is a folder for `read_export`."""
    return (source / MODEL).is_file()


def read_export(folder: Path, kind: str, weights: str) -> Weights:
    """Reads a model's configuration and weights from an export. Arguments: see `read_weights`. Raises ModelError,
    also for a file of these that is not what was written."""
    folder, about = _of_kind(folder, kind)
    file = folder / (RAW if weights == "raw" and about["weights"] == "ema" else MODEL)
    if not file.is_file():
        raise ModelError(f"{folder} has no raw weights, only EMA weights: use --weights ema")
    beside = {name: folder / name for name in (DISCRIMINATOR, DISCRIMINATOR_EMA) if (folder / name).is_file()}
    for path in (file, *beside.values()):
        if wrong := _wrong(path, about["sha256"].get(path.name)):
            raise ModelError(f"{folder} is damaged: {wrong}; copy or export it again")
    tensors = {name: read_tensors(path) for name, path in beside.items()}
    found = "raw" if file.name == RAW else about["weights"]
    return Weights(
        about["model"],
        read_tensors(file),
        tensors.get(DISCRIMINATOR),
        f"{folder} ({found} weights)",
        str(folder / CONFIG),
        found,
        tensors.get(DISCRIMINATOR_EMA),
        Average(**about["average"]) if about.get("average") else None,
        about.get("step"),
        read_trained_classes(about, about["model"], folder / CONFIG),
        read_codes_of(about, folder / CONFIG),
        trained_g=read_trained_grids(about, about["model"], folder / CONFIG),
        heads_encoder=about.get(HEADS_ENCODER),
    )


def weights_in_export(folder: Path) -> dict[str, list[str]]:
    """Which of ``ema`` and ``raw`` weights an export holds, by kind of model. Raises ModelError."""
    about = read_about(folder)
    has_raw = about["weights"] == "raw" or (folder / RAW).is_file()
    found = {about["kind"]: ["ema"] * (about["weights"] == "ema") + ["raw"] * has_raw}
    return found | (weights_in_export(folder / TOKENIZER) if is_export(folder / TOKENIZER) else {})


def _of_kind(folder: Path, kind: str) -> tuple[Path, dict]:
    """The folder that holds a model of this kind (``folder`` or the tokenizer's inside it), and its ``config.yaml``."""
    about = read_about(folder)
    if about["kind"] == kind:
        return folder, about
    if kind == TOKENIZER and is_export(folder / TOKENIZER):
        return _of_kind(folder / TOKENIZER, kind)
    raise ModelError(f"{folder} holds no {kind}: it is a {about['kind']}'s export")


def read_about(folder: Path) -> dict:
    """An export's ``config.yaml``. Raises ModelError."""
    path = folder / CONFIG
    try:
        about = yaml.safe_load(path.read_text())
        wanted = {"kind": str, "weights": str, "model": dict, "sha256": dict}
        if wrong := [key for key, of in wanted.items() if not isinstance(about.get(key), of)]:
            raise ValueError(f"it lacks {wrong[0]}")
        for key, choices in {"kind": KINDS, "weights": SETS}.items():
            if about[key] not in choices:
                raise ValueError(f"{key}: {about[key]} is not one of {', '.join(choices)}")
        if not isinstance(about.get("step"), int | None):
            raise ValueError(f"step: {about['step']} is not a whole number")
        if about.get("average"):
            Average(**about["average"])
        return about
    except FileNotFoundError as error:
        raise ModelError(f"{folder} is not an export: it has no {CONFIG}") from error
    except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} does not describe an exported model ({detail})") from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises ModelError if it is damaged."""
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged ({' '.join(str(error).split())}): copy or export it again") from error


def damaged_file(folder: Path) -> str | None:
    """Compares the hash of each file of an export with ``config.yaml``. Returns what is wrong, or None."""
    for name, sha256 in read_about(folder)["sha256"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if wrong := _wrong(folder / name, sha256):
            return wrong
    return damaged_file(folder / TOKENIZER) if is_export(folder / TOKENIZER) else None


def _wrong(file: Path, sha256: str | None) -> str | None:
    """What is wrong with a file of an export. sha256: None if it is not known. Reads a file once per process, unless it
    changes."""
    if sha256 is None or is_known_sha256(file, sha256):
        return None
    if sha256_of(file) != sha256:
        return f"{file.name} is not what was written (its sha256 differs)"
    remember_sha256(file, sha256)
    return None


def fill_export(
    folder: Path, about: dict, files: dict[str, dict[str, Tensor]], texts: dict[str, str], card: str
) -> None:
    """Writes an export into an existing folder. about: ``config.yaml`` without the hashes of files. files, texts: by
    their names."""
    for name, tensors in files.items():
        save_tensors(folder / name, tensors, {"format": "pt"})
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    hashes = {name: sha256_of(folder / name) for name in (*files, *texts)}
    (folder / CONFIG).write_text(yaml.safe_dump({**about, "sha256": hashes}, sort_keys=False), encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder next to ``out`` and renames it to ``out`` at the end. On failure it is removed. For one
    writer of ``out`` at a time. Raises ModelError if ``out`` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} already exists: choose another --out, or remove it")
    out = out.resolve()
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed job
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
