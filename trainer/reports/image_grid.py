"""Grids of images: originals next to their reconstructions."""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

EXAMPLE_COUNT = 8


class Example(NamedTuple):
    """An image and its reconstruction; images are uint8 (3, h, w) on the CPU. position: in the evaluated set."""

    key: str
    psnr: float  # dB
    original_chw: Tensor
    reconstruction_chw: Tensor
    palette_chw: Tensor | None = None
    position: int = 0
    lpips: float | None = None  # None if not measured

    @property
    def distance(self) -> float:
        """Larger for a worse reconstruction: LPIPS if it was measured, else negative PSNR."""
        return -self.psnr if self.lpips is None else self.lpips

    @property
    def caption(self) -> str:
        """The reconstruction's PSNR, and LPIPS if it was measured."""
        psnr = "exact" if math.isinf(self.psnr) else f"{self.psnr:.1f} dB"
        return psnr if self.lpips is None else f"{psnr}, LPIPS {self.lpips:.3f}"


# Sort keys of the examples that a report shows.
ORDERS: dict[str, Callable[[Example], tuple]] = {
    "first": lambda example: (example.position,),
    "worst": lambda example: (-example.distance, example.position),
    "best": lambda example: (example.distance, example.position),
}


class Gallery:
    """Keeps the first, the worst and the best EXAMPLE_COUNT examples of all that it is given."""

    def __init__(self):
        self.examples: dict[str, list[Example]] = {name: [] for name in ORDERS}

    def add(self, examples: Iterable[Example]) -> None:
        """Copies the examples that it keeps, since they may be views of a whole batch."""
        examples = list(examples)
        for name, order in ORDERS.items():
            kept = self.examples[name]
            best = heapq.nsmallest(EXAMPLE_COUNT, [*kept, *examples], key=order)
            known = {example.position for example in kept}
            self.examples[name] = [example if example.position in known else _copy(example) for example in best]


def merge_galleries(galleries: Iterable[dict[str, list[Example]]]) -> dict[str, list[Example]]:
    """The examples of one gallery that was given the examples of all galleries."""
    galleries = list(galleries)
    return {
        name: heapq.nsmallest(EXAMPLE_COUNT, (example for one in galleries for example in one[name]), key=order)
        for name, order in ORDERS.items()
    }


def _copy(example: Example) -> Example:
    original_chw, reconstruction_chw = (
        picture_chw.to("cpu", copy=True) for picture_chw in (example.original_chw, example.reconstruction_chw)
    )
    return example._replace(original_chw=original_chw, reconstruction_chw=reconstruction_chw)


_BACKGROUND, _TEXT, _FAINT = (24, 26, 31), (235, 236, 240), (160, 165, 175)


def side_by_side(examples: Sequence[Example], *, columns: int = 4, cell: int = 256) -> Image.Image:
    """A grid of examples in bands of up to ``columns``; each band has rows of originals, palettes and reconstructions.

    Without palettes that row is omitted. Small images are enlarged by integer factors, so that pixels stay square;
    large ones are reduced to ``cell`` pixels.
    """
    rows = ["original_chw", "palette_chw", "reconstruction_chw"]
    rows = [name for name in rows if getattr(examples[0], name) is not None]
    bands = math.ceil(len(examples) / columns)
    columns = math.ceil(len(examples) / bands)
    gap, label = 12, 36
    band_height = len(rows) * (label + cell) + label + gap
    grid = Image.new("RGB", (gap + columns * (cell + gap), gap + bands * band_height), _BACKGROUND)
    draw = ImageDraw.Draw(grid)
    font, small = ImageFont.load_default(26), ImageFont.load_default(20)
    titles = {"palette_chw": "palette (one colour per token)"}
    for i, example in enumerate(examples):
        band, column = divmod(i, columns)
        left, top = gap + column * (cell + gap), gap + band * band_height
        for row, name in enumerate(rows):
            y = top + row * (label + cell)
            if column == 0:
                draw.text((gap, y), titles.get(name, name.removesuffix("_chw")), fill=_TEXT, font=font)
            picture = _fit(getattr(example, name), cell)
            grid.paste(picture, (left + (cell - picture.width) // 2, y + label + (cell - picture.height) // 2))
        caption = _shorten(f"{example.caption}  {Path(example.key).name}", small, cell)
        draw.text((left, top + len(rows) * (label + cell) + 4), caption, fill=_FAINT, font=small)
    return grid


def pair(example: Example) -> Image.Image:
    """Original and reconstruction next to each other at the image's own size; small ones are enlarged."""
    original, reconstruction = (
        _fit(picture_chw, max(256, *picture_chw.shape[-2:]))
        for picture_chw in (example.original_chw, example.reconstruction_chw)
    )
    gap, label = 12, 30
    grid = Image.new("RGB", (3 * gap + 2 * original.width, original.height + label + 2 * gap), _BACKGROUND)
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(20)
    texts = ("original", f"reconstruction, {example.caption}")
    for x, picture, text in zip((gap, 2 * gap + original.width), (original, reconstruction), texts, strict=True):
        draw.text((x, gap // 2), _shorten(text, font, picture.width), fill=_TEXT, font=font)
        grid.paste(picture, (x, gap // 2 + label))
    return grid


def _fit(image_chw: Tensor, cell: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(image_chw.permute(1, 2, 0).numpy()))
    longest = max(picture.size)
    if longest <= cell:
        factor = cell // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return picture


def _shorten(text: str, font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
