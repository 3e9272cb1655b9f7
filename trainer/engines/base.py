"""The boundary between a task's step and the way its module is spread over ranks."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Engine(ABC):
    """A module, its optimiser, and gradients that are averaged over ranks.

    One step is: for every micro-batch ``loss = ...``, ``engine.backward(loss, last=...)``; then ``engine.grad_norm()``
    and ``engine.step(lr, scale)``. Losses are means over the micro-batch; the engine divides by the number of
    micro-batches and of ranks, so that the gradient is that of the mean over the global batch. It trains the
    parameters that the optimiser has; the module may hold others.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        micro_batch_size: int,
        micro_batches: int,
    ):
        self.module = module
        self.optimizer = optimizer
        self.micro_batch_size = micro_batch_size
        self.micro_batches = micro_batches

    @property
    def param_groups(self) -> list[dict]:
        """The optimiser's."""
        return self.optimizer.param_groups

    def __call__(self, *args, **kwargs):
        """The module's forward. Not a wrapper's: DeepSpeed's adds hooks to the outputs that the adaptive weight's
        extra gradients would set off, and switches autocast off."""
        return self.module(*args, **kwargs)

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of one micro-batch's mean loss; ``last``: the step's last one, gradients are reduced."""

    @abstractmethod
    def grad_norm(self) -> Tensor:
        """Reduces what is still to be reduced; returns the norm of the gradient over all ranks. Once a step."""

    @abstractmethod
    def step(self, lr: float, scale: Tensor | float = 1.0) -> None:
        """Multiplies the gradients by ``scale`` (for clipping; at most 1), updates by rate ``lr``, clears them."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """All ranks write what `load` needs beside the module's weights: the optimiser's state."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """All ranks restore what `save` wrote; the module's weights are loaded already."""


def clip_scale(norm: Tensor, clip_norm: float | None) -> Tensor | float:
    """The factor that brings gradients of that global norm down to ``clip_norm``; never above 1."""
    return 1.0 if clip_norm is None else torch.clamp(clip_norm / (norm + 1e-6), max=1.0)
