"""The codebook's own engine: rows, gradient and optimiser state are on the ranks that own them, and nowhere else."""

from torch import Tensor

from model_zoo.pieces import Piece
from trainer.engines.base import MakeOptimizer
from trainer.engines.replicated import Replicated
from trainer.parallel import CodebookGroups, sum_over_ranks


class Codebook(Replicated):
    """A quantizer whose codebook is spread over ``groups.shard``, with copies among ``groups.replicas``.

    The gradients that a sharded quantizer gives are those of the sum of its group's losses; so a sum over the replicas,
    divided by the number of all ranks, is the gradient of the mean loss. Backward is the generator's.

    codes: how many the whole codebook has.
    """

    def __init__(self, quantizer, make_optimizer: MakeOptimizer, codes: int, groups: CodebookGroups, **batch):
        super().__init__(quantizer, make_optimizer, replicas=groups.replicas, **batch)
        self.codes, self.shard = codes, groups.shard

    def grad_norm(self) -> Tensor:
        norm = super().grad_norm()
        return norm if self.shard is None else sum_over_ranks(norm.square(), self.shard.group).sqrt()

    def weights(self) -> list[Piece]:
        first = self.shard.start if self.shard else 0
        return [
            Piece(piece.name, (self.codes, piece.shape[1]), first * piece.shape[1], piece.values)
            for piece in super().weights()
        ]
