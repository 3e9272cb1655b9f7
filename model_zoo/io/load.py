"""Loads models from any source: runs, published checkpoints, exports, and names on the Hugging Face hub."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from model_zoo.conditions import assumed_trained
from model_zoo.config import TokenizerConfig, TransformerConfig
from model_zoo.errors import ModelError
from model_zoo.io.emu_folder import CHECKPOINT, is_emu_folder
from model_zoo.io.export_format import CONFIG, MODEL, is_export, read_export, weights_in_export
from model_zoo.io.manifest import STATE, check
from model_zoo.io.published_ckpt import SUFFIXES, is_published, open_published, read_published
from model_zoo.io.run_layout import checkpoint_step, run_folder
from model_zoo.io.sharded_tensors import ShardedTensors
from model_zoo.io.weights import KINDS, SETS, TRAINED, TRAINED_G, Average, Weights, check_weights, heads_encoder
from model_zoo.tokenizer import Tokenizer
from model_zoo.transformer import Transformer, rope_tables

Model = TypeVar("Model", bound=nn.Module)
Result = TypeVar("Result")


def load_tokenizer(source: str | Path, weights: str = "ema") -> Tokenizer:
    """A trained or published tokenizer, in eval mode on the CPU.

    source, weights: as in `read_weights`: a run, a published file or an export (of a tokenizer, or of a generator that
    contains its tokenizer), the folder of Emu3.5's tokenizer, or a name on the Hugging Face hub.
    Raises ModelError if the source, its checkpoint, or the requested weights do not exist.
    """
    return build_model(read_weights(source, "tokenizer", weights), "tokenizer", TokenizerConfig, Tokenizer)


def load_generator(source: str | Path, weights: str = "ema") -> Transformer:
    """A trained or published generator, in eval mode on the CPU, in fp32.

    source, weights: as in `read_weights`: a run, a published file (assumed to have 16 x 16 codes per image), an
    export, or a name on the Hugging Face hub.
    Raises ModelError if the source, its checkpoint, or the requested weights do not exist.
    """
    return build_generator(read_weights(source, "generator", weights))


def build_generator(found: Weights) -> Transformer:
    """A generator of weights that were read, in eval mode on the CPU, in fp32. Raises ModelError."""

    def build(config: TransformerConfig) -> Transformer:
        with torch.device("meta"):  # large models take long to initialise, and every weight is replaced
            transformer = Transformer(config)
        transformer.rope_tp2 = rope_tables(config)  # not stored in checkpoints
        return transformer

    return build_model(found, "generator", TransformerConfig, build, assign=True).float()


def build_model(found: Weights, kind: str, schema: type, build: Callable[..., Model], assign: bool = False) -> Model:
    """Builds a model from weights that were read, in eval mode on the CPU.

    kind: of KINDS. schema: class of the model's configuration. build: makes the model from the configuration. assign:
    the model uses the given tensors instead of copying them, so it may be built on the meta device. Raises ModelError.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), found.config))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise _no_config(found.recipe, kind, error) from error
    with torch.device("meta"):  # before memory is spent
        expected = build(config).state_dict()
    check_weights(found.tensors, expected, f"{found.origin} does not hold the weights of {found.recipe}: it")
    model = build(config)
    model.load_state_dict(found.tensors, strict=True, assign=assign)
    if found.trained_c is not None:
        model.trained_c = found.trained_c
    if found.trained_g is not None:
        model.trained_g = found.trained_g
    return model.eval()


def read_weights(source: str | Path, kind: str, weights: str = "ema") -> Weights:
    """Reads a model's configuration and weights, without building the model.

    source: a run's folder (its newest complete checkpoint is read); a checkpoint's folder in a run; a published
    file or folder (see `published_ckpt`); the folder of an export; or, if no such path exists, a name ``owner/name`` or
    ``owner/name@revision`` on the Hugging Face hub.
    kind: of KINDS.
    weights: ``ema`` or ``raw``. A published checkpoint or an export without EMA has one set, which ``ema`` returns.
    The hashes of the files are compared before. Raises ModelError if the source, its
    checkpoint, or the requested weights do not exist, and for a file that is not what was written.
    """
    if weights not in SETS:
        raise ModelError(f"weights must be 'ema' or 'raw', not {weights!r}")

    def read(checkpoint: Path) -> Weights:
        if is_published(checkpoint):
            return read_published(checkpoint, kind, weights)
        if is_export(checkpoint):
            return read_export(checkpoint, kind, weights)
        return _read_run(checkpoint, kind, weights)

    return read_newest(Path(source), read)


