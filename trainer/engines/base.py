"""The boundary between a task's step and the way its module is spread over ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from model_zoo.io.sharded_tensors import TensorShard
from trainer.optim import get_step, set_step

MakeOptimizer = Callable[..., Optimizer]  # of parameters; apex=False: see `trainer.optim.adam`


class Memory(NamedTuple):
    """Bytes that a rank holds between a backward and the optimiser's step, when its gradients are all there."""

    parameters: int
    gradients: int
    optimizer: int


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors: what several of them share counts once, padding counts too."""
    # Only a DTensor has `to_local`; importing its class would take as long as half of torch.
    tensors = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class Engine(ABC):
    """A module, its optimiser, and gradients that are averaged over ranks.

    One step is: for every micro-batch ``loss = ...``, ``engine.backward(loss, last=...)``; then ``engine.grad_norm()``
    and ``engine.step(lr, scale)``, or ``engine.skip()``. Losses are means over the micro-batch; the engine divides by
    the number of micro-batches and of ranks, so that the gradient is that of the mean over the global batch.

    Where parameters, gradients and optimiser state lie is the engine's affair; what others need of them are the flat
    pieces that are here: `weights` and `moments`.
    """

    optimizer: Optimizer
    # Which of how many ranks with the very same pieces this is: together they write one copy of them.
    replica: tuple[int, int] = (0, 1)
    # Whether a forward is a collective, so that all ranks must run as many of them, evaluation included.
    forwards_together = False
    # Whether optimiser state, and what else the engine's settings say, is kept in the CPU's memory.
    offloads = False

    def __init__(self, module: nn.Module, *, micro_batch_size: int, micro_batches: int):
        self.module = module
        self.micro_batch_size = micro_batch_size
        self.micro_batches = micro_batches

    @property
    def param_groups(self) -> list[dict]:
        """The optimiser's."""
        return self.optimizer.param_groups

    def __call__(self, *args, **kwargs):
        """The module's forward."""
        return self.run(self.module, *args, **kwargs)

    def run(self, function: Callable, *args, **kwargs):
        """Calls a function that computes with the module's weights, such as one of its methods."""
        return function(*args, **kwargs)

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of one micro-batch's mean loss; ``last``: the step's last one, gradients are reduced."""

    @abstractmethod
    def grad_norm(self) -> Tensor:
        """Reduces what is still to be reduced; returns the norm of the gradient over all ranks, on all of them. Once a
        step. Not finite where any rank's gradient is not."""

    @abstractmethod
    def step(self, lr: float, scale: Tensor | float = 1.0) -> None:
        """Multiplies the gradients by ``scale`` (for clipping; at most 1), updates by rate ``lr``, clears them."""

    @abstractmethod
    def skip(self) -> None:
        """Clears the gradients without an update; in place of `step`."""

    @abstractmethod
    def weights(self) -> list[TensorShard]:
        """The trained parameters that are here, in fp32, by the names of the module's state dict. Their values are
        views: written to, they count after `sync_weights`."""

    @abstractmethod
    def moments(self, key: str) -> list[Tensor]:
        """The optimiser's state of that name (`trainer.optim.MOMENTS`), a view beside each of `weights`."""

    @abstractmethod
    def resident_bytes(self) -> Memory:
        """What this rank holds of parameters, of their gradients once a backward has run, and of the optimiser's state,
        by the tensors that are there. Activations and buffers for communication are not in it."""

    def optimizer_bytes(self) -> int:
        """Of the optimiser's state that is here."""
        states = self.optimizer.state.values()
        return stored_bytes(value for state in states for value in state.values() if isinstance(value, Tensor))

    def sync_weights(self) -> None:  # noqa: B027 (most engines have nothing to do)
        """After writing to `weights`: the module computes with them from now on. All ranks call together."""

    @property
    def updates(self) -> int:
        """How many updates the optimiser has seen."""
        return get_step(self.optimizer)

    @updates.setter
    def updates(self, number: int) -> None:
        set_step(self.optimizer, number)


class Root(nn.Module):
    """The part of a module that an engine takes over, and a forward that runs any function.

    Engines that shard parameters hook into modules and want their outermost one to be called first.
    ignored: parameters of the module that are another engine's; a direct child that has one is left out whole.
    """

    def __init__(self, module: nn.Module, ignored: Iterable[nn.Parameter]):
        super().__init__()
        ignored = set(ignored)
        parts = [module] if not ignored else [c for c in module.children() if not ignored & set(c.parameters())]
        self.parts = nn.ModuleList(parts)

    def forward(self, function: Callable, *args, **kwargs):
        return function(*args, **kwargs)


def trained_parameters(module: nn.Module, ignored: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
    """Name -> parameter of all but the ignored ones."""
    ignored = set(ignored)
    return {name: parameter for name, parameter in module.named_parameters() if parameter not in ignored}


def clip_scale(norm: Tensor, clip_norm: float | None) -> Tensor | float:
    """The factor that brings gradients of that global norm down to ``clip_norm``; never above 1."""
    return 1.0 if clip_norm is None else torch.clamp(clip_norm / (norm + 1e-6), max=1.0)
