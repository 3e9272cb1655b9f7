"""Sampling. What is marked `gpu` has never run on a GPU yet: none was at hand when it was written."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from model_checks import random_transformer, refused

from model_zoo import Sampler, Sampling, TransformerConfig
from model_zoo.conditions import describe_classes, trained_from
from model_zoo.sampler import draw, guidance_scale_t, keep_products_in

# More positions than a bucket of static steps, so that there are two.
TINY = TransformerConfig(vocabulary=40, classes=5, grid=[9, 8], depth=2, heads=2, head_dim=8, dropout=0.0)
tiny = partial(random_transformer, TINY)
SEVERAL = replace(TINY, grids=["9x8", "5x7", "7x10"])  # for each of its grids, another number of codes
ALL = Sampling(temperature=0.9, guidance=3.0, guidance_schedule="cosine", top_k=30, top_p=0.9)


def sampled(sampler, images, settings=ALL, grid=None):
    """Codes of images, each a class and a seed."""
    classes, seeds = zip(*images, strict=True)
    return sampler.sample(torch.tensor(classes), list(seeds), settings, grid=grid)


IMAGES = [(n % 5, 100 + n) for n in range(8)]


@pytest.mark.parametrize("settings", [Sampling(), ALL])
def test_an_image_does_not_depend_on_the_others(settings):
    transformer = tiny()
    eight = sampled(Sampler(transformer, 8), IMAGES, settings)
    assert eight.shape == (8, 9, 8) and eight.dtype == torch.int64
    assert len(eight.unique()) > 10
    for number in (0, 3, 7):
        assert torch.equal(sampled(Sampler(transformer, 1), [IMAGES[number]], settings)[0], eight[number])
    assert torch.equal(sampled(Sampler(transformer, 8), IMAGES[::-1], settings).flip(0), eight)
    few = Sampler(transformer, 8)
    assert torch.equal(sampled(few, IMAGES[:3], settings), eight[:3])
    assert torch.equal(sampled(few, IMAGES[3:], settings), eight[3:])  # nothing stays behind from the batch before


def test_seed_and_class_make_the_image():
    codes = sampled(Sampler(tiny(), 5), [(0, 1), (0, 2), (1, 1), (0, 1), (0, 1 + 2**32)])
    assert torch.equal(codes[0], codes[3])
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
    assert not torch.equal(codes[0], codes[4])  # all bits of a seed count


@pytest.mark.parametrize(
    ("trained", "label", "guidance", "said"),
    [
        ("0-4", 2, 3.0, "guidance 3 needs a generator that was also trained without a class"),
        ("0-4", 2, 0.0, "guidance 0 needs"),
        ("0-4", 5, 1.0, "never trained without a class: choose --classes among 0-4"),
        ("0,2-4,none", 1, 1.0, "never trained with class 1: choose --classes among 0,2-4,none"),
        ("none", 0, 1.0, "never trained with class 0: choose --classes among none"),
        ("0-4", 2, 1.0, None),
        ("2,none", 2, 3.0, None),
        ("none", 5, 3.0, None),
        (None, 2, 3.0, None),
    ],
)
def test_classes_and_guidance_that_were_never_trained_are_refused(trained, label, guidance, said):
    """Their rows of the class table give codes like any other row."""
    sampler = Sampler(tiny(), 1)
    sampler.transformer.trained_c = None if trained is None else trained_from(trained, TINY.classes)
    arguments = torch.tensor([label]), [0], Sampling(guidance=guidance)
    if said:
        assert said in refused(sampler.sample, *arguments)
    else:
        sampler.sample(*arguments)


def test_text_of_classes():
    for text in ("", "none", "0", "0-4,none", "0-1,3", "1,3,none"):
        assert describe_classes(trained_from(text, 5)) == text
    with pytest.raises(ValueError, match="'5' is not a class from 0 to 4"):
        trained_from("5", 5)


def test_settings_may_change_between_batches():
    sampler, transformer = Sampler(tiny(), 8), tiny()
    for settings in (Sampling(), ALL, Sampling()):
        assert torch.equal(sampled(sampler, IMAGES, settings), sampled(Sampler(transformer, 8), IMAGES, settings))


def test_an_image_of_a_grid_does_not_depend_on_the_others():
    """Nor on the images of other grids that were sampled before."""
    transformer = random_transformer(SEVERAL)
    sampler, images = Sampler(transformer, 4), IMAGES[:4]
    for grid in ((5, 7), None, (5, 7)):
        four = sampled(sampler, images, grid=grid)
        assert four.shape == (4, *(grid or (9, 8)))
        assert torch.equal(four, sampled(Sampler(transformer, 4), images, grid=grid))
    assert torch.equal(sampled(Sampler(transformer, 1), images[2:3], grid=(5, 7))[0], four[2])


@pytest.mark.parametrize("grid", [None, (5, 7)])
def test_codes_are_drawn_with_the_probabilities_of_the_forward(grid):
    """By hand: for each position the whole forward, guidance, softmax, and the inverse of its distribution function."""
    settings = Sampling(temperature=0.7, guidance=2.5, guidance_schedule="linear")
    transformer, tokens = (tiny(), 72) if grid is None else (random_transformer(SEVERAL), math.prod(grid))
    codes_bt = sampled(Sampler(transformer, 8), IMAGES, settings, grid).flatten(1)
    class_b = torch.tensor([label for label, _ in IMAGES])
    with torch.no_grad():
        conditional_btv = transformer(codes_bt[:, :-1], class_b, grid)
        unconditional_btv = transformer(codes_bt[:, :-1], torch.full_like(class_b, TINY.classes), grid)
    for position in range(tokens):
        strength = 1 + 1.5 * position / (tokens - 1)
        conditional_bv, unconditional_bv = conditional_btv[:, position], unconditional_btv[:, position]
        logits_bv = unconditional_bv + strength * (conditional_bv - unconditional_bv)
        summed_bv = (logits_bv.double() / 0.7).softmax(dim=1).cumsum(dim=1)
        for image, (_, seed) in enumerate(IMAGES):
            uniform = np.random.Generator(np.random.Philox(seed)).random(tokens)[position]
            code = codes_bt[image, position]
            assert (summed_bv[image, code - 1] if code else 0) - 1e-5 <= uniform <= summed_bv[image, code] + 1e-5


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 3.0), ("linear", 2.0), ("cosine", 2.0)])
def test_guidance_schedules(schedule, middle):
    guidance_t = guidance_scale_t(Sampling(guidance=3.0, guidance_schedule=schedule), 5)
    assert guidance_t.shape == (5,)
    assert guidance_t[0] == (3.0 if schedule == "constant" else 1.0)
    assert guidance_t[2].item() == pytest.approx(middle) and guidance_t[4].item() == pytest.approx(3.0)
    quarter = {"constant": 3.0, "linear": 1.5, "cosine": 1 + 2 * (1 - math.cos(math.pi / 4)) / 2}[schedule]
    assert guidance_t[1].item() == pytest.approx(quarter)


def test_guidance_0_is_the_image_of_no_class():
    sampler = Sampler(tiny(), 2)
    codes = sampled(sampler, [(0, 7), (3, 7)], Sampling(guidance=0.0))
    none = sampled(sampler, [(TINY.classes, 7), (TINY.classes, 7)], Sampling())
    assert torch.equal(codes, none) and torch.equal(codes[0], codes[1])


# -------------------------------------------------------------------------------------------------------------- drawing

PROBABILITIES = torch.tensor([0.05, 0.4, 0.0, 0.1, 0.25, 0.2], dtype=torch.float64)


def drawn(count=20_000, **settings):
    """How often each code was drawn."""
    uniform_b = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codes_b = draw(PROBABILITIES.log().expand(count, -1), uniform_b, Sampling(**settings))
    return torch.bincount(codes_b, minlength=6)


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities / probabilities.sum()
    there = expected > 0
    assert counts[~there].sum() == 0
    return ((counts - expected)[there].square() / expected[there]).sum().item()


# 99.9% of draws by the right distribution of 5 codes (4 degrees of freedom) give less than this.
CHI_SQUARE = 18.47


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_drawn_codes_are_distributed_as_the_softmax(temperature):
    assert chi_square(drawn(temperature=temperature), PROBABILITIES ** (1 / temperature)) < CHI_SQUARE


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 4, 5]),
        ({"top_k": 600}, [0, 1, 3, 4, 5]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 4]),
        ({"top_p": 0.66}, [1, 4, 5]),
        ({"top_p": 0.96}, [0, 1, 3, 4, 5]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # 0.4 / 0.65 of the two
        ({"top_k": 2, "top_p": 0.63}, [1, 4]),
    ],
)
def test_top_k_and_top_p_keep_exactly(settings, kept):
    probabilities = torch.zeros(6, dtype=torch.float64)
    probabilities[kept] = PROBABILITIES[kept]
    assert chi_square(drawn(**settings), probabilities) < CHI_SQUARE
    assert drawn(**settings).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("settings", [Sampling(), Sampling(top_k=5), Sampling(top_p=0.99)])
def test_codes_of_probability_0_are_never_drawn(settings):
    logits_v = torch.full((1000,), -math.inf)
    logits_v[torch.arange(7, 1000, 50)] = torch.randn(20, generator=torch.Generator().manual_seed(0))
    edges_b = torch.tensor([0.0, 5e-324, 1e-17, 0.5, 1 - 2**-53], dtype=torch.float64)
    codes_b = draw(logits_v.expand(5, -1), edges_b, settings)
    assert (logits_v[codes_b] > -math.inf).all()


# ---------------------------------------------------------------------------------------------- static steps, precision


@pytest.mark.parametrize("settings", [Sampling(), ALL])
def test_static_steps_draw_the_same_codes(settings):
    transformer = tiny()
    static = Sampler(transformer, 8)
    assert not static.static
    static.static = True
    expected = sampled(Sampler(transformer, 8), IMAGES, settings)
    for _ in range(2):
        assert torch.equal(sampled(static, IMAGES, settings), expected)


def test_static_steps_draw_the_same_codes_of_each_grid():
    transformer = random_transformer(SEVERAL)
    static = Sampler(transformer, 8)
    static.static = True
    for grid in ((5, 7), (7, 10)):
        assert torch.equal(sampled(static, IMAGES, grid=grid), sampled(Sampler(transformer, 8), IMAGES, grid=grid))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=[pytest.mark.full, pytest.mark.process])])
def test_compiled_steps_draw_the_same_codes(monkeypatch, backend):
    """``eager`` traces the step without generating code: it shows that the step is one graph."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    transformer = random_transformer(SEVERAL)
    compiled, plain = Sampler(transformer, 8, compile=True), Sampler(transformer, 8)
    assert torch.equal(sampled(compiled, IMAGES, grid=(7, 10)), sampled(plain, IMAGES, grid=(7, 10)))


