"""Weights read from any source, before a model is built from them."""

import textwrap
from typing import NamedTuple

from torch import Tensor

from model_zoo.errors import ModelError

KINDS = ("tokenizer", "generator")  # kinds of models; prefixes of tensor names in checkpoints
SETS = ("ema", "raw")  # sets of weights: the exponential moving average, and the trained weights


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


def check_names(tensors: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Checks that ``tensors`` has exactly the expected names and shapes. Raises ModelError: one line that starts with
    ``what`` and names up to three differences."""
    wrong = [f"lacks {name} of shape {list(tensor.shape)}" for name, tensor in expected.items() if name not in tensors]
    wrong += [
        f"holds {name} of shape {list(tensor.shape)}, expected {list(expected[name].shape)}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    wrong += [f"holds {name}, which is not expected" for name in tensors if name not in expected]
    if wrong:
        more = f", and {len(wrong) - 3} more such" if len(wrong) > 3 else ""
        raise ModelError(textwrap.shorten(f"{what} {', '.join(wrong[:3])}{more}", 600, placeholder=" ..."))