def is_standalone(source: Path) -> bool:
    """Whether the source is a published checkpoint or an export, which do not belong to a run."""
    return is_published(source) or is_export(source)


def read_newest(source: Path, read: Callable[[Path], Result]) -> Result:
    """``read(find_checkpoint(source))``, again for a newer checkpoint of the run if it has one when reading fails:
    training removes older checkpoints, also those that are being read."""
    while True:
        checkpoint = find_checkpoint(source)
        try:
            return read(checkpoint)
        except Exception:
            if find_checkpoint(source) == checkpoint:
                raise


def find_checkpoint(source: Path) -> Path:
    """Resolves a source to the path to read: the newest checkpoint's folder of a run; the downloaded copy of a name on
    the hub; otherwise the source itself. Raises ModelError."""
    if is_hub_name(source):
        source = _download(source)
    if is_standalone(source):
        return source
    if (source / CHECKPOINT).is_file() and not (source / "checkpoints").exists():
        raise ModelError(
            f"{source} holds {CHECKPOINT}, but no {CONFIG} with ddconfig: copy the {CONFIG} of Emu3.5's tokenizer into "
            f"it, or give the file {source / CHECKPOINT}"
        )
    run = run_folder(source)
    if not (run / "config.yaml").is_file():
        raise ModelError(f"{run} is not a run folder (it has no config.yaml): give the folder that `ibq train` wrote")
    if source != run:
        return source
    latest = run / "checkpoints" / "latest"
    checkpoint = None
    try:
        while checkpoint != (checkpoint := latest.parent / latest.read_text(errors="replace").strip()):
            if checkpoint.is_dir():
                return checkpoint
    except (FileNotFoundError, NotADirectoryError):
        message = f"{run} has no finished checkpoint yet: train on, or lower trainer.checkpoint_every_steps"
        raise ModelError(message) from None
    except OSError as error:
        raise ModelError(f"cannot read {latest}: {error.strerror}; let this user read the run's folder") from error
    raise ModelError(f"{latest} names {checkpoint.name}, which does not exist; write another checkpoint's name there")


def is_hub_name(source: Path) -> bool:
    """Whether the source is a name ``owner/name`` or ``owner/name@revision`` on the hub: neither this path nor a folder
    ``owner`` exists."""
    looks_so = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", str(source), re.ASCII)
    is_path = source.suffix in SUFFIXES or source.exists() or Path(source.parts[0]).exists()
    return bool(looks_so) and not is_path


def _download(name: Path) -> Path:
    """Downloads a model and returns its path in the Hugging Face cache: the folder of Emu3.5's tokenizer, the
    repository's first ``.ckpt``, or the folder of an export. Cached files are not downloaded again and work offline.
    Raises ModelError."""
    repository, _, revision = str(name).partition("@")
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModelError(
            f"{name} does not exist; names on the model hub need a package: pip install huggingface_hub"
        ) from error
    where = {"repo_id": repository, "revision": revision or None}
    # The classes of exceptions depend on the HTTP library that a version of the package uses, so catch all.
    try:
        files = huggingface_hub.list_repo_files(**where)
        checkpoints = sorted(file for file in files if file.endswith(".ckpt"))
        beside = [CONFIG] if checkpoints[:1] == [CHECKPOINT] and CONFIG in files else []
        wanted = checkpoints[:1] + beside or ["*.safetensors", "*.json", f"*{CONFIG}"]
        folder = Path(huggingface_hub.snapshot_download(**where, allow_patterns=wanted))
    except Exception as error:
        try:
            folder = Path(huggingface_hub.snapshot_download(**where, local_files_only=True))
        except Exception:
            detail = (str(error).split("\n")[0] or type(error).__name__)[:200]
            raise ModelError(
                f"{name} is neither a path nor available on the model hub ({detail}): give the path of a file"
            ) from error
    if is_emu_folder(folder):
        return folder
    checkpoints = sorted(folder.rglob("*.ckpt"))
    if not checkpoints and not is_export(folder):
        raise ModelError(f"{name} on the model hub holds neither a .ckpt nor {MODEL} with {CONFIG}: choose another")
    return checkpoints[0] if checkpoints else folder


