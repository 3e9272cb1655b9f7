"""What quantizers share whose codes are a function of a table: codes = P(C), with a trained projector P."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.config import TokenizerConfig
from model_zoo.ops.chunked import nearest_code
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.ops.types import IndexBackprop
from model_zoo.quantizers import base
from model_zoo.quantizers.base import Quantizer


class ProjectedCodebook(Quantizer):
    """Selects the projected code at the smallest Euclidean distance, with a straight-through gradient. The VQ losses
    train the projector, and the table unless it is frozen, towards the features.

    The projected codes are computed in each forward. In eval mode without gradients they are computed once and kept
    until a weight or the mode changes, so that a validation does not compute them for each picture. (A change through
    `.data` in eval mode is not noticed.) A subclass sets
    ``projector``, a module from rows to codes. The projector needs the whole table, so that codes cannot be sharded.

    rows_kr: the initial table.
    """

    projector: nn.Module

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None, rows_kr: Tensor, frozen: bool):
        super().__init__(config, shard)
        self.embedding = nn.Embedding.from_pretrained(rows_kr, freeze=frozen)
        self._kept: tuple[list, Tensor] | None = None  # what identified the weights, and their codes

    def train(self, mode: bool = True) -> "ProjectedCodebook":
        self._kept = None  # engines change weights in training mode, through buffers whose versions do not tell
        return super().train(mode)

    def row_parameters(self) -> list[nn.Parameter]:
        return [self.embedding.weight]

    def project(self, rows_kr: Tensor) -> Tensor:
        """Rows of the table -> codes, in fp32 also under autocast."""
        with torch.autocast(rows_kr.device.type, enabled=False):
            return self.projector(rows_kr)

    def codes(self) -> Tensor:
        """The code vectors ``(k, d)``; differentiable."""
        if self.training or torch.is_grad_enabled():
            return self.project(self.embedding.weight)
        weights = [(weight.data_ptr(), weight._version) for weight in self.parameters()]
        if self._kept is None or self._kept[0] != weights:
            self._kept = weights, self.project(self.embedding.weight)
        return self._kept[1]

    def vectors(self, index_n: Tensor) -> Tensor:
        return F.embedding(index_n, self.codes())

    @torch.no_grad()
    def nearest(self, z_nd: Tensor) -> Tensor:
        return nearest_code(z_nd, self.codes(), distance="euclidean")

    def assign(self, z_nd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
        codes_kd = self.codes()
        index_n = nearest_code(z_nd.detach(), codes_kd.detach(), distance="euclidean")
        return straight_through(z_nd, index_n, F.embedding(index_n, codes_kd))


class LinearCodebook(ProjectedCodebook):
    """A frozen table and a trained linear layer. A layer maps each row by itself, so that the gradient needs the chosen
    rows only, and no matrix of codes x dimensions."""

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None, row_dim: int, row_std: float):
        rows_kr = base.initial_codes(0, config.codebook_size, config.codebook_size, row_dim, row_std)
        super().__init__(config, shard, rows_kr, frozen=True)
        self.projector = nn.Linear(row_dim, config.code_dim)

    def vectors(self, index_n: Tensor) -> Tensor:
        return self.project(self.embedding(index_n))

    def assign(self, z_nd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
        index_n = self.nearest(z_nd)
        return straight_through(z_nd, index_n, self.vectors(index_n))


def straight_through(z_nd: Tensor, index_n: Tensor, code_nd: Tensor) -> IndexBackprop:
    """The decoder sees the codes; the encoder gets the decoder's gradient unchanged."""
    return IndexBackprop(z_nd + (code_nd - z_nd).detach(), index_n, None, None, code_nd)
