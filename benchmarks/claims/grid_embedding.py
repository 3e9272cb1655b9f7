"""What a generator loses without an embedding of the grid, on synthetic pictures of two shapes.

The last column of a picture has a separate code, and all other codes are uniform. Without the embedding, nothing
tells the model in the first row which shape a picture has. Prints the excess of the loss over the best possible one.
Results: docs/LOG.md, 2026-11-30.

    python benchmarks/claims/grid_embedding.py
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from model_zoo import Transformer, TransformerConfig

GRIDS, LAST, STEPS, BATCH = ((4, 8), (8, 4)), 15, 600, 32
MODEL = dict(vocabulary=LAST + 1, classes=1, grid=[4, 8], grids=["4x8", "8x4"], depth=2, heads=2, head_dim=32)
FOURTH = 3  # position of the first code that differs: the last of a row in 8x4


def pictures(grid: tuple[int, int], count: int) -> Tensor:
    """Codes ``(count, tokens)``."""
    index_bhw = torch.randint(LAST, (count, *grid))
    index_bhw[:, :, -1] = LAST
    return index_bhw.flatten(1)


def train(seed: int, embedding: bool) -> Transformer:
    """embedding: False: that of the grid stays zero."""
    torch.manual_seed(seed)
    transformer = Transformer(TransformerConfig(**MODEL, dropout=0.0))
    transformer.grid_emb.weight.requires_grad_(embedding)
    optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], 1e-3)
    for step in range(STEPS):
        grid = GRIDS[step % 2]
        transformer.loss(pictures(grid, BATCH), torch.zeros(BATCH, dtype=torch.long), grid=grid).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return transformer.eval()


@torch.no_grad()
def excess_t(transformer: Transformer, grid: tuple[int, int], count: int = 256) -> Tensor:
    """Loss of each code in nats, minus its entropy."""
    index_bt = pictures(grid, count)
    logits_btv = transformer(index_bt[:, :-1], torch.zeros(count, dtype=torch.long), grid)
    loss_t = F.cross_entropy(logits_btv.flatten(0, 1), index_bt.flatten(), reduction="none").view(count, -1).mean(0)
    is_last_t = torch.arange(len(loss_t)) % grid[1] == grid[1] - 1
    return loss_t - torch.where(is_last_t, 0.0, math.log(LAST))


for embedding in (True, False):
    for seed in range(3):
        transformer = train(seed, embedding)
        for grid in GRIDS:
            found_t = excess_t(transformer, grid)
            where = f"{'with' if embedding else 'without'} the embedding, seed {seed}, grid {grid[0]}x{grid[1]}"
            print(f"{where}: {found_t[FOURTH]:.3f} at the fourth code, {found_t.mean():.4f} in the mean", flush=True)
