"""The rotation trick against its paper's matrices, built token by token in float64."""

import pytest
import torch
from model_checks import features, quantizer_of, tokens
from torch import Tensor

from model_zoo.quantizers.base import Quantizer
from model_zoo.quantizers.rotation_vq import rotate


def make(**changes) -> Quantizer:
    torch.manual_seed(0)
    return quantizer_of("rotation_vq", 37, 8, **changes)


def double(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def jacobian(z_d: Tensor, q_d: Tensor) -> Tensor:
    """lambda R for one token: two reflections, one across the middle of z and q, one across q (appendix A.5)."""
    identity_dd = torch.eye(len(z_d), dtype=torch.float64)
    z_unit_d, q_unit_d = z_d / z_d.norm(), q_d / q_d.norm()
    middle_d = (z_unit_d + q_unit_d) / (z_unit_d + q_unit_d).norm()
    rotation_dd = (identity_dd - 2 * q_unit_d.outer(q_unit_d)) @ (identity_dd - 2 * middle_d.outer(middle_d))
    assert torch.linalg.det(rotation_dd).item() == pytest.approx(1)
    return q_d.norm() / z_d.norm() * rotation_dd


@pytest.mark.parametrize("normalize", [False, True])
def test_the_value_is_the_code_and_the_gradient_is_rotated_and_rescaled(normalize):
    quantizer, z_bdhw = make(normalize=normalize), features()
    unit = torch.nn.functional.normalize if normalize else lambda x_nd: x_nd
    z_nd = tokens(z_bdhw).double().requires_grad_()
    codes_kd = unit(quantizer.embedding.weight.detach().double())
    input_nd = unit(z_nd)
    index_n = (input_nd[:, None] - codes_kd).square().sum(dim=2).argmin(dim=1)
    assert len(index_n.unique()) > 5
    weight_nd = torch.randn(30, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    matrices = [jacobian(z_d, codes_kd[index]) for z_d, index in zip(input_nd.detach(), index_n, strict=True)]
    for z_d, matrix_dd, index in zip(input_nd.detach(), matrices, index_n, strict=True):
        torch.testing.assert_close(matrix_dd @ z_d, codes_kd[index])  # it does turn z into q
    to_input_nd = torch.stack([matrix_dd.T @ g for matrix_dd, g in zip(matrices, weight_nd, strict=True)])
    input_nd.backward(to_input_nd)

    quantized = quantizer(z_bdhw)
    assert torch.equal(quantized.index_bhw.flatten(), index_n)
    got_nd = quantized.quantized_bdhw.movedim(1, 3).flatten(0, 2)
    torch.testing.assert_close(got_nd.double(), codes_kd[index_n], rtol=1e-6, atol=1e-6)
    (got_nd * weight_nd).sum().backward()
    torch.testing.assert_close(tokens(z_bdhw.grad).double(), z_nd.grad, rtol=1e-5, atol=1e-5)
    assert quantizer.embedding.weight.grad is None  # the VQ losses alone move the codes
    assert torch.equal(quantizer.tokenize(z_bdhw).flatten(), index_n)


def test_the_angle_to_the_gradient_is_kept():
    quantizer, z_bdhw = make(), features()
    quantized = quantizer(z_bdhw)
    grad_bdhw = torch.randn(z_bdhw.shape)
    quantized.quantized_bdhw.backward(grad_bdhw)
    at_code = torch.cosine_similarity(quantized.quantized_bdhw, grad_bdhw)
    at_feature = torch.cosine_similarity(z_bdhw, z_bdhw.grad)
    torch.testing.assert_close(at_feature, at_code, rtol=1e-4, atol=1e-5)
    assert (torch.cosine_similarity(grad_bdhw, z_bdhw.grad) < 0.9).any()  # straight through, all would be 1


def test_the_losses_are_those_of_vq():
    torch.manual_seed(0)
    quantizers = make(), quantizer_of("vq", 37, 8)
    quantizers[1].load_state_dict(quantizers[0].state_dict())
    gradients = []
    for quantizer in quantizers:
        z_bdhw = features()
        quantized = quantizer(z_bdhw, 0.5)
        assert quantized.double_quantization is None and quantized.sample_entropy is None
        (quantized.commitment + 0.25 * quantized.codebook).backward()
        gradients.append((quantized.commitment, quantized.codebook, z_bdhw.grad, quantizer.embedding.weight.grad))
    for of_rotation, of_vq in zip(*gradients, strict=True):
        assert torch.equal(of_rotation, of_vq)


def gradient(z_1d: Tensor, q_1d: Tensor) -> Tensor:
    """lambda R of one token, column by column."""
    z_1d = z_1d.requires_grad_()
    rows = [torch.autograd.grad(rotate(z_1d, q_1d)[0, i], z_1d)[0][0] for i in range(z_1d.shape[1])]
    return torch.stack(rows)


def test_the_degenerate_cases():
    identity_dd = torch.eye(3, dtype=torch.float64)
    q_1d = double(0, 2, 0)
    for z_1d in (double(0, 0, 0), double(0, 0, 1e-7)):  # no direction: straight through
        assert torch.equal(gradient(z_1d, q_1d), identity_dd)
    assert torch.equal(gradient(double(0, 0, 0), double(0, 0, 0)), identity_dd)
    assert torch.equal(gradient(double(1, 2, 3), double(0, 0, 0)), 0 * identity_dd)  # lambda = 0
    assert torch.equal(gradient(double(0, 4, 0), q_1d), identity_dd / 2)  # z^ = q^: only rescaled
    opposite_dd = gradient(double(0, -1, 0), q_1d)
    assert torch.equal(opposite_dd, 2 * torch.diag(torch.tensor([1.0, -1, 1], dtype=torch.float64)))
    assert torch.equal(opposite_dd @ double(0, -1, 0)[0], q_1d[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [0, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
def test_near_opposite_vectors_have_bounded_gradients(apart, dtype):
    angle = torch.tensor(apart, dtype=torch.float64)
    z_1d = torch.stack([angle.sin(), -angle.cos(), 0 * angle])[None].to(dtype)
    matrix_dd = gradient(z_1d, double(0, 1, 0).to(dtype))
    assert torch.linalg.matrix_norm(matrix_dd.double(), 2) < 1.001
    if apart > 2e-4:  # a rotation, to rounding
        error_dd = matrix_dd.double() @ matrix_dd.double().T - torch.eye(3, dtype=torch.float64)
        assert error_dd.abs().max() < 1e-3


def test_zeros_and_opposites_do_not_spread_to_other_tokens():
    quantizer, z_bdhw = make(), features().detach()
    z_bdhw[0, :, 0, 0] = 0
    z_bdhw[1, :, 2, 4] = -1e-3 * quantizer.embedding.weight.detach()[5]
    z_bdhw.requires_grad_()
    quantizer(z_bdhw).quantized_bdhw.sum().backward()
    assert z_bdhw.grad.isfinite().all()
    assert torch.equal(z_bdhw.grad[0, :, 0, 0], torch.ones(8))
