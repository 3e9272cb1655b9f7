"""The keys of a recipe, with their defaults: one dataclass for each section. `trainer.recipes` reads and checks them.

The metadata of a field hold the rules for its value; see `model_zoo.config.broken_rule`.
"""

from dataclasses import dataclass, field
from typing import Any

from data.config import DataConfig
from model_zoo.config import DISCRIMINATOR_ENCODERS, LossConfig, Sampling, TokenizerConfig, TransformerConfig

# OmegaConf's mark of a key without a default, spelled out so that OmegaConf is not imported here.
MISSING: Any = "???"
BETAS = {"at_least": 0, "below": 1}


@dataclass
class EngineConfig:
    """How parameters, gradients and optimizer state are distributed over processes.

    kind: ``ddp`` (plain PyTorch, a full copy on every process), ``deepspeed`` or ``fsdp2``.
    """

    kind: str = field(default="ddp", metadata={"choices": ("ddp", "deepspeed", "fsdp2")})
    # deepspeed: a name from ds_configs (zero0 to zero3, zero2_offload, zero3_offload) or the path of a JSON file.
    config: str = "zero1"
    # fsdp2: frees gathered parameters after the forward pass and gathers them again for the backward pass.
    reshard: bool = True
    # fsdp2: keeps parameters, gradients and optimizer state in CPU memory.
    offload: bool = False
    # fsdp2: shards over this many neighbouring ranks and replicates the shards over the others; None: over all ranks.
    shard_over: int | None = field(default=None, metadata={"at_least": 1})


@dataclass
class TrainerConfig:
    """Number of steps, batch sizes, precision, and how often to log, validate and save."""

    max_steps: int = field(default=MISSING, metadata={"at_least": 1})
    global_batch_size: int = field(default=MISSING, metadata={"at_least": 1})
    # Images per process and forward pass; gradients are accumulated over the micro-batches of a step. None: one
    # micro-batch per step.
    micro_batch_size: int | None = field(default=None, metadata={"at_least": 1})
    precision: str = field(default="bf16", metadata={"choices": ("fp32", "bf16", "fp16")})
    # Uses TF32 (a 10-bit mantissa) for fp32 matrix products on CUDA, including the quantizer's: faster, less exact.
    tf32: bool = False
    device: str = field(default="auto", metadata={"choices": ("auto", "cpu", "cuda")})
    compile: bool = False
    # Discards activations inside each block and recomputes them in the backward pass. ``selective`` (generators only)
    # keeps the outputs that are expensive to recompute: those of matrix products and attention.
    activation_checkpointing: Any = field(default=False, metadata={"choices": (False, True, "selective")})
    gradient_clip_norm: float | None = field(default=None, metadata={"above": 0})
    log_every_steps: int = field(default=50, metadata={"at_least": 1})
    validate_every_steps: int = field(default=5000, metadata={"at_least": 1})
    validation_images: int = field(default=1000, metadata={"at_least": 1})
    checkpoint_every_steps: int = field(default=5000, metadata={"at_least": 1})
    # Keeps this many of the newest checkpoints; and, forever, those at multiples of `keep_every_steps`.
    keep_last: int = field(default=3, metadata={"at_least": 1})
    keep_every_steps: int | None = field(default=None, metadata={"at_least": 1})
    # Writes checkpoints in a background thread while training continues.
    async_checkpoints: bool = True
    # Skips a step whose loss or gradient is not finite; training ends after more skipped steps in a row than this.
    max_skipped_steps: int = field(default=10, metadata={"at_least": 0})
    # If a process makes no progress for this many seconds, it prints its stack traces and exits.
    timeout_seconds: float = field(default=1800.0, metadata={"at_least": 1, "at_most": 30 * 86400})


@dataclass
class TokenizerTrainerConfig(TrainerConfig):
    """The `trainer` section of a tokenizer's recipe."""

    # Implementation of index backpropagation; see `model_zoo.ops.index_backprop`.
    quantizer_impl: str = field(default="auto", metadata={"choices": ("auto", "dense", "chunked", "triton")})
    # Logs the norm of each loss term's gradient at the features, the codes and the encoder, at each logged step.
    log_gradient_balance: bool = False


@dataclass
class OptimizerConfig:
    """AdamW. Weight decay applies to matrices only, not to biases and norms."""

    lr: float = field(default=1e-4, metadata={"at_least": 0})
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata=BETAS)
    epsilon: float = field(default=1e-8, metadata={"at_least": 0})
    weight_decay: float = field(default=0.0, metadata={"at_least": 0})
    # If given, weight decay changes from `weight_decay` to this value along a cosine over all steps.
    final_weight_decay: float | None = field(default=None, metadata={"at_least": 0})


@dataclass
class TokenizerOptimizerConfig(OptimizerConfig):
    """The `optimizer` section of a tokenizer's recipe. discriminator_lr: None: the same as `lr`."""

    betas: list[float] = field(default_factory=lambda: [0.5, 0.9], metadata=BETAS)
    discriminator_lr: float | None = field(default=None, metadata={"at_least": 0})


