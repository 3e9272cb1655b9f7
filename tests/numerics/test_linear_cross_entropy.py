"""Chunked linear cross-entropy against the dense one in float64, and what only chunks can get wrong."""

import math
import re
import sys

import numpy as np
import pytest
import torch
from index_backprop_runs import error
from model_checks import refused
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model_zoo.ops
from model_zoo import ModelError
from model_zoo.ops import linear_cross_entropy

OP = sys.modules["model_zoo.ops.linear_cross_entropy"]
# Tokens, vocabulary, dimension: one token, one code, odd vocabularies, a last chunk that is shorter.
SHAPES = [(1, 1, 8), (1, 37, 8), (5, 33, 9), (64, 257, 16), (37, 1001, 32), (40, 161, 64), (3, 5, 512)]
# Largest error over the largest true value that is allowed beside the dense path's own error in the same type.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture
def few_tokens(monkeypatch):
    """few_tokens(tokens, weight_vd): at most so many tokens in a chunk from here on."""

    def set_bytes(tokens, weight_vd):
        bytes_per_logit = {8: 8, 4: 4, 2: 6}[weight_vd.dtype.itemsize]
        monkeypatch.setitem(OP.CHUNK_BYTES, "cpu", tokens * bytes_per_logit * len(weight_vd))

    return set_bytes


def random_operands(tokens, vocabulary, dim, dtype=torch.float64, scale=1.0, seed=0):
    """Logits have a standard deviation of ``scale``."""
    generator = np.random.default_rng(seed)
    hidden_nd = torch.tensor(scale * generator.normal(size=(tokens, dim)))
    weight_vd = torch.tensor(generator.normal(size=(vocabulary, dim)) / dim**0.5)
    return hidden_nd.to(dtype), weight_vd.to(dtype), torch.tensor(generator.integers(vocabulary, size=tokens))


def run(impl, hidden_nd, weight_vd, target_n, z_weight=0.0, factor=1.0, dtype=None):
    """Losses and gradients by name, as float64."""
    hidden, weight = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (hidden_nd, weight_vd))
    out = linear_cross_entropy(hidden, weight, target_n, z_weight=z_weight, impl=impl)
    (factor * out.loss).backward()
    assert hidden.grad.dtype == hidden.dtype and weight.grad.dtype == weight.dtype
    values = out._asdict() | {"hidden.grad": hidden.grad, "weight.grad": weight.grad}
    return {name: value.detach().double() for name, value in values.items()}


def test_dense_is_pytorchs_cross_entropy():
    hidden_nd, weight_vd, target_n = random_operands(37, 1001, 32)
    logits_nv = F.linear(hidden_nd, weight_vd)
    out = linear_cross_entropy(hidden_nd, weight_vd, target_n, z_weight=0.3, impl="dense")
    torch.testing.assert_close(out.cross_entropy, F.cross_entropy(logits_nv, target_n))
    torch.testing.assert_close(out.z, logits_nv.exp().sum(dim=1).log().square().mean())
    torch.testing.assert_close(out.loss, out.cross_entropy + 0.3 * out.z)
    assert not out.cross_entropy.requires_grad and not out.z.requires_grad


