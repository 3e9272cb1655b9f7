"""FSQ: finite scalar quantization (arXiv 2309.15505), with iFSQ's bound (arXiv 2601.17124); a baseline."""

import math

import torch
from torch import Tensor

from model_zoo.config import TokenizerConfig
from model_zoo.errors import ModelError
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.ops.types import IndexBackprop
from model_zoo.quantizers.base import Quantizer

EPSILON = 1e-3  # FSQ's: keeps tanh away from the last rounding boundary
IFSQ_SLOPE = 1.6


class FiniteScalarQuantizer(Quantizer):
    """Bounds each feature and rounds it to one of L_i levels; a code is the tuple of the levels, so there are
    L_1 x ... x L_d codes, none of them learned. The gradient of rounding is straight-through, that of the bound exact.

    ``model.bound`` is one of these. Here h = (L - 1) / 2, and o = 1/2 for even L, else 0.

    tanh: h' tanh(z + tan(o / h')) - o with h' = (1 - 0.001) h (FSQ, section 3.1 and appendix A.1; no equation numbers).
    ifsq: h (2 sigmoid(1.6 z) - 1) - o, nearly uniform for z ~ normal(0, 1), so that the inner levels are used about
        equally and the outer two half as often (iFSQ, as in its public code). iFSQ is defined for odd L only. For even
        L we subtract o and shift nothing, so that the value stays uniform; a feature of 0 then lies between two levels.

    A vector's components are the rounded values divided by floor(L / 2): L odd gives [-1, 1], L even [-1, 1 - 2/L]. In
    the number of a code, the first feature's level counts 1, the second's L_1, and so on, each from 0.

    FSQ adds no loss, so its recipe sets loss.quantizer.weight=0. With a weight above 0, the commitment term compares
    the bounded features with the codes.
    """

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None = None):
        super().__init__(config, shard)
        levels = list(config.levels)
        if not levels:
            raise ModelError(
                "model.quantizer=fsq needs model.levels, the number of levels of each feature: for instance "
                "model.levels=[8,8,8,5,5,5] model.codebook_size=64000 model.code_dim=6"
            )
        codes = math.prod(levels)
        if codes > 2**24:  # of which training counts each
            raise ModelError(f"model.levels={levels} makes {codes} codes: give at most 2^24")
        if (config.codebook_size, config.code_dim) != (codes, len(levels)):
            raise ModelError(
                f"model.levels={levels} makes {codes} codes of {len(levels)} dimensions, not {config.codebook_size} of "
                f"{config.code_dim}: give model.codebook_size={codes} model.code_dim={len(levels)}"
            )
        self.levels, self.bound = levels, config.bound
        # Buffers in fp32 or int64; all follow from the configuration, so that checkpoints need not contain them.
        scale = 1 - EPSILON if self.bound == "tanh" else 1.0
        half = [scale * (level - 1) / 2 for level in levels]
        offset = [0.0 if level % 2 else 0.5 for level in levels]
        shift = [math.tan(o / h) if self.bound == "tanh" else 0.0 for o, h in zip(offset, half, strict=True)]
        width = [level // 2 for level in levels]
        for name, values in (("half", half), ("offset", offset), ("shift", shift), ("width", width)):
            self.register_buffer(f"{name}_d", torch.tensor(values, dtype=torch.float32), persistent=False)
        place = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("place_d", torch.tensor(place), persistent=False)
        self.register_buffer("levels_d", torch.tensor(levels), persistent=False)

    def settings(self) -> str:
        return f"fsq {self.levels} {self.bound}"

    def prepare(self, z_nd: Tensor) -> Tensor:
        unit_nd = torch.tanh(z_nd + self.shift_d) if self.bound == "tanh" else 2 * torch.sigmoid(IFSQ_SLOPE * z_nd) - 1
        return (unit_nd * self.half_d - self.offset_d) / self.width_d

    def assign(self, z_nd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
        index_n = self.nearest(z_nd)
        code_nd = self.vectors(index_n)
        return IndexBackprop(z_nd + (code_nd - z_nd).detach(), index_n, None, None, code_nd)

    def nearest(self, z_nd: Tensor) -> Tensor:
        level_nd = torch.round(z_nd * self.width_d + self.width_d).long()
        return (level_nd * self.place_d).sum(dim=1)

    def vectors(self, index_n: Tensor) -> Tensor:
        level_nd = index_n[:, None] // self.place_d % self.levels_d
        return (level_nd - self.width_d) / self.width_d
