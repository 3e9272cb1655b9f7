"""Baselines for a tokenizer's PSNR that learn nothing.

* mean colour: each image is replaced by its mean colour;
* palette: one colour for each token's patch, from as many colours as the codebook has codes, found by k-means. It has
  the same bits per token as the tokenizer. It is fitted to the evaluated images, which favours it: to all patches, or,
  if there are many, to an equal random subset of each image's patches.

There are 2^24 colours. With as many codes or more the palette holds all of them: each patch gets its own mean colour.

Both round colours to the nearest level (the ``paper`` protocol's truncation would only make them worse).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional as F

from trainer.metrics.image import padding
from trainer.reports.measures import ALL_COLORS

# The palette is fitted to about 64 patches per colour, at least 2^16 and at most 2^20: more change its PSNR by
# hundredths of a dB and take minutes.
FITTED_PER_COLOR, LEAST_FITTED, MOST_FITTED = 64, 2**16, 2**20
QUERIED_PATCHES = 2**20  # at a time


def fit_palette(color_n3: np.ndarray, weight_n: np.ndarray, color_count: int, *, seed: int = 0) -> np.ndarray:
    """Lloyd's k-means on weighted colours in levels (0 to 255): at most ``color_count`` uint8 colours (k, 3).

    Colours are first rounded to levels, as they will be drawn; if no more than ``color_count`` distinct ones are left,
    these are the palette. A KD-tree finds the nearest colour: an iteration with 262,144 colours and a million patches
    takes seconds.
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
        if idle_count:  # unused colours move to the points with the largest error
            palette_k3[~filled_k] = point_u3[np.argsort(error_u)[-idle_count:]]
    return np.rint(palette_k3).astype(np.uint8)


