import numpy as np
import pytest
import torch
from model_checks import quantizer_of
from scipy.special import expit
from torch import Tensor
from torch.nn import functional as F

from model_zoo.config import EntropyLoss, LossConfig, QuantizerLoss
from model_zoo.losses import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    Lecam,
    SemanticHead,
    cosine_distance,
    entropy_penalty,
    quantizer_loss,
)
from model_zoo.ops import index_backprop
from model_zoo.quantizers.base import Quantized


def logits(seed=0):
    """Real and fake, on both sides of every hinge."""
    generator = np.random.default_rng(seed)
    return generator.normal(0.5, 1.5, size=(2, 3, 1, 4, 5))


def test_hinge_and_vanilla_equal_their_formulas():
    real, fake = logits()
    expected = {
        "hinge": 0.5 * (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()),
        "vanilla": 0.5 * (-np.log(expit(real)).mean() - np.log(1 - expit(fake)).mean()),
    }
    assert expected.keys() == DISCRIMINATOR_LOSSES.keys()
    for name, loss in DISCRIMINATOR_LOSSES.items():
        assert loss(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(expected[name], rel=1e-12)


def test_non_saturating_averages_an_images_logits_first_and_linear_is_minus_the_mean():
    _, fake = logits()
    expected = {"non_saturating": np.mean([-np.log(expit(image.mean())) for image in fake]), "linear": -fake.mean()}
    assert expected["non_saturating"] != pytest.approx(-np.log(expit(fake)).mean(), rel=0.01)
    assert expected.keys() == GENERATOR_LOSSES.keys()
    for name, loss in GENERATOR_LOSSES.items():
        assert loss(torch.tensor(fake)).item() == pytest.approx(expected[name], rel=1e-12)


@pytest.mark.parametrize("name", sorted(DISCRIMINATOR_LOSSES))
def test_discriminator_losses_raise_real_and_lower_fake_logits(name):
    real, fake = (torch.tensor(x, requires_grad=True) for x in np.zeros((2, 3, 1, 2, 2)))
    DISCRIMINATOR_LOSSES[name](real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()


@pytest.mark.parametrize("name", sorted(GENERATOR_LOSSES))
def test_generator_losses_raise_fake_logits(name):
    fake = torch.zeros(3, 1, 2, 2, requires_grad=True)
    GENERATOR_LOSSES[name](fake).backward()
    assert (fake.grad < 0).all()


@pytest.mark.parametrize("name", [*DISCRIMINATOR_LOSSES, *GENERATOR_LOSSES])
def test_confident_logits_overflow_nothing(name):
    loss = {**DISCRIMINATOR_LOSSES, **GENERATOR_LOSSES}[name]
    values = [torch.full((2, 1, 2, 2), 1e4 * sign, requires_grad=True) for sign in (-1, 1)]
    value = loss(*values) if name in DISCRIMINATOR_LOSSES else loss(values[0])
    value.backward()
    assert value.isfinite() and values[0].grad.isfinite().all()


def test_lecam_pulls_each_side_towards_the_others_mean():
    real, fake = logits()
    lecam = Lecam(decay=0.9).double()
    lecam.mean_real.fill_(0.8)
    lecam.mean_fake.fill_(-0.3)
    expected = (np.maximum(0, real + 0.3) ** 2).mean() + (np.maximum(0, 0.8 - fake) ** 2).mean()
    assert lecam(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(expected, rel=1e-6)


def test_lecam_means_start_at_zero_and_move_by_one_minus_decay_without_a_graph():
    lecam = Lecam(decay=0.9)
    assert (lecam.mean_real.item(), lecam.mean_fake.item()) == (0.0, 0.0)
    lecam.update(torch.tensor(2.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True))
    assert not lecam.mean_real.requires_grad and not lecam.mean_fake.requires_grad
    assert (lecam.mean_real.item(), lecam.mean_fake.item()) == pytest.approx((0.2, -0.1))
    lecam.update(torch.tensor(4.0), torch.tensor(-3.0))
    assert (lecam.mean_real.item(), lecam.mean_fake.item()) == pytest.approx((0.58, -0.39))


def test_lecam_means_are_saved_and_never_learned():
    lecam = Lecam(decay=0.9)
    lecam.update(torch.tensor(2.0), torch.tensor(-1.0))
    assert not list(lecam.parameters())
    state = lecam.state_dict()
    assert {name: value.item() for name, value in state.items()} == pytest.approx({"mean_real": 0.2, "mean_fake": -0.1})
    resumed = Lecam(decay=0.9)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.mean_real, lecam.mean_real) and torch.equal(resumed.mean_fake, lecam.mean_fake)


def quantized_features(name="vq"):
    torch.manual_seed(0)
    quantizer = quantizer_of(name, 11, 4)
    z_bdhw = torch.randn(2, 4, 3, 3, requires_grad=True)
    return quantizer, z_bdhw, quantizer(z_bdhw)


@pytest.mark.parametrize(
    ("form", "features_share", "codes_share"),
    [
        ("paper", 0.25, 1.0),  # |sg[z] - C[i]|^2 + beta |z - sg[C[i]]|^2
        ("reference", 1.0, 0.25),  # |sg[C[i]] - z|^2 + beta |C[i] - sg[z]|^2
    ],
)
def test_beta_sits_on_the_term_that_the_form_says(form, features_share, codes_share):
    quantizer, z_bdhw, quantized = quantized_features()
    loss = quantizer_loss(quantized, QuantizerLoss(form=form, beta=0.25))
    loss.backward()
    difference_bdhw = (z_bdhw - quantizer.lookup(quantized.index_bhw)).detach()
    assert loss.item() == pytest.approx(1.25 * difference_bdhw.square().mean().item(), rel=1e-6)  # alike in value
    gradient_bdhw = 2 * difference_bdhw / difference_bdhw.numel()
    torch.testing.assert_close(z_bdhw.grad, features_share * gradient_bdhw)
    gradient_nd = gradient_bdhw.permute(0, 2, 3, 1).reshape(-1, 4)
    expected_kd = torch.zeros(11, 4).index_add_(0, quantized.index_bhw.flatten(), -codes_share * gradient_nd)
    torch.testing.assert_close(quantizer.embedding.weight.grad, expected_kd)


def test_published_form_and_weights_are_the_defaults():
    config = LossConfig()
    assert (config.quantizer.form, config.quantizer.beta, config.quantizer.weight) == ("reference", 0.25, 1.0)
    assert config.quantizer.double_quantization_weight == 1.0
    assert (config.reconstruction.weight, config.perceptual.weight) == (1.0, 1.0)
    assert (config.generator.kind, config.generator.weight, config.generator.adaptive) == ("non_saturating", 0.1, False)
    assert (config.discriminator.kind, config.discriminator.start_step) == ("hinge", 0)
    assert (config.lecam.weight, config.lecam.decay) == (0.05, 0.999)
    entropy = config.entropy
    assert (entropy.weight, entropy.temperature) == (0.05, 0.01)
    assert (entropy.sample_weight, entropy.average_weight) == (1.0, 1.0)


@pytest.mark.parametrize("form", ["paper", "reference"])
def test_double_quantization_is_added_by_its_own_weight(form):
    _, _, quantized = quantized_features("ibq")
    config = QuantizerLoss(form=form, beta=0.25, double_quantization_weight=3.0)
    expected = 1.25 * quantized.commitment.item() + 3.0 * quantized.double_quantization.item()
    assert quantizer_loss(quantized, config).item() == pytest.approx(expected, rel=1e-6)


def entropy_terms(z_nd, codebook_kd) -> Quantized:
    out = index_backprop(z_nd, codebook_kd, impl="dense", entropy_temperature=0.3)
    nothing = torch.zeros(())
    return Quantized(
        out.quantized_nd, out.index_n, None, nothing, nothing, out.sample_entropy, out.average_probability_k
    )


def test_entropy_penalty_over_micro_batches_equals_autograd_through_the_whole_batch():
    torch.manual_seed(0)
    config = EntropyLoss(temperature=0.3, sample_weight=0.7, average_weight=1.3)
    z_nd, codebook_kd = torch.randn(12, 6).double(), torch.randn(9, 6).double()

    z_whole, codebook_whole = z_nd.clone().requires_grad_(), codebook_kd.clone().requires_grad_()
    whole = index_backprop(z_whole, codebook_whole, impl="dense", entropy_temperature=0.3)
    expected = 0.7 * whole.sample_entropy - 1.3 * whole.average_entropy
    expected.backward()

    z_parts, codebook_parts = z_nd.clone().requires_grad_(), codebook_kd.clone().requires_grad_()
    parts = [entropy_terms(z, codebook_parts) for z in z_parts.chunk(3)]
    average_k = torch.stack([part.average_probability_k for part in parts]).mean(dim=0)
    penalties = [entropy_penalty(part, average_k, config) for part in parts]
    (sum(penalty.loss for penalty in penalties) / 3).backward()

    exact = {"rtol": 0, "atol": 1e-10}
    torch.testing.assert_close(sum(penalty.loss for penalty in penalties) / 3, expected, **exact)
    torch.testing.assert_close(z_parts.grad, z_whole.grad, **exact)
    torch.testing.assert_close(codebook_parts.grad, codebook_whole.grad, **exact)
    for penalty in penalties:
        torch.testing.assert_close(penalty.average_entropy, whole.average_entropy.detach(), **exact)
        assert not penalty.average_entropy.requires_grad


def test_entropy_penalty_takes_no_gradient_through_the_global_mean():
    torch.manual_seed(0)
    z_nd, codebook_kd = torch.randn(12, 6, requires_grad=True), torch.randn(9, 6)
    quantized = entropy_terms(z_nd, codebook_kd)
    gradients = [
        torch.autograd.grad(entropy_penalty(quantized, average_k, EntropyLoss()).loss, z_nd, retain_graph=True)[0]
        for average_k in (quantized.average_probability_k, quantized.average_probability_k.detach())
    ]
    assert torch.equal(*gradients)


def by_formula(layers: list[tuple[Tensor, Tensor]], codes_bdhw: Tensor, features_bdhw: Tensor) -> Tensor:
    """Mean of 1 - cos over tokens, in float64."""
    x = codes_bdhw.movedim(1, -1).flatten(0, 2)
    for number, (weight, bias) in enumerate(layers):
        x = x if number == 0 else x * torch.sigmoid(x)
        x = x @ weight.T + bias
    y = features_bdhw.movedim(1, -1).flatten(0, 2)
    return (1 - (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()).mean()


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("grid", [(3, 5), (6, 10), (2, 2)])
def test_the_semantic_term_equals_its_formula(depth, grid):
    """Value and gradients; the encoder's grid is that of the tokens, finer or coarser."""
    torch.manual_seed(0)
    head, codes_bdhw = SemanticHead(4, 7, 6, depth), torch.randn(2, 4, 3, 5, requires_grad=True)
    features_bdhw = torch.randn(2, 7, *grid)
    loss = cosine_distance(head(codes_bdhw), features_bdhw)
    gradients = torch.autograd.grad(loss, [codes_bdhw, *head.parameters()])

    doubled = [p.detach().double().requires_grad_() for p in head.parameters()]
    codes = codes_bdhw.detach().double().requires_grad_()
    targets = features_bdhw.double()
    if grid == (6, 10):  # the triangle of a bilinear kernel for half the size
        kernel = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
        for axis in (2, 3):
            size = targets.shape[axis]
            inside = targets.narrow(axis, 1, size - 2).unfold(axis, 4, 2) @ kernel
            first = targets.narrow(axis, 0, 3).movedim(axis, -1) @ (kernel[1:] / kernel[1:].sum())
            last = targets.narrow(axis, size - 3, 3).movedim(axis, -1) @ (kernel[:3] / kernel[:3].sum())
            targets = torch.cat([first.unsqueeze(axis), inside, last.unsqueeze(axis)], axis)
    elif grid == (2, 2):
        targets = F.interpolate(targets, (3, 5), mode="bilinear")
    expected = by_formula([*zip(doubled[::2], doubled[1::2], strict=True)], codes, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, true in zip(gradients, torch.autograd.grad(expected, [codes, *doubled]), strict=True):
        torch.testing.assert_close(gradient.double(), true, rtol=1e-5, atol=1e-7)


def test_the_semantic_term_is_between_0_and_2():
    x = torch.randn(2, 5, 3, 3)
    assert cosine_distance(3 * x, x).item() == pytest.approx(0, abs=1e-6)
    assert cosine_distance(-x, x).item() == pytest.approx(2)
