import pytest
import torch
from model_checks import features, quantizer_of, tokens

from model_zoo.quantizers.base import Quantizer

BOTH = ["ibq", "vq"]  # the others have files of their own


def make(name, codes=37, dim=8, init_std=1.0, seed=0) -> Quantizer:
    torch.manual_seed(seed)
    return quantizer_of(name, codes, dim, init_std)


def test_vq_takes_the_nearest_code_by_brute_force():
    quantizer, z_bdhw = make("vq"), features()
    distances_nk = (tokens(z_bdhw)[:, None] - quantizer.embedding.weight[None]).square().sum(dim=2)
    expected_n = distances_nk.argmin(dim=1)
    assert len(expected_n.unique()) > 5
    assert torch.equal(quantizer(z_bdhw).index_bhw.flatten(), expected_n)
    assert torch.equal(quantizer.tokenize(z_bdhw).flatten(), expected_n)


def test_ibq_takes_the_largest_dot_product():
    quantizer, z_bdhw = make("ibq"), features()
    expected_n = (tokens(z_bdhw)[:, None] * quantizer.embedding.weight[None]).sum(dim=2).argmax(dim=1)
    assert not torch.equal(expected_n, make("vq").tokenize(z_bdhw).flatten())  # the same codebook, another rule
    assert torch.equal(quantizer(z_bdhw).index_bhw.flatten(), expected_n)
    assert torch.equal(quantizer.tokenize(z_bdhw).flatten(), expected_n)


