"""A codebook spread over ranks against one process that has all tokens and all codes. Real processes, gloo:
the warm ranks return their results, and the tests compare them.
"""

import pytest
import torch
import torch.distributed as dist
from model_checks import quantizer_of, refused

from model_zoo.ops import index_backprop
from model_zoo.ops.chunked import ChunkedSweeps, nearest_code
from model_zoo.ops.codebook_parallel import CodebookShard, lookup_code, sum_over_shards
from model_zoo.ops.index_backprop import index_backprop_dense
from model_zoo.ops.tiled import Settings, index_backprop_tiled
from model_zoo.ops.types import average_entropy
from model_zoo.quantizers.base import INITIAL_BLOCK

RANKS = 4
DIM = 24
TILE = (16, 32)
SPREADABLE = ["ibq", "vq"]  # of the quantizers
# name: tokens and codes of each rank, dtype, temperature
CASES = {
    "2": ([40, 40], [200, 200], torch.float64, 0.05),
    "2, fp32": ([40, 40], [200, 200], torch.float32, 0.5),
    "2, triton": ([20, 20], [33, 40], torch.float32, 0.5),
    "2, uneven": ([33, 7], [131, 3], torch.float64, 0.05),
    "3": ([20, 20, 20], [67, 67, 66], torch.float64, 0.05),
    "3, fp32": ([20, 20, 20], [67, 67, 66], torch.float32, 0.5),
    "3, uneven, without entropies": ([1, 30, 12], [5, 100, 64], torch.float64, None),
    "4": ([16, 16, 16, 16], [64, 64, 64, 64], torch.float64, 0.05),
    "4, fp32": ([16, 16, 16, 16], [64, 64, 64, 64], torch.float32, 0.01),
    "4, uneven": ([5, 1, 9, 2], [1, 120, 40, 7], torch.float64, 3.0),
}
TIES = [70, 70, 33, 1]  # codes of each rank, all of them the first rank's
# What is wrong with one rank of four, and what all of them must be told.
MISTAKES = {
    "rows": "the shard of rank 2 in the group says codes 20 to 30, but 9 codes are there",
    "gap": "the shard of rank 2 in the group starts at code 21, the one before it ends at 20: a gap",
    "overlap": "the shard of rank 2 in the group starts at code 19, the one before it ends at 20: an overlap",
    "nan": "z of rank 2 in the group is not finite in 1 of 3 tokens",
    "nan code": "the codebook of rank 2 in the group holds NaN or infinity",
    "dimensions": "z of rank 2 in the group must be (N, D) and its codebook (K, D) with the same D",
    "another dimension": "z of rank 2 in the group has 7 dimensions, that of rank 0 has 8",
}


def whole(name):
    """All tokens and codes of a case, and gradients of what each rank's loss uses."""
    tokens, codes, dtype, _ = CASES[name]
    generator = torch.Generator().manual_seed(len(name))

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    z_nd, codebook_kd = normal(sum(tokens), DIM) / 2, normal(sum(codes), DIM) / 2
    # The first code and the last one tie for the last token, and nothing is rounded: so for the one process too.
    z_nd[:, -1] = codebook_kd[:, -1] = 0
    codebook_kd[0] = codebook_kd[-1] = torch.eye(DIM)[-1]
    z_nd[-1] = 2 * codebook_kd[0]
    grads = {"quantized_nd": normal(sum(tokens), DIM), "code_nd": normal(sum(tokens), DIM)}
    return z_nd, codebook_kd, grads, normal(len(tokens)), normal(sum(codes))


def rank_of(name, group, rank):
    """One rank's part of a case: everything that comes out of it."""
    tokens, codes, _, temperature = CASES[name]
    z_nd, codebook_kd, grads, sample_grads, average_grads = whole(name)
    own, start = [slice(sum(tokens[:r]), sum(tokens[: r + 1])) for r in range(len(tokens))][rank], sum(codes[:rank])
    shard = CodebookShard(start, start + codes[rank], group)
    here = slice(shard.start, shard.stop)
    z, codebook = z_nd[own].clone().requires_grad_(), codebook_kd[here].clone().requires_grad_()
    if "triton" in name:
        from model_zoo.ops.triton_sweeps import TritonSweeps as Sweeps
    else:
        Sweeps = ChunkedSweeps
    out = index_backprop_tiled(z, codebook, temperature, sweeps=Sweeps, shard=shard, settings=Settings(tile=TILE))
    loss = (out.quantized_nd * grads["quantized_nd"][own]).sum() + (out.code_nd * grads["code_nd"][own]).sum()
    if temperature is not None:
        loss = loss + sample_grads[rank] * out.sample_entropy + out.average_entropy
        # The sum over all codes is in each rank's loss, so in the sum of losses as often as there are ranks.
        loss = loss + sum_over_shards((out.average_probability_k * average_grads[here]).sum(), shard)
    loss.backward()
    found = {name: value for name, value in out._asdict().items() if isinstance(value, torch.Tensor)}
    found |= {"z.grad": z.grad, "codebook.grad": codebook.grad, "nearest": nearest_code(z, codebook, shard=shard)}
    found["euclidean"] = nearest_code(z, codebook, distance="euclidean", shard=shard)
    if temperature is not None:
        found["average_entropy"] = out.average_entropy
    codebook.grad = None
    looked_up = lookup_code(out.index_n, codebook, shard)
    (looked_up * grads["code_nd"][own]).sum().backward()
    return found | {"lookup": looked_up, "lookup.grad": codebook.grad}


