import math

import numpy as np
import pytest
import skimage.metrics
import torch
from scipy.cluster.vq import kmeans2
from support import photograph, psnr_and_ssim_by_hand

from trainer.evaluation.baselines import ColorBaselines, fit_palette
from trainer.metrics import image as metrics
from trainer.metrics.codebook import USAGE_WINDOW_TOKENS, CodebookUsage, window_usage


def photographs(side=64):
    """Four uint8 crops (4, 3, side, side) of real photographs."""
    return torch.stack([photograph(number, side, side) for number in range(4)])


def as_float(levels):
    return (levels.double() / 127.5 - 1).float()


def noisy(images, amount, seed=0):
    return images + amount * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("amount", [0.02, 0.3, 2.0])
def test_psnr_and_ssim_equal_scikit_image(amount):
    x = as_float(photographs())
    y = noisy(x, amount)
    found = torch.stack([metrics.psnr(x, y), metrics.ssim(x, y)], dim=1)
    for i in range(len(x)):
        assert found[i].tolist() == pytest.approx(psnr_and_ssim_by_hand(x[i], y[i]), abs=1e-6)


def test_ssim_of_the_smallest_image_is_one_window_and_smaller_ones_are_refused():
    x = as_float(photographs(7))
    _, want = psnr_and_ssim_by_hand(x[0], -x[0], win_size=7)
    assert float(metrics.ssim(x, -x)[0]) == pytest.approx(want, abs=1e-6)
    with pytest.raises(ValueError, match="at least 7x7 pixels, not 9x6"):
        metrics.ssim(torch.zeros(1, 3, 6, 9), torch.zeros(1, 3, 6, 9))


def test_levels_are_clamped_and_truncated():
    assert metrics.to_levels(torch.tensor([-7.0, -1.0, 0.0, 0.999, 1.0, 9.0])).tolist() == [0, 0, 127, 254, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8)
    lowered = levels.int() - metrics.to_levels(as_float(levels)).int()
    assert set(lowered.tolist()) == {0, 1}
    assert lowered.nonzero().max() <= 95 and lowered.nonzero().min() >= 1


def test_identical_images_are_counted_and_left_out_of_the_mean():
    x = as_float(photographs())
    y = noisy(x, 0.1)
    y[1] = x[1]
    psnr = metrics.psnr(x, y)
    assert psnr[1] == math.inf
    mean = metrics.finite_mean(psnr.tolist())
    assert mean.infinite_count == 1
    assert mean.mean == pytest.approx(float(psnr[[0, 2, 3]].mean()))
    assert metrics.finite_mean([math.inf, math.inf]) == (math.inf, 2)


def test_l1_is_on_minus_one_to_one_and_clamps():
    black, beyond_white = torch.full((1, 3, 8, 8), -1.0), torch.full((1, 3, 8, 8), 3.0)
    assert metrics.l1(black, beyond_white).tolist() == [2.0]
    assert metrics.l1(black, black / 2).tolist() == [0.5]


@pytest.mark.parametrize("height, width, multiple, want", [(37, 53, 8, (1, 2, 1, 2)), (16, 8, 8, (0, 0, 0, 0))])
def test_padding_puts_the_smaller_half_at_left_and_top(height, width, multiple, want):
    assert metrics.padding(height, width, multiple) == want


def test_usage_and_perplexity():
    usage = CodebookUsage(8)
    assert (usage.usage(), usage.perplexity(), usage.token_count()) == (0, 0, 0)
    usage.update(torch.tensor([[[0, 1], [2, 3]]]))
    usage.update(torch.tensor([0, 1, 2, 3], dtype=torch.int32))
    assert usage.usage() == 0.5
    assert usage.perplexity() == pytest.approx(4)
    assert usage.token_count() == 8
    usage.update(torch.tensor([7] * 8))
    assert usage.usage() == 5 / 8
    assert usage.perplexity() == pytest.approx(math.exp(0.5 * math.log(2) + 4 * 0.125 * math.log(8)))
    usage.reset()
    assert usage.usage() == 0


def test_a_code_beyond_the_codebook_is_an_error():
    with pytest.raises(RuntimeError, match="out of bounds"):
        CodebookUsage(8).update(torch.tensor([8]))


def count_on_a_rank() -> None:
    rank = torch.distributed.get_rank()
    usage = CodebookUsage(4)
    usage.update(torch.tensor([0, 0, 1] if rank == 0 else [0, 3]))
    for _ in range(2):  # merging twice must not count twice
        assert usage.merged().counts_k.tolist() == [3, 1, 0, 1]
    assert usage.merged().usage() == 0.75
    assert usage.token_count() == (3 if rank == 0 else 2)


