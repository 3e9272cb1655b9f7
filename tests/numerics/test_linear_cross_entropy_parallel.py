"""A vocabulary spread over ranks against one process that has all tokens and all codes. Real processes, gloo:
the warm ranks return their results, and the tests compare them.
"""

import sys

import pytest
import torch
import torch.distributed as dist
from model_checks import refused

from model_zoo import ModelError
from model_zoo.ops import linear_cross_entropy
from model_zoo.ops.codebook_parallel import CodebookShard

RANKS = 3
DIM = 12
CHUNK_TOKENS = 16
# name: tokens and rows of each rank, dtype, z_weight, backward's factor
CASES = {
    "2": ([40, 40], [100, 100], torch.float64, 0.0, 1.0),
    "2, z": ([40, 40], [100, 100], torch.float64, 0.1, -2.5),
    "2, uneven": ([33, 7], [131, 3], torch.float64, 0.1, 3.0),
    "2, bf16": ([33, 7], [67, 40], torch.bfloat16, 0.1, 1.0),
    "3": ([20, 20, 20], [67, 67, 66], torch.float64, 0.1, 1.0),
    "3, fp32": ([20, 20, 20], [67, 67, 66], torch.float32, 0.0, 2.0),
    "3, uneven": ([1, 30, 12], [5, 100, 64], torch.float64, 0.1, 1.0),
}
# What one rank of three does wrong, and what all of them must be told.
MISTAKES = {
    "target": "codes of rank 2 in the group must lie in [0, 30)",
    "negative": "codes of rank 2 in the group must lie in [0, 30)",
    "gap": "the shard of rank 2 in the group starts at code 21, the one before it ends at 20: a gap",
    "none": "every rank needs a token, but the group's have [4, 4, 0]",
}


def whole(name):
    """All tokens and rows of a case; logits reach 100, so that maxima of ranks are far apart."""
    tokens, rows, dtype, *_ = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    hidden_nd, weight_vd = (
        torch.randn(n, DIM, dtype=torch.float64, generator=generator).to(dtype) for n in (sum(tokens), sum(rows))
    )
    return 3 * hidden_nd, 2 * weight_vd, torch.randint(sum(rows), (sum(tokens),), generator=generator)


def rank_of(name, group, rank):
    """One rank's part of a case: everything that comes out of it."""
    tokens, rows, _, z_weight, factor = CASES[name]
    hidden_nd, weight_vd, target_n = whole(name)
    start, first = sum(rows[:rank]), sum(tokens[:rank])
    shard, own = CodebookShard(start, start + rows[rank], group), slice(first, first + tokens[rank])
    hidden, weight = hidden_nd[own].clone().requires_grad_(), weight_vd[start : shard.stop].clone().requires_grad_()
    out = linear_cross_entropy(hidden, weight, target_n[own], z_weight=z_weight, shard=shard)
    (factor * out.loss).backward()
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, target_n[own], z_weight=z_weight, shard=shard)
    assert all(torch.equal(a.detach(), b) for a, b in zip(out, without, strict=True))
    return {k: v.detach() for k, v in out._asdict().items()} | {"hidden.grad": hidden.grad, "weight.grad": weight.grad}


def mistaken(name, group, rank):
    """The message that a rank gets where rank 2 is mistaken."""
    start, tokens, target = 10 * rank, 4, 0
    if rank == 2:
        start += name == "gap"
        tokens -= 4 * (name == "none")
        target = {"target": 30, "negative": -1}.get(name, 0)
    shard = CodebookShard(start, start + 10, group)
    target_n = torch.tensor([0, 1, 2, target][:tokens], dtype=torch.int64)
    return refused(linear_cross_entropy, torch.ones(tokens, 8), torch.ones(10, 8), target_n, shard=shard)


def nan(group, rank):
    """The losses of a rank where one row of the last rank's is NaN."""
    weight_vd = torch.ones(10, 8)
    if rank == 2:
        weight_vd[3, 0] = torch.nan
    shard = CodebookShard(10 * rank, 10 * rank + 10, group)
    return linear_cross_entropy(torch.ones(4, 8), weight_vd, torch.zeros(4).long(), shard=shard).loss


def rank_main() -> dict:
    rank = dist.get_rank()
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3)}
    found = {"cases": {}, "mistakes": {name: mistaken(name, groups[3], rank) for name in MISTAKES}}
    found["nan"] = nan(groups[3], rank)
    for name, (tokens, rows, dtype, *_) in CASES.items():
        bytes_per_logit = 6 if dtype.itemsize == 2 else dtype.itemsize
        rows_per_rank = -(-sum(rows) // len(rows))
        chunk_bytes = sys.modules["model_zoo.ops.linear_cross_entropy"].CHUNK_BYTES
        chunk_bytes["cpu"] = CHUNK_TOKENS * bytes_per_logit * rows_per_rank
        if rank < len(tokens):
            found["cases"][name] = rank_of(name, groups[len(tokens)], rank)
    return found


@pytest.fixture(scope="module")
def results(ranks) -> list[dict]:
    return ranks.call(RANKS, rank_main)


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process_with_all_tokens(results, name):
    """Each rank's losses are means over that rank's tokens; gradients are those of the sum of the ranks' losses."""
    tokens, _, dtype, z_weight, factor = CASES[name]
    hidden_nd, weight_vd, target_n = whole(name)
    hidden, weight = hidden_nd.double().requires_grad_(), weight_vd.double().requires_grad_()
    losses = [
        linear_cross_entropy(part_nd, weight, part_n, z_weight=z_weight, impl="dense")
        for part_nd, part_n in zip(hidden.split(tokens), target_n.split(tokens), strict=True)
    ]
    (factor * sum(out.loss for out in losses)).backward()
    found = [results[rank]["cases"][name] for rank in range(len(tokens))]
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for rank, out in zip(found, losses, strict=True):
        for field in out._fields:
            assert float(rank[field]) == pytest.approx(getattr(out, field).item(), rel=tolerance), field
    for field, true in (("hidden.grad", hidden.grad), ("weight.grad", weight.grad)):
        actual = torch.cat([rank[field] for rank in found])
        assert actual.dtype == dtype and actual.shape == true.shape
        assert (actual - true).norm() <= tolerance * true.norm(), field


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_one_rank_is_told_to_all_at_once(results, name):
    assert [rank["mistakes"][name] for rank in results] == RANKS * [MISTAKES[name]]


def test_nan_of_one_rank_is_that_of_all(results):
    assert all(rank["nan"].isnan() for rank in results)


def test_dense_takes_no_shard():
    with pytest.raises(ModelError, match="use impl='chunked' or 'auto' with a shard"):
        linear_cross_entropy(
            torch.ones(2, 8), torch.ones(4, 8), torch.zeros(2).long(), impl="dense", shard=CodebookShard(0, 4, None)
        )
