"""Every rank holds everything; gradients are averaged by one all-reduce. The readable truth for the other engines."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from trainer.engines.base import Engine
from trainer.parallel import sum_over_ranks


class Replicated(Engine):
    """Plain PyTorch. It adds no hook to the module and broadcasts no buffer, so that a discriminator may run several
    forwards before its backward, and its BatchNorm statistics stay each rank's own."""

    replicas: dist.ProcessGroup | None = None  # the ranks that hold the same parameters; None: all

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
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self) -> list[Tensor]:
        parameters = [p for group in self.param_groups for p in group["params"]]
        return [p.grad for p in parameters if p.grad is not None]

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss / self.micro_batches).backward()

    def save(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state)
