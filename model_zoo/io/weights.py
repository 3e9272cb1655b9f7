"""Weights as they come out of any source, before a model is made of them."""

import textwrap
from typing import NamedTuple

from torch import Tensor

from model_zoo.errors import ModelError

KINDS = ("tokenizer", "generator")  # of models that runs train; checkpoints name their pieces after them
SETS = ("ema", "raw")  # of weights: averages, and those that were trained


class Average(NamedTuple):
    """How an average of weights is taken: as published checkpoints say it."""

    decay: float
    num_updates: int = -1  # -1: the decay is the same from the first step on


class Weights(NamedTuple):
    """A model's configuration and one set of its weights.

    config: fields of `TokenizerConfig` or `TransformerConfig`, not checked. tensors: the model's state dict, on the
    CPU, maybe mapped from a file: copy before writing to it. discriminator: the state dict of the `PatchDiscriminator`
    that was trained beside a tokenizer (its own weights, whichever set ``tensors`` is), or None. origin: what was read,
    in words. recipe: what tells the configuration, for messages. weights: which set it is, ``ema`` or ``raw``.
    discriminator_ema: averages of its parameters, which published checkpoints keep and nothing uses. average: how
    averages are taken, where known. step: how long was trained, where known.
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
    """Whether there is each expected tensor in its shape, and no other. Raises ModelError: one line that begins with
    ``what`` and names up to three that are wrong, with what was expected."""
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