@dataclass
class ScheduleConfig:
    """Learning rate over steps: a linear warm-up, then the given kind. Ratios are relative to `optimizer.lr`."""

    kind: str = field(default="constant", metadata={"choices": ("constant", "multistep", "cosine", "linear")})
    warmup_steps: int = field(default=0, metadata={"at_least": 0})
    # Ratio at which the warm-up starts.
    warmup_from: float = field(default=0.0, metadata={"at_least": 0, "at_most": 1})
    # cosine, linear: fraction of the steps after warm-up for which the rate stays at `optimizer.lr`.
    hold: float = field(default=0.0, metadata={"at_least": 0, "at_most": 1})
    # multistep: the rate is multiplied by `factor` at each of these steps.
    milestones: list[int] = field(default_factory=list)
    factor: float = field(default=0.1, metadata={"at_least": 0})
    # cosine, linear: ratio at `trainer.max_steps`.
    final_ratio: float = field(default=0.0, metadata={"at_least": 0})


@dataclass
class EmaConfig:
    """Exponential moving average of the trained weights, without the discriminator's. decay 0: no average."""

    decay: float = field(default=0.999, metadata={"at_least": 0, "below": 1})


@dataclass
class DiscriminatorConfig:
    """kind: ``patchgan``, as published, or ``dino``: heads on the tokens of a frozen encoder.

    For ``patchgan``: channels, layers, and norm: ``batch``, as published, or ``group``, which does not depend on how
    the batch is split.
    For ``dino``: encoder, of DISCRIMINATOR_ENCODERS. weights: path of its file; None: the usual folders. sha256: of
    this file; None: every file that fits is accepted, and the run keeps its hash. size: side in pixels to which
    pictures are resized, at equal area where they are not square; None: the encoder's own.
    """

    kind: str = field(default="patchgan", metadata={"choices": ("patchgan", "dino")})
    channels: int = field(default=64, metadata={"at_least": 1})
    layers: int = field(default=3, metadata={"at_least": 1})
    norm: str = field(default="batch", metadata={"choices": ("batch", "group")})
    encoder: str = field(default="vit_small_patch16_224.dino", metadata={"choices": tuple(DISCRIMINATOR_ENCODERS)})
    weights: str | None = None
    sha256: str | None = None
    size: int | None = field(default=None, metadata={"at_least": 1})


@dataclass
class InitFromConfig:
    """Initial weights of a new run (docs/finetuning.md). Nothing else is read from the source.

    source: anything that `model_zoo.io.load.read_weights` reads; None: random weights. weights: ``ema`` or ``raw``;
    None: those of the EMA if the source has one, else the raw ones.
    """

    source: str | None = None
    weights: str | None = field(default=None, metadata={"choices": (None, "ema", "raw")})


@dataclass
class TokenizerInitFromConfig(InitFromConfig):
    """The `init_from` section of a tokenizer's recipe.

    discriminator: whether to load the source's discriminator too, if it has the recipe's shape. freeze: the part that
    is not trained: ``encoder`` (encoder and codebook, so the codes stay valid) or ``decoder``.
    """

    discriminator: bool = True
    freeze: str | None = field(default=None, metadata={"choices": (None, "encoder", "decoder")})


@dataclass
class TokenizerSource:
    """The tokenizer whose codes a generator learns.

    source: its run folder or published checkpoint; required to tokenize during training (data.content=images), for
    model.embedding=codebook, and for samples drawn during training. fingerprint: of `Tokenizer.fingerprint`; None: that
    of the token shards, or of the source.
    """

    source: str | None = None
    fingerprint: str | None = None


@dataclass
class GeneratorLossConfig:
    """Cross-entropy of the next code."""

    # Weight of mean(logsumexp(logits)^2), which keeps logits from drifting (PaLM, arXiv 2204.02311).
    z_weight: float = field(default=0.0, metadata={"at_least": 0})
    # Probability of dropping the class, for guidance (arXiv 2207.12598). 1: trains without classes.
    label_dropout: float = field(default=0.1, metadata={"at_least": 0, "at_most": 1})
    # Implementation of the loss; see `model_zoo.ops.linear_cross_entropy`.
    impl: str = field(default="auto", metadata={"choices": ("auto", "dense", "chunked", "liger")})


@dataclass
class RunConfig:
    """The sections of every recipe. task: ``tokenizer`` or ``generator``. run: the run folder."""

    task: str = "tokenizer"
    run: str | None = None
    seed: int = field(default=0, metadata={"at_least": 0, "below": 2**63})
    engine: EngineConfig = field(default_factory=EngineConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)


@dataclass
class TokenizerRun(RunConfig):
    """A recipe for training a tokenizer."""

    # Shards the codebook over this many consecutive processes; must divide their total number. 1: not sharded.
    codebook_parallel: int = field(default=1, metadata={"at_least": 1})
    init_from: TokenizerInitFromConfig = field(default_factory=TokenizerInitFromConfig)
    trainer: TokenizerTrainerConfig = field(default_factory=TokenizerTrainerConfig)
    model: TokenizerConfig = field(default_factory=TokenizerConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: TokenizerOptimizerConfig = field(default_factory=TokenizerOptimizerConfig)


@dataclass
class GeneratorRun(RunConfig):
    """A recipe for training a generator."""

    task: str = "generator"
    # Shards the rows of the head over this many consecutive processes, like codebook_parallel for a codebook.
    vocabulary_parallel: int = field(default=1, metadata={"at_least": 1})
    init_from: InitFromConfig = field(default_factory=InitFromConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(content="tokens"))
    model: TransformerConfig = field(default_factory=TransformerConfig)
    tokenizer: TokenizerSource = field(default_factory=TokenizerSource)
    loss: GeneratorLossConfig = field(default_factory=GeneratorLossConfig)
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(decay=0.0))
    # Defaults of `ibq sample`; also used for the samples drawn during training.
    sampling: Sampling = field(default_factory=Sampling)
