"""Index backpropagation: the public operation of the IBQ quantizer (arXiv 2412.02692, Algorithm 1)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from model_zoo.errors import ModelError
from model_zoo.ops.chunked import ChunkedSweeps
from model_zoo.ops.codebook_parallel import CodebookShard, communicator
from model_zoo.ops.tiled import Settings, index_backprop_tiled
from model_zoo.ops.types import IndexBackprop

# Size N x K of the logits from which tiles are faster than the full matrices. Measured on one core of an AMD EPYC with
# N = 64 to 4096 and D = 32 and 256: the two break even between 2^20 and 2^22, later for large N and small K.
CHUNKED_FROM = 2**22


def index_backprop(
    z_nd: Tensor,
    codebook_kd: Tensor,
    *,
    impl: str = "auto",
    entropy_temperature: float | None = 0.01,
    shard: CodebookShard | None = None,
    settings: Settings | None = None,
) -> IndexBackprop:
    """Quantizes ``z_nd`` (tokens x D) with ``codebook_kd`` (K x D): hard codes forward, softmax gradient backward.

    impl: ``dense`` builds the N x K matrices and is the reference implementation; ``chunked`` processes them in tiles
        and needs O(N D + K) memory beside operands and gradients; ``triton`` does the same in CUDA kernels; ``auto``
        selects the implementation that `fastest_impl` returns.
    entropy_temperature: temperature of the assignment whose entropies are returned; None omits the entropies.
    shard: this rank's part of a codebook that is sharded over ranks. All ranks of its group must call together, each
        with its own tokens. The result equals that of one process with all their tokens and codes; the gradients are
        those of the sum of the ranks' losses.
    settings: tile size and skipping (`model_zoo.ops.Settings`); ignored by ``dense``.

    Raises ModelError for mismatched shapes, for shards that do not form a codebook, for features that are not finite
    (on all ranks of a shard's group at once), and for an ``impl`` that is unknown or does not support the operands.
    """
    if shard is None and (z_nd.ndim != 2 or codebook_kd.ndim != 2 or z_nd.shape[1] != codebook_kd.shape[1]):
        raise ModelError(
            f"index_backprop takes z (N, D) and codebook (K, D), not {tuple(z_nd.shape)} and {tuple(codebook_kd.shape)}"
        )
    if impl == "auto":
        impl = fastest_impl(z_nd, codebook_kd, shard)
    if impl == "dense":
        if shard is not None:
            raise ModelError("impl='dense' takes a whole codebook: use impl='chunked' or 'auto' with a shard")
        communicator(z_nd, codebook_kd, None)  # raises for features that are not finite
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


def index_backprop_dense(z_nd: Tensor, codebook_kd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
    """The reference implementation: Algorithm 1, differentiated by autograd. Memory: several N x K matrices."""
    logits_nk = z_nd @ codebook_kd.T
    soft_nk = logits_nk.softmax(dim=1)
    index_n = logits_nk.argmax(dim=1)  # argmax returns the first, so the lowest, of equal maxima
    hard_nk = F.one_hot(index_n, codebook_kd.shape[0]).to(soft_nk.dtype)
    # The forward value equals hard_nk bit for bit; the gradient is that of soft_nk.
    one_hot_nk = hard_nk + (soft_nk - soft_nk.detach())
    quantized_nd = one_hot_nk @ codebook_kd
    code_nd = codebook_kd[index_n]
    if entropy_temperature is None:
        return IndexBackprop(quantized_nd, index_n, None, None, code_nd)

    log_assignment_nk = torch.log_softmax(logits_nk / entropy_temperature, dim=1)
    assignment_nk = log_assignment_nk.exp()
    sample_entropy = -(assignment_nk * log_assignment_nk).sum(dim=1).mean()
    return IndexBackprop(quantized_nd, index_n, sample_entropy, assignment_nk.mean(dim=0), code_nd)


def fastest_impl(z_nd: Tensor, codebook_kd: Tensor, shard: CodebookShard | None = None) -> str:
    """The implementation that ``impl="auto"`` selects for these operands."""
    # Exact fp32 products cannot use tensor cores, so the kernels would not beat PyTorch's own.
    if z_nd.is_cuda and (z_nd.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"):
        try:
            from model_zoo.ops.triton_sweeps import suits
        except ImportError:  # Triton does not support this system
            pass
        else:
            if suits(z_nd, codebook_kd):
                return "triton"
    return "chunked" if shard is not None or len(z_nd) * len(codebook_kd) >= CHUNKED_FROM else "dense"
