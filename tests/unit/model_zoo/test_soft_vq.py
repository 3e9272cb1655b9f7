import math

import pytest
import torch
from model_checks import features, quantizer_of, refused, tokens

from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.quantizers.soft_vq import SoftVectorQuantizer


def make(codes=37, dim=8) -> SoftVectorQuantizer:
    torch.manual_seed(0)
    return quantizer_of("soft_vq", codes, dim, 0.5)


@pytest.mark.parametrize("progress", [0.0, 0.5, 0.8])
def test_training_sees_the_mixture_and_all_codes_get_gradients(progress):
    quantizer, z_bdhw = make(), features()
    quantizer.anneal(progress)
    z_nd = tokens(z_bdhw).double().requires_grad_()
    codes_kd = quantizer.embedding.weight.detach().double().requires_grad_()
    mixture_nd = (z_nd @ codes_kd.T / quantizer.temperature.double()).softmax(dim=1) @ codes_kd
    weight_nd = torch.randn(mixture_nd.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (mixture_nd * weight_nd).sum().backward()

    quantized = quantizer(z_bdhw)
    got_nd = quantized.quantized_bdhw.permute(0, 2, 3, 1).reshape(-1, 8)
    torch.testing.assert_close(got_nd.double(), mixture_nd, rtol=1e-4, atol=1e-5)
    (got_nd * weight_nd).sum().backward()
    moved = (quantizer.embedding.weight.grad.abs().sum(dim=1) > 0).sum()
    assert moved == 37 if progress < 0.7 else moved > 5
    scale = codes_kd.grad.abs().max().item()
    torch.testing.assert_close(quantizer.embedding.weight.grad.double(), codes_kd.grad, rtol=1e-4, atol=1e-5 * scale)
    got_grad_nd = tokens(z_bdhw.grad).double()
    torch.testing.assert_close(got_grad_nd, z_nd.grad, rtol=1e-4, atol=1e-5 * z_nd.grad.abs().max().item())
    error = quantized.double_quantization.item()
    assert error == pytest.approx((mixture_nd - z_nd).square().mean().item(), rel=1e-5)


def test_inference_is_hard():
    quantizer, z_bdhw = make(), features()
    expected_n = (tokens(z_bdhw).double() @ quantizer.embedding.weight.double().T).argmax(dim=1)
    assert torch.equal(quantizer.tokenize(z_bdhw).flatten(), expected_n)
    in_evaluation = quantizer.eval()(z_bdhw)
    assert torch.equal(in_evaluation.quantized_bdhw, quantizer.lookup(in_evaluation.index_bhw))
    quantizer.train()
    quantized = quantizer(z_bdhw)
    assert torch.equal(quantized.index_bhw.flatten(), expected_n)
    codes_bdhw = quantizer.lookup(quantized.index_bhw)
    assert torch.equal(codes_bdhw[1, :, 2, 4], quantizer.embedding.weight[expected_n[-1]])
    assert not torch.allclose(codes_bdhw, quantized.quantized_bdhw, atol=0.1)  # the gap that the method suffers from
    quantizer.anneal(1.0)
    torch.testing.assert_close(quantizer(z_bdhw).quantized_bdhw, codes_bdhw)  # and that the temperature closes


def test_the_temperature_falls_along_half_a_cosine():
    quantizer = make()
    assert quantizer.temperature.item() == pytest.approx(0.9)
    quantizer.anneal(0.25)
    assert quantizer.temperature.item() == pytest.approx(0.9 * (1 + math.cos(math.pi / 4)) / 2, rel=1e-5)
    quantizer.anneal(0.5)
    assert quantizer.temperature.item() == pytest.approx(0.45, rel=1e-5)
    quantizer.anneal(1.0)
    assert quantizer.temperature.item() == pytest.approx(1e-6)
    assert "temperature" not in quantizer.state_dict()  # the step decides


def test_a_spread_codebook_is_refused():
    assert "codebook_parallel=1" in refused(quantizer_of, "soft_vq", 8, 4, shard=CodebookShard(0, 4, None))
