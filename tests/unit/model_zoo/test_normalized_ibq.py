"""IBQ with normalized features and codes, and with a learned scale of the logits, against an independent float64
computation."""

import math

import pytest
import torch
from index_backprop_runs import error
from model_checks import features, quantizer_of, refused, tokenizer_of, tokens
from torch import Tensor

from model_zoo.ops.types import average_entropy
from model_zoo.quantizers.base import Quantizer

CODES, DIM, TEMPERATURE = 37, 8, 0.5
SCALES = [1.0, 10.0]
IMPLS = ["dense", "chunked", pytest.param("triton", marks=pytest.mark.filterwarnings("ignore::RuntimeWarning"))]
# Largest error over the largest true value of fp32, some units of rounding, as in tests/numerics; the logits, which
# reach the scale, are rounded before they are divided by the temperature.
TOLERANCE = 4e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(scale: float, impl: str = "dense", learned: bool = False) -> Quantizer:
    torch.manual_seed(0)
    settings = dict(normalize=True, logit_scale=scale, learn_logit_scale=learned)
    quantizer = quantizer_of("ibq", CODES, DIM, **settings).to(DEVICE)
    quantizer.impl = impl
    return quantizer


def unit(x_nd: Tensor) -> Tensor:
    return x_nd / x_nd.square().sum(dim=1, keepdim=True).sqrt()


