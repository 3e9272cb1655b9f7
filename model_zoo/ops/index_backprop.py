"""Index backpropagation: the public operation of the IBQ quantizer (arXiv 2412.02692, Algorithm 1)."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from model_zoo.errors import ModelError
from model_zoo.ops.codebook_parallel import CodebookShard, exchange, sum_over_shards

if TYPE_CHECKING:
    from model_zoo.ops.tiled import Settings

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
    shard: what the call was given. average_probability_k then holds this rank's codes alone, and is the mean over the
        tokens of all ranks of the group; sample_entropy is that of this rank's tokens.
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


def index_backprop(
    z_nd: Tensor,
    codebook_kd: Tensor,
    *,
    impl: str = "auto",
    entropy_temperature: float | None = 0.01,
    shard: CodebookShard | None = None,
    settings: "Settings | None" = None,
) -> IndexBackprop:
    """Quantizes ``z_nd`` (tokens x D) by ``codebook_kd`` (K x D): hard codes forward, softmax gradient backward.

    impl: ``dense`` builds the N x K matrices and is the readable truth; ``chunked`` goes over them in tiles and needs
        O(N D + K) memory beside operands and gradients; ``triton`` does that in CUDA kernels; ``auto`` takes what
        `fastest_impl` names.
    entropy_temperature: temperature of the assignment whose entropies are returned; None leaves them out.
    shard: where the codebook is spread over ranks, the part that is here; all ranks of its group call together, each
        with its own tokens. The result is that of one process with all their tokens and codes, and the gradients are
        those of the sum of the ranks' losses.
    settings: tiles, and what is skipped of them (`model_zoo.ops.Settings`); ``dense`` has none.

    Raises ModelError for shapes that do not fit, shards that make no codebook, features that are not finite (on all
    ranks of a shard's group at once), or an ``impl`` that is unknown or cannot take these operands.
    """
    # They need the types above.
    from model_zoo.ops.chunked import ChunkedSweeps
    from model_zoo.ops.dense import index_backprop_dense
    from model_zoo.ops.tiled import Settings, index_backprop_tiled

    if shard is None and (z_nd.ndim != 2 or codebook_kd.ndim != 2 or z_nd.shape[1] != codebook_kd.shape[1]):
        raise ModelError(
            f"index_backprop takes z (N, D) and codebook (K, D), not {tuple(z_nd.shape)} and {tuple(codebook_kd.shape)}"
        )
    if impl == "auto":
        impl = fastest_impl(z_nd, codebook_kd, shard)
    if impl == "dense":
        if shard is not None:
            raise ModelError("impl='dense' takes a whole codebook: use impl='chunked' or 'auto' with a shard")
        exchange(z_nd, codebook_kd, None)  # refuses features that are not finite
        return index_backprop_dense(z_nd, codebook_kd, entropy_temperature)
    if impl == "chunked":
        sweeps = ChunkedSweeps
    elif impl == "triton":
        try:
            from model_zoo.ops.triton_sweeps import TritonSweeps as sweeps
        except ImportError as error:
            raise ModelError(f"impl='triton' needs Triton ({error}): use impl='chunked'") from error
    else:
        raise ModelError(f"unknown impl {impl!r}: choose one of auto, dense, chunked, triton")
    return index_backprop_tiled(
        z_nd, codebook_kd, entropy_temperature, sweeps=sweeps, shard=shard, settings=settings or Settings()
    )


def fastest_impl(z_nd: Tensor, codebook_kd: Tensor, shard: CodebookShard | None = None) -> str:
    """The name that ``impl="auto"`` stands for with these operands."""
    # Exact fp32 products have no tensor cores to gain from, and PyTorch's are as good as they get.
    if z_nd.is_cuda and (z_nd.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"):
        try:
            from model_zoo.ops.triton_sweeps import suits
        except ImportError:  # there is no Triton for this system
            pass
        else:
            if suits(z_nd, codebook_kd):
                return "triton"
    return "chunked" if shard is not None or len(z_nd) * len(codebook_kd) >= CHUNKED_FROM else "dense"