def test_bf16_products_draw_what_autocast_would():
    transformer = tiny()
    expected = sampled(Sampler(transformer, 8, torch.bfloat16), IMAGES)
    assert not torch.equal(expected, sampled(Sampler(transformer, 8), IMAGES))
    keep_products_in(transformer, torch.bfloat16)
    assert transformer.head.weight.dtype == transformer.blocks[0].attention.wqkv.weight.dtype == torch.bfloat16
    assert transformer.tok_emb.weight.dtype == transformer.blocks[0].ffn_norm.weight.dtype == torch.float32
    assert torch.equal(sampled(Sampler(transformer, 8, torch.bfloat16), IMAGES), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [Sampling(), ALL])
def test_captured_steps_draw_the_same_codes(settings):
    transformer = tiny().cuda()
    expected = sampled(Sampler(transformer, 8, graphs=False), IMAGES, settings)
    sampler = Sampler(transformer, 8)
    for _ in range(2):
        assert torch.equal(sampled(sampler, IMAGES, settings), expected)
    assert list(sampler.graphs) == [64, 72]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0 must be above 0"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"guidance": -1.0}, "guidance -1.0 must be at least 0"),
        ({"guidance": math.nan}, "guidance nan"),
        (
            {"guidance_schedule": "square"},
            "guidance_schedule square is unknown: choose one of constant, linear, cosine",
        ),
        ({"top_k": -1}, "top_k -1 must be at least 0"),
        ({"top_p": 0.0}, "top_p 0.0 must be above 0"),
        ({"top_p": 1.1}, "top_p 1.1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    assert message in refused(Sampling, **settings)


def test_batches_that_cannot_be_are_refused():
    sampler = Sampler(tiny(), 2)
    assert "3 classes and 3 seeds: give equally many, at most 2" in refused(sampled, sampler, IMAGES[:3])
    assert "classes must lie in [0, 5]" in refused(sampled, sampler, [(6, 1)])
    assert "batch size 0" in refused(Sampler, tiny(), 0)
    assert "8x9 is a grid unknown to the generator: it knows 9x8" in refused(sampled, sampler, [(1, 1)], grid=(8, 9))
    assert "call eval()" in refused(sampled, Sampler(tiny().train(), 2), IMAGES[:2])


def test_settings_that_found_no_room_are_tried_again(monkeypatch):
    sampler = Sampler(tiny(), 2)
    with monkeypatch.context() as patch:
        patch.setattr(sampler.transformer, "new_caches", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            sampled(sampler, IMAGES[:2])
    assert torch.equal(sampled(sampler, IMAGES[:2]), sampled(Sampler(tiny(), 2), IMAGES[:2]))


def test_logits_that_are_not_finite_are_told():
    transformer = tiny()
    transformer.head.weight.data[3] = math.nan
    assert "logits are not finite" in refused(sampled, Sampler(transformer, 2), IMAGES[:2])
