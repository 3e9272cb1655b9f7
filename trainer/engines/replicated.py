"""Every rank holds everything; gradients are averaged by one all-reduce. The readable truth for the other engines."""

from pathlib import Path

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from trainer.engines.base import Engine
from trainer.parallel import mean_over_ranks


class Replicated(Engine):
    """Plain PyTorch. It adds no hook to the module and broadcasts no buffer, so that a discriminator may run several
    forwards before its backward, and its BatchNorm statistics stay each rank's own."""

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss / self.micro_batches).backward()

    def step(self, lr: float) -> Tensor:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        flat = mean_over_ranks(_flatten_dense_tensors(gradients))
        for gradient, reduced in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
            gradient.copy_(reduced)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self, folder: Path) -> None:
        if torch.distributed.get_rank() == 0:
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state)
