"""Codebook usage and perplexity."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class CodebookUsage:
    """Counts how often each code was chosen, over any number of batches.

    ``counts_k`` is int64 and on the process group's device from the start, because a rank may have nothing to count.
    Each rank counts its own tokens; `merged` sums over ranks.
    """

    def __init__(self, codebook_size: int, device: torch.device | str = "cpu"):
        self.counts_k = torch.zeros(codebook_size, dtype=torch.int64, device=device)

    def update(self, index: Tensor) -> None:
        """Counts the codes of an integer tensor of any shape; codes outside the codebook are an error."""
        index_n = index.detach().flatten().to(self.counts_k.device, torch.int64)
        self.counts_k.scatter_add_(0, index_n, torch.ones_like(index_n))

    def merged(self, group: dist.ProcessGroup | None = None) -> "CodebookUsage":
        """The sum over the ranks of ``group`` as a new object; this rank's own counts stay unchanged."""
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
        """exp(entropy) of the empirical code distribution, from 1 to the codebook size; 0 before the first token."""
        counts = self.counts_k[self.counts_k > 0].double()
        if len(counts) == 0:
            return 0.0
        probability = counts / counts.sum()
        return float(torch.exp(-(probability * probability.log()).sum()))

    def reset(self) -> None:
        self.counts_k.zero_()


USAGE_WINDOW_TOKENS = 65_536


def window_usage(index_n, codebook_size: int, window_tokens: int = USAGE_WINDOW_TOKENS) -> float | None:
    """Distinct codes / codebook size per complete window of consecutive tokens, mean over the windows; None without
    one. This is LlamaGen's usage (arXiv 2406.06525), which does not grow with the size of the set."""
    import numpy as np  # slow to import; training does not call this

    count = len(index_n) // window_tokens
    windows = np.asarray(index_n)[: count * window_tokens].reshape(count, window_tokens)
    return math.fsum(len(np.unique(window)) for window in windows) / (count * codebook_size) if count else None


class CodebookHealth:
    """Monitors codebook usage during training from the codes of every step; O(codebook size) memory per rank.

    ``usage`` covers a sliding window of WINDOW_TOKENS tokens per code. A code of average frequency is absent from such
    a window with a probability of one in a million, so an absent code counts as dead.

    sizes: how many codes are counted: those of the codebook, or the values of each group of bits of a codebook that is
    too large to count. A token then counts once for each group, and the window is that of the largest group.
    start_steps: codes that start at one place come into use one after another, and their low usage means no collapse.
    The alarm waits this many steps, or until the usage has passed COLLAPSED_USAGE.
    """

    WINDOW_TOKENS = 16
    COLLAPSED_SHARE = 0.5  # of the best usage so far
    COLLAPSED_USAGE = 0.1

    def __init__(
        self, sizes: Sequence[int], tokens_per_step: int, device: torch.device | str = "cpu", start_steps: int = 0
    ):
        self.start_steps, codebook_size = start_steps, sum(sizes)
        self.window_steps = -(-self.WINDOW_TOKENS * max(sizes) // tokens_per_step)
        self.name = "codebook usage" if len(sizes) == 1 else "usage of groups"
        self.recent = CodebookUsage(codebook_size, device)  # of this rank, since the last `read`
        self.since_start = CodebookUsage(codebook_size, device)  # of all ranks
        self.last_step_k = torch.full((codebook_size,), -1, dtype=torch.int64, device=device)
        self.best_usage = torch.zeros((), dtype=torch.float64)
        self.alarm: str | None = None

    def update(self, index: Tensor, step: int) -> None:
        """Counts the codes of one micro-batch of step ``step`` (from 0)."""
        self.recent.update(index)
        self.last_step_k[index.flatten()] = step

    def read(self, step: int) -> dict[str, float]:
        """Scalars to log after step ``step`` (from 0) over all ranks, which call it together; also sets ``alarm``.

        usage, dead_codes: of the window. perplexity: since the last `read`.
        """
        recent = self.recent.merged()
        self.since_start.counts_k += recent.counts_k
        self.recent.reset()
        if dist.is_initialized():
            dist.all_reduce(self.last_step_k, dist.ReduceOp.MAX)
        used = int((self.last_step_k > max(step - self.window_steps, -1)).sum())
        usage = used / len(self.last_step_k)
        self.alarm = None
        if step + 1 >= self.window_steps:
            self.best_usage.clamp_(min=usage)
            best = float(self.best_usage)
            starting = step < self.start_steps and best < self.COLLAPSED_USAGE
            if not starting and (usage < self.COLLAPSED_SHARE * best or usage < self.COLLAPSED_USAGE):
                self.alarm = (
                    f"{self.name} is {usage:.1%} (best so far {best:.1%}) over the last {self.window_steps} steps: "
                    "it collapses; lower optimizer.lr, or (ibq) raise trainer.global_batch_size or loss.entropy.weight"
                )
        return {
            "usage": usage,
            "usage_since_start": self.since_start.usage(),
            "dead_codes": float(len(self.last_step_k) - used),
            "perplexity": recent.perplexity(),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The state to save; equal on all ranks directly after `read`."""
        return {"counts_k": self.since_start.counts_k, "last_step_k": self.last_step_k, "best_usage": self.best_usage}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores a `state_dict`."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])


def moments(rows_nd: Tensor) -> Tensor:
    """``(3, d)`` in float64: the number of rows, their sum and their sum of squares. Moments of parts can be added."""
    total = torch.zeros(3, rows_nd.shape[1], dtype=torch.float64, device=rows_nd.device)
    for part_nd in rows_nd.detach().split(2**14):  # avoids a float64 copy of a whole codebook
        part_nd = part_nd.double()
        total += torch.stack([torch.full_like(total[0], len(part_nd)), part_nd.sum(dim=0), part_nd.square().sum(dim=0)])
    return total


def gaussian_distance(first: Tensor, second: Tensor) -> float:
    """2-Wasserstein distance between the diagonal Gaussians of two `moments`, divided by sqrt(d)."""
    (mean, std), (other_mean, other_std) = (
        (sums[1] / sums[0], (sums[2] / sums[0] - (sums[1] / sums[0]).square()).clamp(min=0).sqrt())
        for sums in (first, second)
    )
    return float(((mean - other_mean).square() + (std - other_std).square()).mean().sqrt())
