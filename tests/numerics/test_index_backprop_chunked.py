"""The tiled index backpropagation against the dense one in float64, and what only tiles can get wrong."""

import math
import sys

import numpy as np
import pytest
import torch
from index_backprop_runs import GOLDEN_CASES, TILE, error, random_operands, run, run_golden, tied_operands, tiled_by
from model_checks import quantizer_of, refused

from model_zoo import ModelError
from model_zoo.ops import index_backprop
from model_zoo.ops.chunked import ChunkedSweeps, nearest_code
from model_zoo.ops.index_backprop import fastest_impl, index_backprop_dense
from model_zoo.ops.tiled import SkipStats
from model_zoo.ops.types import average_entropy

index_backprop_chunked = tiled_by(ChunkedSweeps)
# Tokens, codes, code dimension: one token, one code, a last tile of one, dimensions up to 512.
SHAPES = [(1, 1, 8), (1, 37, 8), (5, 33, 9), (64, 257, 16), (33, 300, 32), (3, 5, 512), (40, 161, 64)]
# Largest error over the largest true value that is allowed beside the dense path's own error in the same type: some
# units of rounding (of the results, in half precision).
TOLERANCE = {torch.float64: 1e-14, torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("temperature", [None, 0.01, 0.5, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_error_is_no_larger_than_that_of_dense(dtype, shape, temperature):
    z_nd, codebook_kd, upstream = random_operands(*shape, dtype)
    exact, index_n = run(index_backprop_dense, z_nd, codebook_kd, upstream, temperature, torch.float64)
    # The tiles compute in fp32 where the operands are half precision; dense, which does not, would be a lax measure.
    half = dtype.itemsize == 2
    dense, _ = run(index_backprop_dense, z_nd, codebook_kd, upstream, temperature, torch.float32 if half else dtype)
    for settings in ({"tile": TILE}, {"tile": TILE, "skip": False}, {}):
        chunked, chunked_index_n = run(index_backprop_chunked, z_nd, codebook_kd, upstream, temperature, **settings)
        assert torch.equal(chunked_index_n, index_n)
        assert chunked.keys() == exact.keys()
        for name in exact:
            # Rounding of the logits counts 1 / temperature times, and gradients are rounded to the operands' type.
            sums = torch.float32 if half else dtype
            allowed = error(dense[name], exact[name]) + TOLERANCE[sums] / min(1, temperature or 1)
            if half and name.endswith("grad"):
                allowed += TOLERANCE[dtype]
            # With one code the features have no gradient. The error is then relative to the operands, which are near 1.
            least = 1e-30 if exact[name].any() else 1.0
            assert error(chunked[name], exact[name], least) <= allowed, (name, settings)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_gradcheck(temperature, skip):
    z_nd, codebook_kd, _ = random_operands(3, 5, 2)

    def outputs(z_nd, codebook_kd):
        out = index_backprop_chunked(z_nd, codebook_kd, temperature, tile=(2, 2), skip=skip)
        return out.code_nd, out.sample_entropy, out.average_probability_k, out.average_entropy

    assert torch.autograd.gradcheck(outputs, (z_nd.requires_grad_(), codebook_kd.requires_grad_()))


def test_gradcheck_of_the_straight_through_output():
    """Its gradient is that of onehot C + p(z, C) C0, in which the hard choice and C0 are held fixed."""
    z_nd, codebook_kd, _ = random_operands(3, 5, 2)
    hard_nk = torch.nn.functional.one_hot((z_nd @ codebook_kd.T).argmax(dim=1), 5).double()

    class Surrogate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, codebook):
            ctx.save_for_backward(z, codebook)
            return hard_nk @ codebook + (z @ codebook.T).softmax(dim=1) @ codebook_kd

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                operands = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                quantized_nd = index_backprop_chunked(*operands, None, tile=(2, 2)).quantized_nd
            return torch.autograd.grad(quantized_nd, operands, grad)

    operands = [x.clone().requires_grad_() for x in (z_nd, codebook_kd)]
    assert torch.autograd.gradcheck(Surrogate.apply, operands)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_numbers_in_tiles_of_two_by_three(case):
    for name, value in run_golden(index_backprop_chunked, case, torch.float64, tile=(2, 3)).items():
        np.testing.assert_allclose(value, case[name], rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_skipping_changes_rounding_only_and_is_counted(dtype):
    z_nd, codebook_kd, upstream = random_operands(33, 1000, 32, dtype, scale=6.0)
    stats = SkipStats()
    skipped, index_n = run(index_backprop_chunked, z_nd, codebook_kd, upstream, 0.01, tile=TILE, stats=stats)
    unskipped_stats = SkipStats()
    whole, whole_index_n = run(
        index_backprop_chunked, z_nd, codebook_kd, upstream, 0.01, tile=TILE, skip=False, stats=unskipped_stats
    )
    assert torch.equal(index_n, whole_index_n)
    for name in whole:
        # Rounding of the logits, which reach 150, counts 1 / temperature times.
        # An entropy of nothing (here 2e-9 nats) is a difference of larger numbers.
        assert error(skipped[name], whole[name], least=1e-4) < 150 / 0.01 * torch.finfo(dtype).eps
    sweeps = {"output", "assignment", "average", "soft_gradient", "average_gradient", "entropy_gradient"}
    assert stats.row_tiles == unskipped_stats.row_tiles == {sweep: 33 * 32 for sweep in sweeps}
    assert all(unskipped_stats.skip_rate(sweep) == 0 for sweep in sweeps)
    assert stats.skip_rate("soft_gradient") > 0.2
    assert stats.skip_rate("average") == stats.skip_rate("entropy_gradient") > 0.9


def test_wide_assignments_skip_nothing():
    z_nd, codebook_kd, upstream = random_operands(20, 100, 8, scale=0.1)
    stats = SkipStats()
    run(index_backprop_chunked, z_nd, codebook_kd, upstream, 1.0, tile=TILE, stats=stats)
    assert stats.visited == stats.row_tiles


def test_ties_go_to_the_lowest_index_across_tiles():
    z_nd, codebook_kd, lowest_n = tied_operands(70)
    for tile in [(16, 32), (20, 7), (1, 1), (64, 512)]:
        assert torch.equal(index_backprop_chunked(z_nd, codebook_kd, 0.01, tile=tile).index_n, lowest_n)
        assert torch.equal(nearest_code(z_nd, codebook_kd, tile=tile), lowest_n)


@pytest.mark.parametrize("shape", [(300, 513, 32), (7, 515, 64), (1, 1025, 64)])
def test_equal_codes_tie_also_where_logits_are_rounded(shape):
    """A last tile of one code would be a matrix-vector product, with other rounding."""
    tokens, codes, dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    few_kd = torch.randn(codes // 4, dim, generator=generator)
    number_k = torch.randint(0, codes // 4, (codes,), generator=generator)
    index_n = nearest_code(torch.randn(tokens, dim, generator=generator), few_kd[number_k])
    assert torch.equal(index_n, (number_k[index_n][:, None] == number_k).int().argmax(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [None, 0.01, 1.0])
@pytest.mark.parametrize("tile", [(2, 2), (16, 16)])
def test_logits_of_ten_thousand_give_no_nan(tile, temperature, dtype):
    # Ascending, so that the running maximum rises by 1e4 and by 2e4 from tile to tile.
    codebook_kd = torch.tensor([[-100.0, 0.0], [-100, 0], [0, 0], [0, 100], [100, 0]])
    z_nd = torch.tensor([[100.0, 0.0], [-100, 0], [100, 100], [0, 0]])
    upstream = random_operands(4, 5, 2)[2]
    values, index_n = run(index_backprop_chunked, z_nd, codebook_kd, upstream, temperature, dtype, tile=tile)
    assert index_n.tolist() == [4, 0, 3, 0]
    assert all(value.isfinite().all() for value in values.values())
    exact, _ = run(index_backprop_dense, z_nd, codebook_kd, upstream, temperature, torch.float64)
    # Gradients of features are differences of terms of magnitude 100, which fp32 rounds by 100 eps.
    rounding = 100 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(values, exact, rtol=2 * TOLERANCE[dtype], atol=max(TOLERANCE[dtype], rounding))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_features_that_are_no_numbers_are_refused(impl, bad):
    z_nd, codebook_kd, _ = random_operands(6, 40, 8)
    z_nd[2, 3] = z_nd[4, 0] = bad
    with pytest.raises(ModelError, match=r"not finite in 2 of 6 tokens.*optimizer\.lr"):
        index_backprop(z_nd, codebook_kd, impl=impl)
    assert "not finite in 2 of 6 tokens" in refused(nearest_code, z_nd, codebook_kd)


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_a_codebook_that_is_no_numbers_is_refused(impl):
    z_nd, codebook_kd, _ = random_operands(6, 600, 8)
    codebook_kd[3, 1] = float("nan")
    for call in (lambda: index_backprop(z_nd, codebook_kd, impl=impl), lambda: nearest_code(z_nd, codebook_kd)):
        assert "the codebook holds NaN or infinity" in refused(call)


def test_no_tokens():
    for op in (index_backprop_dense, index_backprop_chunked):
        codebook_kd = torch.randn(20, 8, requires_grad=True)
        out = op(torch.zeros(0, 8, requires_grad=True), codebook_kd, None)
        (out.quantized_nd.sum() + out.code_nd.sum()).backward()
        assert out.quantized_nd.shape == (0, 8) and not codebook_kd.grad.any()


def test_what_is_skipped_is_nothing_also_all_together():
    """A code 20 above 131,071 others: each of these is below rounding, and their sum is not."""
    codebook_kd = torch.zeros(2**17, 1)
    codebook_kd[0] = 20
    entropy = index_backprop_chunked(torch.ones(1, 1), codebook_kd, 1.0).sample_entropy.item()
    others = (2**17 - 1) * math.exp(-20)
    assert entropy == pytest.approx(math.log(1 + others) + 20 * others / (1 + others), rel=1e-4)
    assert entropy > 0.005


def test_same_input_same_bits():
    """Also where all tokens share few codes, whose gradients are sums over tokens."""
    z_nd, codebook_kd, upstream = random_operands(300, 500, 16, torch.float32)
    codebook_kd[3] = 40 * z_nd.mean(dim=0)
    codebook_kd[400] = -codebook_kd[3]
    runs = [run(index_backprop_chunked, z_nd, codebook_kd, upstream, 0.01, tile=(128, 64)) for _ in range(3)]
    assert len(runs[0][1].unique()) < 200
    for values, index_n in runs[1:]:
        assert torch.equal(index_n, runs[0][1])
        assert all(torch.equal(values[name], runs[0][0][name]) for name in values)


def test_forward_is_the_chosen_code_to_the_last_bit():
    for dtype in TOLERANCE:
        z_nd, codebook_kd, _ = random_operands(33, 257, 16, dtype)
        out = index_backprop_chunked(z_nd, codebook_kd, 0.1, tile=TILE)
        assert out.quantized_nd.dtype == out.code_nd.dtype == dtype
        assert torch.equal(out.quantized_nd, codebook_kd[out.index_n])
        assert torch.equal(out.code_nd, codebook_kd[out.index_n])
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        assert out.sample_entropy.dtype == out.average_probability_k.dtype == sums


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_nearest_code_equals_the_operations_index(dtype):
    z_nd, codebook_kd, _ = random_operands(33, 1000, 16, dtype)
    expected_n = (z_nd.double() @ codebook_kd.double().T).argmax(dim=1)
    for tile in (TILE, None):
        assert torch.equal(nearest_code(z_nd, codebook_kd, tile=tile), expected_n)


def test_auto_is_dense_for_small_and_chunked_for_large_operands():
    small, large = (torch.empty(1024, 4), torch.empty(64, 4)), (torch.empty(1024, 4), torch.empty(2**16, 4))
    assert fastest_impl(*small) == "dense" and fastest_impl(*large) == "chunked"
    z_nd, codebook_kd, _ = random_operands(1024, 4096, 8, torch.float32)
    by_name = {impl: index_backprop(z_nd, codebook_kd, impl=impl) for impl in ("auto", "chunked")}
    assert torch.equal(by_name["auto"].average_probability_k, by_name["chunked"].average_probability_k)


def test_vq_losses_are_the_same_through_either_implementation(monkeypatch):
    quantizer = quantizer_of("ibq", 4096, 8)
    z_bdhw = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    results = {}
    for impl in ("dense", "chunked"):
        monkeypatch.setattr(sys.modules["model_zoo.ops.index_backprop"], "fastest_impl", lambda *_, impl=impl: impl)
        quantizer.zero_grad()
        z_bdhw.grad = None
        out = quantizer(z_bdhw, 0.5)
        loss = out.double_quantization + 0.7 * out.commitment + 0.3 * out.codebook + out.quantized_bdhw.square().sum()
        (loss + out.sample_entropy - average_entropy(out.average_probability_k)).backward()
        results[impl] = [loss, z_bdhw.grad, quantizer.embedding.weight.grad]
    for chunked, dense in zip(results["chunked"], results["dense"], strict=True):
        assert error(chunked.detach(), dense.detach()) < 1e-4


MEMORY = """
import resource, torch
from model_zoo.config import TokenizerConfig
from model_zoo.quantizers.registry import QUANTIZERS

def step(tokens, codes):
    quantizer = QUANTIZERS["ibq"](TokenizerConfig(codebook_size=codes, code_dim=128))
    z_bdhw = torch.randn(1, 128, 1, tokens, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = quantizer(z_bdhw, 0.01)
    vq = out.double_quantization + out.commitment + out.codebook
    (vq + out.sample_entropy + out.average_probability_k.square().sum()).backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gradients = quantizer.embedding.weight.grad.nbytes + z_bdhw.grad.nbytes
    return (after - before) / 2**10 - gradients / 2**20

step(256, 8192)  # loads libraries, starts autograd's thread
print(step(256, 2**16))
"""


def test_one_gradient_of_the_codebook_and_no_matrix_of_tokens_times_codes(launch):
    """In a fresh process, with the VQ losses and both entropies: N x K is 64 MiB, K x D 32 MiB; 12 MiB are allowed."""
    assert float(launch.python("-c", MEMORY).succeeded().out) < 12


@pytest.mark.full
def test_more_than_two_to_the_31_logits():
    codes, tokens = 2**22, 520
    codebook_kd = torch.zeros(codes, 8)
    codebook_kd[-1, 0] = codebook_kd[codes // 2, 1] = codebook_kd[5, 2] = 1.0
    z_nd = torch.eye(8)[torch.arange(tokens) % 3]
    expected_n = torch.tensor([codes - 1, codes // 2, 5])[torch.arange(tokens) % 3]
    assert torch.equal(nearest_code(z_nd, codebook_kd), expected_n)