@pytest.mark.parametrize(("z_weight", "factor"), [(0.0, 1.0), (0.0, -2.5), (0.1, 1.0), (0.1, 3.0)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_error_is_no_larger_than_that_of_dense(few_tokens, dtype, shape, z_weight, factor):
    operands = random_operands(*shape, dtype, scale=2.0)
    exact = run("dense", *operands, z_weight, factor, torch.float64)
    dense = run("dense", *operands, z_weight, factor)
    for tokens in (1, 7, 16, shape[0]):
        few_tokens(tokens, operands[1])
        chunked = run("chunked", *operands, z_weight, factor)
        assert chunked.keys() == exact.keys()
        for name in exact:
            # The dense path's losses are as exact as its logits; a rounding of one logit is what half precision allows.
            assert error(chunked[name], exact[name]) <= 1.5 * error(dense[name], exact[name]) + TOLERANCE[dtype], name


def test_chunks_are_of_equal_length():
    chunk_bytes = OP.CHUNK_BYTES["cpu"]
    assert OP._chunks(37, chunk_bytes // 16, "cpu") == [slice(0, 13), slice(13, 26), slice(26, 37)]
    assert OP._chunks(3, 2 * chunk_bytes, "cpu") == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_gradcheck(few_tokens):
    hidden_nd, weight_vd, target_n = random_operands(5, 11, 3)
    few_tokens(2, weight_vd)

    def loss(hidden_nd, weight_vd):
        return linear_cross_entropy(hidden_nd, weight_vd, target_n, z_weight=0.2, impl="chunked").loss

    assert torch.autograd.gradcheck(loss, (hidden_nd.requires_grad_(), weight_vd.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_was_never_written_is_never_read(few_tokens, dtype):
    """PyTorch fills new memory with NaN in this mode."""
    operands = random_operands(37, 1001, 32, dtype)
    few_tokens(16, operands[1])
    expected = run("chunked", *operands, 0.1)
    torch.use_deterministic_algorithms(True)
    try:
        found = run("chunked", *operands, 0.1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_makes_products_in_its_type_and_gives_gradients_in_the_parameters(few_tokens, dtype):
    operands = random_operands(37, 1001, 32, torch.float32)
    rounded = [x.to(dtype) if x.is_floating_point() else x for x in operands]
    few_tokens(16, rounded[1])
    expected = run("chunked", *rounded, 0.1)
    with torch.autocast("cpu", dtype):
        found, dense = run("chunked", *operands, 0.1), run("dense", *operands, 0.1)
    exact = run("dense", *operands, 0.1, dtype=torch.float64)
    for name in expected:
        # The losses are the same to the last bit; gradients need no rounding to half precision.
        assert error(found[name], expected[name]) <= (TOLERANCE[dtype] if name.endswith("grad") else 0), name
        assert error(found[name], exact[name]) <= 1.5 * error(dense[name], exact[name]) + TOLERANCE[dtype], name
    assert error(found["weight.grad"], exact["weight.grad"]) > 1e-5  # so the products were not fp32's


def test_fp16_does_not_lose_what_is_small_before_a_loss_is_scaled():
    """The mean over 4,096 tokens gives each token a gradient of 2^-12, which times p underflows in fp16."""
    hidden_nd, weight_vd, target_n = random_operands(4096, 300, 16, torch.float16, scale=0.1)
    weight_vd = weight_vd / 64
    found = run("chunked", hidden_nd, weight_vd, target_n, factor=2.0**12)
    exact = run("dense", hidden_nd, weight_vd, target_n, factor=2.0**12, dtype=torch.float64)
    for name in exact:
        assert error(found[name], exact[name]) < 2e-3, name


def test_without_gradients_only_the_loss_is_made(few_tokens):
    hidden_nd, weight_vd, target_n = random_operands(37, 1001, 32)
    few_tokens(16, weight_vd)
    expected = run("chunked", hidden_nd, weight_vd, target_n, 0.1)

    def products(**needs):
        with Watch() as watch:
            out = linear_cross_entropy(hidden_nd, weight_vd, target_n, z_weight=0.1, impl="chunked")
        assert all(torch.equal(getattr(out, name).detach(), expected[name]) for name in out._fields)
        return out.loss.requires_grad, watch.products

    assert products() == (False, 3)
    hidden_nd.requires_grad_()
    weight_vd.requires_grad_()
    with torch.no_grad():
        assert products() == (False, 3)
    assert products() == (True, 9)


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_one_operand_may_be_fixed(few_tokens, wanted):
    hidden_nd, weight_vd, target_n = random_operands(37, 1001, 32)
    few_tokens(16, weight_vd)
    both = run("chunked", hidden_nd, weight_vd, target_n, 0.1)
    operand = (hidden_nd if wanted == "hidden" else weight_vd).requires_grad_()
    with Watch() as watch:
        linear_cross_entropy(hidden_nd, weight_vd, target_n, z_weight=0.1, impl="chunked").loss.backward()
    assert torch.equal(operand.grad, both[f"{wanted}.grad"])
    assert (weight_vd if wanted == "hidden" else hidden_nd).grad is None
    assert watch.products == 6


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_other_parts_of_a_loss_and_accumulation(few_tokens, impl):
    """The hidden vectors come from somewhere, and gradients add up over micro-batches."""
    hidden_nd, weight_vd, target_n = random_operands(37, 101, 8)
    few_tokens(16, weight_vd)
    weight = nn.Parameter(weight_vd)
    layer_dd = nn.Parameter(torch.eye(8, dtype=torch.float64))
    for part in (slice(0, 20), slice(20, 37)):
        hidden = (hidden_nd[part] @ layer_dd).tanh()
        loss = linear_cross_entropy(hidden, weight, target_n[part], impl=impl).loss / 2 + weight.square().mean()
        loss.backward()
    reference, eye = weight_vd.clone().requires_grad_(), torch.eye(8, dtype=torch.float64, requires_grad=True)
    for part in (slice(0, 20), slice(20, 37)):
        logits = (hidden_nd[part] @ eye).tanh() @ reference.T
        (F.cross_entropy(logits, target_n[part]) / 2 + reference.square().mean()).backward()
    torch.testing.assert_close(weight.grad, reference.grad)
    torch.testing.assert_close(layer_dd.grad, eye.grad)


def test_going_back_twice_is_right_or_refused():
    hidden_nd, weight_vd, target_n = random_operands(5, 33, 9)
    once = run("chunked", hidden_nd, weight_vd, target_n)
    weight = weight_vd.clone().requires_grad_()
    loss = linear_cross_entropy(hidden_nd, weight, target_n, impl="chunked").loss
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    assert torch.equal(weight.grad, 2 * once["weight.grad"])
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_weight", [0.0, 1e-4])
def test_logits_of_ten_thousand_stay_finite(few_tokens, dtype, z_weight):
    weight_vd = torch.tensor([[-100.0, 0.0], [-100, 0], [0, 0], [0, 100], [100, 0]])
    hidden_nd = torch.tensor([[100.0, 0.0], [-100, 0], [100, 100], [0, 0]])
    target_n = torch.tensor([0, 2, 4, 1])
    few_tokens(3, weight_vd)
    found = run("chunked", hidden_nd, weight_vd, target_n, z_weight, dtype=dtype)
    exact = run("dense", hidden_nd, weight_vd, target_n, z_weight, dtype=torch.float64)
    assert found["cross_entropy"] > 7000
    assert all(value.isfinite().all() for value in found.values())
    torch.testing.assert_close(found, exact, rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_nan(few_tokens, impl, bad):
    """The run's own alarm is there for it; a loss that looks well would hide it."""
    hidden_nd, weight_vd, target_n = random_operands(6, 40, 8)
    few_tokens(2, weight_vd)
    hidden_nd[3, 2] = bad
    found = run(impl, hidden_nd, weight_vd, target_n)
    assert found["loss"].isnan() and found["hidden.grad"][3].isnan().all() and found["weight.grad"].isnan().all()
    assert found["hidden.grad"][:3].isfinite().all()


class Watch(TorchDispatchMode):
    """Sees every operation: the most elements of a tensor that one gave, and products of matrices."""

    def __init__(self):
        super().__init__()
        self.most = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        self.most = max(self.most, *(x.numel() for x in tensors), 0)
        self.products += func.overloadpacket.__name__.rstrip("_") in ("mm", "addmm")
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_tokens_times_vocabulary_is_made(few_tokens, dtype):
    operands = random_operands(64, 1001, 8, dtype)
    few_tokens(10, operands[1])
    most = {}
    for impl in ("dense", "chunked"):
        with Watch() as watch:
            run(impl, *operands, 0.1, factor=2.0)
        most[impl] = watch.most
    assert most["dense"] >= 64 * 1001
    assert most["chunked"] <= 10 * 1001


def test_the_gradient_of_the_weight_is_not_copied():
    """Where backward's factor is 1 what the forward pass made is handed over; else it is scaled in place."""
    hidden_nd, weight_vd, target_n = random_operands(4, 1001, 64, torch.float32)
    for factor in (1.0, 2.0):
        weight = weight_vd.clone().requires_grad_()
        loss = linear_cross_entropy(hidden_nd, weight, target_n, impl="chunked").loss
        saved = loss.grad_fn.saved_tensors[1].data_ptr()
        (factor * loss).backward()
        assert weight.grad.data_ptr() == saved


def test_a_compiled_module_may_stand_around_it(few_tokens):
    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 301, bias=False)

        def forward(self, x_nd, target_n):
            return linear_cross_entropy(self.body(x_nd).relu(), self.head.weight, target_n, impl="chunked").loss * 3

    torch.manual_seed(0)
    module, x_nd, target_n = Generator(), torch.randn(37, 16), torch.randint(301, (37,))
    few_tokens(16, module.head.weight)
    found = []
    for call in (module, torch.compile(module, backend="aot_eager")):
        module.zero_grad()
        loss = call(x_nd, target_n)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in module.parameters())])
    torch.testing.assert_close(*found)


def test_strided_operands(few_tokens):
    hidden_nd, weight_vd, target_n = random_operands(37, 130, 16, torch.float32)
    few_tokens(16, weight_vd)
    expected = run("chunked", hidden_nd, weight_vd, target_n)
    for strided_weight in (weight_vd.T.contiguous().T, weight_vd.repeat_interleave(2, dim=1)[:, ::2]):
        found = run("chunked", hidden_nd.T.contiguous().T, strided_weight, target_n.repeat_interleave(2)[::2])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_auto_is_chunked_on_a_cpu():
    operands = random_operands(37, 130, 16, torch.float32)
    found, expected = run("auto", *operands), run("chunked", *operands)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("bad", [-1, 40, -100])  # -100: what PyTorch's own would leave out in silence
def test_targets_outside_of_the_vocabulary_are_refused(impl, bad):
    hidden_nd, weight_vd, target_n = random_operands(6, 40, 8)
    target_n[2] = bad
    with pytest.raises(ModelError, match=r"targets must lie in \[0, 40\), not from"):
        linear_cross_entropy(hidden_nd, weight_vd, target_n, impl=impl)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(hidden_nd=torch.zeros(6, 7)), r"takes hidden \(N, D\) and weight \(V, D\), not \(6, 7\) and \(40, 8\)"),
        (dict(hidden_nd=torch.zeros(2, 3, 8)), r"not \(2, 3, 8\) and"),
        (dict(hidden_nd=torch.zeros(6, 8, dtype=torch.bfloat16)), "is torch.bfloat16 and weight torch.float32: cast"),
        (dict(target_n=torch.zeros(5, dtype=torch.int64)), r"each of 6 tokens, not torch.int64 \(5,\)"),
        (dict(target_n=torch.zeros(6)), r"each of 6 tokens, not torch.float32 \(6,\)"),
        (dict(hidden_nd=torch.zeros(0, 8), target_n=torch.zeros(0, dtype=torch.int64)), "at least one token"),
        (dict(impl="fused"), "unknown impl 'fused': choose one of auto, dense, chunked, liger"),
    ],
)
def test_mistakes_are_told_in_one_line(change, said):
    arguments = dict(hidden_nd=torch.zeros(6, 8), weight_vd=torch.zeros(40, 8), target_n=torch.zeros(6).long())
    assert re.search(said, refused(linear_cross_entropy, **(arguments | change)))


