"""Weights read from any source, before a model is built from them."""

import math
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model_zoo.conditions import trained_from, trained_grids_from
from model_zoo.errors import ModelError

KINDS = ("tokenizer", "generator")  # kinds of models; prefixes of tensor names in checkpoints
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights
COUNTERS = (torch.int32, torch.int64)  # dtypes of counters beside weights
SETS = ("ema", "raw")  # sets of weights: the exponential moving average, and the trained weights
# `Weights.trained_c`: its name in a run's checkpoints, and the key of its text in exports and our published files.
TRAINED, TRAINED_CLASSES = "conditions/trained_c", "trained_classes"
# The same of `Weights.trained_g`; the published layout has no grids.
TRAINED_G, TRAINED_GRIDS = "conditions/trained_g", "trained_grids"
CODES_OF = "codes_of_tokenizer"  # `Weights.tokenizer`: its key in exports and our published files


class Average(NamedTuple):
    """Parameters of the EMA of weights, as stored in published checkpoints."""

    decay: float
    num_updates: int = -1  # -1: constant decay from the first step on


class Weights(NamedTuple):
    """A model's configuration and one set of its weights.

    config: fields of `TokenizerConfig` or `TransformerConfig`, not validated.
    tensors: the model's state dict on the CPU. It may be memory-mapped: copy a tensor before writing to it.
    discriminator: the state dict of the `PatchDiscriminator` trained with a tokenizer, or None; always raw weights.
    origin: description of what was read. recipe: where the configuration comes from. Both are for messages.
    weights: which set ``tensors`` is, ``ema`` or ``raw``.
    discriminator_ema: EMA of the discriminator's parameters, which published checkpoints contain and nothing uses.
    average: parameters of the EMA, if known. step: number of training steps, if known.
    trained_c: of a generator, the trained classes (see `model_zoo.conditions`), if known.
    tokenizer: of a generator, the fingerprint of the tokenizer whose codes it has learned, if known.
    trained_g: of a generator with a table of grids, the trained ones, if known.
    heads_encoder: the encoder whose tokens a discriminator of kind ``dino`` reads, see `heads_encoder`, if known.
    """

    config: dict
    tensors: dict[str, Tensor]
    discriminator: dict[str, Tensor] | None
    origin: str
    recipe: str
    weights: str
    discriminator_ema: dict[str, Tensor] | None = None
    average: Average | None = None
    step: int | None = None
    trained_c: Tensor | None = None
    tokenizer: str | None = None
    trained_g: Tensor | None = None
    heads_encoder: str | None = None


def read_trained_classes(about: dict, model: dict, where: str | Path) -> Tensor | None:
    """`Weights.trained_c` of an export or a published file; None if it does not say. about: what holds
    TRAINED_CLASSES. model: the generator's configuration. Raises ModelError, which names ``where``."""
    if TRAINED_CLASSES not in about:
        return None
    try:
        return trained_from(str(about[TRAINED_CLASSES]), int(model["classes"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{where}: {TRAINED_CLASSES}: {error}") from error


def read_trained_grids(about: dict, model: dict, where: str | Path) -> Tensor | None:
    """`Weights.trained_g` of an export; None if it does not say. Arguments and errors: see `read_trained_classes`."""
    if TRAINED_GRIDS not in about:
        return None
    try:
        return trained_grids_from(str(about[TRAINED_GRIDS]), model["grids"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{where}: {TRAINED_GRIDS}: {error}") from error


def heads_encoder(kind: str, encoder: str, sha256: str | None) -> str | None:
    """The encoder of ``discriminator.kind=dino`` and the hash of its file, from the settings ``discriminator``. None
    for PatchGAN, and where the hash is not known."""
    return f"{encoder}, sha256 {sha256}" if kind == "dino" and sha256 else None


def read_codes_of(about: dict, where: str | Path) -> str | None:
    """`Weights.tokenizer` of an export or a published file; None if it does not say. about: what holds CODES_OF.
    Raises ModelError, which names ``where``."""
    fingerprint = about.get(CODES_OF)
    if not isinstance(fingerprint, str | None):
        raise ModelError(f"{where}: {CODES_OF}: {fingerprint} is not a fingerprint in quotes")
    return fingerprint


def no_weight(tensor: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Why a tensor cannot be a weight, or a counter of one of the given dtypes; None if it can. Reads no values."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return "nested" if tensor.is_nested else f"sparse ({tensor.layout})"
    if tensor.is_meta:
        return "without values (of the meta device)"
    if tensor.dtype not in dtypes:
        return f"of {tensor.dtype}"
    if (stored := tensor.untyped_storage().nbytes()) < tensor.numel() * tensor.itemsize:
        return f"of {tensor.numel():,} elements, which share {stored:,} bytes"
    return None


def check_weights(tensors: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Checks that ``tensors`` has exactly the expected names and shapes, and weights with finite values. Raises
    ModelError: one line that starts with ``what`` and names up to three differences."""
    wrong = [f"lacks {name} of shape {list(tensor.shape)}" for name, tensor in expected.items() if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            wrong.append(f"holds {name}, which is not expected")
        elif why := no_weight(tensor, DTYPES if expected[name].is_floating_point() else COUNTERS):
            wrong.append(f"holds {name} {why}, no weight")
        elif tensor.shape != expected[name].shape:
            wrong.append(f"holds {name} of shape {list(tensor.shape)}, expected {list(expected[name].shape)}")
    if not wrong:  # values are read last, where every tensor is as large as the model
        wrong = [f"holds {name} with NaN or infinity" for name, tensor in tensors.items() if not _is_finite(tensor)]
    if wrong:
        more = f", and {len(wrong) - 3} more such" if len(wrong) > 3 else ""
        raise ModelError(textwrap.shorten(f"{what} {', '.join(wrong[:3])}{more}", 600, placeholder=" ..."))


def _is_finite(tensor: Tensor) -> bool:
    """Needs no memory, unlike `torch.isfinite`; NaN is among the extremes of what holds it."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())
