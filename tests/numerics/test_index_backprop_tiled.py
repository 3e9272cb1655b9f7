"""What both tiled index backpropagations must get right: the chunked one, and the Triton kernels (on a GPU or else in
Triton's interpreter)."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from index_backprop_runs import OUTPUTS, TILE, random_operands, run, tiled_by

from model_zoo.ops.chunked import ChunkedSweeps
from model_zoo.ops.index_backprop import index_backprop_dense
from model_zoo.ops.tiled import SkipStats

# NumPy, in the interpreter, says so of the rows beside the operands, which are thrown away.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


class Tiled(NamedTuple):
    """An implementation and operands that suit it; what `run` gives of these and all upstream gradients at temperature
    0.1; how far it may be from dense at which temperatures, and from itself with other strides."""

    op: Callable
    operands: tuple
    values: dict[str, torch.Tensor]
    index_n: torch.Tensor
    temperatures: list[float]
    dense_tolerance: dict[str, float]
    stride_tolerance: dict[str, float]


@pytest.fixture(scope="module", params=["chunked", "triton"])
def tiled(request) -> Tiled:
    if request.param == "chunked":
        op, operands = tiled_by(ChunkedSweeps), random_operands(18, 70, 16)
        limits = [0.02, 0.7], {"rtol": 1e-10, "atol": 1e-12}, {"rtol": 1e-10, "atol": 1e-12}
    else:
        op = tiled_by(pytest.importorskip("model_zoo.ops.triton_sweeps").TritonSweeps)
        operands = random_operands(18, 36, 16, torch.float32, device="cuda" if torch.cuda.is_available() else "cpu")
        limits = [0.7], {"rtol": 1e-4, "atol": 1e-6}, {"rtol": 0, "atol": 0}
    return Tiled(op, operands, *run(op, *operands, 0.1, tile=TILE), *limits)


@pytest.mark.parametrize("used", [[name] for name in OUTPUTS] + [OUTPUTS[:1] + OUTPUTS[2:], OUTPUTS[2:]], ids="+".join)
def test_each_upstream_gradient_alone_and_together(tiled, used):
    z_nd, codebook_kd, upstream = tiled.operands
    upstream = {name: upstream[name] for name in used}
    for temperature in tiled.temperatures:
        exact, _ = run(index_backprop_dense, z_nd, codebook_kd, upstream, temperature, torch.float64)
        values, _ = run(tiled.op, z_nd, codebook_kd, upstream, temperature, tile=TILE)
        assert values.keys() == exact.keys()  # so that the gradient of z is None for code_nd alone
        torch.testing.assert_close(values, exact, **tiled.dense_tolerance)


@pytest.mark.parametrize("wanted", ["z", "codebook"])
def test_one_operand_may_be_fixed(tiled, wanted):
    z_nd, codebook_kd, upstream = tiled.operands
    operands = {"z": z_nd.detach(), "codebook": codebook_kd.detach()}
    operands[wanted].requires_grad_()
    out = tiled.op(*operands.values(), 0.1, tile=TILE)
    torch.autograd.backward([getattr(out, name) for name in OUTPUTS], list(upstream.values()))
    assert torch.equal(operands.pop(wanted).grad.double(), tiled.values[f"{wanted}.grad"])
    (fixed,) = operands.values()
    assert fixed.grad is None


def test_strided_operands_and_upstream_gradients(tiled):
    z_nd, codebook_kd, upstream = tiled.operands
    upstream = upstream | {"quantized_nd": upstream["quantized_nd"].T.contiguous().T}
    for strided_codebook in (codebook_kd.T.contiguous().T, codebook_kd.repeat_interleave(2, dim=1)[:, ::2]):
        strided_z = z_nd.T.contiguous().T
        assert not strided_z.is_contiguous() and not strided_codebook.is_contiguous()
        values, index_n = run(tiled.op, strided_z, strided_codebook, upstream, 0.1, tile=TILE)
        assert torch.equal(index_n, tiled.index_n)
        torch.testing.assert_close(values, tiled.values, **tiled.stride_tolerance)


def test_expanded_upstream_gradient(tiled):
    """`sum().backward()` passes an expanded gradient, whose elements share memory."""
    z_nd, codebook_kd, _ = tiled.operands
    grads = []
    for op in (index_backprop_dense, tiled.op):
        z = z_nd.detach().requires_grad_()
        op(z, codebook_kd, None).quantized_nd.sum().backward()
        grads.append(z.grad)
    torch.testing.assert_close(*grads, **tiled.dense_tolerance)


def test_without_gradients_the_values_are_the_same(tiled):
    z_nd, codebook_kd, _ = tiled.operands
    stats = SkipStats()
    with torch.no_grad():
        out = tiled.op(z_nd.detach().requires_grad_(), codebook_kd, 0.1, tile=TILE, stats=stats)
    assert torch.equal(out.index_n, tiled.index_n)
    assert all(torch.equal(getattr(out, name).double(), tiled.values[name]) for name in OUTPUTS)
    assert "output" not in stats.visited  # softmax(l) C is the backward pass's affair
    assert not out.quantized_nd.requires_grad