def test_counts_of_two_ranks_merge(ranks):
    ranks.call(2, count_on_a_rank)


def test_palette_with_room_for_every_colour_is_exact():
    baselines = ColorBaselines(patch_size=1, color_count=4096, image_count=4)
    levels = photographs(16)
    baselines.update(levels, range(4))
    palette = baselines.fit(baselines.fitted())
    assert len(palette) == len(levels.permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0))
    assert baselines.palette_psnr(palette) == [math.inf] * 4
    assert torch.equal(baselines.draw_palette(levels[2], palette), levels[2])


@pytest.mark.parametrize("height, width, colors", [(64, 64, 20), (37, 61, 20), (37, 61, 2**32)])
def test_baseline_psnr_is_that_of_the_drawn_pictures(height, width, colors):
    levels = photographs()[:, :, :height, :width]
    baselines = ColorBaselines(patch_size=8, color_count=colors, image_count=4)
    baselines.update(levels, range(4))
    palette = baselines.fit(baselines.fitted())
    mean_psnr, palette_psnr = baselines.mean_color_psnr(), baselines.palette_psnr(palette)
    for i, picture in enumerate(levels):
        for drawn, psnr in [
            (picture.double().mean((1, 2), keepdim=True).round().byte().expand_as(picture), mean_psnr[i]),
            (baselines.draw_palette(picture, palette), palette_psnr[i]),
        ]:
            assert drawn.shape == picture.shape and drawn.dtype == torch.uint8
            want = skimage.metrics.peak_signal_noise_ratio(picture.numpy(), drawn.numpy())
            assert psnr == pytest.approx(want, abs=1e-6)
    assert all(p > m + 2 for p, m in zip(palette_psnr, mean_psnr, strict=True))


def test_palette_is_seeded_and_as_good_as_scipy():
    random = np.random.default_rng(3)
    color = random.normal(128, 30, (4000, 3)).clip(0, 255)
    weight = np.ones(len(color))
    palette = fit_palette(color, weight, 64, seed=1)
    assert palette.shape == (64, 3)
    assert np.array_equal(palette, fit_palette(color, weight, 64, seed=1))
    assert not np.array_equal(palette, fit_palette(color, weight, 64, seed=2))

    def cost(palette_k3):
        return ((color[:, None] - palette_k3[None]) ** 2).sum(-1).min(1).mean()

    scipy_palette, _ = kmeans2(color, 64, minit="++", iter=50, seed=1)
    assert cost(palette.astype(float)) < 1.05 * cost(scipy_palette)


def test_a_large_set_is_fitted_by_a_part_of_each_image_whoever_has_it(monkeypatch):
    monkeypatch.setattr("trainer.evaluation.baselines.LEAST_FITTED", 100)
    levels = photographs(64)

    def baselines(*positions, image_count=4):
        part = ColorBaselines(patch_size=2, color_count=16, image_count=image_count)
        for position in positions:
            part.update(levels[position : position + 1], [position])
        return part

    whole, first, second = baselines(0, 1, 2, 3), baselines(1, 2), baselines(0, 3)
    assert [len(patches.sum_n3) for patches in whole.fitted()] == [256] * 4  # of 1,024: 64 a colour, over 4 images
    palette = whole.fit(whole.fitted())
    assert np.array_equal(palette, whole.fit(first.fitted() + second.fitted()))
    apart = dict(zip((1, 2, 0, 3), first.palette_psnr(palette) + second.palette_psnr(palette), strict=True))
    assert whole.palette_psnr(palette) == [apart[position] for position in range(4)]
    everything = baselines(0, 1, 2, 3, image_count=1)  # all patches of each

    def error(palette_k3):
        return np.mean([10 ** (-psnr / 10) for psnr in whole.palette_psnr(palette_k3)])

    assert error(palette) < 1.1 * error(everything.fit(everything.fitted()))


@pytest.mark.parametrize("count", [0, 99, 100, 350])
def test_window_usage_counts_whole_windows_only(count):
    index = np.random.default_rng(count).integers(0, 60, count)
    shares, start = [], 0
    while start + 100 <= count:
        shares.append(len(set(index[start : start + 100].tolist())) / 60)
        start += 100
    usage = window_usage(index, 60, window_tokens=100)
    assert usage is None if count < 100 else usage == pytest.approx(np.mean(shares))
    assert USAGE_WINDOW_TOKENS == 65536
