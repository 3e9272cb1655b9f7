"""Models out of run folders and published checkpoints."""

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from model_zoo import ModelError
from model_zoo.interop import is_published, read_published
from model_zoo.pieces import PieceFiles, run_of

KINDS = ("tokenizer", "generator")  # of models that runs train; checkpoints name their pieces after them
Model = TypeVar("Model", bound=nn.Module)


def load_model(
    source: str | Path, weights: str, kind: str, schema: type, build: Callable[..., Model], assign: bool = False
) -> Model:
    """The model of a run or a published checkpoint, in eval mode on the CPU.

    source: a run's folder, whose newest complete checkpoint is taken; a checkpoint's folder in it; or a published
    ``.ckpt``. weights: ``ema`` or ``raw``. kind: of KINDS. build: makes the model of a ``schema``, its configuration.
    assign: the model may be of the meta device; its weights are the very tensors that were read.
    Raises ModelError where the folder, a checkpoint in it, or the asked weights are missing.
    """
    if weights not in ("ema", "raw"):
        raise ModelError(f"weights must be 'ema' or 'raw', not {weights!r}")
    source = Path(source)
    if is_published(source):
        shape, tensors = read_published(source, kind, weights)
        model, recipe = build(schema(**shape)), "a published model"
    else:
        source = find_checkpoint(source)
        recipe = run_of(source) / "config.yaml"
        files, prefix = _files(source, kind, weights)
        model, tensors = build(_config(recipe, kind, schema)), files.tensors(prefix)
    try:
        model.load_state_dict(tensors, strict=True, assign=assign)
    except RuntimeError as error:
        raise ModelError(f"{source} does not hold the weights of {recipe} ({_detail(error)})") from error
    return model.eval()


def find_checkpoint(source: Path) -> Path:
    """A checkpoint's folder: the newest of a run, or the one that is given; a published checkpoint is one. Raises
    ModelError."""
    run = run_of(source)
    if is_published(source):
        return source
    if not (run / "config.yaml").is_file():
        raise ModelError(f"{run} is no run folder (no config.yaml in it): give the folder that `ibq train` wrote")
    if source != run:
        return source
    latest = run / "checkpoints" / "latest"
    if not latest.is_file():
        raise ModelError(f"{run} holds no finished checkpoint yet: train on, or lower trainer.checkpoint_every_steps")
    checkpoint = latest.parent / latest.read_text(errors="replace").strip()
    if not checkpoint.is_dir():
        raise ModelError(
            f"{latest} names {checkpoint.name}, which does not exist; write another checkpoint's name there"
        )
    return checkpoint


def _files(checkpoint: Path, kind: str, weights: str) -> tuple[PieceFiles, str]:
    """The checkpoint's tensors, and what the names of the asked ones begin with."""
    prefix = f"{kind}_ema/" if weights == "ema" else f"{kind}/"
    files = PieceFiles(checkpoint)
    if files.names(prefix):
        return files, prefix
    for other in KINDS:
        if other != kind and files.names(f"{other}/"):
            raise ModelError(f"{checkpoint} is of a {other}'s run: name a {kind}'s")
    mend = "; ask for the raw weights (--weights raw)" if files.names(f"{kind}/") else ""
    raise ModelError(f"{checkpoint} holds no {weights} weights of a {kind}{mend}")


def _config(path: Path, kind: str, schema: type):
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path)["model"]))
    except (OmegaConfBaseException, yaml.YAMLError, KeyError, TypeError, ValueError, OSError) as error:
        detail = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} describes no {kind} ({detail})") from error


def _detail(error: RuntimeError) -> str:
    """The first complaint of `load_state_dict`, behind its heading."""
    return textwrap.shorten(str(error).splitlines()[1], 200, placeholder=" ...")
