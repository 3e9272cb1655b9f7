"""Plain data parallelism: every rank holds everything, and one all-reduce averages the gradients. The other engines are
tested against it."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from model_zoo.io.sharded_tensors import TensorShard, whole_tensor
from trainer.engines.base import Engine, MakeOptimizer, trained_parameters
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

    def weights(self) -> list[TensorShard]:
        return [whole_tensor(name, parameter) for name, parameter in self.parameters.items()]
