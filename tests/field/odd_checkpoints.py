"""Model files as people have them: state dicts under other names, with wrappers' prefixes, beside pickled objects, and
with tensors that no weight can be."""

from collections.abc import Callable

import torch
from torch import Tensor


class ModelCheckpoint:
    """Stands for a callback that a training library pickles into its checkpoints."""


def wrapped(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


# Each makes, of a whole tensor, one that cannot be a weight.
ODD_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "integers": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "eight bits": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": lambda t: t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t.flatten(), t.flatten()[:1]]),
    "meta": lambda t: t.to("meta"),
    "a terabyte by stride 0": lambda t: t.flatten()[:1].expand(2**38),
    "its shape by stride 0": lambda t: t.flatten()[0].clone().expand(t.shape),
    "NaN": lambda t: t.clone().index_fill_(0, torch.tensor([0]), torch.nan),
    "infinity": lambda t: t.clone().index_fill_(0, torch.tensor([0]), -torch.inf),
}