def weights(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(scale: float) -> dict[str, Tensor]:
    """Values of all outputs and the gradients of one loss that uses all of them, by hand where autograd of the soft
    assignment is not the published gradient. The scale's is that of its logarithm."""
    log_scale = torch.tensor(math.log(scale), dtype=torch.float64, requires_grad=True)
    z_nd = tokens(features(DIM)).double().requires_grad_()
    weight_kd = make(scale).embedding.weight.detach().cpu().double().requires_grad_()
    z_unit_nd, codes_kd = unit(z_nd), unit(weight_kd)
    logits_nk = log_scale.exp() * (z_unit_nd @ codes_kd.T)  # cosines times the scale
    soft_nk = logits_nk.softmax(dim=1)
    hard_nk = torch.nn.functional.one_hot(logits_nk.argmax(dim=1), CODES).double()
    # Eq. 5-8: the code vectors of the index, with the soft assignment's gradient.
    index_nk = hard_nk + soft_nk - soft_nk.detach()
    quantized_nd = index_nk @ codes_kd
    assignment_nk = (logits_nk / TEMPERATURE).softmax(dim=1)
    average_k = assignment_nk.mean(dim=0)
    found = {
        "quantized": quantized_nd,
        "double_quantization": (quantized_nd - z_unit_nd).square().mean(),
        "commitment": (z_unit_nd - (hard_nk @ codes_kd).detach()).square().mean(),
        "codebook": (z_unit_nd.detach() - hard_nk @ codes_kd).square().mean(),
        "sample_entropy": -(assignment_nk * assignment_nk.log()).sum(dim=1).mean(),
        "average_probability": average_k,
        "average_entropy": -(average_k * (average_k + 1e-5).log()).sum(),
    }
    loss(found).backward()
    gradients = {"z.grad": z_nd.grad, "weight.grad": weight_kd.grad, "log_scale.grad": log_scale.grad}
    return {"index": hard_nk.argmax(dim=1), **found, **gradients}


def loss(found: dict[str, Tensor]) -> Tensor:
    terms = {name: 1.0 + number for number, name in enumerate(sorted(found)) if found[name].ndim == 0}
    quantized_nd, average_k = found["quantized"], found["average_probability"]
    return (
        sum(weight * found[name] for name, weight in terms.items())
        + (quantized_nd * weights(2, *quantized_nd.shape).to(quantized_nd)).sum()
        + (average_k * weights(3, CODES).to(average_k)).sum()
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("learned", [False, True])
def test_values_and_gradients(learned, scale, impl):
    if impl == "triton":
        pytest.importorskip("triton")
    quantizer, z_bdhw = make(scale, impl, learned), features(DIM).detach().to(DEVICE).requires_grad_()
    out = quantizer(z_bdhw, TEMPERATURE)
    found = {
        "quantized": out.quantized_bdhw.movedim(1, 3).flatten(0, 2),
        "double_quantization": out.double_quantization,
        "commitment": out.commitment,
        "codebook": out.codebook,
        "sample_entropy": out.sample_entropy,
        "average_probability": out.average_probability_k,
        "average_entropy": average_entropy(out.average_probability_k),
    }
    loss(found).backward()
    found |= {"z.grad": tokens(z_bdhw.grad), "weight.grad": quantizer.embedding.weight.grad}
    true = expected(scale)
    if learned:
        found["log_scale.grad"] = quantizer.log_logit_scale.grad
    else:
        del true["log_scale.grad"]
    assert len(true["index"].unique()) > 5
    assert torch.equal(out.index_bhw.flatten().cpu(), true.pop("index"))
    assert found.keys() == true.keys()
    for name, value in true.items():
        assert error(found[name].detach().cpu().double(), value.detach()) < TOLERANCE * max(1, scale / TEMPERATURE), (
            name
        )
    assert torch.equal(quantizer.tokenize(z_bdhw), out.index_bhw)
    torch.testing.assert_close(quantizer.lookup(out.index_bhw), out.quantized_bdhw, rtol=1e-6, atol=1e-6)


def test_the_scale_matters_to_gradients_and_entropies_but_not_to_codes():
    low, high = (expected(scale) for scale in SCALES)
    assert torch.equal(low["index"], high["index"]) and torch.equal(low["commitment"], high["commitment"])
    assert high["sample_entropy"] < low["sample_entropy"] / 1.5
    assert error(high["z.grad"], low["z.grad"]) > 0.1


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("scale", SCALES)
def test_gradcheck(scale, impl):
    """Of what has a true gradient: not of the chosen codes' straight-through path."""
    quantizer = make(scale, impl, learned=True).cpu().double()
    z_nd, weight_kd = weights(4, 3, DIM).requires_grad_(), weights(5, 7, DIM).requires_grad_()
    log_scale = torch.tensor(math.log(scale), dtype=torch.float64, requires_grad=True)
    del quantizer.embedding.weight, quantizer.log_logit_scale  # so that tensors can take their places

    def outputs(z_nd: Tensor, weight_kd: Tensor, log_scale: Tensor):
        quantizer.embedding.weight, quantizer.log_logit_scale = weight_kd, log_scale
        out = quantizer.assign(quantizer.prepare(z_nd), TEMPERATURE)
        return out.code_nd, out.sample_entropy, out.average_probability_k, out.average_entropy

    assert torch.autograd.gradcheck(outputs, (z_nd, weight_kd, log_scale))


def test_a_learned_scale_changes_neither_codes_nor_the_fingerprint():
    tokenizer = tokenizer_of(normalize=True, logit_scale=10.0, learn_logit_scale=True)
    images_bchw = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    index_bhw, before = tokenizer.tokenize(images_bchw), tokenizer.fingerprint()
    assert before == tokenizer_of(normalize=True).fingerprint() != tokenizer_of().fingerprint()
    with torch.no_grad():
        tokenizer.quantize.log_logit_scale += 1
    assert tokenizer.quantize.scalars() == {"logit_scale": pytest.approx(10 * math.e)}
    assert torch.equal(tokenizer.tokenize(images_bchw), index_bhw) and tokenizer.fingerprint() == before
    with torch.no_grad():
        tokenizer.quantize.embedding.weight[3, 0] += 1
    assert tokenizer.fingerprint() != before


@pytest.mark.parametrize(("scale", "after"), [(99.0, 99.0), (101.0, 100.0)])
def test_a_learned_scale_is_clamped_after_each_step(scale, after):
    quantizer = make(99.0, learned=True)
    quantizer.log_logit_scale.data.fill_(math.log(scale))
    quantizer.after_step()
    assert quantizer.logit_scale.item() == pytest.approx(after)


def test_a_fixed_scale_is_no_parameter_and_may_be_larger():
    quantizer = make(200.0)
    quantizer.after_step()
    assert (
        quantizer.logit_scale == 200
        and quantizer.scalars() == {}
        and list(quantizer.state_dict()) == ["embedding.weight"]
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "model.learn_logit_scale=true needs model.normalize=true"),
        (
            {"normalize": True, "logit_scale": 101.0},
            "model.logit_scale=101.0 with model.learn_logit_scale=true must be",
        ),
    ],
)
def test_a_scale_that_cannot_be_learned_is_refused(changes, said):
    assert said in refused(quantizer_of, "ibq", CODES, DIM, learn_logit_scale=True, **changes)
