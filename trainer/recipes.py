"""Finds, reads and checks recipes: a YAML file and ``key=value`` overrides make a `trainer.config.RunConfig`.

An unknown key is an error. A former name of a key is translated in a file; on the command line it is an error that
names the new one.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from functools import cache
from importlib import resources
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config import MOST_CODES
from data.unfinished import complete_file
from model_zoo.config import WITH_CODEBOOK, PerceptualLoss, TokenizerConfig, broken_rule
from trainer import TrainerError
from trainer.config import DiscriminatorConfig, GeneratorRun, RunConfig, TokenizerRun
from trainer.values import changed_texts, parse_value

TASKS = {"tokenizer": TokenizerRun, "generator": GeneratorRun}
EVALUATION = "evaluation"  # the folder of recipes for evaluations
ABLATIONS = "ablations"  # the folder of recipes for ablations
# Former names of keys and sections (with all keys of the section), and of values.
RENAMED_KEYS = {"trainer.keep_checkpoints": "trainer.keep_last", "start": "init_from"}
RENAMED_VALUES = {("engine.kind", "replicated"): "ddp"}
# By task: defaults for run folders that were written before these keys existed.
FORMER = {"tokenizer": {"model": {"codebook_init": "normal"}}}


def recipe_paths(kinds: Iterable[str] = TASKS) -> dict[str, Path]:
    """Returns {name: file} of the package's recipes of these kinds."""
    folder = Path(str(resources.files("model_zoo"))) / "recipes"
    return {path.stem: path for kind in kinds for path in sorted((folder / kind).glob("*.yaml"))}


def find_recipe(recipe: str, kinds: Iterable[str] = TASKS) -> Path:
    """Finds a recipe by its name, or as a YAML file. Raises a one-line TrainerError."""
    paths = recipe_paths(kinds)
    if recipe in paths:
        return paths[recipe]
    if recipe.endswith((".yaml", ".yml")):
        if not Path(recipe).is_file():
            raise TrainerError(f"recipe file {recipe} does not exist")
        return Path(recipe)
    if recipe in recipe_paths([EVALUATION]):
        raise TrainerError(f"{recipe} trains nothing: give it to `ibq evaluate reconstruction RUN --recipe {recipe}`")
    if recipe in recipe_paths([ABLATIONS]):
        raise TrainerError(f"{recipe} is a table of several trainings: `ibq ablate {recipe}`")
    if recipe in recipe_paths():
        raise TrainerError(f"{recipe} is a recipe for training; here it is one of {', '.join(paths)}")
    raise TrainerError(f"unknown recipe {recipe!r}{_closest(recipe, paths)}; `ibq recipes` lists them")


def load_recipe(recipe: str, overrides: list[str]) -> RunConfig:
    """Reads a recipe, by its name or from a YAML file, with ``key=value`` overrides. Raises a one-line TrainerError."""
    return _resolve(find_recipe(recipe), overrides)


def load_run_config(run: str | Path, overrides: list[str]) -> RunConfig:
    """Reads the configuration of a run folder, with ``key=value`` overrides. Raises a one-line TrainerError."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise TrainerError(f"{run} is not a run folder (it has no config.yaml): give the folder that `ibq train` wrote")
    return _resolve(path, overrides, FORMER)


def former_defaults(task: str) -> DictConfig:
    """The defaults of a run that was written before keys existed. task: of TASKS."""
    return OmegaConf.merge(_schema(task), FORMER.get(task, {}))


def save_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved configuration. An existing file stays intact if the process is killed meanwhile."""
    with complete_file(path) as temporary:
        OmegaConf.save(OmegaConf.structured(config), temporary)


def read_recipe(path: Path) -> DictConfig:
    """Reads a recipe file without checking its keys. Raises a one-line TrainerError."""
    try:
        from_file = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise TrainerError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(from_file):
        raise TrainerError(f"{path} is not a recipe: it must map keys to values")
    return from_file


