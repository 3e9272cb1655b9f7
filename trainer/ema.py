"""Exponential moving average of a model's parameters."""

import torch
from torch import Tensor, nn


class Ema:
    """Running average of every entry of ``module.state_dict()`` (a tokenizer's are all floating-point), in fp32.

    Build it after the weights that training starts from are in the module: it starts as their copy.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: value.detach().float().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Call once after optimiser step ``step`` (from 0). Early steps use a smaller decay, (2 + step) / (11 + step),
        as in the published training, so that a short run's average is not its random start."""
        decay = min(self.decay, (2 + step) / (11 + step))
        state = module.state_dict()
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, [state[name].float() for name in self.average], 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> averaged tensor, by the names of the module's own state dict."""
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes exactly the saved names; anything else is a KeyError."""
        if state.keys() != self.average.keys():
            raise KeyError(f"EMA names differ: {sorted(state.keys() ^ self.average.keys())[:5]}")
        for name, value in state.items():
            self.average[name].copy_(value)
