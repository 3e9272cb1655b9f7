"""The result of index backpropagation, shared by all of its implementations."""

from typing import NamedTuple

import torch
from torch import Tensor

from model_zoo.ops.codebook_parallel import CodebookShard, sum_over_shards

# Added inside the logarithm of the average entropy, as in the published training code. It bounds the gradient
# -(log(a + eps) + a / (a + eps)) of unused codes.
AVERAGE_ENTROPY_EPSILON = 1e-5


class IndexBackprop(NamedTuple):
    """Result of index backpropagation. All floating-point fields are differentiable in z and in the codebook.

    quantized_nd: the chosen code vectors; their gradient reaches *all* codes through the softmax of the logits.
    index_n: int64 indices of the chosen codes; ties go to the lowest index.
    sample_entropy: scalar, mean over tokens of H(softmax(logits / temperature)) in nats; None without temperature.
    average_probability_k: mean over tokens of softmax(logits / temperature); None without temperature. The entropy of
        this mean is not stored: means over micro-batches and ranks can be averaged again, entropies cannot.
    code_nd: the chosen code vectors again; their gradient reaches only the chosen codes, and no token. The VQ losses
        use this field, so that they share the operation's gradient of the codebook. A second gradient buffer of
        K x D would double the memory.
    shard: the shard given to the call. With a shard, average_probability_k covers this rank's codes only and is the
        mean over the tokens of all ranks of the group; sample_entropy is the mean over this rank's tokens.
    """

    quantized_nd: Tensor
    index_n: Tensor
    sample_entropy: Tensor | None
    average_probability_k: Tensor | None
    code_nd: Tensor
    shard: CodebookShard | None = None

    @property
    def average_entropy(self) -> Tensor | None:
        """Scalar H(average_probability_k) in nats, over all codes; None without temperature."""
        if self.average_probability_k is None:
            return None
        return average_entropy(self.average_probability_k, self.shard)


def average_entropy(average_probability_k: Tensor, shard: CodebookShard | None = None) -> Tensor:
    """Entropy in nats of the mean assignment, ``-sum_k a_k log(a_k + 1e-5)``: high when all codes are in use."""
    entropy = -(average_probability_k * torch.log(average_probability_k + AVERAGE_ENTROPY_EPSILON)).sum()
    return sum_over_shards(entropy, shard)
