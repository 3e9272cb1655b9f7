"""PSNR, SSIM and L1 per image, by the protocol of the published tokenizer tables ("paper").

The protocol: reconstructions are clamped to [-1, 1]; both images are scaled to [0, 1] and truncated to uint8; PSNR and
SSIM have a data range of 1; SSIM uses a uniform 7x7 window and the sample covariance, without a border of 3 pixels.
Every function returns one value per image, so that means are taken over images and never over means of batches.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

SSIM_WINDOW = 7


def to_levels(images_bchw: Tensor) -> Tensor:
    """The uint8 levels of float images in [-1, 1]: clamped, then truncated, as in the published results.

    Because of float32 rounding, truncation lowers some of the levels 1 to 95 by one. This is kept, since it affects
    both images alike and the published tables include it.
    """
    return ((images_bchw.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)


def psnr(x_bchw: Tensor, y_bchw: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of float images in [-1, 1]; (b,) float64, infinite if both are identical."""
    error_bchw = to_levels(x_bchw).int() - to_levels(y_bchw).int()
    return -10 * torch.log10(error_bchw.square().sum(dim=(1, 2, 3)).double() / (error_bchw[0].numel() * 255**2))


def ssim(x_bchw: Tensor, y_bchw: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of float images in [-1, 1], mean over channels; (b,) float64.

    Raises ValueError for images smaller than the window of 7x7 pixels.
    """
    if min(x_bchw.shape[-2:]) < SSIM_WINDOW:
        height, width = x_bchw.shape[-2:]
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, not {width}x{height}")
    # One image at a time fits into a CPU's cache, which is three times as fast.
    pairs = zip(to_levels(x_bchw).float(), to_levels(y_bchw).float(), strict=True)
    return torch.stack([_ssim_of_levels(x_chw, y_chw) for x_chw, y_chw in pairs])


def _ssim_of_levels(x_chw: Tensor, y_chw: Tensor) -> Tensor:
    count = SSIM_WINDOW**2
    mean_x, mean_y = _window_sum(x_chw) / count, _window_sum(y_chw) / count
    means, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    covariance = (_window_sum(x_chw * y_chw) / count - means) * (count / (count - 1))
    variances = (_window_sum(x_chw.square() + y_chw.square()) / count - squares) * (count / (count - 1))  # of both
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * means + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))).mean()


def _window_sum(values_chw: Tensor) -> Tensor:
    """Sums over 7x7 windows without padding, which drops a border of 3 pixels. float64, because variances are
    differences of nearly equal numbers; the float32 sums of products of levels are exact: 2 x 49 x 255^2 < 2^24."""
    for dim in (-2, -1):  # adding shifted images is much faster than pooling on a CPU
        length = values_chw.shape[dim] - SSIM_WINDOW + 1
        values_chw = sum(values_chw.narrow(dim, shift, length) for shift in range(SSIM_WINDOW))
    return values_chw.double()


def l1(x_bchw: Tensor, y_bchw: Tensor) -> Tensor:
    """Mean absolute difference of float images in [-1, 1], clamped but not rounded; (b,), between 0 and 2."""
    return (x_bchw.float().clamp(-1, 1) - y_bchw.float().clamp(-1, 1)).abs().mean(dim=(1, 2, 3))


class FiniteMean(NamedTuple):
    mean: float
    infinite_count: int


def finite_mean(values: Iterable[float]) -> FiniteMean:
    """The mean of the finite values and the number of infinite ones; the mean is infinite if all values are."""
    values = list(values)
    finite = [value for value in values if not math.isinf(value)]
    return FiniteMean(math.fsum(finite) / len(finite) if finite else math.inf, len(values) - len(finite))


class Padding(NamedTuple):
    """Pixels added on each side, in the order of `torch.nn.functional.pad`."""

    left: int
    right: int
    top: int
    bottom: int


def padding(height: int, width: int, multiple: int) -> Padding:
    """Padding that makes both sides multiples of ``multiple``, the smaller half at the left and the top."""
    extra_h, extra_w = -height % multiple, -width % multiple
    return Padding(extra_w // 2, extra_w - extra_w // 2, extra_h // 2, extra_h - extra_h // 2)
