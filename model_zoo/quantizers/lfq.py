"""LFQ: lookup-free quantization (MAGVIT-v2, arXiv 2310.05737; Open-MAGVIT2, arXiv 2409.04410), a baseline; in groups as
in WeTok (arXiv 2508.05599)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from model_zoo.config import TokenizerConfig
from model_zoo.errors import ModelError
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.ops.types import IndexBackprop
from model_zoo.quantizers.base import Quantizer

MOST_BITS = 62  # of a code, an int64
MOST_GROUP_BITS = 24  # the mean assignment of a group has 2^bits numbers
MOST_COUNTED_BITS = 24  # the usage of larger codebooks is counted by groups of bits
MOST_BITS_OF_COUNTED_GROUP = 16


class LookupFreeQuantizer(Quantizer):
    """A code is the signs of its d features: 2^d codes, none of them learned. Bit j of a code, counted from the lowest,
    is 1 if feature j is above 0. The gradient is straight-through.

    The entropies are those of softmax(2 z C^T / temperature) over all 2^d codes. This distribution factorises into d
    Bernoulli variables, P(bit j) = sigmoid(4 z_j / temperature). The entropy of a token is the sum of their entropies,
    and the mean over tokens is a product of two matrices of tokens x 2^(d / 2). No matrix of tokens x codes is built.

    With ``model.groups`` = g the d bits are split into g groups of neighbours, as in WeTok's group-wise quantization.
    Codes, vectors and the entropy of a token stay the same. The entropy of the mean assignment becomes the sum of those
    of the groups, each over its own 2^(d / g) codes: an upper bound, which needs g 2^(d / g) numbers in place of 2^d.
    ``average_probability_k`` holds the groups' mean assignments one after another, the lowest bits' first. WeTok's
    public code instead averages the entropies of tokens over the groups, and takes one mean assignment over tokens and
    groups; we keep the groups apart and sum, so that one group is LFQ. Entropies are then g times as large.

    The usage of more than 2^24 codes is that of groups of neighbouring bits: as few groups as have at most 16 bits
    each, whatever ``model.groups`` is. Smaller groups show little: both values of a bit are nearly always in use.
    """

    has_entropy = True
    code_size = 1.0  # of each component of a code

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None = None):
        super().__init__(config, shard)
        codebook_size, bits = config.codebook_size, config.code_dim
        if codebook_size != 2**bits:
            bits = (codebook_size - 1).bit_length()
            raise ModelError(
                f"model.quantizer={config.quantizer} has 2^code_dim codes, not {codebook_size} of {config.code_dim} "
                f"dimensions: give model.codebook_size={2**bits} model.code_dim={bits}"
            )
        if bits > MOST_BITS:
            raise ModelError(
                f"model.code_dim={bits}: a code of model.quantizer={config.quantizer} has at most {MOST_BITS} bits"
            )
        self.groups = self.default_groups(bits) if config.groups is None else config.groups
        fitting = [groups for groups in range(1, bits + 1) if bits % groups == 0 and bits // groups <= MOST_GROUP_BITS]
        if self.groups not in fitting:
            raise ModelError(
                f"model.groups={self.groups} does not split {bits} bits into equal groups of at most "
                f"{MOST_GROUP_BITS}: give one of {', '.join(map(str, fitting))}"
            )
        self.register_buffer("powers_d", 2 ** torch.arange(bits), persistent=False)
        self.counted_bits = [bits]
        if bits > MOST_COUNTED_BITS:
            groups = -(-bits // MOST_BITS_OF_COUNTED_GROUP)
            self.counted_bits = [bits // groups + (group < bits % groups) for group in range(groups)]
        self.counted_sizes = [2**of_group for of_group in self.counted_bits]

    @staticmethod
    def default_groups(bits: int) -> int:
        return 1

    def assign(self, z_nd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
        index_n = self.nearest(z_nd)
        sign_nd = self._signs(index_n)
        quantized_nd = self.code_size * (z_nd + (sign_nd - z_nd).detach())
        code_nd = self.code_size * sign_nd
        if entropy_temperature is None:
            return IndexBackprop(quantized_nd, index_n, None, None, code_nd)
        logit_nd = 4 * self.code_size * z_nd / entropy_temperature
        # The entropy of a Bernoulli variable is softplus(x) - x sigmoid(x), which is even in x.
        size_nd = logit_nd.abs()
        sample_entropy = (F.softplus(-size_nd) + size_nd * torch.sigmoid(-size_nd)).sum(dim=1).mean()
        average_k = torch.cat([mean_assignment(part_nb) for part_nb in logit_nd.chunk(self.groups, dim=1)])
        return IndexBackprop(quantized_nd, index_n, sample_entropy, average_k, code_nd)

    def nearest(self, z_nd: Tensor) -> Tensor:
        return ((z_nd > 0) * self.powers_d).sum(dim=1)

    def vectors(self, index_n: Tensor) -> Tensor:
        return self.code_size * self._signs(index_n)

    def counted(self, index: Tensor) -> Tensor:
        if not self.counts_groups:
            return index
        counted, first_bit, first_value = [], 0, 0
        for bits, size in zip(self.counted_bits, self.counted_sizes, strict=True):
            counted.append((index >> first_bit) % size + first_value)
            first_bit, first_value = first_bit + bits, first_value + size
        return torch.stack(counted, dim=-1)

    def _signs(self, index_n: Tensor) -> Tensor:
        """The bits of codes as 1 and -1."""
        return (index_n[:, None] & self.powers_d).ne(0).float() * 2 - 1


def mean_assignment(logit_nb: Tensor) -> Tensor:
    """Logits of b Bernoulli variables -> the mean over tokens of the probabilities ``(2^b,)`` of their joint outcomes;
    variable 0 is the lowest bit."""
    low_na, high_nb = (joint_probability(half) for half in logit_nb.tensor_split([logit_nb.shape[1] // 2], dim=1))
    return (high_nb.T @ low_na).flatten() / len(logit_nb)


def joint_probability(logit_nd: Tensor) -> Tensor:
    """Logits of d Bernoulli variables -> probabilities ``(n, 2^d)`` of their joint outcomes; variable 0 is the lowest
    bit."""
    probability_nk = logit_nd.new_ones(len(logit_nd), 1)
    for up_n in logit_nd.unbind(dim=1):
        down_nk = probability_nk * torch.sigmoid(-up_n)[:, None]
        probability_nk = torch.cat([down_nk, probability_nk * torch.sigmoid(up_n)[:, None]], dim=1)
    return probability_nk
