"""The boundary between a task's step and the way its module is spread over ranks."""

from abc import ABC, abstractmethod
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer


class Engine(ABC):
    """A module, its optimiser, and gradients that are averaged over ranks.

    One step is: for every micro-batch ``loss = ...engine(...)``, ``engine.backward(loss, last=...)``; then
    ``engine.step(lr)``. Losses are means over the micro-batch; the engine divides by the number of micro-batches and
    of ranks, so that the gradient is that of the mean over the global batch.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        micro_batch_size: int,
        micro_batches: int,
        clip_norm: float | None,
    ):
        self.module = module
        self.optimizer = optimizer
        self.micro_batch_size = micro_batch_size
        self.micro_batches = micro_batches
        self.clip_norm = clip_norm

    def __call__(self, *args, **kwargs):
        """The module's forward. Not a wrapper's: DeepSpeed's adds hooks to the outputs that the adaptive weight's
        extra gradients would set off, and switches autocast off."""
        return self.module(*args, **kwargs)

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of one micro-batch's mean loss; ``last``: the step's last one, gradients are reduced."""

    @abstractmethod
    def step(self, lr: float) -> Tensor | float:
        """Clips, updates by rate ``lr``, clears the gradients. Returns the global gradient norm before clipping."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """All ranks write what `load` needs beside the module's weights: the optimiser's state."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """All ranks restore what `save` wrote; the module's weights are loaded already."""
