"""Settings of models, losses and sampling, as plain dataclasses: reading a recipe imports no model and no torch.

The metadata of a field hold the rules for its value; `broken_rule` applies them.
"""

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from model_zoo.errors import ModelError

# Quantizers whose code vectors are parameters, which ``codebook_init`` initializes. The codes of the others are given
# by a formula, or are a function of a table.
WITH_CODEBOOK = ("ibq", "vq", "vq_ema", "rotation_vq", "soft_vq")
# Encoders of loss.semantic, by timm's name, and the file that their authors publish. `test_vit` is for tests: 0.3 M
# parameters.
DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"
ENCODERS = {
    "vit_small_patch14_dinov2.lvd142m": f"{DINOV2}/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "vit_base_patch14_dinov2.lvd142m": f"{DINOV2}/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "vit_large_patch14_dinov2.lvd142m": f"{DINOV2}/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "vit_base_patch16_siglip_256.v2_webli": None,
    "vit_large_patch16_siglip_256.v2_webli": None,
    "vit_so400m_patch14_siglip_224.v2_webli": None,
    "test_vit.r160_in1k": None,
}
# The same of discriminator.kind=dino.
DISCRIMINATOR_ENCODERS = {
    "vit_small_patch16_224.dino": (
        "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
    ),
    "test_vit.r160_in1k": None,
}
MOST_GRID_SIDE = 1024  # codes
COMPARISONS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


def broken_rule(value: Any, rules: Mapping[str, Any]) -> str | None:
    """What is wrong with a field's value, to follow ``key=value`` in an error message; None if nothing is.

    rules: the field's metadata. ``choices``: all allowed values. ``at_least``, ``above``, ``at_most``, ``below``:
    bounds of a number, or of every number in a list; they allow None. Whatever the rules, floats must be finite.
    """
    if "choices" in rules:
        choices = ", ".join("null" if choice is None else str(choice) for choice in rules["choices"])
        return None if value in rules["choices"] else f"is unknown: choose one of {choices}"
    numbers = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        return "must be finite"
    for rule, bound in rules.items():
        if not all(number is None or COMPARISONS[rule](number, bound) for number in numbers):
            return f"must be {rule.replace('_', ' ')} {bound}"
    return None


def check_fields(config: "TokenizerConfig | TransformerConfig") -> None:
    """Raises ModelError for a value that its field's metadata do not allow."""
    for each in fields(config):
        value = getattr(config, each.name)
        if problem := broken_rule(value, each.metadata):
            raise ModelError(f"model.{each.name}={value} {problem}")


@dataclass
class TokenizerConfig:
    """Architecture of a tokenizer. The defaults are the published ImageNet model with 16,384 codes."""

    quantizer: str = "ibq"
    codebook_size: int = field(default=16384, metadata={"at_least": 2})
    code_dim: int = field(default=256, metadata={"at_least": 1})
    channels: int = field(default=128, metadata={"at_least": 1})
    channel_multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4], metadata={"at_least": 1})
    num_res_blocks: int = field(default=4, metadata={"at_least": 1})
    # Downsampling factors at which attention follows the residual blocks.
    attention_factors: list[int] = field(default_factory=lambda: [16])
    latent_channels: int = field(default=256, metadata={"at_least": 1})
    # Above 1, the encoder begins with a strided patch convolution: for small models that work at token resolution.
    patch_size: int = field(default=1, metadata={"at_least": 1})
    # Layer norm per position and no attention, so that a code depends only on its neighbourhood: for small models.
    local: bool = False
    # How the codebook of ibq, vq, vq_ema, rotation_vq and soft_vq is initialized. "features": from the features of the
    # first step's images (`CodebookQuantizer.match_features`). "normal", as published: from normal(0,
    # codebook_init_std^2); a model that is built outside training is initialized this way in either case.
    codebook_init: str = field(default="features", metadata={"choices": ("features", "normal")})
    codebook_init_std: float = field(default=1.0, metadata={"above": 0})  # only for "normal"
    # Divides features and codes by their norms, so that similarities are cosines (ibq, vq, rotation_vq).
    normalize: bool = False
    # Factor on the cosines in IBQ's softmax, or with learn_logit_scale its initial value; both only with normalize.
    logit_scale: float = field(default=1.0, metadata={"above": 0})
    learn_logit_scale: bool = False
    # lfq, bsq: into how many groups the bits are split for the entropy of the mean assignment; null: 1 for lfq, one a
    # bit for bsq.
    groups: int | None = field(default=None, metadata={"at_least": 1})
    # fsq: the levels of each dimension; their product is codebook_size, their number is code_dim.
    levels: list[int] = field(default_factory=list, metadata={"at_least": 2, "at_most": 1000})
    # fsq: what bounds a feature before it is rounded.
    bound: str = field(default="tanh", metadata={"choices": ("tanh", "ifsq")})
    # vq_ema: decay of the moving averages that are its codes.
    codebook_decay: float = field(default=0.99, metadata={"at_least": 0, "below": 1})
    # vq_ema: codes that fewer tokens a step choose (as a moving average) restart at random features, from step
    # 1 / (1 - codebook_decay) on; 0 disables it. It must be well below the mean, which is a step's tokens divided by
    # the codes.
    restart_below: float = field(default=0.0, metadata={"at_least": 0})
    # The projector of vqbridge: codes that form one token of its transformer; the transformer's width, number of blocks
    # and of attention heads.
    bridge_group: int = field(default=64, metadata={"at_least": 1})
    bridge_width: int = field(default=256, metadata={"at_least": 1})
    bridge_depth: int = field(default=2, metadata={"at_least": 1})
    bridge_heads: int = field(default=4, metadata={"at_least": 1})
    # The table of vqgan_lc: a .npy or .safetensors file with one row per code, which only a new run reads, and the
    # values in a row.
    codes: str | None = None
    table_dim: int = field(default=768, metadata={"at_least": 1})


