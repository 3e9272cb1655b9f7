"""The interface between a task's step and the way a module is distributed over ranks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from model_zoo.io.sharded_tensors import TensorShard
from trainer.optim import get_step, set_step

MakeOptimizer = Callable[..., Optimizer]  # takes parameters; apex=False: see `trainer.optim.adam`


class Memory(NamedTuple):
    """Bytes that a rank holds between the backward pass and the optimizer step, when all gradients exist."""

    parameters: int
    gradients: int
    optimizer: int


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors: a shared storage counts once, padding counts too."""
    storages = [local(tensor).untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    # Only a DTensor has `to_local`; importing its class would take as long as half of torch.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Engine(ABC):
    """A module, its optimizer, and gradients that are averaged over ranks.

    One step is: for every micro-batch ``loss = ...``, ``engine.backward(loss, last=...)``; then ``engine.grad_norm()``
    and ``engine.step(lr, scale)``, or ``engine.skip()``. Losses are means over the micro-batch; the engine divides by
    the number of micro-batches and of ranks, so that the gradient is that of the mean over the global batch.

    The engine decides where parameters, gradients and optimizer state are stored. Other code sees this rank's flat
    shards of them: `weights` and `moments`.
    """

    optimizer: Optimizer
    parameters: dict[str, nn.Parameter]  # those that the engine owns
    # (index, count) among the ranks that hold the same shards: together they write one copy.
    replica: tuple[int, int] = (0, 1)
    # Whether a forward is a collective, so that all ranks must run equally many, in evaluation too.
    forwards_together = False
    # Whether optimizer state, and parameters where the settings say so, are kept in CPU memory.
    offloads = False

    def __init__(self, module: nn.Module, *, micro_batch_size: int, micro_batches: int):
        self.module = module
        self.micro_batch_size = micro_batch_size
        self.micro_batches = micro_batches

    @property
    def param_groups(self) -> list[dict]:
        """The optimizer's parameter groups."""
        return self.optimizer.param_groups

    def __call__(self, *args, **kwargs):
        """The module's forward."""
        return self.run(self.module, *args, **kwargs)

    def run(self, function: Callable, *args, **kwargs):
        """Calls a function that uses the module's weights, such as one of its methods."""
        return function(*args, **kwargs)

    @abstractmethod
    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradient of one micro-batch's mean loss. last: of the step, so gradients are reduced."""

    @abstractmethod
    def grad_norm(self) -> Tensor:
        """Finishes the reduction and returns the norm of the global gradient on all ranks. Call it once per step. The
        norm is not finite if any rank's gradient is not."""

    def step(self, lr: float, scale: Tensor | float = 1.0) -> None:
        """Multiplies the gradients by ``scale`` (for clipping; at most 1), updates the parameters, clears gradients."""
        gradients = self._gradients()
        if isinstance(scale, Tensor) and gradients:
            scale = scale.to(gradients[0].device)  # the CPU, if the engine offloads
        torch._foreach_mul_(gradients, scale)
        for group in self.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.skip()

    def skip(self) -> None:
        """Clears the gradients without an update; call it instead of `step`."""
        self.optimizer.zero_grad()  # sets gradients to None by default; apex's takes no argument

    @abstractmethod
    def weights(self) -> list[TensorShard]:
        """This rank's shards of the parameters, in fp32, named as in the module's state dict. Their values are views:
        after writing to them, call `sync_weights`."""

    def moments(self, key: str) -> list[Tensor]:
        """Views of the optimizer state of that name (`trainer.optim.MOMENTS`), in the order of `weights`."""
        return [local(self.optimizer.state[parameter][key]).view(-1) for parameter in self.parameters.values()]

    def resident_bytes(self) -> Memory:
        """Bytes of the tensors that this rank holds: parameters, their gradients after a backward, optimizer state.
        Activations and communication buffers are not included."""
        shards = [local(parameter) for parameter in self.parameters.values()]
        return Memory(stored_bytes(shards), sum(shard.nbytes for shard in shards), self.optimizer_bytes())

    def optimizer_bytes(self) -> int:
        """Bytes of this rank's optimizer state."""
        states = self.optimizer.state.values()
        return stored_bytes(value for state in states for value in state.values() if isinstance(value, Tensor))

    def sync_weights(self) -> None:  # noqa: B027 (most engines have nothing to do)
        """Makes the module compute with what was written to `weights`. All ranks call together."""

    @property
    def updates(self) -> int:
        """The number of updates that the optimizer has made."""
        return get_step(self.optimizer)

    @updates.setter
    def updates(self, number: int) -> None:
        set_step(self.optimizer, number)

    def _gradients(self) -> list[Tensor]:
        return [local(p.grad) for p in self.parameters.values() if p.grad is not None]


class Root(nn.Module):
    """The part of a module that an engine owns, with a forward that runs any function.

    Engines that shard parameters attach hooks to modules, and need their root module to be called first.
    ignored: parameters that belong to another engine; a direct child that has one of them is left out.
    """

    def __init__(self, module: nn.Module, ignored: Iterable[nn.Parameter]):
        super().__init__()
        ignored = set(ignored)
        parts = [module] if not ignored else [c for c in module.children() if not ignored & set(c.parameters())]
        self.parts = nn.ModuleList(parts)

    def forward(self, function: Callable, *args, **kwargs):
        return function(*args, **kwargs)


def trained_parameters(module: nn.Module, ignored: Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
    """The module's parameters by name, without the ignored ones."""
    ignored = set(ignored)
    return {name: parameter for name, parameter in module.named_parameters() if parameter not in ignored}


def clip_scale(norm: Tensor, clip_norm: float | None) -> Tensor | float:
    """The factor, at most 1, that scales a gradient of global norm ``norm`` down to ``clip_norm``."""
    return 1.0 if clip_norm is None else torch.clamp(clip_norm / (norm + 1e-6), max=1.0)
