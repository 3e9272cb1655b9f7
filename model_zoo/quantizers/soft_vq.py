"""Soft VQ: training uses a mixture of all codes, inference the most likely one (a baseline of arXiv 2412.02692)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from model_zoo.config import TokenizerConfig
from model_zoo.ops.chunked import nearest_code
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.ops.types import IndexBackprop
from model_zoo.quantizers.base import CodebookQuantizer


class SoftVectorQuantizer(CodebookQuantizer):
    """z_q = softmax(z C^T / T) C. Every code gets a gradient, as in IBQ, but the decoder is trained on mixtures.

    T decreases from 0.9 to 1e-6 on a cosine schedule, so that the mixture converges to one code. The mixture is
    computed as attention with the features as queries and the codes as keys and values, so PyTorch's fused kernels
    avoid a matrix of tokens x codes.
    """

    soft_assignment = True
    FIRST_TEMPERATURE, LAST_TEMPERATURE = 0.9, 1e-6

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None = None):
        super().__init__(config, shard)
        # A tensor, so that a compiled model is not recompiled at each step.
        self.register_buffer("temperature", torch.tensor(self.FIRST_TEMPERATURE), persistent=False)

    def anneal(self, progress: float) -> None:
        cosine = (1 + math.cos(math.pi * progress)) / 2
        self.temperature.fill_(self.LAST_TEMPERATURE + cosine * (self.FIRST_TEMPERATURE - self.LAST_TEMPERATURE))

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
