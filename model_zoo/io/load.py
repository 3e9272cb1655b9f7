"""Models out of whatever holds one: runs, published checkpoints, exports, and names on the model hub."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from model_zoo.errors import ModelError
from model_zoo.io.export_format import held_by_export, is_export, read_export
from model_zoo.io.hub import download, is_hub_name
from model_zoo.io.published_ckpt import is_published, open_published, read_published
from model_zoo.io.sharded_tensors import ShardedTensors, run_of
from model_zoo.io.weights import KINDS, SETS, Average, Weights, check_names

Model = TypeVar("Model", bound=nn.Module)


def load_model(
    source: str | Path, weights: str, kind: str, schema: type, build: Callable[..., Model], assign: bool = False
) -> Model:
    """The model of a source, as `read_weights` takes it, in eval mode on the CPU.

    kind: of KINDS. build: makes the model of a ``schema``, its configuration. assign: the model may be of the meta
    device; its weights are the very tensors that were read. Raises ModelError.
    """
    return as_model(read_weights(source, kind, weights), kind, schema, build, assign)


def as_model(found: Weights, kind: str, schema: type, build: Callable[..., Model], assign: bool = False) -> Model:
    """`load_model` of weights that were read."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), found.config))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise _no_config(found.recipe, kind, error) from error
    model = build(config)
    check_names(found.tensors, model.state_dict(), f"{found.origin} does not hold the weights of {found.recipe}: it")
    model.load_state_dict(found.tensors, strict=True, assign=assign)
    return model.eval()


def read_weights(source: str | Path, kind: str, weights: str = "ema") -> Weights:
    """A model's configuration and weights, without making the model.

    source: a run's folder, whose newest complete checkpoint is taken; a checkpoint's folder in it; a published
    ``.ckpt``; the folder of an export; or, where there is no such path, the name ``owner/name`` or
    ``owner/name@revision`` of one on the model hub. kind: of KINDS. weights: ``ema`` or ``raw``; of a published
    checkpoint or an export without averages ``ema`` are the only ones.
    Raises ModelError where the source, a checkpoint in it, or the asked weights are missing.
    """
    if weights not in SETS:
        raise ModelError(f"weights must be 'ema' or 'raw', not {weights!r}")
    source = find_checkpoint(Path(source))
    if is_published(source):
        return read_published(source, kind, weights)
    if is_export(source):
        return read_export(source, kind, weights)
    return _read_run(source, kind, weights)


def stands_alone(source: Path) -> bool:
    """Whether it is a published checkpoint or an export, which tell nothing of a run."""
    return is_published(source) or is_export(source)


def find_checkpoint(source: Path) -> Path:
    """What is to be read: the newest checkpoint's folder of a run; or the source itself, where it is a checkpoint's
    folder, a published checkpoint or an export; or where the hub's copy lies. Raises ModelError."""
    if is_hub_name(source):
        source = download(source)
    if stands_alone(source):
        return source
    run = run_of(source)
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


def held(checkpoint: Path) -> dict[str, list[str]]:
    """Kind of model -> which of ``ema`` and ``raw`` weights, of what `find_checkpoint` gives. Raises ModelError."""
    if is_published(checkpoint):
        parts = open_published(checkpoint).parts
        return {kind: ["ema", "raw"] if part.model_ema else ["raw"] for kind, part in parts.items()}
    if is_export(checkpoint):
        return held_by_export(checkpoint)
    files = ShardedTensors(checkpoint)
    sets = {kind: {"ema": f"{kind}_ema/", "raw": f"{kind}/"} for kind in KINDS}
    found = {kind: [name for name, prefix in of.items() if files.names(prefix)] for kind, of in sets.items()}
    return {kind: names for kind, names in found.items() if names}


def _read_run(checkpoint: Path, kind: str, weights: str) -> Weights:
    path, files = run_of(checkpoint) / "config.yaml", ShardedTensors(checkpoint)
    prefix = f"{kind}_ema/" if weights == "ema" else f"{kind}/"
    if not files.names(prefix):
        raise _lacking(files, kind, weights)
    try:
        recipe = OmegaConf.to_container(OmegaConf.load(path))
        config, decay = dict(recipe["model"]), (recipe.get("ema") or {}).get("decay")
    except (OmegaConfBaseException, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise _no_config(str(path), kind, error) from error
    return Weights(
        config,
        files.tensors(prefix),
        files.tensors("discriminator/") or None if kind == "tokenizer" else None,
        f"{checkpoint} ({weights} weights)",
        str(path),
        weights,
        average=Average(decay) if decay else None,
        step=_step(checkpoint),
    )


def _step(checkpoint: Path) -> int | None:
    name = checkpoint.name.removeprefix("step_")
    return int(name) if name.isdecimal() else None


def _lacking(files: ShardedTensors, kind: str, weights: str) -> ModelError:
    for other in KINDS:
        if other != kind and files.names(f"{other}/"):
            return ModelError(f"{files.folder} is of a {other}'s run: name a {kind}'s")
    mend = "; ask for the raw weights (--weights raw)" if files.names(f"{kind}/") else ""
    return ModelError(f"{files.folder} holds no {weights} weights of a {kind}{mend}")


def _no_config(where: str, kind: str, error: Exception) -> ModelError:
    detail = (str(error).splitlines() or [type(error).__name__])[0]
    return ModelError(f"{where} describes no {kind} ({detail})")
