"""How much of a codebook is used, and how evenly."""

import torch
import torch.distributed as dist
from torch import Tensor


class CodebookUsage:
    """Counts how often each code was chosen, over any number of batches.

    `counts_k` is int64, on the device of the process group's tensors, for a rank may have nothing to count. Each rank
    counts its own tokens; `merged` sums them.
    """

    def __init__(self, codebook_size: int, device: torch.device | str = "cpu"):
        self.counts_k = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def update(self, index: Tensor) -> None:
        """Counts the codes of an integer tensor of any shape; codes beyond the codebook are an error."""
        index_n = index.detach().flatten().to(self.counts_k.device, torch.int64)
        self.counts_k.scatter_add_(0, index_n, torch.ones_like(index_n))

    def merged(self, group: dist.ProcessGroup | None = None) -> "CodebookUsage":
        """The sum over the ranks of `group`, as a new object: this rank's own counts stay, so nothing counts twice."""
        total = CodebookUsage(len(self.counts_k), self.counts_k.device)
        total.counts_k += self.counts_k
        if dist.is_initialized():
            dist.all_reduce(total.counts_k, group=group)
        return total

    def token_count(self) -> int:
        return int(self.counts_k.sum())

    def usage(self) -> float:
        """Distinct codes chosen / codebook size; 0 before the first token."""
        return float((self.counts_k > 0).double().mean())

    def perplexity(self) -> float:
        """exp(entropy of the codes' empirical distribution), from 1 to the codebook size; 0 before the first token."""
        counts = self.counts_k[self.counts_k > 0].double()
        if len(counts) == 0:
            return 0.0
        probability = counts / counts.sum()
        return float(torch.exp(-(probability * probability.log()).sum()))

    def reset(self) -> None:
        self.counts_k.zero_()
