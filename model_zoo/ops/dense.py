"""Index backpropagation with the full N x K matrices: the reference implementation for the fast versions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from model_zoo.ops.types import IndexBackprop


def index_backprop_dense(z_nd: Tensor, codebook_kd: Tensor, entropy_temperature: float | None) -> IndexBackprop:
    """Algorithm 1 of the paper (arXiv 2412.02692), differentiated by autograd. Memory: several N x K matrices."""
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
