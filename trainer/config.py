"""Recipes: a YAML file and ``key=value`` changes, checked against the dataclasses here. Unknown keys fail."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data import DataConfig
from model_zoo.losses import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, LossConfig
from model_zoo.sampler import Sampling
from model_zoo.tokenizer import TokenizerConfig
from model_zoo.transformer import TransformerConfig
from trainer import TrainerError


@dataclass
class EngineConfig:
    """``kind``: ``replicated`` (plain PyTorch, every rank holds all), ``deepspeed`` or ``fsdp2``."""

    kind: str = "replicated"
    # deepspeed: a name from ds_configs (zero0 to zero3, zero2_offload, zero3_offload) or the path of a JSON file.
    config: str = "zero1"
    # fsdp2: whether parameters are let go after a forward and gathered anew for its backward; whether parameters,
    # gradients and optimiser are kept in the CPU's memory; over how many neighbouring ranks they are cut (None: all).
    reshard: bool = True
    offload: bool = False
    shard_over: int | None = None


@dataclass
class TrainerConfig:
    """Length, batches, precision, and how often what is written."""

    max_steps: int = MISSING
    global_batch_size: int = MISSING
    # Images per rank and forward. None: the whole of a rank's share at once; less accumulates gradients.
    micro_batch_size: int | None = None
    precision: str = "bf16"
    # On CUDA, fp32 products by TF32 (10 bits of mantissa), the quantizer's among them: faster, and coarser.
    tf32: bool = False
    device: str = "auto"
    compile: bool = False
    # Forgets what is inside blocks after the forward and computes it again for the backward. ``selective`` (generators)
    # keeps what is dear to compute, which is products of matrices and attention.
    activation_checkpointing: Any = False
    gradient_clip_norm: float | None = None
    log_every_steps: int = 50
    validate_every_steps: int = 5000
    validation_images: int = 1000
    checkpoint_every_steps: int = 5000
    # The newest so many checkpoints stay, and for good those of every so many steps.
    keep_last: int = 3
    keep_every_steps: int | None = None
    # Written by a thread while training goes on.
    async_checkpoints: bool = True
    # So many steps one after another may be left out for losses or gradients that are not finite.
    max_skipped_steps: int = 10
    # A process that gets no further for so long tells where it stands and ends.
    timeout_seconds: float = 1800.0


@dataclass
class TokenizerTrainerConfig(TrainerConfig):
    """And for tokenizers."""

    # Of index backpropagation: which of `model_zoo.ops.index_backprop`'s implementations.
    quantizer_impl: str = "auto"


@dataclass
class OptimizerConfig:
    """AdamW. ``weight_decay`` is that of matrices; biases and norms have none."""

    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    # Where it is given, weight decay goes from `weight_decay` to this along a cosine over all steps.
    final_weight_decay: float | None = None


@dataclass
class TokenizerOptimizerConfig(OptimizerConfig):
    """Generator and discriminator apart; ``discriminator_lr`` None: the same rate."""

    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])
    discriminator_lr: float | None = None


@dataclass
class ScheduleConfig:
    """Learning rate over steps: linear warm-up, then ``constant``, ``multistep``, ``cosine`` or ``linear``."""

    kind: str = "constant"
    warmup_steps: int = 0
    # The share of the peak that warm-up begins at.
    warmup_from: float = 0.0
    # cosine, linear: for such a share of the steps behind warm-up the rate stays at its peak.
    hold: float = 0.0
    # multistep: at each of these steps the rate is multiplied by ``factor``.
    milestones: list[int] = field(default_factory=list)
    factor: float = 0.1
    # cosine, linear: the share of the peak that is left at ``trainer.max_steps``.
    final_ratio: float = 0.0


@dataclass
class EmaConfig:
    """Exponential moving average of the trained weights but the discriminator's; decay 0 keeps none."""

    decay: float = 0.999


@dataclass
class DiscriminatorConfig:
    """PatchGAN. ``norm``: ``batch`` as published, or ``group``, whose result does not depend on the batch."""

    channels: int = 64
    layers: int = 3
    norm: str = "batch"


@dataclass
class StartConfig:
    """Weights that training begins from, and nothing else of what they come from (docs/finetuning.md).

    source: whatever `model_zoo.io.load.read_weights` takes; None: from scratch. weights: its ``ema`` or ``raw`` ones.
    discriminator: whether to take the one trained beside them, where it has the recipe's shape. freeze: what stays as
    it is: ``encoder`` (encoder and codebook, so the codes stay valid) or ``decoder``.
    """

    source: str | None = None
    weights: str = "ema"
    discriminator: bool = True
    freeze: str | None = None


