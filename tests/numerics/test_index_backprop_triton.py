"""The Triton kernels against the dense index backpropagation in float64, on a GPU or else in Triton's interpreter."""

import itertools
from functools import partial

import index_backprop_runs
import pytest
import torch
from index_backprop_runs import GOLDEN_CASES, TILE, error, run, run_golden, tied_operands, tiled_by
from model_checks import refused

from model_zoo import ModelError
from model_zoo.ops import index_backprop
from model_zoo.ops.index_backprop import fastest_impl, index_backprop_dense
from model_zoo.ops.tiled import HardGradient, Settings, SkipStats

tl = pytest.importorskip("triton.language")
from model_zoo.ops import triton_sweeps  # noqa: E402  (Triton is not there on every system)
from model_zoo.ops.triton_sweeps import TritonSweeps  # noqa: E402

# NumPy, in the interpreter, says so of the rows beside the operands, which are thrown away.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
index_backprop_triton = tiled_by(TritonSweeps)
random_operands = partial(index_backprop_runs.random_operands, dtype=torch.float32, device=DEVICE)
# Tokens, codes, code dimension: one token, one code, last tiles of one, dimensions up to 512.
SHAPES = [(1, 1, 8), (1, 37, 8), (5, 33, 9), (64, 257, 16), (33, 200, 32), (3, 5, 512), (40, 161, 64)]
if DEVICE == "cpu":  # The interpreter's time grows with the number of tiles. One of these has more than 4 tiles of
    # codes, so that each has one program; in the others several programs share a tile.
    SHAPES = [(1, 1, 8), (1, 37, 8), (17, 129, 9), (32, 33, 32), (3, 5, 512), (18, 65, 40)]