def ties(group, rank):
    """The same codes on every rank, as many as it has; everything is rounded, and tiles have other shapes."""
    rows = TIES[rank]
    generator = torch.Generator().manual_seed(1)
    few_kd, z_nd = torch.randn(TIES[0], DIM, generator=generator), torch.randn(50, DIM, generator=generator)
    shard = CodebookShard(sum(TIES[:rank]), sum(TIES[: rank + 1]), group)
    found = [nearest_code(z_nd, few_kd[:rows], shard=shard, distance=d, tile=TILE) for d in ("dot", "euclidean")]
    return [*found, index_backprop(z_nd, few_kd[:rows], shard=shard).index_n]


def mistaken(name, group, rank):
    """The message that a rank gets where rank 2 is mistaken."""
    start, stop, rows, dim, codebook_dim = 10 * rank, 10 * rank + 10, 10, 8, 8
    if rank == 2:
        rows -= name == "rows"
        start += (name == "gap") - (name == "overlap")
        rows -= (name == "gap") - (name == "overlap")
        dim -= name in ("dimensions", "another dimension")
        codebook_dim -= name == "another dimension"
    z_nd = torch.ones(3, dim)
    if rank == 2 and name == "nan":
        z_nd[1, 0] = float("nan")
    codebook_kd = torch.ones(rows, codebook_dim)
    if rank == 2 and name == "nan code":
        codebook_kd[0, 0] = float("nan")
    shard = CodebookShard(start, stop, group)
    return [refused(call, z_nd, codebook_kd, shard=shard) for call in (index_backprop, nearest_code)]


def beyond(group, rank):
    """Rank 1 asks for codes that are not there; and the shards end before the quantizer's codebook does."""
    shard = CodebookShard(10 * rank, 10 * rank + 10, group)
    indices = [torch.tensor([0, i if rank == 1 else 0]) for i in (40, -1)]
    of_codes = [refused(lookup_code, index_n, torch.ones(10, 8), shard) for index_n in indices]
    return [*of_codes, refused(quantizer_of, "ibq", 50, 8, shard=shard)]