def read_as(schema: type, path: Path):
    """Reads a file as an object of the dataclass ``schema``. Raises a one-line TrainerError."""
    node = OmegaConf.structured(schema)
    try:
        return OmegaConf.to_object(OmegaConf.merge(node, read_recipe(path)))
    except OmegaConfBaseException as error:
        raise TrainerError(f"{path}: {_explain(error, node)}") from error


def renamed(override: str) -> str:
    """Replaces former names of key and value in an override."""
    key, equals, value = override.partition("=")
    key = renamed_key(key)
    return f"{key}{equals}{RENAMED_VALUES.get((key, value), value)}"


def renamed_key(key: str) -> str:
    """The present name of a key."""
    for old, new in RENAMED_KEYS.items():
        if key == old or key.startswith(f"{old}."):
            key = new + key.removeprefix(old)
    return key


def _rename(from_file: DictConfig, path: Path) -> None:
    """Replaces former names of keys and values in a file's content."""

    def parent_of(key: str):
        parent = from_file.get(key.rpartition(".")[0]) if "." in key else from_file
        return parent if OmegaConf.is_dict(parent) else {}

    for old, new in RENAMED_KEYS.items():
        parent, old_name, new_name = parent_of(old), old.rpartition(".")[2], new.rpartition(".")[2]
        if old_name in parent:
            if new_name in parent:
                raise TrainerError(f"{path}: {old} is called {new} now, and both are given: remove {old}")
            parent[new_name] = parent.pop(old_name)
    for (key, old), new in RENAMED_VALUES.items():
        parent, name = parent_of(key), key.rpartition(".")[2]
        if parent.get(name) == old:
            parent[name] = new


def _resolve(path: Path, overrides: list[str], defaults: dict | None = None) -> RunConfig:
    """Merges schema, defaults, file and overrides, and checks the result. defaults: of runs, by
    task; replace the schema's."""
    from_file = read_recipe(path)
    _rename(from_file, path)
    task = from_file.get("task", "tokenizer")
    if task not in TASKS:
        raise TrainerError(f"{path}: task={task} is unknown: choose one of {', '.join(TASKS)}")
    schema = _schema(task)
    _check_texts(path, TASKS[task], from_file)
    try:
        merged = OmegaConf.merge(schema, (defaults or {}).get(task, {}), from_file)  # a copy
    except OmegaConfBaseException as error:
        raise TrainerError(f"{path}: {_explain(error, schema)}") from error
    keys = _keys_of(overrides, schema)
    if "task" in keys:
        raise TrainerError(f"task= cannot be changed: {path.stem} is a recipe for a {task}")
    if defaults is not None and "engine.kind" in keys:
        kind = overrides[keys.index("engine.kind")].partition("=")[2]
        if parse_value(TASKS[task], "engine.kind", kind) != merged.engine.kind:
            merged.engine = schema.engine  # a resumed run does not take over the settings of its former engine
    for key, override in zip(keys, overrides, strict=True):
        try:
            _override(merged, key, parse_value(TASKS[task], key, override.partition("=")[2]), override)
        except UnicodeEncodeError as error:
            raise TrainerError(
                f"{key}: its value is not UTF-8, or the locale is not: set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
            ) from error
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            if OmegaConf.is_dict(section := OmegaConf.select(schema, key)):
                first = leaves(section, f"{key}.")[0]
                raise TrainerError(f"{override!r}: {key} is a section: set its keys, as in {first}=VALUE") from error
            raise TrainerError(f"{override!r}: {_explain(error, schema)}") from error
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise TrainerError(f"{path}: {_explain(error, schema)}") from error
    _check_fields(config)
    _check(config)
    if "engine.config" in keys and config.engine.kind != "deepspeed":
        raise TrainerError(f"engine.config is for engine.kind=deepspeed, not {config.engine.kind}: give that too")
    return config


