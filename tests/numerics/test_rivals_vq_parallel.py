"""Normalized and rotating quantizers with a codebook spread over 2, 3 and 4 ranks, and moving averages on 2, 3 and 4
ranks, against one process that has all tokens and all codes."""

import pytest
import torch
import torch.distributed as dist
from model_checks import quantizer_of
from torch import Tensor

from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.ops.types import average_entropy
from model_zoo.quantizers.base import Quantizer

SIZES = [2, 3, 4]
CODES, DIM, TEMPERATURE = 67, 8, 0.5
SPREAD = {
    "ibq, scale 1": ("ibq", {"normalize": True}),
    "ibq, scale 10": ("ibq", {"normalize": True, "logit_scale": 10.0}),
    "ibq, learned scale": ("ibq", {"normalize": True, "logit_scale": 10.0, "learn_logit_scale": True}),
    "cosine vq": ("vq", {"normalize": True}),
    "rotation": ("rotation_vq", {}),
    "cosine rotation": ("rotation_vq", {"normalize": True}),
}
TOLERANCE = 1e-5  # of the difference's norm over the true one's
STEPS = 5


def build(name: str, shard: CodebookShard | None = None) -> Quantizer:
    kind, changes = SPREAD[name]
    torch.manual_seed(3)
    return quantizer_of(kind, CODES, DIM, shard=shard, **changes)


def features(ranks: int, rank: int, step: int = 0) -> Tensor:
    """A rank's tokens of a global batch of 12 images, equal for any number of ranks."""
    z_bdhw = torch.randn(12, DIM, 2, 3, generator=torch.Generator().manual_seed(step)) + 0.3 * step
    return z_bdhw.chunk(ranks)[rank]


def run(name: str, ranks: int, rank: int, shard: CodebookShard | None) -> dict[str, Tensor]:
    """Values and gradients of the mean over the ranks' losses."""
    quantizer, z_bdhw = build(name, shard), features(ranks, rank).requires_grad_()
    out = quantizer(z_bdhw, TEMPERATURE if quantizer.has_entropy else None)
    up_bdhw = torch.randn(12, DIM, 2, 3, generator=torch.Generator().manual_seed(99)).chunk(ranks)[rank]
    loss = 0.25 * out.commitment + out.codebook + (out.quantized_bdhw * up_bdhw).mean()
    entropies = {}
    if quantizer.has_entropy:
        average = average_entropy(out.average_probability_k, shard)
        loss = loss + out.double_quantization + 0.1 * (out.sample_entropy - average)
        entropies = {"average_probability": out.average_probability_k, "average_entropy": average[None]}
    (loss / ranks).backward()
    values = {
        "index": out.index_bhw,
        "tokenized": quantizer.tokenize(z_bdhw),
        "quantized": out.quantized_bdhw,
        "lookup": quantizer.lookup(out.index_bhw),
        "z.grad": z_bdhw.grad,
        "weight.grad": quantizer.embedding.weight.grad,
        "rows": quantizer.embedding.weight,
    }
    scales = {f"{key}.grad": p.grad for key, p in quantizer.named_parameters() if key == "log_logit_scale"}
    return {name: value.detach() for name, value in (values | entropies | scales).items()}


def averages(ranks: int, rank: int, restart_below: float, parts: int = 1) -> list[Tensor]:
    """The codes after each step of moving averages, and what is saved of them in the end."""
    torch.manual_seed(3)
    quantizer = quantizer_of("vq_ema", CODES, DIM, codebook_decay=0.6, restart_below=restart_below).train()
    found = []
    for step in range(STEPS):
        quantizer.anneal(0.5)
        for z_bdhw in features(ranks, rank, step).chunk(parts):
            quantizer(z_bdhw)
        quantizer.after_step()
        found.append(quantizer.embedding.weight.detach().clone())
    return [*found, *quantizer.statistics().values()]


def spread_main() -> dict:
    """Every result of one of four ranks, in groups of 2, 3 and 4."""
    rank, found = dist.get_rank(), {}
    for size in SIZES:
        group = dist.new_group(list(range(size)))
        if rank < size:
            shard = CodebookShard.even(CODES, group)
            found[size] = {name: run(name, size, rank, shard) for name in SPREAD}
    return found


def averages_main() -> dict:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    return {restart: averages(ranks, rank, restart) for restart in (0.0, 0.95)}


@pytest.fixture(scope="module")
def results(ranks) -> list[dict]:
    """Of each rank."""
    return ranks.call(4, spread_main)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SPREAD)
def test_a_sharded_codebook_equals_a_whole_one(results, name, size):
    true, found = run(name, 1, 0, None), [results[rank][size][name] for rank in range(size)]
    assert len(true["index"].unique()) > 10
    for key, value in true.items():
        if key == "average_entropy":
            assert all(part[key].item() == pytest.approx(value.item(), rel=1e-5) for part in found)
            continue
        if key == "log_logit_scale.grad":  # each rank has its tokens' part
            assert sum(part[key].item() for part in found) == pytest.approx(value.item(), rel=TOLERANCE)
            continue
        joined = torch.cat([part[key] for part in found])
        assert joined.shape == value.shape, key
        if key in ("index", "tokenized", "rows"):
            assert torch.equal(joined, value), key
        else:
            assert (joined - value).norm() <= TOLERANCE * value.norm(), key


@pytest.mark.parametrize("size", SIZES)
def test_moving_averages_are_those_of_all_ranks(ranks, size):
    found = ranks.call(size, averages_main)
    for restart in (0.0, 0.95):
        for parts in (1, 2):
            for number, value in enumerate(averages(1, 0, restart, parts)):
                copies = [of_rank[restart][number] for of_rank in found]
                assert all(torch.equal(copy, copies[0]) for copy in copies)
                assert (copies[0] - value).float().norm() <= TOLERANCE * value.float().norm()
    moved = averages(1, 0, 0.95)[STEPS - 1] - averages(1, 0, 0.0)[STEPS - 1]
    assert (moved.norm(dim=1) > 0.1).sum() > 10  # restarts are part of this