@dataclass
class TokenizerSource:
    """The tokenizer whose codes a generator learns. source: its run folder or published checkpoint, which is needed to
    tokenize on the fly (data.content=images), for model.embedding=codebook, and for pictures as training goes.
    fingerprint: of `Tokenizer.fingerprint`; None: that of the token shards, or of the source."""

    source: str | None = None
    fingerprint: str | None = None


@dataclass
class GeneratorLossConfig:
    """Cross-entropy of the next code."""

    # Weight of mean(logsumexp(logits)^2), which keeps logits from drifting (PaLM, arXiv 2204.02311).
    z_weight: float = 0.0
    # The class is left out with this probability, for guidance (arXiv 2207.12598). 1: there are no classes.
    label_dropout: float = 0.1
    # Which of `model_zoo.ops.linear_cross_entropy`'s implementations.
    impl: str = "auto"


@dataclass
class RunConfig:
    """What every recipe has. task: ``tokenizer`` or ``generator``."""

    task: str = "tokenizer"
    run: str | None = None
    seed: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)


@dataclass
class TokenizerRun(RunConfig):
    """A whole recipe for tokenizer training."""

    # Over how many processes the codebook is spread; these processes follow one another, and their number divides that
    # of all. 1: every process holds the whole.
    codebook_parallel: int = 1
    start: StartConfig = field(default_factory=StartConfig)
    trainer: TokenizerTrainerConfig = field(default_factory=TokenizerTrainerConfig)
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: TokenizerOptimizerConfig = field(default_factory=TokenizerOptimizerConfig)


@dataclass
class GeneratorRun(RunConfig):
    """A whole recipe for generator training."""

    task: str = "generator"
    # Over how many processes the head's rows are spread, as codebook_parallel does it for a codebook.
    vocabulary_parallel: int = 1
    data: DataConfig = field(default_factory=lambda: DataConfig(content="tokens"))
    model: TransformerConfig = field(default_factory=TransformerConfig)
    tokenizer: TokenizerSource = field(default_factory=TokenizerSource)
    loss: GeneratorLossConfig = field(default_factory=GeneratorLossConfig)
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.0))
    # What `ibq sample` does unless it is told otherwise, and the pictures as training goes.
    sampling: Sampling = field(default_factory=Sampling)


TASKS = {"tokenizer": TokenizerRun, "generator": GeneratorRun}
EVALUATION = "evaluation"  # the folder of the recipes that measure and do not train
ABLATIONS = "ablations"
CHOICES = {
    "engine.kind": ("replicated", "deepspeed", "fsdp2"),
    "trainer.precision": ("fp32", "bf16", "fp16"),
    "trainer.device": ("auto", "cpu", "cuda"),
    "trainer.quantizer_impl": ("auto", "dense", "chunked", "triton"),
    "model.codebook_init": ("features", "normal"),
    "start.weights": ("ema", "raw"),
    "start.freeze": (None, "encoder", "decoder"),
    "trainer.activation_checkpointing": (False, True, "selective"),
    "loss.impl": ("auto", "dense", "chunked", "liger"),
    "discriminator.norm": ("batch", "group"),
    "schedule.kind": ("constant", "multistep", "cosine", "linear"),
    "loss.quantizer.form": ("reference", "paper"),
    "loss.generator.kind": tuple(GENERATOR_LOSSES),
    "loss.discriminator.kind": tuple(DISCRIMINATOR_LOSSES),
}
RENAMED = {"trainer.keep_checkpoints": "trainer.keep_last"}  # key of an older version -> its name now
# What runs did before there were these keys, by task.
FORMER = {"tokenizer": {"model": {"codebook_init": "normal"}}}
MOST_SECONDS = 30 * 86400.0
AT_LEAST = {
    "codebook_parallel": 1,
    "vocabulary_parallel": 1,
    "trainer.max_steps": 1,
    "trainer.global_batch_size": 1,
    "trainer.micro_batch_size": 1,
    "trainer.gradient_clip_norm": 1e-12,
    "trainer.log_every_steps": 1,
    "trainer.validate_every_steps": 1,
    "trainer.validation_images": 1,
    "trainer.checkpoint_every_steps": 1,
    "trainer.keep_last": 1,
    "trainer.keep_every_steps": 1,
    "trainer.max_skipped_steps": 0,
    "trainer.timeout_seconds": 1,
    "engine.shard_over": 1,
    "data.image_size": 1,
    "data.val_image_size": 1,
    "model.channels": 1,
    "model.latent_channels": 1,
    "model.num_res_blocks": 1,
    "model.patch_size": 1,
    "model.codebook_init_std": 1e-12,
    "discriminator.channels": 1,
    "discriminator.layers": 1,
    "optimizer.lr": 0,
    "optimizer.discriminator_lr": 0,
    "optimizer.epsilon": 0,
    "optimizer.weight_decay": 0,
    "optimizer.final_weight_decay": 0,
    "schedule.warmup_steps": 0,
    "schedule.warmup_from": 0,
    "schedule.hold": 0,
    "schedule.factor": 0,
    "schedule.final_ratio": 0,
    "loss.discriminator.start_step": 0,
    "loss.generator.adaptive_cap": 0,
    "ema.decay": 0,
    "loss.reconstruction.weight": 0,
    "loss.perceptual.weight": 0,
    "loss.generator.weight": 0,
    "loss.generator.ramp_steps": 0,
    "loss.lecam.weight": 0,
    "loss.quantizer.weight": 0,
    "loss.quantizer.beta": 0,
    "loss.entropy.weight": 0,
    "loss.entropy.temperature": 1e-6,
    "loss.z_weight": 0,
    "loss.label_dropout": 0,
}
AT_MOST = {
    "schedule.warmup_from": 1,
    "schedule.hold": 1,
    "loss.label_dropout": 1,
    "trainer.timeout_seconds": MOST_SECONDS,
}


