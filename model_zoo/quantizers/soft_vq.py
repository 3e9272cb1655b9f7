"""Soft VQ: training sees a mixture of all codes, inference the likeliest one (a baseline of arXiv 2412.02692)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from model_zoo.errors import ModelError
from model_zoo.ops import CodebookShard, IndexBackprop, nearest_code
from model_zoo.quantizers.base import CodebookQuantizer


class SoftVectorQuantizer(CodebookQuantizer):
    """z_q = softmax(z C^T / T) C: every code gets a gradient, as in IBQ, but what the decoder is trained on is no code.

    T falls from 0.9 to 1e-6 along half a cosine, so that the mixture ends as one code. The mixture is attention with
    the features as queries and the codes as keys and values, so no matrix of tokens x codes is kept where PyTorch has
    a fused kernel for it.
    """

    soft_assignment = True
    FIRST_TEMPERATURE, LAST_TEMPERATURE = 0.9, 1e-6

    def __init__(self, codebook_size: int, code_dim: int, init_std: float = 1.0, shard: CodebookShard | None = None):
        if shard is not None:
            raise ModelError("model.quantizer=soft_vq needs its whole codebook: codebook_parallel=1")
        super().__init__(codebook_size, code_dim, init_std)
        # A tensor, so that a compiled model is not compiled anew at each step.
        self.register_buffer("temperature", torch.tensor(self.FIRST_TEMPERATURE), persistent=False)

    def anneal(self, progress: float) -> None:
        falling = (1 + math.cos(math.pi * progress)) / 2
        self.temperature.fill_(self.LAST_TEMPERATURE + falling * (self.FIRST_TEMPERATURE - self.LAST_TEMPERATURE))

    def assign(self, z_nd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
        index_n = self.nearest(z_nd)
        code_nd = self.vectors(index_n)
        if not self.training:
            return IndexBackprop(code_nd, index_n, None, None, code_nd)
        codes_11kd = self.embedding.weight[None, None]
        queries_11nd = (z_nd / self.temperature)[None, None]
        soft_11nd = F.scaled_dot_product_attention(queries_11nd, codes_11kd, codes_11kd, scale=1.0)
        return IndexBackprop(soft_11nd[0, 0], index_n, None, None, code_nd)

    def nearest(self, z_nd: Tensor) -> Tensor:
        return nearest_code(z_nd, self.embedding.weight)