def _check_texts(path: Path, schema: type, from_file: DictConfig) -> None:
    """Raises TrainerError for a path or a name that YAML takes for a number and would spell otherwise."""
    in_file = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    if not isinstance(in_file, dict):  # an empty file, or a word
        return
    for key, text in changed_texts(schema, OmegaConf.to_container(from_file), in_file):
        raise TrainerError(f"{path}: {key}: YAML reads {text} as a number or true or false: put it in quotes")


@cache
def _schema(task: str) -> DictConfig:
    """Returns the keys of a task's configuration with their types and defaults. Do not change it: copy it."""
    return OmegaConf.structured(TASKS[task])


def _keys_of(overrides: list[str], schema: DictConfig) -> list[str]:
    """Returns the key of each override. Raises TrainerError for one that is not ``key=value`` or uses a former name of
    something in the schema."""
    keys = []
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise TrainerError(f"{override!r} is not key=value, as in optimizer.lr=1e-4")
        if (new := renamed(override)) != override and new.partition("=")[0].split(".")[0] in schema:
            new_key = new.partition("=")[0]
            old, new = (key, new_key) if new_key != key else (override, new)
            raise TrainerError(f"{old} is called {new} now")
        if key in keys:
            raise TrainerError(f"{key} is given twice; put a pattern with braces in quotes, or the shell expands it")
        if override == "run=":
            raise TrainerError("run= is empty: name a folder")
        keys.append(key)
    return keys


def _override(config: DictConfig, key: str, value, override: str) -> None:
    """Sets one key in place. A number in the key is an index of a list: data.sources.0.weight=2."""
    if not any(part.isdecimal() for part in key.split(".")):
        changed = OmegaConf.create()
        OmegaConf.update(changed, key, value)
        OmegaConf.unsafe_merge(config, changed)  # merge() copies the whole configuration
        return
    try:
        OmegaConf.update(config, key, value)
    except (IndexError, AttributeError, TypeError, AssertionError) as error:
        raise TrainerError(f"{override!r}: there is no {key}; the first item of a list is 0") from error


def _check_fields(config, prefix: str = "") -> None:
    """Raises TrainerError for a value that breaks a rule in its field's metadata."""
    for field in dataclasses.fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _check_fields(value, f"{key}.")
        elif problem := broken_rule(value, field.metadata):
            raise TrainerError(f"{key}={value} {problem}")


def _check(config: RunConfig) -> None:
    """Raises TrainerError for values that contradict each other."""
    engine = config.engine
    if engine.kind != "fsdp2" and (engine.offload or engine.shard_over is not None or not engine.reshard):
        raise TrainerError(
            "engine.offload, engine.shard_over and engine.reshard are settings of engine.kind=fsdp2: remove them, or "
            "give that too"
        )
    if len(config.optimizer.betas) != 2:
        raise TrainerError(f"optimizer.betas={config.optimizer.betas} must be two numbers")
    if isinstance(config, TokenizerRun):
        _check_tokenizer(config)
    elif config.model.vocabulary > MOST_CODES:
        raise TrainerError(
            f"model.vocabulary={config.model.vocabulary} must be at most {MOST_CODES} (2^24), the codes that "
            "token shards hold: train on a tokenizer of fewer codes"
        )


# Keys of `TokenizerConfig` that only these quantizers use.
KEYS_OF_QUANTIZERS = {
    "logit_scale": ("ibq",),
    "learn_logit_scale": ("ibq",),
    "groups": ("lfq", "bsq"),
    "levels": ("fsq",),
    "bound": ("fsq",),
    "codebook_decay": ("vq_ema",),
    "restart_below": ("vq_ema",),
    **dict.fromkeys(("bridge_group", "bridge_width", "bridge_depth", "bridge_heads"), ("vqbridge",)),
    **dict.fromkeys(("codes", "table_dim"), ("vqgan_lc",)),
}


