"""What a tokenizer's PSNR must be compared with: pictures made without any learning.

* mean colour: each image is replaced by its mean colour;
* palette: as many colours as the codebook has codes, found by k-means, one colour for each token's patch. It spends the
  same bits per token as the tokenizer, and it is fitted to the very pictures it is judged on, which favours it.

Both round their colours to the nearest level (the `paper` protocol's truncation would only weaken them).
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional as F

from trainer.metrics.image import padding


def fit_palette(color_n3: np.ndarray, weight_n: np.ndarray, color_count: int, *, seed: int = 0) -> np.ndarray:
    """At most `color_count` uint8 colours (k, 3) for colours in levels (0 to 255) with weights, by Lloyd's k-means.

    Colours are first rounded to levels, as they will be drawn; where no more distinct ones are left than the palette
    holds, they are the palette. A KD-tree finds the nearest colour, so that 262,144 colours for a million patches take
    seconds an iteration.
    """
    distinct_u3, inverse_n = _distinct(np.rint(color_n3).astype(np.int64))
    if len(distinct_u3) <= color_count:
        return distinct_u3.astype(np.uint8)
    weight_u = np.bincount(inverse_n, weights=weight_n)
    point_u3 = distinct_u3.astype(np.float64)
    # The best quantiser of a density p in d dimensions has codes as dense as p^(d / (d + 2)) (Zador 1982).
    start_u = weight_u**0.6
    random = np.random.default_rng(seed)
    start = random.choice(len(point_u3), size=color_count, replace=False, p=start_u / start_u.sum())
    palette_k3, last_cost = point_u3[start], np.inf
    for _ in range(50):
        distance_u, nearest_u = cKDTree(palette_k3).query(point_u3, workers=-1)
        error_u = weight_u * distance_u**2
        cost = error_u.sum()
        if cost >= last_cost * (1 - 1e-3):
            break
        last_cost = cost
        mass_k = np.bincount(nearest_u, weights=weight_u, minlength=color_count)
        sum_k3 = np.stack([np.bincount(nearest_u, weight_u * point_u3[:, c], color_count) for c in range(3)], axis=1)
        filled_k = mass_k > 0
        palette_k3[filled_k] = sum_k3[filled_k] / mass_k[filled_k, None]
        idle_count = int((~filled_k).sum())
        if idle_count:  # colours that nothing chose move to the points that are drawn worst
            palette_k3[~filled_k] = point_u3[np.argsort(error_u)[-idle_count:]]
    return np.rint(palette_k3).astype(np.uint8)


def _distinct(color_n3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows (u, 3) of whole levels, and for each row the place of its colour among them (n,)."""
    code_u, inverse_n = np.unique(color_n3 @ (65536, 256, 1), return_inverse=True)
    return np.stack([code_u >> 16, code_u >> 8 & 255, code_u & 255], axis=1), inverse_n


class _ImageSums(NamedTuple):
    """All that the error of an image drawn in flat patches depends on: sum (x - c)^2 = sum x^2 - 2 c sum x + n c^2."""

    patch_sum_n3: np.ndarray  # sums of levels over a patch's own pixels (padding apart)
    pixel_count_n: np.ndarray
    square_sum: int


class ColorBaselines:
    """Collects images and tells the PSNR of their mean colours and of a palette; keeps 4 numbers a patch, no pixels."""

    def __init__(self, patch_size: int, color_count: int, *, seed: int = 0):
        self.patch_size, self.color_count, self.seed = patch_size, color_count, seed
        self._images: list[_ImageSums] = []

    def update(self, levels_bchw: Tensor) -> None:
        """Takes uint8 images. Sides that no patch divides are padded like the tokenizer's, the padding not counted."""
        self._images.extend(self._patch_sums(levels_chw) for levels_chw in levels_bchw)

    def mean_color_psnr(self) -> list[float]:
        """dB, an image each, in the order of the updates; infinite for an image of one colour."""
        return [_psnr(image, np.rint(_mean_color(image))) for image in self._images]

    def fit(self) -> np.ndarray:
        """The palette (k, 3), uint8, fitted to the patches of all images, each weighted by its pixels."""
        color_n3 = np.concatenate([_patch_colors(image) for image in self._images])
        weight_n = np.concatenate([image.pixel_count_n for image in self._images])
        return fit_palette(color_n3, weight_n, self.color_count, seed=self.seed)

    def palette_psnr(self, palette_k3: np.ndarray) -> list[float]:
        """dB, an image each, in the order of the updates, each patch drawn in the palette's nearest colour."""
        tree = cKDTree(palette_k3)
        # The nearest to a patch's mean is also the colour of least squared error over its pixels.
        return [_psnr(image, palette_k3[tree.query(_patch_colors(image))[1]]) for image in self._images]

    def draw_mean_color(self, levels_chw: Tensor) -> Tensor:
        """The image in its mean colour, uint8 (3, h, w)."""
        color = np.rint(_mean_color(self._patch_sums(levels_chw))).astype(np.uint8)
        return torch.from_numpy(color)[:, None, None].expand(levels_chw.shape).contiguous()

    def draw_palette(self, levels_chw: Tensor, palette_k3: np.ndarray) -> Tensor:
        """The image with each patch in the palette's nearest colour, uint8 (3, h, w)."""
        height, width = levels_chw.shape[-2:]
        pad = padding(height, width, self.patch_size)
        nearest_n = cKDTree(palette_k3).query(_patch_colors(self._patch_sums(levels_chw)))[1]
        patches = palette_k3[nearest_n].reshape(
            (height + pad.top + pad.bottom) // self.patch_size, (width + pad.left + pad.right) // self.patch_size, 3
        )
        drawn_hwc = patches.repeat(self.patch_size, axis=0).repeat(self.patch_size, axis=1)
        drawn_hwc = drawn_hwc[pad.top : pad.top + height, pad.left : pad.left + width]
        return torch.from_numpy(drawn_hwc.transpose(2, 0, 1).copy())

    def _patch_sums(self, levels_chw: Tensor) -> _ImageSums:
        levels = levels_chw.double()  # whole numbers, exact
        pad = padding(*levels.shape[-2:], self.patch_size)
        planes = F.pad(torch.cat([levels, torch.ones_like(levels[:1])]), (pad.left, pad.right, pad.top, pad.bottom))
        sums_n4 = F.avg_pool2d(planes, self.patch_size, divisor_override=1).flatten(1).T.cpu().numpy().astype(np.int32)
        return _ImageSums(sums_n4[:, :3], sums_n4[:, 3], int(levels.square().sum()))


def _patch_colors(image: _ImageSums) -> np.ndarray:
    return image.patch_sum_n3 / image.pixel_count_n[:, None]


def _mean_color(image: _ImageSums) -> np.ndarray:
    return image.patch_sum_n3.sum(axis=0, dtype=np.int64) / image.pixel_count_n.sum()


def _psnr(image: _ImageSums, color: np.ndarray) -> float:
    """dB of the image with its patches drawn in whole-level colours, (n, 3) or one for all (3,)."""
    color = color.astype(np.int64)
    error = image.square_sum + (image.pixel_count_n[:, None] * color**2 - 2 * color * image.patch_sum_n3).sum()
    if error == 0:
        return float("inf")
    return float(-10 * np.log10(error / (3 * image.pixel_count_n.sum() * 255**2)))
