import itertools

import pytest
import torch
from model_checks import features, quantizer_of, refused, tokens

from model_zoo.config import EntropyLoss, QuantizerLoss
from model_zoo.losses import entropy_penalty, quantizer_loss
from model_zoo.ops.codebook_parallel import CodebookShard


def all_codes(d) -> torch.Tensor:
    """Every code's vector, (2^d, d) in float64, lowest bit first."""
    return torch.tensor([code[::-1] for code in itertools.product([-1.0, 1.0], repeat=d)], dtype=torch.float64)


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_a_code_is_the_signs_and_the_nearest_of_all_codes(d):
    quantizer, z_bdhw = quantizer_of("lfq", 2**d, d), features(d)
    quantized = quantizer(z_bdhw)
    expected_n = torch.cdist(tokens(z_bdhw).double(), all_codes(d)).argmin(dim=1)
    assert torch.equal(quantized.index_bhw.flatten(), expected_n)
    assert torch.equal(quantizer.tokenize(z_bdhw).flatten(), expected_n)
    assert torch.equal(tokens(quantizer.lookup(quantized.index_bhw)).double(), all_codes(d)[expected_n])
    assert torch.equal(quantized.quantized_bdhw.sign(), quantizer.lookup(quantized.index_bhw))
    assert list(quantizer.parameters()) == [] and quantizer.state_dict() == {}


@pytest.mark.parametrize("d", [1, 2, 5, 8])
@pytest.mark.parametrize("temperature", [0.01, 0.5, 4.0])
def test_entropies_are_those_of_the_softmax_over_all_codes(d, temperature):
    quantizer, z_bdhw = quantizer_of("lfq", 2**d, d), features(d)
    quantized = quantizer(z_bdhw, temperature)
    z_nd = tokens(z_bdhw).double().requires_grad_()
    log_p_nk = (2 * z_nd @ all_codes(d).T / temperature).log_softmax(dim=1)
    sample_entropy = -(log_p_nk.exp() * log_p_nk).sum(dim=1).mean()
    average_k = log_p_nk.exp().mean(dim=0)
    assert quantized.sample_entropy.item() == pytest.approx(sample_entropy.item(), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(quantized.average_probability_k.double(), average_k, rtol=1e-4, atol=1e-7)

    # The gradient in float64: at low temperatures it is a small difference of large numbers.
    mine_nd = z_nd.detach().clone().requires_grad_()
    assigned = quantizer.assign(mine_nd, temperature)
    as_quantized = quantized._replace(
        sample_entropy=assigned.sample_entropy, average_probability_k=assigned.average_probability_k
    )
    penalty = entropy_penalty(as_quantized, assigned.average_probability_k, EntropyLoss())
    exact = sample_entropy + (average_k * (average_k + 1e-5).log()).sum()
    assert penalty.loss.item() == pytest.approx(exact.item(), rel=1e-9, abs=1e-12)
    penalty.loss.backward()
    exact.backward()
    torch.testing.assert_close(mine_nd.grad, z_nd.grad, rtol=1e-7, atol=1e-11)


def test_eighteen_bits_take_no_matrix_of_tokens_and_codes():
    quantizer, z_bdhw = quantizer_of("lfq", 2**18, 18), features(18, b=4, h=32, w=32)  # which would be 4 GiB
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        quantized = quantizer(z_bdhw, 0.01)
    assert quantized.average_probability_k.shape == (2**18,)
    assert quantized.average_probability_k.sum().item() == pytest.approx(1, rel=1e-4)
    assert max(sizes) == 4096 * 2**9
    assert int(quantized.index_bhw.max()) > 2**17


def test_the_gradient_goes_straight_through_and_the_losses_move_features_alone():
    quantizer, z_bdhw = quantizer_of("lfq", 2**5, 5), features(5)
    weight_bdhw = torch.randn(z_bdhw.shape)
    quantized = quantizer(z_bdhw)
    (quantized.quantized_bdhw * weight_bdhw).sum().backward()
    assert torch.equal(z_bdhw.grad, weight_bdhw)
    assert quantized.codebook is None and quantized.double_quantization is None
    commitment = (z_bdhw.detach() - z_bdhw.detach().sign()).square().mean().item()
    for form, share in (("paper", 0.25), ("reference", 1.0)):
        loss = quantizer_loss(quantized, QuantizerLoss(form=form, beta=0.25))
        assert loss.item() == pytest.approx(share * commitment, rel=1e-5)


def test_what_makes_no_lookup_free_codebook_is_refused():
    said = refused(quantizer_of, "lfq", 100_000, 18)
    assert "model.codebook_size=131072 model.code_dim=17" in said
    assert "codebook_parallel=1" in refused(quantizer_of, "lfq", 16, 4, shard=CodebookShard(0, 8, None))