def recipe_paths(kinds: Iterable[str] = TASKS) -> dict[str, Path]:
    """Name -> file of every recipe of those kinds that comes with the package."""
    folder = Path(str(resources.files("model_zoo"))) / "recipes"
    return {path.stem: path for kind in kinds for path in sorted((folder / kind).glob("*.yaml"))}


def find_recipe(recipe: str, kinds: Iterable[str] = TASKS) -> Path:
    """The file of the recipe of that name, or that YAML file. Raises TrainerError, one line."""
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
    """The recipe of that name, or in that YAML file, with ``key=value`` changes. Raises TrainerError, one line."""
    return _resolve(find_recipe(recipe), overrides)


def load_run_config(run: str | Path, overrides: list[str]) -> RunConfig:
    """The resolved configuration of a run folder, with ``key=value`` changes."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise TrainerError(f"{run} is no run folder (no config.yaml in it): give the folder that `ibq train` wrote")
    return _resolve(path, overrides, FORMER)


def save_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved configuration; a kill in between leaves the former file whole."""
    unfinished = path.with_suffix(".unfinished")
    OmegaConf.save(OmegaConf.structured(config), unfinished)
    unfinished.replace(path)


def read_recipe(path: Path) -> DictConfig:
    """What a recipe's file says, not checked against any keys. Raises TrainerError."""
    try:
        from_file = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise TrainerError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(from_file):
        raise TrainerError(f"{path} is not a recipe: it must map keys to values")
    return from_file


def _resolve(path: Path, overrides: list[str], defaults: dict | None = None) -> RunConfig:
    """defaults: by task, what keys are that neither the file nor an override names, where the schema's is not it."""
    from_file = read_recipe(path)
    task = from_file.get("task", "tokenizer")
    if task not in TASKS:
        raise TrainerError(f"{path}: task={task} is unknown: choose one of {', '.join(TASKS)}")
    schema = OmegaConf.structured(TASKS[task])
    try:
        merged = OmegaConf.merge(schema, (defaults or {}).get(task, {}), from_file)
    except OmegaConfBaseException as error:
        raise TrainerError(f"{path}: {explain(error, schema)}") from error
    seen = set()
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise TrainerError(f"{override!r} is not key=value, as in optimizer.lr=1e-4")
        if key in seen:
            raise TrainerError(f"{key} is given twice; quote a pattern with braces so that the shell leaves it whole")
        seen.add(key)
        if key == "run" and override == "run=":
            raise TrainerError("run= is empty: name a folder")
        if key == "task":
            raise TrainerError(f"task= cannot be changed: {path.stem} is a recipe for a {task}")
        try:
            merged = _changed(merged, key, override)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise TrainerError(f"{override!r}: {explain(error, schema)}") from error
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise TrainerError(f"{path}: {explain(error, schema)}") from error
    _check(merged)
    if "engine.config" in seen and config.engine.kind != "deepspeed":
        raise TrainerError(f"engine.config is for engine.kind=deepspeed, not {config.engine.kind}: give that too")
    return config


