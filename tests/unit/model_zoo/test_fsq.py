import itertools
import math

import numpy as np
import pytest
import torch
from model_checks import features, quantizer_of, refused, tokenizer_of, tokens

from model_zoo.ops.codebook_parallel import CodebookShard

LEVELS = [[5, 5, 5], [8, 5], [2, 3, 4], [7], [17, 17]]


def fsq(levels, **changes):
    return quantizer_of("fsq", math.prod(levels), len(levels), levels=levels, **changes)


def of_paper(z_nd: torch.Tensor, levels, bound: str):
    """Bounded features, and integers after rounding, of float64 features: FSQ's appendix A.1, and iFSQ's line."""
    bounded = []
    for z_n, level in zip(z_nd.unbind(dim=1), levels, strict=True):
        even = level % 2 == 0
        if bound == "ifsq":
            bounded.append((level - 1) / 2 * (2 / (1 + torch.exp(-1.6 * z_n)) - 1) - (0.5 if even else 0.0))
        else:
            half = (level - 1) * (1 - 1e-3) / 2
            shift = math.tan(0.5 / half) if even else 0.0
            bounded.append(half * torch.tanh(z_n + shift) - (0.5 if even else 0.0))
    bounded_nd = torch.stack(bounded, dim=1)
    return bounded_nd, bounded_nd.detach().round()


@pytest.mark.parametrize("bound", ["tanh", "ifsq"])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_values_codes_losses_and_gradients_are_the_papers(levels, bound):
    quantizer = fsq(levels, bound=bound)
    z_bdhw = (2 * features(len(levels), b=4, h=8, w=8)).detach().requires_grad_()
    weight_bdhw = torch.randn(z_bdhw.shape, generator=torch.Generator().manual_seed(2))
    quantized = quantizer(z_bdhw, 0.01)
    ((quantized.quantized_bdhw * weight_bdhw).sum() + 3 * quantized.commitment).backward()

    z_nd = tokens(z_bdhw).double().requires_grad_()
    bounded_nd, rounded_nd = of_paper(z_nd, levels, bound)
    width_d = torch.tensor([level // 2 for level in levels], dtype=torch.float64)
    straight_nd = (bounded_nd + (rounded_nd - bounded_nd).detach()) / width_d
    commitment = ((bounded_nd - rounded_nd) / width_d).square().mean()
    ((straight_nd * tokens(weight_bdhw).double()).sum() + 3 * commitment).backward()

    digits_nd = (rounded_nd + width_d).long().numpy()
    code_n = np.ravel_multi_index(digits_nd.T, levels, order="F")  # the first dimension counts 1
    assert quantized.index_bhw.flatten().tolist() == code_n.tolist()
    assert quantizer.tokenize(z_bdhw).flatten().tolist() == code_n.tolist()
    torch.testing.assert_close(tokens(quantized.quantized_bdhw).double(), rounded_nd / width_d, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(tokens(quantizer.lookup(quantized.index_bhw)).double(), rounded_nd / width_d)
    torch.testing.assert_close(tokens(z_bdhw.grad).double(), z_nd.grad, rtol=1e-4, atol=1e-5)
    assert quantized.commitment.item() == pytest.approx(commitment.item(), rel=1e-4)
    assert quantized.codebook is None and quantized.double_quantization is None
    assert quantized.sample_entropy is None and quantized.average_probability_k is None


@pytest.mark.parametrize("bound", ["tanh", "ifsq"])
@pytest.mark.parametrize("level", [*range(2, 20), 999, 1000])
def test_any_number_of_levels_makes_as_many_values(level, bound):
    quantizer = fsq([level], bound=bound)
    z_1dhw = torch.linspace(-30, 30, 200_001).view(1, 1, 1, -1)
    index_n = quantizer.tokenize(z_1dhw).flatten()
    assert index_n.unique().tolist() == list(range(level))
    assert bool((index_n.diff() >= 0).all())
    assert bool((quantizer.vectors(index_n).abs() <= 1).all())


def test_all_codes_differ_and_are_found_again():
    quantizer = fsq([8, 5, 3])
    index_n = torch.arange(120)
    vector_nd = quantizer.vectors(index_n)
    grids = [np.arange(-(level // 2), (level + 1) // 2) / (level // 2) for level in (8, 5, 3)]
    assert {tuple(v) for v in vector_nd.double().numpy().round(6)} == {
        tuple(np.round(v, 6)) for v in itertools.product(*grids)
    }
    assert torch.equal(quantizer.nearest(vector_nd), index_n)


def test_ifsq_uses_the_levels_of_gaussian_features_more_equally():
    z_1dhw = torch.randn(1, 1, 100, 1000, generator=torch.Generator().manual_seed(3))
    for level in (16, 17):
        inner = {}
        for bound in ("tanh", "ifsq"):
            count_k = fsq([level], bound=bound).tokenize(z_1dhw).flatten().bincount(minlength=level).double()
            inner[bound] = count_k[1:-1] / count_k[1:-1].mean()  # the outermost levels take half an interval
        assert inner["ifsq"].std() < 0.06 < 0.15 < inner["tanh"].std()


def test_the_fingerprint_tells_levels_and_bounds_apart():
    def of(**changes):
        return tokenizer_of(quantizer="fsq", codebook_size=40, code_dim=2, **changes).fingerprint()

    found = [of(levels=[8, 5]), of(levels=[5, 8]), of(levels=[8, 5], bound="ifsq")]
    assert len(set(found)) == 3 and found[0] == of(levels=[8, 5])


def test_what_makes_no_grid_is_refused():
    assert "model.levels=[8,8,8,5,5,5]" in refused(quantizer_of, "fsq", 64000, 6)
    for codes, dim in ((100, 2), (40, 3)):
        said = refused(quantizer_of, "fsq", codes, dim, levels=[8, 5])
        assert "give model.codebook_size=40 model.code_dim=2" in said
    assert "codebook_parallel=1" in refused(fsq, [8, 5], shard=CodebookShard(0, 20, None))
    assert "model.normalize=false" in refused(fsq, [8, 5], normalize=True)
    assert "at most 2^24" in refused(fsq, [1000] * 3)
    for levels, problem in (([1, 8], "at least 2"), ([8, 1001], "at most 1000")):
        assert problem in refused(tokenizer_of, quantizer="fsq", codebook_size=8, code_dim=2, levels=levels)
    assert "tanh, ifsq" in refused(tokenizer_of, quantizer="fsq", codebook_size=8, code_dim=1, levels=[8], bound="erf")
