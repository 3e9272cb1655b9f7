"""Token shards for tests: each class has different transitions between codes."""

from pathlib import Path

import numpy as np
from samples import write_tar

from data.tokens import pack_codes

FINGERPRINT = "0123456789abcdef"


def codes(classes: int, count: int, vocabulary: int, grid: tuple[int, int], seed: int) -> np.ndarray:
    """int64 (count, rows, columns) of classes 0, 1, ... by turns. A code is the one before plus the class's stride, or,
    once in ten times, any."""
    random = np.random.default_rng(seed)
    index_nt = np.empty((count, grid[0] * grid[1]), np.int64)
    index_nt[:, 0] = random.integers(vocabulary, size=count)
    stride_n = 1 + np.arange(count) % classes
    for t in range(1, index_nt.shape[1]):
        any_n = random.integers(vocabulary, size=count)
        index_nt[:, t] = np.where(random.random(count) < 0.1, any_n, (index_nt[:, t - 1] + stride_n) % vocabulary)
    return index_nt.reshape(count, *grid)


def write_tokens(
    folder: Path,
    *,
    count: int = 64,
    classes: int = 4,
    vocabulary: int = 256,
    grid: tuple[int, int] = (8, 8),
    seed: int = 0,
    per_shard: int = 16,
    labels: bool = True,
) -> Path:
    """Writes tars of them, and returns the folder."""
    folder.mkdir(parents=True)
    index_nhw = codes(classes, count, vocabulary, grid, seed)
    for first in range(0, count, per_shard):
        samples = [
            {"__key__": f"{n:06d}", "codes": pack_codes(index_nhw[n : n + 1], FINGERPRINT, vocabulary)}
            | ({"cls": str(n % classes).encode()} if labels else {})
            for n in range(first, min(count, first + per_shard))
        ]
        write_tar(folder / f"tokens-{first // per_shard:06d}.tar", samples)
    return folder
