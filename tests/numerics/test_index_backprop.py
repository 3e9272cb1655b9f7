"""Index backpropagation against closed forms in numpy's float64, finite differences, and numbers kept in a file."""

import math

import numpy as np
import pytest
import torch
from golden import make_index_backprop as golden
from index_backprop_runs import GOLDEN_CASES
from model_checks import refused

from model_zoo import ModelError
from model_zoo.ops import index_backprop
from model_zoo.ops.types import average_entropy

IMPLS = ["dense", "chunked", "auto"]
# Ragged on purpose: a single token, codes that are no round number, more dimensions than tokens.
SHAPES = [(1, 2, 8), (1, 37, 8), (5, 100, 9), (64, 257, 16), (33, 1000, 32), (3, 5, 64)]


def random_inputs(tokens, codes, dim, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=(rows, dim)) / dim**0.25 for rows in (tokens, codes, tokens)]


def run(z_nd, codebook_kd, grad_nd, temperature, sample_weight, average_weight, *, impl="dense", dtype=torch.float64):
    """The operation and autograd's gradients of the loss that `golden.closed_form` differentiates."""
    z = torch.tensor(z_nd, dtype=dtype, requires_grad=True)
    codebook = torch.tensor(codebook_kd, dtype=dtype, requires_grad=True)
    out = index_backprop(z, codebook, impl=impl, entropy_temperature=temperature)
    loss = (out.quantized_nd * torch.tensor(grad_nd, dtype=dtype)).sum()
    if temperature is not None:
        loss = loss + sample_weight * out.sample_entropy + average_weight * out.average_entropy
    loss.backward()
    return out, z.grad, codebook.grad


def assert_equals_closed_form(result, expected, rtol, atol):
    out, grad_z, grad_codebook = result
    close = {"rtol": rtol, "atol": atol, "check_dtype": False}
    assert out.index_n.dtype == torch.int64
    assert out.index_n.tolist() == list(expected.index_n)
    torch.testing.assert_close(out.quantized_nd.detach(), torch.as_tensor(expected.quantized_nd), **close)
    torch.testing.assert_close(grad_z, torch.as_tensor(expected.grad_z_nd), **close)
    torch.testing.assert_close(grad_codebook, torch.as_tensor(expected.grad_codebook_kd), **close)
    if expected.sample_entropy is None:
        assert out.sample_entropy is None and out.average_probability_k is None and out.average_entropy is None
    else:
        assert out.sample_entropy.item() == pytest.approx(expected.sample_entropy, rel=rtol, abs=atol)
        assert out.average_entropy.item() == pytest.approx(expected.average_entropy, rel=rtol, abs=atol)
        average = torch.as_tensor(expected.average_probability_k)
        torch.testing.assert_close(out.average_probability_k.detach(), average, **close)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [None, 0.01, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_closed_form_in_float64(shape, temperature, impl):
    inputs = random_inputs(*shape)
    expected = golden.closed_form(*inputs, temperature, 0.7, -1.3)
    assert_equals_closed_form(run(*inputs, temperature, 0.7, -1.3, impl=impl), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [None, 1.0])
def test_values_and_gradients_equal_the_closed_form_in_float32(temperature, impl):
    inputs = [array.astype(np.float32).astype(np.float64) for array in random_inputs(64, 257, 16)]
    expected = golden.closed_form(*inputs, temperature, 0.7, -1.3)
    result = run(*inputs, temperature, 0.7, -1.3, impl=impl, dtype=torch.float32)
    assert_equals_closed_form(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sample_weight, average_weight", [(1.0, 0.0), (0.0, 1.0)])
def test_each_entropy_has_its_own_gradient(sample_weight, average_weight):
    z_nd, codebook_kd, _ = random_inputs(7, 19, 8)
    nothing = np.zeros_like(z_nd)
    expected = golden.closed_form(z_nd, codebook_kd, nothing, 0.3, sample_weight, average_weight)
    assert np.abs(expected.grad_z_nd).max() > 1e-3
    result = run(z_nd, codebook_kd, nothing, 0.3, sample_weight, average_weight)
    assert_equals_closed_form(result, expected, rtol=1e-9, atol=1e-12)


def test_golden_file_is_what_its_script_makes():
    made = golden.make()
    assert [case.keys() for case in GOLDEN_CASES] == [case.keys() for case in made]
    for kept_case, made_case in zip(GOLDEN_CASES, made, strict=True):
        for name, value in made_case.items():
            if value is None:
                assert kept_case[name] is None
            else:
                np.testing.assert_allclose(kept_case[name], value, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_equals_the_golden_numbers(case, impl):
    case = {name: np.array(value) if isinstance(value, list) else value for name, value in case.items()}
    expected = golden.ClosedForm(*(case[name] for name in golden.ClosedForm._fields))
    names = "z_nd", "codebook_kd", "grad_nd", "temperature", "sample_weight", "average_weight"
    result = run(*(case[name] for name in names), impl=impl)
    assert_equals_closed_form(result, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("impl", IMPLS)
def test_forward_is_the_chosen_code_to_the_last_bit(impl, dtype):
    z_nd, codebook_kd = (torch.tensor(x, dtype=dtype) for x in random_inputs(64, 257, 16)[:2])
    out = index_backprop(z_nd, codebook_kd.requires_grad_(), impl=impl)
    assert torch.equal(out.quantized_nd, codebook_kd[out.index_n])


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_lowest_index(impl):
    codebook_kd = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, -1.0]])
    z_nd = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]])
    assert index_backprop(z_nd, codebook_kd, impl=impl).index_n.tolist() == [1, 0, 0, 0, 5]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("temperature", [None, 0.01])