def grid_name(grid: Sequence[int]) -> str:
    """``24x40`` of (rows, columns), as in `TransformerConfig.grids`."""
    rows, columns = grid
    return f"{rows}x{columns}"


@dataclass
class TransformerConfig:
    """Architecture of a generator. The defaults are the published B model for 16,384 codes."""

    vocabulary: int = field(default=16384, metadata={"at_least": 1})
    classes: int = field(default=1000, metadata={"at_least": 1})
    # Rows and columns of an image's codes.
    grid: list[int] = field(default_factory=lambda: [16, 16], metadata={"at_least": 1})
    # For pictures of several shapes: all grids, as ROWSxCOLUMNS, of which `grid` is the default of sampling. Each has a
    # row in one more table of embeddings. Empty: `grid` alone, and no such table.
    grids: list[str] = field(default_factory=list)
    depth: int = field(default=16, metadata={"at_least": 1})
    heads: int = field(default=16, metadata={"at_least": 1})
    head_dim: int = field(default=64, metadata={"at_least": 4})
    # Of the codes. "codebook": the tokenizer's code vectors, frozen, followed by a linear layer.
    embedding: str = field(default="learned", metadata={"choices": ("learned", "codebook")})
    code_dim: int = field(default=256, metadata={"at_least": 1})
    # Applied to embeddings and to the outputs of attention and feed-forward layers.
    dropout: float = field(default=0.1, metadata={"at_least": 0, "below": 1})
    # Factor on the initial weights of the gates; a small one makes the blocks of a deep model start near the identity.
    gate_init: float = 1e-3

    @property
    def width(self) -> int:
        """Size of the hidden state of a position."""
        return self.heads * self.head_dim

    @property
    def hidden(self) -> int:
        """Size of the feed-forward layer: 2/3 of 4 x width, rounded up to a multiple of 256."""
        return -(-int(8 * self.width / 3) // 256) * 256

    @property
    def all_grids(self) -> tuple[tuple[int, int], ...]:
        """The grids (rows, columns) that the model knows: `grids`, in their order, or `grid`. Raises ModelError for
        grids that contradict each other or are none."""
        if len(self.grid) != 2:
            raise ModelError(f"model.grid={self.grid} must be rows and columns")
        default = (self.grid[0], self.grid[1])
        if not self.grids:
            return (default,)
        parsed = tuple(map(_parsed_grid, self.grids))
        if twice := [grid for grid in dict.fromkeys(parsed) if parsed.count(grid) > 1]:
            raise ModelError(f"model.grids has {grid_name(twice[0])} twice: leave one out")
        if default not in parsed:
            raise ModelError(
                f"model.grid=[{default[0]},{default[1]}] is not among model.grids=[{','.join(self.grids)}]: set "
                f"model.grid=[{parsed[0][0]},{parsed[0][1]}] or another one of them, or add {grid_name(default)} there"
            )
        return parsed

    @property
    def tokens(self) -> int:
        """Codes of an image, or of one with the largest grid."""
        return max(rows * columns for rows, columns in self.all_grids)


def _parsed_grid(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})", str(text), re.ASCII)
    rows, columns = map(int, match.groups()) if match else (0, 0)
    if not 1 <= min(rows, columns) <= max(rows, columns) <= MOST_GRID_SIDE:
        raise ModelError(f"model.grids: {text!r} must be ROWSxCOLUMNS, each 1 to {MOST_GRID_SIDE}, such as 24x40")
    return rows, columns


@dataclass(frozen=True)
class Sampling:
    """How codes are sampled from the logits. The steps, in order:

    guidance: classifier-free guidance (arXiv 2207.12598), ``uncond + s_t (cond - uncond)`` with
        ``s_t = 1 + (guidance - 1) f(x)`` and f from `model_zoo.sampler.SCHEDULES`; 1 disables it.
    temperature: divides the logits.
    top_k: keeps the k likeliest codes; 0 keeps all.
    top_p: keeps the fewest codes whose total probability reaches top_p; 1 keeps all.

    Raises ModelError for values out of range.
    """

    temperature: float = field(default=1.0, metadata={"above": 0})
    guidance: float = field(default=1.0, metadata={"at_least": 0})
    guidance_schedule: str = field(default="constant", metadata={"choices": ("constant", "linear", "cosine")})
    top_k: int = field(default=0, metadata={"at_least": 0})
    top_p: float = field(default=1.0, metadata={"above": 0, "at_most": 1})

    def __post_init__(self):
        for each in fields(self):
            value = getattr(self, each.name)
            if problem := broken_rule(value, each.metadata):
                raise ModelError(f"{each.name} {value} {problem}")


