import itertools
import math

import pytest
import torch
from model_checks import features, quantizer_of, refused, tokens

from model_zoo.config import EntropyLoss
from model_zoo.losses import entropy_penalty
from model_zoo.ops.codebook_parallel import CodebookShard


def sphere_codes(d) -> torch.Tensor:
    """Every code's vector, (2^d, d) in float64, lowest bit first."""
    signs = torch.tensor([code[::-1] for code in itertools.product([-1.0, 1.0], repeat=d)], dtype=torch.float64)
    return signs / math.sqrt(d)


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_values_codes_losses_and_gradients_are_the_papers(d):
    quantizer, z_bdhw = quantizer_of("bsq", 2**d, d), features(d)
    weight_bdhw = torch.randn(z_bdhw.shape, generator=torch.Generator().manual_seed(2))
    quantized = quantizer(z_bdhw)
    ((quantized.quantized_bdhw * weight_bdhw).sum() + 3 * quantized.commitment).backward()

    z_nd = tokens(z_bdhw).double().requires_grad_()
    u_nd = z_nd / z_nd.square().sum(dim=1, keepdim=True).sqrt()
    signs_nd = torch.where(u_nd > 0, 1.0, -1.0).double()
    straight_nd = (u_nd + (signs_nd - u_nd).detach()) / math.sqrt(d)
    commitment = (u_nd - signs_nd / math.sqrt(d)).square().mean()
    ((straight_nd * tokens(weight_bdhw).double()).sum() + 3 * commitment).backward()

    nearest_n = torch.cdist(u_nd.detach(), sphere_codes(d)).argmin(dim=1)
    assert torch.equal(quantized.index_bhw.flatten(), nearest_n)
    assert torch.equal(quantizer.tokenize(z_bdhw).flatten(), nearest_n)
    torch.testing.assert_close(tokens(quantizer.lookup(quantized.index_bhw)).double(), sphere_codes(d)[nearest_n])
    torch.testing.assert_close(tokens(quantized.quantized_bdhw).double(), straight_nd.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(tokens(z_bdhw.grad).double(), z_nd.grad, rtol=1e-4, atol=1e-5)
    assert quantized.commitment.item() == pytest.approx(commitment.item(), rel=1e-5, abs=1e-12)
    assert quantized.codebook is None and quantized.double_quantization is None
    assert list(quantizer.parameters()) == [] and quantizer.state_dict() == {}


@pytest.mark.parametrize(("d", "groups"), [(1, None), (5, None), (6, 6), (6, 2), (6, 1)])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_entropies_are_the_papers(d, groups, temperature):
    """q(c | u) = softmax(tau u C^T) over all codes with tau = 2 / temperature. H(E[q]) is approximated by the sum over
    groups of bits, by default one a bit: of the marginals of E[q]."""
    quantizer = quantizer_of("bsq", 2**d, d, groups=groups)
    z_nd = tokens(features(d)).double().requires_grad_()
    u_nd = z_nd / z_nd.square().sum(dim=1, keepdim=True).sqrt()
    log_q_nk = (2 / temperature * u_nd @ sphere_codes(d).T).log_softmax(dim=1)
    sample_entropy = -(log_q_nk.exp() * log_q_nk).sum(dim=1).mean()
    average = 0.0
    bits = d // (groups or d)
    for first in range(0, d, bits):
        marginal_k = torch.zeros(2**bits, dtype=torch.float64)
        of_group = (torch.arange(2**d) >> first) % 2**bits
        marginal_k = marginal_k.index_add(0, of_group, log_q_nk.exp().mean(dim=0))
        average = average - (marginal_k * (marginal_k + 1e-5).log()).sum()
    exact = sample_entropy - average

    mine_nd = z_nd.detach().clone().requires_grad_()
    assigned = quantizer.assign(quantizer.prepare(mine_nd), temperature)
    assert assigned.average_probability_k.shape == (d // bits * 2**bits,)
    assert assigned.sample_entropy.item() == pytest.approx(sample_entropy.item(), rel=1e-9, abs=1e-12)
    quantized = quantizer(features(d), temperature)
    torch.testing.assert_close(
        quantized.average_probability_k.double(), assigned.average_probability_k.detach(), rtol=1e-4, atol=1e-6
    )
    as_quantized = quantized._replace(
        sample_entropy=assigned.sample_entropy, average_probability_k=assigned.average_probability_k
    )
    penalty = entropy_penalty(as_quantized, assigned.average_probability_k, EntropyLoss())
    assert penalty.loss.item() == pytest.approx(exact.item(), rel=1e-9, abs=1e-12)
    penalty.loss.backward()
    exact.backward()
    torch.testing.assert_close(mine_nd.grad, z_nd.grad, rtol=1e-7, atol=1e-11)


def test_the_length_of_features_does_not_matter():
    quantizer, z_bdhw = quantizer_of("bsq", 2**6, 6), features(6).detach()
    one, other = quantizer(z_bdhw, 0.5), quantizer(10 * z_bdhw, 0.5)
    assert torch.equal(one.index_bhw, other.index_bhw)
    for field in ("sample_entropy", "commitment", "average_probability_k"):
        torch.testing.assert_close(getattr(one, field), getattr(other, field))


def test_what_makes_no_sphere_of_codes_is_refused():
    assert "model.codebook_size=131072 model.code_dim=17" in refused(quantizer_of, "bsq", 100_000, 18)
    assert "model.codebook_size=16384 model.code_dim=14" in refused(quantizer_of, "bsq", 16384, 256)
    assert "codebook_parallel=1" in refused(quantizer_of, "bsq", 16, 4, shard=CodebookShard(0, 8, None))
    assert "model.normalize=false" in refused(quantizer_of, "bsq", 16, 4, normalize=True)
    assert "give one of 1, 2, 3, 6" in refused(quantizer_of, "bsq", 64, 6, groups=4)