# Largest error over the largest true value beside that of dense fp32 with the same operands. Half-precision products
# are exact, so that values are as good as in fp32; gradients are rounded to the type, half a unit (2^-9 in bf16), and
# so is each dl before its product with C or z; a few of them make up the largest gradient.
VALUES = 4e-6
GRADIENTS = {torch.float32: VALUES, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def combinations():
    """All dtypes, shapes and temperatures. Every third combination, which covers all pairs of two, is not `full`."""
    choices = list(GRADIENTS), SHAPES, [None, 0.01, 0.5]
    for numbers in itertools.product(*(range(len(values)) for values in choices)):
        marks = [] if sum(numbers) % 3 == 0 else [pytest.mark.full]
        yield pytest.param(*(values[n] for values, n in zip(choices, numbers, strict=True)), marks=marks)


@pytest.mark.parametrize(("dtype", "shape", "temperature"), list(combinations()))
def test_error_is_no_larger_than_that_of_dense(dtype, shape, temperature):
    z_nd, codebook_kd, upstream = random_operands(*shape, dtype=dtype)
    exact, index_n = run(index_backprop_dense, z_nd, codebook_kd, upstream, temperature, torch.float64)
    dense, _ = run(index_backprop_dense, z_nd, codebook_kd, upstream, temperature, torch.float32)
    # The interpreter's time counts: there one setting, of every other shape the one that skips.
    settings = [{"tile": TILE, "skip": SHAPES.index(shape) % 2 == 0}]
    if DEVICE == "cuda":
        settings = [{"tile": TILE}, {"tile": TILE, "skip": False}, {}]
    for setting in settings:
        values, triton_index_n = run(index_backprop_triton, z_nd, codebook_kd, upstream, temperature, **setting)
        assert torch.equal(triton_index_n, index_n)
        assert values.keys() == exact.keys()
        for name in exact:
            # Rounding of the logits counts 1 / temperature times.
            allowed = error(dense[name], exact[name]) + VALUES / min(1, temperature or 1)
            if "grad" in name and dtype != torch.float32:
                allowed += GRADIENTS[dtype]
            assert error(values[name], exact[name]) <= allowed, (name, setting)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_numbers(case):
    for name, value in run_golden(index_backprop_triton, case, torch.float32, DEVICE).items():
        exact = torch.tensor(case[name], dtype=torch.float64)
        assert error(value.double().cpu(), exact) <= VALUES / min(1, case["temperature"] or 1), name


def test_ties_go_to_the_lowest_index_within_and_across_tiles_and_parts_of_lists():
    z_nd, codebook_kd, lowest_n = tied_operands(130, DEVICE)
    for dtype in GRADIENTS:
        out = index_backprop_triton(z_nd.to(dtype), codebook_kd.to(dtype), None, tile=TILE)
        assert torch.equal(out.index_n, lowest_n)


def test_equal_codes_tie_also_where_logits_are_rounded():
    generator = torch.Generator().manual_seed(1)
    few_kd = torch.randn(20, 64, generator=generator).to(DEVICE)
    number_k = torch.randint(0, 20, (129,), generator=generator).to(DEVICE)
    z_nd = torch.randn(40, 64, generator=generator).to(DEVICE)
    # NumPy, by which the interpreter multiplies, rounds equal columns of wider blocks apart on some processors.
    index_n = index_backprop_triton(z_nd, few_kd[number_k], None, tile=(16, 16)).index_n
    assert torch.equal(index_n, (number_k[index_n][:, None] == number_k).int().argmax(dim=1))


@pytest.mark.parametrize("dtype", list(GRADIENTS))
@pytest.mark.parametrize("temperature", [None, 0.01])
def test_logits_of_ten_thousand_give_no_nan(temperature, dtype):
    # Ascending, so that the running maximum rises from tile to tile; no tile and no block is full. The last token's
    # logits are all far below zero, as are not those of the rows beside the operands.
    far = torch.tensor([[-100.0, 0.0, 100], [-100, 0, 100], [0, 0, 100], [0, 100, 100], [100, 0, 100]])
    codebook_kd = torch.cat([far[:1].expand(18, 3), far]).to(DEVICE)
    z_nd = torch.tensor([[100.0, 0, 0], [-100, 0, 0], [100, 100, 0], [0, 0, 0], [0, 0, -100]], device=DEVICE)
    upstream = random_operands(5, 23, 3, dtype=dtype)[2]
    values, index_n = run(index_backprop_triton, z_nd, codebook_kd, upstream, temperature, dtype, tile=(16, 16))
    exact, exact_index_n = run(index_backprop_dense, z_nd, codebook_kd, upstream, temperature, torch.float64)
    assert torch.equal(index_n, exact_index_n)
    for name in exact:
        assert values[name].isfinite().all(), name
        assert error(values[name], exact[name]) <= VALUES + GRADIENTS[dtype], name


def test_skipping_changes_rounding_only_and_is_counted():
    z_nd, codebook_kd, upstream = random_operands(17, 72, 16, scale=6.0)
    z_nd[1:16] = z_nd[0] + 0.1 * z_nd[1:16]  # the tokens of a block share their few live tiles
    stats, unskipped = SkipStats(), SkipStats()
    skipped, index_n = run(index_backprop_triton, z_nd, codebook_kd, upstream, 0.05, tile=(16, 16), stats=stats)
    whole, whole_index_n = run(
        index_backprop_triton, z_nd, codebook_kd, upstream, 0.05, tile=(16, 16), skip=False, stats=unskipped
    )
    assert torch.equal(index_n, whole_index_n)
    for name in whole:
        # Logits reach 150, and their rounding counts 1 / temperature times.
        torch.testing.assert_close(skipped[name], whole[name], rtol=1e-3, atol=1e-3 * whole[name].abs().max().item())
    sweeps = {"output", "assignment", "average", "soft_gradient", "average_gradient", "entropy_gradient"}
    assert stats.row_tiles == unskipped.row_tiles == unskipped.visited == dict.fromkeys(sweeps, 17 * 5)
    assert stats.skip_rate("output") == 0
    assert stats.skip_rate("average") == stats.skip_rate("entropy_gradient") > 0.3


def test_same_input_same_bits():
    """Also where all tokens share few codes, whose gradients are sums over tokens."""
    z_nd, codebook_kd, upstream = random_operands(66, 36, 16)  # 5 blocks: each has one program
    codebook_kd[3] = 40 * z_nd.mean(dim=0)
    codebook_kd[35] = -codebook_kd[3]
    runs = [run(index_backprop_triton, z_nd, codebook_kd, upstream, 0.01, tile=TILE) for _ in range(2)]
    assert len(runs[0][1].unique()) < 20
    assert torch.equal(runs[0][1], runs[1][1])
    assert all(torch.equal(runs[0][0][name], runs[1][0][name]) for name in runs[0][0])


@pytest.mark.parametrize("dtype", list(GRADIENTS))
def test_chosen_codes_of_other_ranks_are_left_out(dtype):
    """And a code of many tokens gets the sum of all their gradients."""
    z_nd, codebook_kd, _ = random_operands(50, 37, 9, dtype=dtype)
    index_n = torch.tensor([-40, -1, 37, 38, 1000, 36, 0, 15, 16] + 41 * [20], device=DEVICE)
    grad_nd = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    sweeps = TritonSweeps(z_nd, codebook_kd, 2000, Settings(tile=(16, 16)))
    max_n = sweeps.row_statistics(with_output=False).max_n
    grad_z_nd, grad_kd = sweeps.gradients(max_n, None, None, HardGradient(index_n, grad_nd), (True, True))
    here = (index_n >= 0) & (index_n < 37)
    expected_kd = torch.zeros(37, 9, dtype=torch.float64, device=DEVICE)
    expected_kd.index_add_(0, index_n[here], grad_nd[here].double())
    assert grad_z_nd is None and grad_kd.dtype == dtype
    assert error(grad_kd.double(), expected_kd) <= GRADIENTS[dtype] / 2


def test_tf32_is_what_pytorchs_switch_says():
    z_nd, codebook_kd, _ = random_operands(5, 20, 64)
    exact = index_backprop_triton(z_nd, codebook_kd, 0.5).sample_entropy
    assert triton_sweeps._precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert triton_sweeps._precision(torch.float32) == "tf32" and triton_sweeps._precision(torch.bfloat16) == "ieee"
    torch.testing.assert_close(index_backprop_triton(z_nd, codebook_kd, 0.5).sample_entropy, exact, rtol=1e-2, atol=0)


def test_by_name():
    z_nd, codebook_kd, _ = random_operands(18, 36, 16)
    expected = index_backprop(z_nd, codebook_kd, impl="dense", entropy_temperature=0.5)
    out = index_backprop(z_nd, codebook_kd, impl="triton", entropy_temperature=0.5)
    assert torch.equal(out.index_n, expected.index_n)
    torch.testing.assert_close(out.sample_entropy, expected.sample_entropy)
    assert fastest_impl(z_nd, codebook_kd) == ("triton" if triton_sweeps.suits(z_nd, codebook_kd) else "dense")


@pytest.mark.parametrize(
    ("z_dtype", "codebook_dtype", "dim", "said"),
    [
        (torch.float64, torch.float64, 8, "float64"),
        (torch.float32, torch.bfloat16, 8, "bfloat16"),
        (torch.float32, torch.float32, 513, "at most 512 dimensions, not 513"),
    ],
)
def test_operands_that_no_kernel_takes(z_dtype, codebook_dtype, dim, said):
    z_nd = torch.zeros(4, dim, dtype=z_dtype, device=DEVICE)
    codebook_kd = torch.zeros(5, dim, dtype=codebook_dtype, device=DEVICE)
    message = refused(index_backprop, z_nd, codebook_kd, impl="triton")
    assert said in message and "impl='chunked'" in message
    assert not triton_sweeps.suits(z_nd, codebook_kd)


def test_shapes_and_features_that_do_not_fit():
    with pytest.raises(ModelError, match=r"takes z \(N, D\) and codebook \(K, D\)"):
        index_backprop(torch.zeros(4, 8, device=DEVICE), torch.zeros(4, 9, device=DEVICE), impl="triton")
    with pytest.raises(ModelError, match="not finite in 1 of 4 tokens"):
        z_nd = torch.zeros(4, 8, device=DEVICE)
        z_nd[1, 2] = float("nan")
        index_backprop(z_nd, torch.zeros(5, 8, device=DEVICE), impl="triton")


def test_cpu_tensors_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_sweeps, "INTERPRETED", tl.constexpr(False))
    with pytest.raises(ModelError, match=r"takes CUDA tensors: use impl='chunked'.*TRITON_INTERPRET=1"):
        index_backprop(torch.zeros(4, 8), torch.zeros(5, 8), impl="triton")
