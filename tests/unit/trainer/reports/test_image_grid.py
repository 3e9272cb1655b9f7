import math

import numpy as np
import torch
from PIL import Image

from trainer.reports.image_grid import Example, Gallery, merge_galleries, pair, side_by_side


def example(position, psnr=20.0, side=32, **values):
    generator = torch.Generator().manual_seed(position)
    a, b, c = (torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator) for _ in range(3))
    return Example(f"{position}.png", psnr, a, b, palette_chw=c, position=position, **values)


def test_a_grid_shows_each_picture_above_its_reconstruction():
    examples = [example(position) for position in range(8)]
    grid = side_by_side(examples, columns=4, cell=64)
    assert grid.size == (12 + 4 * 76, 12 + 2 * (3 * (36 + 64) + 36 + 12))
    assert side_by_side(examples[:5], columns=4, cell=64).width == 12 + 3 * 76  # bands of 3 and 2, not 4 and 1
    pixels = np.asarray(grid)
    original = examples[1].original_chw.permute(1, 2, 0).numpy()
    # Second column, first row, each pixel a square of 2x2.
    assert np.array_equal(pixels[48:112:2, 88:152:2], original) and np.array_equal(pixels[49:112:2, 89:152:2], original)


def test_pair_has_the_pictures_own_size():
    picture = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    grid = pair(Example("x.png", math.inf, picture, 255 - picture))
    assert isinstance(grid, Image.Image) and grid.size == (2 * 400 + 36, 300 + 54)
    assert np.array_equal(np.asarray(grid)[36:336, 424:824], 255 - picture.permute(1, 2, 0).numpy())


def test_captions_tell_lpips_where_it_was_measured():
    assert example(0).caption == "20.0 dB" and example(0, math.inf).caption == "exact"
    assert example(0, lpips=0.1234).caption == "20.0 dB, LPIPS 0.123"


def test_galleries_of_any_division_merge_to_that_of_one_process():
    examples = [example(position, psnr=float((7 * position) % 23)) for position in range(23)]
    whole, shares = Gallery(), [Gallery() for _ in range(3)]
    whole.add(examples)
    for position in range(0, 23, 4):
        shares[position % 3].add(examples[position : position + 4])
    together = merge_galleries(share.examples for share in shares)
    for name, kept in whole.examples.items():
        assert [one.position for one in together[name]] == [one.position for one in kept]
    assert [one.psnr for one in together["worst"]] == sorted(one.psnr for one in examples)[:8]
    assert [one.psnr for one in together["best"]] == sorted((one.psnr for one in examples), reverse=True)[:8]
    assert whole.examples["first"][0].original_chw.data_ptr() != examples[0].original_chw.data_ptr()  # a copy