def _distinct(color_n3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows (u, 3) of integer levels, and each row's index among them (n,)."""
    code_u, inverse_n = np.unique(color_n3 @ (65536, 256, 1), return_inverse=True)
    return np.stack([code_u >> 16, code_u >> 8 & 255, code_u & 255], axis=1), inverse_n


class Patches(NamedTuple):
    """Patches of the image at that position of the set: sums of levels over each patch's pixels without padding (n, 3),
    and the number of these pixels (n,)."""

    position: int
    sum_n3: np.ndarray
    pixel_count_n: np.ndarray


class _ImageSums(NamedTuple):
    """Sufficient statistics for the error of flat patches: sum (x - c)^2 = sum x^2 - 2 c sum x + n c^2."""

    patches: Patches
    square_sum: int


class ColorBaselines:
    """Accumulates images and computes the PSNR of both baselines; stores 3 numbers per patch, no pixels.

    image_count: of the whole set, over all processes. The palette depends on the set and the seed, not on how images
    are divided among processes.
    """

    def __init__(self, patch_size: int, color_count: int, *, image_count: int, seed: int = 0):
        self.patch_size, self.color_count, self.seed = patch_size, color_count, seed
        fitted = min(max(FITTED_PER_COLOR * color_count, LEAST_FITTED), MOST_FITTED)
        self.fitted_per_image = max(1, fitted // max(1, image_count))
        self._images: list[_ImageSums] = []
        self._pixel_counts: dict[tuple[int, int], np.ndarray] = {}  # by image size

    def update(self, levels_bchw: Tensor, positions: Sequence[int]) -> None:
        """Adds uint8 images of one size with their positions in the set. Sides are padded like the tokenizer's; padding
        does not count."""
        self._images.extend(self._sums(levels_bchw, positions))

    def mean_color_psnr(self) -> list[float]:
        """dB of each image, in the order of updates; infinite for an image of one colour."""
        return [_psnr(image, np.rint(_mean_color(image.patches))) for image in self._images]

    def fitted(self) -> list[Patches]:
        """The patches of each image that the palette is fitted to, chosen by seed and position; none if the palette
        holds all colours."""
        chosen = []
        if self.color_count >= ALL_COLORS:
            return chosen
        for patches, _ in self._images:
            count = len(patches.pixel_count_n)
            if count > self.fitted_per_image:
                random = np.random.default_rng((self.seed, patches.position))
                which = random.choice(count, self.fitted_per_image, replace=False)
                patches = Patches(patches.position, patches.sum_n3[which], patches.pixel_count_n[which])
            chosen.append(patches)
        return chosen

    def fit(self, fitted: Iterable[Patches]) -> np.ndarray | None:
        """The palette (k, 3), uint8, for the `fitted` patches of all images, weighted by their numbers of pixels; None:
        all colours."""
        if self.color_count >= ALL_COLORS:
            return None
        fitted = sorted(fitted, key=lambda patches: patches.position)
        color_n3 = np.concatenate([_colors(patches) for patches in fitted])
        weight_n = np.concatenate([patches.pixel_count_n for patches in fitted])
        return fit_palette(color_n3, weight_n, self.color_count, seed=self.seed)

    def palette_psnr(self, palette_k3: np.ndarray | None) -> list[float]:
        """dB of each image, in the order of updates, with each patch in the palette's nearest colour."""
        nearest, found = _nearest_in(palette_k3), []
        patch_count = max((len(image.patches.pixel_count_n) for image in self._images), default=1)
        images_at_once = max(1, QUERIED_PATCHES // patch_count)
        for first in range(0, len(self._images), images_at_once):
            images = self._images[first : first + images_at_once]
            # The colour nearest to a patch's mean also has the least squared error over its pixels.
            nearest_n3 = nearest(np.concatenate([_colors(image.patches) for image in images]))
            ends = np.cumsum([len(image.patches.pixel_count_n) for image in images])
            found += [_psnr(*pair) for pair in zip(images, np.split(nearest_n3, ends[:-1]), strict=True)]
        return found

    def draw_palette(self, levels_chw: Tensor, palette_k3: np.ndarray | None) -> Tensor:
        """The image with each patch in the palette's nearest colour, uint8 (3, h, w)."""
        height, width = levels_chw.shape[-2:]
        pad = padding(height, width, self.patch_size)
        nearest_n3 = _nearest_in(palette_k3)(_colors(self._sums(levels_chw[None], [0])[0].patches))
        patches = nearest_n3.reshape(
            (height + pad.top + pad.bottom) // self.patch_size, (width + pad.left + pad.right) // self.patch_size, 3
        )
        drawn_hwc = patches.repeat(self.patch_size, axis=0).repeat(self.patch_size, axis=1)
        drawn_hwc = drawn_hwc[pad.top : pad.top + height, pad.left : pad.left + width]
        return torch.from_numpy(drawn_hwc.transpose(2, 0, 1).copy())

    def _sums(self, levels_bchw: Tensor, positions: Sequence[int]) -> list[_ImageSums]:
        levels_bchw = levels_bchw.double()  # integers, exact
        size = tuple(levels_bchw.shape[-2:])
        if size not in self._pixel_counts:
            self._pixel_counts[size] = self._patch_sums(torch.ones_like(levels_bchw[:1, :1]))[0, :, 0]
        squares_b = levels_bchw.square().sum(dim=(1, 2, 3)).tolist()
        return [
            _ImageSums(Patches(position, sum_n3, self._pixel_counts[size]), int(square))
            for position, sum_n3, square in zip(positions, self._patch_sums(levels_bchw), squares_b, strict=True)
        ]

    def _patch_sums(self, values_bchw: Tensor) -> np.ndarray:
        """(b, n, c) sums of integers from 0 to 255, in the smallest type that holds them."""
        padded_bchw = F.pad(values_bchw, padding(*values_bchw.shape[-2:], self.patch_size))
        sums_bcn = F.avg_pool2d(padded_bchw, self.patch_size, divisor_override=1).flatten(2)
        return sums_bcn.transpose(1, 2).cpu().numpy().astype(np.min_scalar_type(255 * self.patch_size**2))


def _nearest_in(palette_k3: np.ndarray | None) -> Callable[[np.ndarray], np.ndarray]:
    """The function from colours (n, 3) in levels to the palette's nearest uint8 colours (n, 3)."""
    if palette_k3 is None:
        return lambda color_n3: np.rint(color_n3).astype(np.uint8)
    tree = cKDTree(palette_k3)
    return lambda color_n3: palette_k3[tree.query(color_n3, workers=-1)[1]]


def _colors(patches: Patches) -> np.ndarray:
    return patches.sum_n3 / patches.pixel_count_n[:, None].astype(np.float64)


def _mean_color(patches: Patches) -> np.ndarray:
    return patches.sum_n3.sum(axis=0, dtype=np.int64) / patches.pixel_count_n.sum(dtype=np.int64)


def _psnr(image: _ImageSums, color: np.ndarray) -> float:
    """dB of the image with its patches in integer colours, (n, 3) or one for all (3,)."""
    color, sum_n3 = color.astype(np.int64), image.patches.sum_n3.astype(np.int64)
    pixel_count_n = image.patches.pixel_count_n.astype(np.int64)
    error = image.square_sum + (pixel_count_n[:, None] * color**2 - 2 * color * sum_n3).sum()
    if error == 0:
        return float("inf")
    return float(-10 * np.log10(error / (3 * pixel_count_n.sum() * 255**2)))