@pytest.mark.parametrize("name", BOTH)
def test_codes_lie_where_their_features_lay(name):
    quantizer, z_bdhw = make(name), features()
    quantized = quantizer(z_bdhw)
    assert quantized.index_bhw.shape == (2, 3, 5) and quantized.index_bhw.dtype == torch.int64
    for b, h, w in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        alone = quantizer.tokenize(z_bdhw[b : b + 1, :, h : h + 1, w : w + 1])
        assert alone.item() == quantized.index_bhw[b, h, w].item()
        code_d = quantizer.embedding.weight[quantized.index_bhw[b, h, w]]
        torch.testing.assert_close(quantized.quantized_bdhw[b, :, h, w], code_d, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(quantizer.lookup(quantized.index_bhw), quantized.quantized_bdhw, rtol=1e-6, atol=1e-6)


def test_vq_passes_the_gradient_straight_through_and_none_to_the_codebook():
    quantizer, z_bdhw = make("vq"), features()
    grad_bdhw = torch.randn(z_bdhw.shape)
    (quantizer(z_bdhw).quantized_bdhw * grad_bdhw).sum().backward()
    assert torch.equal(z_bdhw.grad, grad_bdhw)
    assert quantizer.embedding.weight.grad is None


def rows_with_gradient(quantizer, z_bdhw):
    quantized = quantizer(z_bdhw)
    (quantized.quantized_bdhw.sum() + quantized.commitment + quantized.codebook).backward()
    chosen = quantized.index_bhw.unique()
    return chosen, quantizer.embedding.weight.grad.abs().sum(dim=1).nonzero().flatten()


def test_ibq_gradient_reaches_unchosen_codes():
    chosen, moved = rows_with_gradient(make("ibq"), features())
    assert len(chosen) < 37 and len(moved) == 37


def test_vq_gradient_reaches_chosen_codes_only():
    chosen, moved = rows_with_gradient(make("vq"), features())
    assert len(chosen) < 37
    assert torch.equal(moved, chosen)


@pytest.mark.parametrize("name", BOTH)
def test_commitment_moves_only_features_and_codebook_only_codes(name):
    for term in ("commitment", "codebook"):
        quantizer, z_bdhw = make(name), features()
        quantized = quantizer(z_bdhw)
        codes_bdhw = quantizer.lookup(quantized.index_bhw).detach()
        value = getattr(quantized, term)
        assert value.item() == pytest.approx((z_bdhw - codes_bdhw).square().mean().item(), rel=1e-6)
        value.backward()
        to_features = 2 * (z_bdhw.detach() - codes_bdhw) / z_bdhw.numel()
        if term == "commitment":
            torch.testing.assert_close(z_bdhw.grad, to_features)
            assert quantizer.embedding.weight.grad is None
        else:
            assert z_bdhw.grad is None
            expected_kd = torch.zeros(37, 8).index_add_(0, quantized.index_bhw.flatten(), -tokens(to_features))
            torch.testing.assert_close(quantizer.embedding.weight.grad, expected_kd)


def test_double_quantization_is_a_term_of_ibq_alone():
    assert make("vq")(features()).double_quantization is None
    quantizer, z_bdhw = make("ibq"), features()
    quantizer(z_bdhw).double_quantization.backward()

    # mean |z_q - z|^2: its gradient enters z_q, where it goes the soft way, and z directly.
    z_nd, codebook_kd = tokens(z_bdhw).double(), quantizer.embedding.weight.detach().double()
    soft_nk = (z_nd @ codebook_kd.T).softmax(dim=1)
    index_n = soft_nk.argmax(dim=1)
    grad_nd = 2 * (codebook_kd[index_n] - z_nd) / z_nd.numel()
    output_nd = soft_nk @ codebook_kd
    grad_logits_nk = soft_nk * (grad_nd @ codebook_kd.T - (grad_nd * output_nd).sum(dim=1, keepdim=True))
    expected_nd = grad_logits_nk @ codebook_kd - grad_nd
    expected_kd = (grad_logits_nk.T @ z_nd).index_add_(0, index_n, grad_nd)
    torch.testing.assert_close(tokens(z_bdhw.grad), expected_nd.float(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(quantizer.embedding.weight.grad, expected_kd.float(), rtol=1e-4, atol=1e-7)


def test_entropy_terms_come_where_a_temperature_asks_for_them():
    quantizer, z_bdhw = make("ibq"), features()
    without, with_terms = quantizer(z_bdhw), quantizer(z_bdhw, 0.5)
    assert without.sample_entropy is None and without.average_probability_k is None
    assignment_nk = (tokens(z_bdhw) @ quantizer.embedding.weight.T / 0.5).softmax(dim=1)
    torch.testing.assert_close(with_terms.average_probability_k, assignment_nk.mean(dim=0))
    torch.testing.assert_close(with_terms.sample_entropy, torch.special.entr(assignment_nk).sum(dim=1).mean())
    vq = make("vq")(z_bdhw, 0.5)
    assert vq.sample_entropy is None and vq.average_probability_k is None


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizer_is_an_fp32_island_under_bf16_autocast(name, dtype):
    quantizer = make(name, codes=2048, dim=64)
    z_bdhw = features(64, 1, 32, 32).detach().to(dtype)
    expected = quantizer(z_bdhw.float(), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(z_bdhw, 0.5)
        index_bhw = quantizer.tokenize(z_bdhw)
        # What the island prevents: in bf16 logits pick other codes.
        z_nd, codebook_kd = tokens(z_bdhw), quantizer.embedding.weight
        norms_k = {"ibq": 0, "vq": codebook_kd.square().sum(dim=1)}[name]
        leaked_n = (2 * z_nd @ codebook_kd.T - norms_k).argmax(dim=1)
    assert (leaked_n != expected.index_bhw.flatten()).float().mean() > 0.001
    assert torch.equal(quantized.index_bhw, expected.index_bhw)
    assert torch.equal(index_bhw, expected.index_bhw)
    for value, expected_value in zip(quantized, expected, strict=True):
        assert (value is None) == (expected_value is None)
        if value is not None:
            assert value.dtype == expected_value.dtype and torch.equal(value, expected_value)


@pytest.mark.parametrize("name", BOTH)
def test_codebook_starts_normal_with_the_asked_deviation(name):
    for init_std in (1.0, 0.2):
        weight = make(name, codes=2000, dim=16, init_std=init_std).embedding.weight
        assert weight.std().item() == pytest.approx(init_std, rel=0.02)
        assert abs(weight.mean().item()) < 0.02 * init_std


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_feature_that_is_not_finite_reaches_the_output_in_training_instead_of_ending_one_rank(name, bad):
    quantizer = make(name).train()
    z_bdhw = features().detach()
    good = quantizer(z_bdhw, 0.1)
    z_bdhw[1, 3, 2, 4] = bad
    quantized = quantizer(z_bdhw.requires_grad_(), 0.1)
    assert quantized.quantized_bdhw.isnan().all()
    # The codes are those of the other tokens as before, and lie in the codebook.
    same = torch.ones(2, 3, 5, dtype=torch.bool)
    same[1, 2, 4] = False
    assert torch.equal(quantized.index_bhw[same], good.index_bhw[same])
    assert quantized.index_bhw.min() >= 0 and quantized.index_bhw.max() < 37
    assert quantized.features_nd.isfinite().all()
    quantized.quantized_bdhw.sum().backward()  # it can be gone through, and is then left out


@pytest.mark.parametrize("name", BOTH)
def test_finite_features_are_not_touched_by_that(name):
    quantizer, z_bdhw = make(name), features()
    in_training, in_evaluation = quantizer.train()(z_bdhw), quantizer.eval()(z_bdhw)
    assert torch.equal(in_training.quantized_bdhw, in_evaluation.quantized_bdhw)
    assert torch.equal(in_training.index_bhw, in_evaluation.index_bhw)
    assert torch.equal(in_training.features_nd, tokens(z_bdhw))