def available_weights(checkpoint: Path) -> dict[str, list[str]]:
    """Which of ``ema`` and ``raw`` weights a path from `find_checkpoint` holds, by kind of model. Raises ModelError."""
    if is_published(checkpoint):
        parts = open_published(checkpoint).parts
        return {kind: ["ema", "raw"] if part.model_ema else ["raw"] for kind, part in parts.items()}
    if is_export(checkpoint):
        return weights_in_export(checkpoint)
    files = ShardedTensors(checkpoint)
    found = {kind: [weights for weights in SETS if files.names(_prefix(kind, weights))] for kind in KINDS}
    return {kind: sets for kind, sets in found.items() if sets}


def _prefix(kind: str, weights: str) -> str:
    """What the names of a model's tensors start with in a run's checkpoint."""
    return f"{kind}_ema/" if weights == "ema" else f"{kind}/"


class RunSettings(NamedTuple):
    """Settings of a run, by section. path: where they were read, for messages."""

    recipe: dict
    path: Path


def run_settings(checkpoint: Path) -> RunSettings:
    """The settings that the checkpoint of a run was trained with; those of the run's config.yaml where an earlier
    version wrote the checkpoint. (A resume that fails has changed config.yaml already, and a user may have edited it.)
    Raises what reading YAML raises."""
    path = checkpoint / STATE
    settings = (json.loads(path.read_bytes()) if path.exists() else {}).get("settings") or {}
    if not any(key.startswith("model.") for key in settings):
        path = run_folder(checkpoint) / "config.yaml"
        return RunSettings(OmegaConf.to_container(OmegaConf.load(path)), path)
    recipe: dict = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        section = recipe
        for one in sections:
            section = section.setdefault(one, {})
        section[name] = value
    return RunSettings(recipe, path)


def _read_run(checkpoint: Path, kind: str, weights: str) -> Weights:
    path, files = run_folder(checkpoint) / "config.yaml", ShardedTensors(checkpoint)
    prefix = _prefix(kind, weights)
    check(checkpoint)
    if not files.names(prefix):
        raise _missing(files, kind, weights)
    try:
        recipe, path = run_settings(checkpoint)
        config, decay = dict(recipe["model"]), (recipe.get("ema") or {}).get("decay")
        trained_c = _trained_classes(files, recipe) if kind == "generator" else None
        tokenizer = (recipe.get("tokenizer") or {}).get("fingerprint")
        heads = recipe.get("discriminator") or {}
        encoder = heads_encoder(heads.get("kind", ""), heads.get("encoder", ""), heads.get("sha256"))
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
        step=checkpoint_step(checkpoint),
        trained_c=trained_c,
        tokenizer=tokenizer,
        trained_g=files.tensor(TRAINED_G) if TRAINED_G in files else None,
        heads_encoder=encoder,
    )


def _trained_classes(files: ShardedTensors, recipe: dict) -> Tensor:
    """See `model_zoo.conditions`. Runs of earlier versions did not record it."""
    if TRAINED in files:
        return files.tensor(TRAINED)
    classes = recipe["model"].get("classes", TransformerConfig.classes)
    return assumed_trained(classes, (recipe.get("loss") or {}).get("label_dropout", 0.1))


def _missing(files: ShardedTensors, kind: str, weights: str) -> ModelError:
    for other in KINDS:
        if other != kind and files.names(f"{other}/"):
            return ModelError(f"{files.folder} is from a {other} run: give a {kind} run")
    ways = "--weights raw, init_from.weights=raw, in Python weights='raw'"
    fix = f"; ask for the raw weights ({ways})" if files.names(f"{kind}/") else ""
    return ModelError(f"{files.folder} holds no {weights} weights of a {kind}{fix}")


def _no_config(where: str, kind: str, error: Exception) -> ModelError:
    detail = (str(error).splitlines() or [type(error).__name__])[0]
    return ModelError(f"{where} does not describe a {kind} ({detail})")
