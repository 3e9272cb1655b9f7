import pytest
import torch
from model_checks import features, nearest_by_hand, quantizer_of, refused, tokens

from model_zoo.config import QuantizerLoss
from model_zoo.losses import quantizer_loss
from model_zoo.ops.codebook_parallel import CodebookShard


def make(codes: int = 37, dim: int = 8, seed: int = 0):
    """With projected codes as long as the features, so that several are chosen."""
    torch.manual_seed(seed)
    quantizer = quantizer_of("simvq", codes, dim)
    with torch.no_grad():
        quantizer.projector.weight.normal_()
        quantizer.projector.bias.normal_(std=0.3)
    return quantizer


def test_forward_losses_and_gradients_are_algorithm_1s_in_float64():
    quantizer, z_bdhw = make(), features()
    quantized = quantizer(z_bdhw)
    direction_bdhw = torch.randn(z_bdhw.shape, generator=torch.Generator().manual_seed(2))
    beta = 0.25
    loss = quantizer_loss(quantized, QuantizerLoss(form="paper", beta=beta))
    (loss + (quantized.quantized_bdhw * direction_bdhw).sum()).backward()

    # k = argmin_j |z - q_j W|^2; z_q = sg(q_k W - z) + z; beta |z - sg(q_k W)|^2 + |sg(z) - q_k W|^2.
    z_nd = tokens(z_bdhw).double().requires_grad_()
    table_kd = quantizer.embedding.weight.double()
    weight_dd = quantizer.projector.weight.detach().double().requires_grad_()
    bias_d = quantizer.projector.bias.detach().double().requires_grad_()
    codes_kd = table_kd @ weight_dd.T + bias_d
    grad_nd = tokens(direction_bdhw).double()
    index_n, code_nd, commitment, codebook = nearest_by_hand(z_nd, codes_kd, grad_nd, (beta, 1))

    assert len(index_n.unique()) > 5
    assert torch.equal(quantized.index_bhw.flatten(), index_n)
    torch.testing.assert_close(tokens(quantized.quantized_bdhw).double(), code_nd.detach(), rtol=1e-5, atol=1e-6)
    assert quantized.commitment.item() == pytest.approx(commitment.item(), rel=1e-5)
    assert quantized.codebook.item() == pytest.approx(codebook.item(), rel=1e-5)
    assert quantized.double_quantization is None and quantized.sample_entropy is None
    torch.testing.assert_close(tokens(z_bdhw.grad).double(), z_nd.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.projector.weight.grad.double(), weight_dd.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantizer.projector.bias.grad.double(), bias_d.grad, rtol=1e-4, atol=1e-6)
    assert quantizer.embedding.weight.grad is None


def test_one_step_moves_codes_that_were_not_chosen():
    quantizer, z_bdhw = make(), features()
    before_kd = quantizer.codes().detach().clone()
    quantized = quantizer(z_bdhw)
    quantized.codebook.backward()
    torch.optim.SGD([p for p in quantizer.parameters() if p.requires_grad], lr=0.1).step()
    assert len(quantized.index_bhw.unique()) < 37
    assert (quantizer.codes() - before_kd).abs().amax(dim=1).gt(0).all()


def test_tokens_and_codes_are_those_of_training():
    quantizer, z_bdhw = make(), features()
    quantized = quantizer(z_bdhw)
    assert torch.equal(quantizer.tokenize(z_bdhw), quantized.index_bhw)
    looked_up_bdhw = quantizer.lookup(quantized.index_bhw)
    torch.testing.assert_close(looked_up_bdhw, quantized.quantized_bdhw, rtol=1e-6, atol=1e-6)
    assert torch.equal(quantizer.eval()(z_bdhw).index_bhw, quantized.index_bhw)
    torch.testing.assert_close(quantizer.codes()[quantized.index_bhw.flatten()], tokens(looked_up_bdhw))


def test_it_starts_as_the_released_code_does():
    torch.manual_seed(0)
    quantizer = quantizer_of("simvq", 4000, 64)
    assert quantizer.embedding.weight.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert not quantizer.embedding.weight.requires_grad
    assert quantizer.projector.weight.shape == (64, 64)
    assert quantizer.projector.weight.abs().max().item() == pytest.approx(64**-0.5, rel=0.01)
    assert quantizer.row_parameters() == [quantizer.embedding.weight]
    assert set(quantizer.state_dict()) == {"embedding.weight", "projector.weight", "projector.bias"}


def test_it_computes_in_fp32_under_autocast():
    quantizer, z_bdhw = make(2048, 64), features(64, 1, 32, 32).detach()
    expected = quantizer(z_bdhw)
    looked_up_bdhw, codes_kd = quantizer.lookup(expected.index_bhw), quantizer.codes()
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(z_bdhw)
        assert torch.equal(quantizer.tokenize(z_bdhw), expected.index_bhw)
        assert torch.equal(quantizer.lookup(expected.index_bhw), looked_up_bdhw)
        assert torch.equal(quantizer.codes(), codes_kd)
    assert torch.equal(quantized.index_bhw, expected.index_bhw)
    assert torch.equal(quantized.quantized_bdhw, expected.quantized_bdhw)


def test_no_matrix_of_codes_is_kept_for_the_backward_pass():
    quantizer, z_bdhw = make(4096, 16), features(16)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        quantizer(z_bdhw)
    assert max(sizes) < 4096 * 16


def test_what_it_cannot_do_is_refused():
    assert "codebook_parallel=1" in refused(quantizer_of, "simvq", 16, 4, shard=CodebookShard(0, 8, None))
    assert "model.normalize=false" in refused(quantizer_of, "simvq", 16, 4, normalize=True)