def quantizers(group):
    """Forward, tokens, lookup and initial codes of a sharded quantizer; the second rank has no tokens to look up."""
    rank = dist.get_rank(group)
    found = {}
    for name in SPREADABLE:
        torch.manual_seed(3)
        shard = CodebookShard.even(INITIAL_BLOCK + 13, group)
        quantizer = quantizer_of(name, INITIAL_BLOCK + 13, 8, shard=shard)
        z_bdhw = torch.randn(2, 8, 2, 3, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        out = quantizer(z_bdhw, 0.5 if quantizer.soft_assignment else None)
        loss = out.commitment + 0.25 * out.codebook + out.quantized_bdhw.sum()
        if quantizer.soft_assignment:
            loss = loss + out.double_quantization + out.sample_entropy
            loss = loss - average_entropy(out.average_probability_k, shard)
        loss.backward()
        some = out.index_bhw[: 1 - rank]
        found[name] = {
            "rows": quantizer.embedding.weight.detach(),
            "after": torch.rand(()),  # the next layer's initialization
            "grad": quantizer.embedding.weight.grad,
            "z.grad": z_bdhw.grad,
            "index": out.index_bhw,
            "tokenized": quantizer.tokenize(z_bdhw),
            "lookup": quantizer.lookup(some).detach(),
        }
    return found


def rank_main() -> dict:
    rank, found = dist.get_rank(), {"cases": {}, "mistakes": {}}
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    for name, (tokens, *_) in CASES.items():
        if rank < len(tokens):
            found["cases"][name] = rank_of(name, groups[len(tokens)], rank)
    found["ties"] = ties(groups[4], rank)
    found["beyond"] = beyond(groups[4], rank)
    for name in MISTAKES:
        found["mistakes"][name] = mistaken(name, groups[4], rank)
    if rank < 2:
        found["quantizers"] = quantizers(groups[2])
    return found


@pytest.fixture(scope="module")
def results(ranks) -> list[dict]:
    return ranks.call(RANKS, rank_main, environment={"TRITON_INTERPRET": "1"})


def truth(name):
    """The case in one process by the dense operation, in float64; the sum of the ranks' losses."""
    tokens, _, _, temperature = CASES[name]
    z_nd, codebook_kd, grads, sample_grads, average_grads = (
        {k: v.double() for k, v in x.items()} if isinstance(x, dict) else x.double() for x in whole(name)
    )
    z, codebook = z_nd.requires_grad_(), codebook_kd.requires_grad_()
    out = index_backprop_dense(z, codebook, temperature)
    loss = (out.quantized_nd * grads["quantized_nd"]).sum() + (out.code_nd * grads["code_nd"]).sum()
    found = out._asdict()
    if temperature is not None:
        parts = [index_backprop_dense(part, codebook, temperature).sample_entropy for part in z.split(tokens)]
        found["sample_entropy"] = torch.stack(parts)
        loss = loss + (sample_grads * found["sample_entropy"]).sum()
        loss = loss + len(tokens) * (out.average_entropy + (out.average_probability_k * average_grads).sum())
        found["average_entropy"] = out.average_entropy.expand(len(tokens))  # every rank has the one of all codes
    loss.backward()
    found |= {"z.grad": z.grad, "codebook.grad": codebook.grad, "nearest": out.index_n}
    found["euclidean"] = (z.detach()[:, None] - codebook.detach()).square().sum(dim=2).argmin(dim=1)
    found |= {"lookup": codebook[out.index_n], "lookup.grad": torch.zeros_like(codebook)}
    found["lookup.grad"].index_add_(0, out.index_n, grads["code_nd"])
    return {k: v.detach() for k, v in found.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process_with_all_tokens(results, name):
    tokens, _, dtype, temperature = CASES[name]
    expected = truth(name)
    found = [results[rank]["cases"][name] for rank in range(len(tokens))]
    assert ("sample_entropy" in found[0]) == (temperature is not None)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for key in found[0]:
        join = torch.stack if key.endswith("entropy") else torch.cat
        actual, true = join([rank[key] for rank in found]), expected[key]
        if actual.dtype == torch.int64:
            assert torch.equal(actual, true), key
        else:
            assert actual.shape == true.shape, key
            assert (actual.detach() - true).norm() <= tolerance * true.norm().clamp(min=1e-3), key


def test_ties_across_shards_go_to_the_lowest_index(results):
    for rank in results:
        for index_n in rank["ties"]:
            assert index_n.max() < TIES[0] and len(index_n.unique()) > 20
    for name, (tokens, *_) in CASES.items():
        assert results[len(tokens) - 1]["cases"][name]["index_n"][-1] == 0, name


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_one_rank_is_told_to_all_at_once(results, name):
    messages = [message for rank in results for message in rank["mistakes"][name]]
    (message,) = set(messages)
    assert message.startswith(MISTAKES[name])


def test_codes_beyond_the_codebook_and_shards_that_end_before_it(results):
    for rank in results:
        *of_codes, of_shards = rank["beyond"]
        assert of_codes == 2 * ["codes of rank 1 in the group must lie in [0, 40)"]
        assert of_shards.endswith("are not the codebook's 50 codes, one after the other")


@pytest.mark.parametrize("name", SPREADABLE)
def test_sharded_quantizers_equal_the_whole_one(results, name):
    first, second = (results[rank]["quantizers"][name] for rank in range(2))
    torch.manual_seed(3)
    quantizer = quantizer_of(name, INITIAL_BLOCK + 13, 8)
    assert torch.equal(torch.cat([first["rows"], second["rows"]]), quantizer.embedding.weight)
    assert abs(len(first["rows"]) - len(second["rows"])) == 1
    assert first["after"] == second["after"] == torch.rand(())
    z_bdhw = torch.cat([torch.randn(2, 8, 2, 3, generator=torch.Generator().manual_seed(rank)) for rank in range(2)])
    z_bdhw.requires_grad_()
    out = quantizer(z_bdhw, 0.5 if quantizer.soft_assignment else None)
    loss = out.commitment + 0.25 * out.codebook + out.quantized_bdhw.sum() / 2
    if quantizer.soft_assignment:
        loss = loss + out.double_quantization + out.sample_entropy
        loss = loss - average_entropy(out.average_probability_k)
    (2 * loss).backward()  # the sum of two ranks' mean losses
    for key in ("index", "tokenized"):
        assert torch.equal(torch.cat([first[key], second[key]]), out.index_bhw)
    for key, true in (("z.grad", z_bdhw.grad), ("grad", quantizer.embedding.weight.grad)):
        assert (torch.cat([first[key], second[key]]) - true).norm() < 1e-5 * true.norm()
    assert second["lookup"].shape == (0, 8, 2, 3)
    assert torch.equal(first["lookup"], quantizer.lookup(out.index_bhw[:1]).detach())
