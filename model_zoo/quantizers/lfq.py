"""LFQ: lookup-free quantization (MAGVIT-v2, arXiv 2310.05737; Open-MAGVIT2, arXiv 2409.04410), a baseline."""

import torch
from torch import Tensor
from torch.nn import functional as F

from model_zoo.config import TokenizerConfig
from model_zoo.errors import ModelError
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.ops.types import IndexBackprop
from model_zoo.quantizers.base import Quantizer


class LookupFreeQuantizer(Quantizer):
    """A code is the signs of its d features: 2^d codes, none of them learned. Bit j of a code, counted from the lowest,
    is 1 if feature j is above 0. The gradient is straight-through.

    The entropies are those of softmax(2 z C^T / temperature) over all 2^d codes. This distribution factorises into d
    Bernoulli variables, P(bit j) = sigmoid(4 z_j / temperature). The entropy of a token is the sum of their entropies,
    and the mean over tokens is a product of two matrices of tokens x 2^(d / 2). No matrix of tokens x codes is built.
    """

    has_entropy = True

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None = None):
        super().__init__(config, shard)
        codebook_size, code_dim = config.codebook_size, config.code_dim
        if codebook_size != 2**code_dim:
            bits = (codebook_size - 1).bit_length()
            raise ModelError(
                f"model.quantizer=lfq has 2^code_dim codes, not {codebook_size} of {code_dim} dimensions: give "
                f"model.codebook_size={2**bits} model.code_dim={bits}"
            )
        self.register_buffer("powers_d", 2 ** torch.arange(code_dim), persistent=False)

    def assign(self, z_nd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
        index_n = self.nearest(z_nd)
        code_nd = self.vectors(index_n)
        quantized_nd = z_nd + (code_nd - z_nd).detach()
        if entropy_temperature is None:
            return IndexBackprop(quantized_nd, index_n, None, None, code_nd)
        logit_nd = 4 * z_nd / entropy_temperature
        # The entropy of a Bernoulli variable is softplus(x) - x sigmoid(x), which is even in x.
        size_nd = logit_nd.abs()
        sample_entropy = (F.softplus(-size_nd) + size_nd * torch.sigmoid(-size_nd)).sum(dim=1).mean()
        low_na, high_nb = (joint_probability(half) for half in logit_nd.tensor_split([logit_nd.shape[1] // 2], dim=1))
        average_k = (high_nb.T @ low_na).flatten() / len(z_nd)
        return IndexBackprop(quantized_nd, index_n, sample_entropy, average_k, code_nd)

    def nearest(self, z_nd: Tensor) -> Tensor:
        return ((z_nd > 0) * self.powers_d).sum(dim=1)

    def vectors(self, index_n: Tensor) -> Tensor:
        return (index_n[:, None] & self.powers_d).ne(0).float() * 2 - 1


def joint_probability(logit_nd: Tensor) -> Tensor:
    """Logits of d Bernoulli variables -> probabilities ``(n, 2^d)`` of their joint outcomes; variable 0 is the lowest
    bit."""
    probability_nk = logit_nd.new_ones(len(logit_nd), 1)
    for up_n in logit_nd.unbind(dim=1):
        down_nk = probability_nk * torch.sigmoid(-up_n)[:, None]
        probability_nk = torch.cat([down_nk, probability_nk * torch.sigmoid(up_n)[:, None]], dim=1)
    return probability_nk