def test_logits_of_ten_thousand_give_no_nan(temperature, impl):
    z_nd = np.array([[100.0, 0.0], [-100.0, 0.0], [100.0, 100.0]])
    codebook_kd = np.array([[100.0, 0.0], [-100.0, 0.0], [0.0, 100.0], [0.0, 0.0]])
    assert np.abs(z_nd @ codebook_kd.T).max() == 1e4
    grad_nd = np.ones((3, 2))
    out, grad_z, grad_codebook = run(z_nd, codebook_kd, grad_nd, temperature, 1.0, -1.0, impl=impl, dtype=torch.float32)
    assert out.index_n.tolist() == [0, 1, 0]
    assert grad_z.isfinite().all() and grad_codebook.isfinite().all()
    if temperature:
        # The third token lies between two codes: log(2) nats for one of three tokens.
        assert out.sample_entropy.item() == pytest.approx(math.log(2) / 3)
        assert out.average_probability_k.tolist() == pytest.approx([0.5, 1 / 3, 1 / 6, 0.0])
        assert out.average_entropy.isfinite()


def test_entropies_pass_gradcheck():
    z_nd, codebook_kd = (torch.tensor(x, requires_grad=True) for x in random_inputs(4, 6, 3)[:2])

    def entropies(z_nd, codebook_kd):
        out = index_backprop(z_nd, codebook_kd, impl="dense", entropy_temperature=0.5)
        return out.sample_entropy, out.average_probability_k, out.average_entropy

    assert torch.autograd.gradcheck(entropies, (z_nd, codebook_kd))


def test_straight_through_gradient_is_that_of_its_surrogate_by_finite_differences():
    """Backward differentiates onehot C + p(z, C) C0, where the hard choice and the second C0 are held fixed."""
    z_nd, codebook_kd, grad_nd = random_inputs(5, 7, 3)
    hard_nk = np.eye(7)[(z_nd @ codebook_kd.T).argmax(axis=1)]

    def surrogate(z, codebook):
        soft_nk = np.exp(golden.log_softmax(z @ codebook.T))
        return (grad_nd * (hard_nk @ codebook + soft_nk @ codebook_kd)).sum()

    def differences(function, at):
        result, step = np.zeros_like(at), 1e-5
        for place in np.ndindex(at.shape):
            moved = np.zeros_like(at)
            moved[place] = step
            result[place] = (function(at + moved) - function(at - moved)) / (2 * step)
        return result

    _, grad_z, grad_codebook = run(z_nd, codebook_kd, grad_nd, None, 0, 0)
    np.testing.assert_allclose(grad_z, differences(lambda z: surrogate(z, codebook_kd), z_nd), atol=1e-8)
    np.testing.assert_allclose(grad_codebook, differences(lambda c: surrogate(z_nd, c), codebook_kd), atol=1e-8)


def test_average_entropy_of_averaged_micro_batches_is_the_whole_batches():
    z_nd, codebook_kd = (torch.tensor(x) for x in random_inputs(24, 11, 4)[:2])
    whole = index_backprop(z_nd, codebook_kd, entropy_temperature=0.1)
    parts = [index_backprop(z, codebook_kd, entropy_temperature=0.1) for z in z_nd.chunk(3)]
    averaged = average_entropy(torch.stack([part.average_probability_k for part in parts]).mean(dim=0))
    assert averaged.item() == pytest.approx(whole.average_entropy.item(), abs=1e-12)
    # Which is why the probabilities are returned and not only their entropies: these cannot be averaged.
    mean_of_entropies = torch.stack([part.average_entropy for part in parts]).mean()
    assert mean_of_entropies.item() < whole.average_entropy.item() - 0.01


def test_average_entropy_holds_epsilon_inside_the_logarithm():
    a_k = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    value = average_entropy(a_k)
    assert value.item() == pytest.approx(-math.log(1 + 1e-5), rel=1e-12)
    value.backward()
    assert a_k.grad.tolist() == pytest.approx([-(math.log(1 + 1e-5) + 1 / (1 + 1e-5)), -math.log(1e-5)], rel=1e-12)


@pytest.mark.parametrize(
    "z_shape, codebook_shape", [((2, 3, 4), (5, 4)), ((2, 4), (5, 3)), ((4,), (5, 4)), ((2, 4), (4,))]
)
def test_shapes_that_do_not_fit_are_named(z_shape, codebook_shape):
    message = refused(index_backprop, torch.zeros(z_shape), torch.zeros(codebook_shape))
    assert str(z_shape) in message and str(codebook_shape) in message


def test_unknown_impl_names_the_choices():
    with pytest.raises(ModelError, match=r"unknown impl 'fast': choose one of .*dense"):
        index_backprop(torch.zeros(2, 4), torch.zeros(5, 4), impl="fast")