def _changed(config, key: str, override: str):
    """The configuration with one change; a number in the key is a place in a list, as in data.sources.0.weight=2."""
    if not any(part.isdecimal() for part in key.split(".")):
        return OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
    try:
        OmegaConf.update(config, key, OmegaConf.from_dotlist([f"value={override.partition('=')[2]}"]).value)
    except (IndexError, AttributeError, TypeError, AssertionError) as error:
        raise TrainerError(f"{override!r}: there is no {key}; count places from 0") from error
    return config


def _check(config) -> None:
    keys = leaves(config)
    for key, choices in CHOICES.items():
        if key in keys and (value := OmegaConf.select(config, key)) not in choices:
            known = ", ".join("null" if choice is None else str(choice) for choice in choices)
            raise TrainerError(f"{key}={value} is unknown: choose one of {known}")
    for key in keys:
        value = OmegaConf.select(config, key)
        for number in value if OmegaConf.is_list(value) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise TrainerError(f"{key}={value} must be finite")
    for key, least in AT_LEAST.items():
        value = OmegaConf.select(config, key) if key in keys else None
        if value is not None and value < least:
            raise TrainerError(f"{key}={value} must be at least {least}")
    for key, most in AT_MOST.items():
        if key in keys and (value := OmegaConf.select(config, key)) > most:
            raise TrainerError(f"{key}={value} must be at most {most:.0f}")
    engine = config.engine
    if engine.kind != "fsdp2" and (engine.offload or engine.shard_over is not None or not engine.reshard):
        raise TrainerError("engine.offload, engine.shard_over and engine.reshard are settings of engine.kind=fsdp2")
    if not 0 <= config.seed < 2**63:
        raise TrainerError(f"seed={config.seed} must lie between 0 and 2^63")
    if config.ema.decay >= 1:
        raise TrainerError(f"ema.decay={config.ema.decay} must be below 1; 0 keeps no average")
    if len(config.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise TrainerError(f"optimizer.betas={config.optimizer.betas} must be two numbers from 0 to below 1")
    if config.task == "tokenizer":
        _check_tokenizer(config)


def _check_tokenizer(config) -> None:
    if config.trainer.activation_checkpointing == "selective":
        raise TrainerError("trainer.activation_checkpointing=selective is for generators: true is what tokenizers have")
    if config.data.content != "images":
        raise TrainerError(f"data.content={config.data.content}: a tokenizer learns from images; leave it out")
    if not 0 <= config.loss.lecam.decay < 1:
        raise TrainerError(f"loss.lecam.decay={config.loss.lecam.decay} must be at least 0 and below 1")
    if not config.model.channel_multipliers or min(config.model.channel_multipliers) < 1:
        raise TrainerError(
            f"model.channel_multipliers={config.model.channel_multipliers} must name one level or more, each at least 1"
        )
    model = config.model
    if model.codebook_init == "features" and model.code_dim < 2 and model.quantizer != "lfq":
        raise TrainerError("model.codebook_init=features needs a model.code_dim of 2 or more: use normal")
    if config.start.freeze and config.start.source is None:
        raise TrainerError(
            f"start.freeze={config.start.freeze} would keep random weights as they are: name trained ones with "
            "start.source=SOURCE"
        )
    first = config.loss.generator.start_step
    if first is not None and first < config.loss.discriminator.start_step:
        raise TrainerError(
            f"loss.generator.start_step={first} lies before loss.discriminator.start_step="
            f"{config.loss.discriminator.start_step}: the generator would play against an untrained discriminator"
        )


def explain(error: Exception, schema) -> str:
    """OmegaConf's many-line message -> one line in the user's terms, with the nearest key for a mistyped one."""
    message = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    if "not in" in message and key:
        if str(key) in RENAMED:
            return f"{key} is called {RENAMED[str(key)]} now"
        return f"unknown key {key}{_closest(str(key), leaves(schema))}"
    if "missing mandatory value" in message.lower():
        return f"{key} must be given"
    return f"{key}: {message}" if key and str(key) not in message else message


def leaves(node, prefix: str = "") -> list[str]:
    """Dotted keys of all that a configuration says."""
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