@dataclass
class ReconstructionLoss:
    """Mean absolute error on [-1, 1]."""

    weight: float = field(default=1.0, metadata={"at_least": 0})


@dataclass
class PerceptualLoss:
    """weight x (LPIPS + convnext_factor x distance of ConvNeXt-S logits), or one of the two, by kind.

    kind: ``lpips`` (with VGG16, as published), ``convnext`` or ``lpips+convnext``. The defaults of the two others are
    those of 1d-tokenizer; see `model_zoo.eval_nets.convnext`. vgg16_weights, convnext_weights: paths of the weights
    files; None: the usual folders.
    """

    weight: float = field(default=1.0, metadata={"at_least": 0})
    kind: str = field(default="lpips", metadata={"choices": ("lpips", "convnext", "lpips+convnext")})
    convnext_factor: float = field(default=0.1, metadata={"above": 0})
    vgg16_weights: str | None = None
    convnext_weights: str | None = None


@dataclass
class GeneratorLoss:
    """The adversarial loss of the tokenizer."""

    weight: float = field(default=0.1, metadata={"at_least": 0})
    kind: str = field(default="non_saturating", metadata={"choices": ("non_saturating", "linear")})
    # VQGAN's adaptive weight: weight x |grad of reconstruction| / |grad of this term| at the last layer, capped.
    adaptive: bool = False
    adaptive_cap: float = field(default=1e4, metadata={"at_least": 0})
    # First step at which the term is used; None: that of the discriminator.
    start_step: int | None = None
    # Number of steps over which the weight grows linearly from 0.
    ramp_steps: int = field(default=0, metadata={"at_least": 0})


@dataclass
class DiscriminatorLoss:
    """The discriminator's own loss; it is trained from ``start_step`` on."""

    kind: str = field(default="hinge", metadata={"choices": ("hinge", "vanilla")})
    start_step: int = field(default=0, metadata={"at_least": 0})


@dataclass
class LecamLoss:
    """LeCAM regularization of the discriminator. decay: of the running means of the logits."""

    weight: float = field(default=0.05, metadata={"at_least": 0})
    decay: float = field(default=0.999, metadata={"at_least": 0, "below": 1})


@dataclass
class QuantizerLoss:
    """VQ losses. form: which of the two terms beta weights; see `model_zoo.losses.quantizer_loss`."""

    weight: float = field(default=1.0, metadata={"at_least": 0})
    form: str = field(default="reference", metadata={"choices": ("reference", "paper")})
    beta: float = field(default=0.25, metadata={"at_least": 0})
    double_quantization_weight: float = 1.0


@dataclass
class EntropyLoss:
    """weight x (sample_weight x sample entropy - average_weight x average entropy)."""

    weight: float = field(default=0.05, metadata={"at_least": 0})
    temperature: float = field(default=0.01, metadata={"at_least": 1e-6})
    sample_weight: float = 1.0
    average_weight: float = 1.0


@dataclass
class SemanticLoss:
    """Cosine distance between the codes and the patch features of a frozen encoder; see
    `model_zoo.losses.cosine_distance`. weight 0: there is no encoder and no head.

    encoder: of ENCODERS. weights: path of its file; None: the usual folders. sha256: of this file; None: every file
    that fits is accepted, and the run keeps its hash. size: side in pixels to which pictures are resized for the
    encoder, at equal area where they are not square; None: the encoder's own. width, depth: of the head's hidden
    layers, and the number of its layers.
    """

    weight: float = field(default=0.0, metadata={"at_least": 0})
    encoder: str = field(default="vit_base_patch14_dinov2.lvd142m", metadata={"choices": tuple(ENCODERS)})
    weights: str | None = None
    sha256: str | None = None
    size: int | None = field(default=None, metadata={"at_least": 1})
    width: int = field(default=2048, metadata={"at_least": 1})
    depth: int = field(default=3, metadata={"at_least": 1})


@dataclass
class LossConfig:
    """All losses of tokenizer training. The defaults are the published ones."""

    reconstruction: ReconstructionLoss = field(default_factory=ReconstructionLoss)
    perceptual: PerceptualLoss = field(default_factory=PerceptualLoss)
    generator: GeneratorLoss = field(default_factory=GeneratorLoss)
    discriminator: DiscriminatorLoss = field(default_factory=DiscriminatorLoss)
    lecam: LecamLoss = field(default_factory=LecamLoss)
    quantizer: QuantizerLoss = field(default_factory=QuantizerLoss)
    entropy: EntropyLoss = field(default_factory=EntropyLoss)
    semantic: SemanticLoss = field(default_factory=SemanticLoss)
