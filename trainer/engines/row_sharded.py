"""The engine of a module with one row per code: each rank holds only its rows, their gradient and optimizer state."""

from collections.abc import Iterable

from torch import Tensor, nn

from model_zoo.io.sharded_tensors import TensorShard
from trainer.engines.base import MakeOptimizer
from trainer.engines.ddp import DataParallel
from trainer.parallel import RowGroups, sum_over_ranks


class RowSharded(DataParallel):
    """A quantizer, or a generator's head, whose rows are sharded over ``groups.shard`` and replicated over
    ``groups.replicas``.

    The module's gradient is that of the sum of its group's losses. The sum over the replicas, divided by the number of
    all ranks, is therefore the gradient of the mean loss. The main engine runs the backward pass.

    rows: number of rows in the whole module.
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: MakeOptimizer | None,
        rows: int,
        groups: RowGroups,
        ignored: Iterable[nn.Parameter] = (),
        **batch,
    ):
        super().__init__(module, make_optimizer, ignored, replicas=groups.replicas, **batch)
        self.rows, self.shard = rows, groups.shard

    def grad_norm(self) -> Tensor:
        norm = super().grad_norm()
        return norm if self.shard is None else sum_over_ranks(norm.square(), self.shard.group).sqrt()

    def weights(self) -> list[TensorShard]:
        first = self.shard.start if self.shard else 0
        return [
            TensorShard(shard.name, (self.rows, shard.shape[1]), first * shard.shape[1], shard.values)
            for shard in super().weights()
        ]
