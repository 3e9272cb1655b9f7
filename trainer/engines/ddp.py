"""Plain data parallelism: every rank holds everything, and one all-reduce averages the gradients. The other engines are
tested against it."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from model_zoo.io.sharded_tensors import TensorShard, whole_tensor
from trainer.engines.base import Engine, MakeOptimizer, Memory, stored_bytes, trained_parameters
from trainer.optim import start_moments
from trainer.parallel import sum_over_ranks


class DataParallel(Engine):
    """Adds no hooks to the module and broadcasts no buffers. A discriminator can therefore run several forwards before
    its backward, and each rank keeps its own BatchNorm statistics."""

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: MakeOptimizer | None,
        ignored: Iterable[nn.Parameter] = (),
        replicas: dist.ProcessGroup | None = None,
        **batch,
    ):
        """make_optimizer: None for frozen parameters, of which only `weights` is used. replicas: the ranks that hold
        the same parameters; None: all ranks."""
        super().__init__(module, **batch)
        self.parameters = trained_parameters(module, ignored)
        if make_optimizer:
            self.optimizer = make_optimizer(self.parameters.values())
            start_moments(self.optimizer, self.parameters.values())
        self.replicas = replicas
        self.replica = dist.get_rank(replicas), dist.get_world_size(replicas)

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss / self.micro_batches).backward()

    def grad_norm(self) -> Tensor:
        gradients = self._gradients()
        if dist.get_world_size(self.replicas) > 1:
            flat = sum_over_ranks(_flatten_dense_tensors(gradients), self.replicas)
            for gradient, reduced in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
                gradient.copy_(reduced)
        if dist.get_world_size() > 1:
            torch._foreach_div_(gradients, dist.get_world_size())
        return torch.nn.utils.get_total_norm(gradients)

    def step(self, lr: float, scale: Tensor | float = 1.0) -> None:
        torch._foreach_mul_(self._gradients(), scale)
        for group in self.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.skip()

    def skip(self) -> None:
        self.optimizer.zero_grad()  # sets gradients to None by default; apex's takes no argument

    def weights(self) -> list[TensorShard]:
        return [whole_tensor(name, parameter) for name, parameter in self.parameters.items()]

    def moments(self, key: str) -> list[Tensor]:
        return [self.optimizer.state[parameter][key].view(-1) for parameter in self.parameters.values()]

    def resident_bytes(self) -> Memory:
        parameters = self.parameters.values()
        return Memory(stored_bytes(parameters), sum(p.nbytes for p in parameters), self.optimizer_bytes())

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]