def _check_tokenizer(config: TokenizerRun) -> None:
    model = config.model
    if config.trainer.activation_checkpointing == "selective":
        raise TrainerError("trainer.activation_checkpointing=selective is for generators: use true for a tokenizer")
    if config.data.content != "images":
        raise TrainerError(f"data.content={config.data.content}: a tokenizer learns from images; leave it out")
    if not model.channel_multipliers:
        raise TrainerError("model.channel_multipliers=[] must have at least one level")
    if model.codebook_init == "features" and model.code_dim < 2 and model.quantizer in WITH_CODEBOOK:
        raise TrainerError("model.codebook_init=features needs a model.code_dim of 2 or more: use normal")
    for key, quantizers in KEYS_OF_QUANTIZERS.items():
        if getattr(model, key) != getattr(TokenizerConfig(), key) and model.quantizer not in quantizers:
            raise TrainerError(
                f"model.{key} is for model.quantizer={' or '.join(quantizers)}, not {model.quantizer}: leave it out"
            )
    if model.logit_scale != 1 and not model.normalize:
        raise TrainerError(f"model.logit_scale={model.logit_scale} needs model.normalize=true")
    if config.init_from.freeze and config.init_from.source is None:
        raise TrainerError(
            f"init_from.freeze={config.init_from.freeze} would freeze random weights: name trained ones with "
            "init_from.source=SOURCE"
        )
    if config.init_from.freeze == "encoder" and config.loss.semantic.weight > 0:
        raise TrainerError(
            f"loss.semantic.weight={config.loss.semantic.weight} needs codes that are trained, and "
            "init_from.freeze=encoder freezes them: set loss.semantic.weight=0, or do not freeze the encoder"
        )
    _check_networks_of_losses(config)
    first = config.loss.generator.start_step
    if first is not None and first < config.loss.discriminator.start_step:
        raise TrainerError(
            f"loss.generator.start_step={first} is before loss.discriminator.start_step="
            f"{config.loss.discriminator.start_step}: the adversarial loss would use an untrained discriminator"
        )


def _check_networks_of_losses(config: TokenizerRun) -> None:
    """Raises TrainerError for settings of a network that the recipe does not use."""
    if config.discriminator.kind != "dino":
        for key in ("encoder", "weights", "sha256", "size"):
            if getattr(config.discriminator, key) != getattr(DiscriminatorConfig(), key):
                raise TrainerError(
                    f"discriminator.{key} is for discriminator.kind=dino, not {config.discriminator.kind}: give that "
                    "too, or leave it out"
                )
    perceptual = config.loss.perceptual
    files = {"vgg16_weights": "lpips", "convnext_weights": "convnext", "convnext_factor": "convnext"}
    for key, network in files.items():
        if getattr(perceptual, key) != getattr(PerceptualLoss(), key) and network not in perceptual.kind:
            raise TrainerError(
                f"loss.perceptual.{key} is for loss.perceptual.kind={network} or lpips+convnext, not "
                f"{perceptual.kind}: give one of these, or leave it out"
            )


def _explain(error: Exception, schema: DictConfig) -> str:
    """Returns OmegaConf's message in one line, with the closest known key if a key is unknown."""
    message = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    if "not in" in message and key:
        return f"unknown key {key}{_closest(str(key), leaves(schema))}"
    if "missing mandatory value" in message.lower():
        return f"{key} must be given"
    if "is not a ListConfig" in message:
        return f"{key} is a list: write it in brackets, as in {key}=[A,B]"
    return f"{key}: {message}" if key and str(key) not in message else message


def leaves(node: DictConfig, prefix: str = "") -> list[str]:
    """Returns the dotted keys of all values in a configuration."""
    keys = []
    for key in node:
        child = None if OmegaConf.is_missing(node, key) else node[key]
        keys += leaves(child, f"{prefix}{key}.") if OmegaConf.is_dict(child) else [f"{prefix}{key}"]
    return keys


def _closest(name: str, known) -> str:
    known = list(known)
    ends = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    close = ends or difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(close[:3])}?" if close else ""