def test_liger_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    OP._liger.cache_clear()
    try:
        with pytest.raises(ModelError, match="pip install liger-kernel"):
            linear_cross_entropy(*random_operands(6, 40, 8, torch.float32), impl="liger")
    finally:
        OP._liger.cache_clear()


needs_liger = pytest.mark.skipif(OP._liger() is None, reason="needs liger-kernel")


@needs_liger
@pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter, see tests/conftest.py")
@pytest.mark.parametrize(
    ("dtype", "z_weight"),
    [
        *((torch.float32, 0.0), (torch.bfloat16, 0.1)),
        *(pytest.param(*case, marks=pytest.mark.full) for case in ((torch.float32, 0.1), (torch.bfloat16, 0.0))),
    ],
)
def test_liger_equals_dense(monkeypatch, dtype, z_weight):
    """In Triton's interpreter: liger's own kernels have not been run on a GPU from here."""
    operands = random_operands(10, 301, 16, dtype)
    monkeypatch.setitem(OP.CHUNK_BYTES, "cuda", 4 * dtype.itemsize * 301)  # so it takes several chunks
    exact = run("dense", *operands, z_weight, 2.0, torch.float64)
    dense = run("dense", *operands, z_weight, 2.0)
    found = run("liger", *operands, z_weight, 2.0)
    for name in exact:
        assert error(found[name], exact[name]) <= 1.5 * error(dense[name], exact[name]) + 2 * TOLERANCE[dtype], name


@needs_liger
@pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter, see tests/conftest.py")
def test_liger_with_one_operand_fixed_and_without_gradients():
    hidden_nd, weight_vd, target_n = random_operands(5, 301, 16, torch.float32)
    both = run("chunked", hidden_nd, weight_vd, target_n)
    for name, operands in {
        "weight": (hidden_nd, weight_vd.clone().requires_grad_()),
        "hidden": (hidden_nd.clone().requires_grad_(), weight_vd),
    }.items():
        linear_cross_entropy(*operands, target_n, impl="liger").loss.backward()
        (grad,) = (x.grad for x in operands if x.requires_grad)
        assert error(grad, both[f"{name}.grad"]) < 1e-5
    with torch.no_grad(), Watch() as watch:
        assert not linear_cross_entropy(*operands, target_n, impl="liger").loss.requires_grad
    assert watch.products == 1


@needs_liger
def test_liger_is_refused_where_its_numbers_would_not_hold():
    for dtype in (torch.float16, torch.float64):
        assert "use impl='chunked'" in refused(linear_cross_entropy, *random_operands(6, 40, 8, dtype), impl="liger")


def test_exported():
    assert {"LinearCrossEntropy", "linear_cross_entropy"} <= set(model_zoo.ops.__all__)
