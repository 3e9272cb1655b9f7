"""VQ with normalized features and codes (LlamaGen) against a float64 computation."""

import pytest
import torch
from model_checks import features, quantizer_of, refused, tokens

from model_zoo.config import QuantizerLoss
from model_zoo.losses import quantizer_loss


def make(codes=37, dim=8):
    torch.manual_seed(0)
    return quantizer_of("vq", codes, dim, 0.354, normalize=True)


def test_values_codes_losses_and_gradients():
    quantizer, z_bdhw = make(), features()
    z_nd = tokens(z_bdhw).double().requires_grad_()
    weight_kd = quantizer.embedding.weight.detach().double().requires_grad_()
    z_unit_nd, codes_kd = (x / x.square().sum(dim=1, keepdim=True).sqrt() for x in (z_nd, weight_kd))
    index_n = (z_unit_nd @ codes_kd.T).argmax(dim=1)
    chosen_nd = codes_kd[index_n]
    codebook = (z_unit_nd.detach() - chosen_nd).square().mean()
    commitment = (z_unit_nd - chosen_nd.detach()).square().mean()
    up_nd = torch.randn(z_nd.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # LlamaGen's loss: codebook + 0.25 commitment; the decoder's gradient goes straight through to the unit vectors.
    (codebook + 0.25 * commitment + (z_unit_nd * up_nd).sum()).backward()

    quantized = quantizer(z_bdhw)
    assert len(index_n.unique()) > 5 and torch.equal(quantized.index_bhw.flatten(), index_n)
    assert torch.equal(quantizer.tokenize(z_bdhw).flatten(), index_n)
    got_nd = quantized.quantized_bdhw.movedim(1, 3).flatten(0, 2)
    torch.testing.assert_close(got_nd.double(), chosen_nd, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokens(quantizer.lookup(quantized.index_bhw)).double(), chosen_nd.detach())
    torch.testing.assert_close(quantized.features_nd.double(), z_unit_nd.detach())
    assert quantized.codebook.item() == pytest.approx(codebook.item(), rel=1e-6)
    assert quantized.commitment.item() == pytest.approx(commitment.item(), rel=1e-6)
    loss = quantizer_loss(quantized, QuantizerLoss(form="paper", beta=0.25))
    assert loss.item() == pytest.approx((codebook + 0.25 * commitment).item(), rel=1e-6)
    (loss + (got_nd * up_nd).sum()).backward()
    torch.testing.assert_close(tokens(z_bdhw.grad).double(), z_nd.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.embedding.weight.grad.double(), weight_kd.grad, rtol=1e-5, atol=1e-8)


def test_lengths_do_not_matter():
    quantizer, z_bdhw = make(), features().detach()
    expected = quantizer(z_bdhw)
    with torch.no_grad():
        quantizer.embedding.weight *= torch.rand(37, 1) + 0.1
    quantized = quantizer(7 * z_bdhw)
    assert torch.equal(quantized.index_bhw, expected.index_bhw)
    torch.testing.assert_close(quantized.quantized_bdhw, expected.quantized_bdhw, rtol=1e-5, atol=1e-6)
    assert quantizer(torch.zeros_like(z_bdhw)).quantized_bdhw.isfinite().all()


def test_the_recipes_codes_begin_with_norm_one():
    norms_k = make(codes=4096).embedding.weight.square().sum(dim=1)
    assert norms_k.mean().sqrt().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("name", ["vq", "ibq", "rotation_vq"])
def test_one_dimension_has_no_directions(name):
    assert "model.code_dim=1 has two codes" in refused(quantizer_of, name, 37, 1, normalize=True)


@pytest.mark.parametrize("name", ["soft_vq", "lfq"])
def test_others_do_not_normalize(name):
    assert "set model.normalize=false" in refused(quantizer_of, name, 16, 4, normalize=True)
