"""Index backpropagation: the public operation of the IBQ quantizer (arXiv 2412.02692, Algorithm 1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from model_zoo import ModelError

# Inside the logarithm of the average entropy, as in the published training: it bounds the gradient
# -(log(a + eps) + a / (a + eps)) of codes that nobody uses.
AVERAGE_ENTROPY_EPSILON = 1e-5
# Elements of the N x K matrices from which tiles take less time than the whole. Measured on one core of an AMD EPYC,
# N = 64 to 4096, D = 32 and 256: they are even between 2^20 and 2^22, later where N is large and K small.
CHUNKED_FROM = 2**22


class IndexBackprop(NamedTuple):
    """What index backpropagation returns; every floating-point field is differentiable in z and in the codebook.

    quantized_nd: the chosen code vectors; the gradient reaches *all* codes through the softmax of the logits.
    index_n: int64 indices of the chosen codes, the lowest one on ties.
    sample_entropy: scalar, mean over tokens of H(softmax(logits / temperature)) in nats; None without temperature.
    average_probability_k: mean over tokens of softmax(logits / temperature); None without temperature. It is kept
        apart from its entropy because averages over micro-batches and ranks can be averaged again; entropies cannot.
    code_nd: the chosen code vectors once more; the gradient reaches these codes alone, and no token. It is there so
        that the VQ losses share the operation's gradient of the codebook: one of K x D more would double the memory.
    """

    quantized_nd: Tensor
    index_n: Tensor
    sample_entropy: Tensor | None
    average_probability_k: Tensor | None
    code_nd: Tensor

    @property
    def average_entropy(self) -> Tensor | None:
        """Scalar H(average_probability_k) in nats; None without temperature."""
        return None if self.average_probability_k is None else average_entropy(self.average_probability_k)


def average_entropy(average_probability_k: Tensor) -> Tensor:
    """Entropy in nats of the mean assignment, ``-sum_k a_k log(a_k + 1e-5)``: high when all codes are in use."""
    return -(average_probability_k * torch.log(average_probability_k + AVERAGE_ENTROPY_EPSILON)).sum()


def index_backprop(
    z_nd: Tensor, codebook_kd: Tensor, *, impl: str = "auto", entropy_temperature: float | None = 0.01
) -> IndexBackprop:
    """Quantizes ``z_nd`` (tokens x D) by ``codebook_kd`` (K x D): hard codes forward, softmax gradient backward.

    impl: ``dense`` builds the N x K matrices and is the readable truth; ``chunked`` goes over them in tiles and needs
        O(N D + K) memory beside operands and gradients; ``auto`` takes what `fastest_impl` names.
    entropy_temperature: temperature of the assignment whose entropies are returned; None leaves them out.

    Raises ModelError for shapes that do not fit or an unknown ``impl``.
    """
    from model_zoo.ops.chunked import index_backprop_chunked  # they need the types above
    from model_zoo.ops.dense import index_backprop_dense

    if z_nd.ndim != 2 or codebook_kd.ndim != 2 or z_nd.shape[1] != codebook_kd.shape[1]:
        raise ModelError(
            f"index_backprop takes z (N, D) and codebook (K, D), not {tuple(z_nd.shape)} and {tuple(codebook_kd.shape)}"
        )
    if impl == "auto":
        impl = fastest_impl(z_nd, codebook_kd)
    implementations = {"dense": index_backprop_dense, "chunked": index_backprop_chunked}
    if impl not in implementations:
        raise ModelError(f"unknown impl {impl!r}: choose one of auto, {', '.join(implementations)}")
    return implementations[impl](z_nd, codebook_kd, entropy_temperature)


def fastest_impl(z_nd: Tensor, codebook_kd: Tensor) -> str:
    """The name that ``impl="auto"`` stands for with these operands."""
    return "chunked" if len(z_nd) * len(codebook_kd) >= CHUNKED_FROM else "dense"
