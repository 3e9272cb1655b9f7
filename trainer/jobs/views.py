"""Views of an image that `ibq tokenize` writes as codes, and the sizes of views."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.buckets import MOST_BUCKETS, MOST_SIDE, PARTS, bucket_for, by_area, image_sizes, parse_size, sizes_of
from data.config import DataConfig
from data.transforms import Size, as_size, decode, pixels_chw, resize_and_center_crop, resize_named
from model_zoo.config import grid_name
from trainer import TrainerError

VIEWS = {"original": 1, "flip": 2, "ten-crop": 10}  # kind -> views per image


@dataclass(frozen=True)
class Views:
    """An image file's bytes -> uint8 (views, 3, height, width); view 0 is the centre crop, not mirrored.

    kind: of VIEWS. ten-crop: the centre and four corners of the centre at 1.1 times the size, then the mirror images of
    all five. sizes: of a view, by ascending area; an image has views of one of them. resize: the protocol.
    enlargement: how far an image may be enlarged to cover its size, see `data.buckets.bucket_of`; None: there is one
    size, which every image is resized to.
    """

    kind: str
    sizes: Sequence[Size]
    resize: str
    enlargement: float | None = None

    def __call__(self, content: bytes) -> np.ndarray:
        """Raises ImageError, also for an image that is smaller than its size."""
        image, protocol = decode(content), resize_named(self.resize)
        size = self.sizes[0] if self.enlargement is None else bucket_for(self.sizes, image, self.enlargement)
        if self.kind == "ten-crop":
            larger = Size(*(round(1.1 * side) for side in size))
            left, top = protocol.margin(larger.width - size.width), protocol.margin(larger.height - size.height)
            crops = _five_crops(resize_and_center_crop(image, larger, protocol), size, left, top)
        else:
            crops = [resize_and_center_crop(image, size, protocol)]
        views_vchw = np.stack([pixels_chw(crop) for crop in crops])
        return views_vchw if self.kind == "original" else np.concatenate([views_vchw, views_vchw[..., ::-1]])

    def settings(self, factor: int) -> dict:
        """What a later job must have in common to continue. factor: pixels of a token's side."""
        grids = [[size.height // factor, size.width // factor] for size in self.sizes]
        if self.enlargement is None:
            return {"grid": grids[0], "image_size": self.sizes[0].height}
        named = {"sizes": list(map(str, self.sizes)), "grids": list(map(grid_name, grids))}
        return {**named, "max_enlargement": self.enlargement}


def _five_crops(image: Image.Image, size: Size, left: int, top: int) -> list[Image.Image]:
    """left, top: of the one in the centre."""
    right, bottom = image.width - size.width, image.height - size.height
    corners = [(left, top), (0, 0), (right, 0), (0, bottom), (right, bottom)]
    return [image.crop((x, y, x + size.width, y + size.height)) for x, y in corners]


class SizeOptions(NamedTuple):
    """Options of `ibq tokenize`. size: pixels of a square, or sizes such as 384x640,512x512; None: the run's
    ``data.image_size``. pixels: sides of squares such as 256,512: sizes of about as many pixels, to an aspect ratio of
    `max_aspect`. max_enlargement: how far an image may be enlarged to cover its size; None: the run's."""

    size: int | str | None = None
    pixels: str | None = None
    max_aspect: float | None = None
    max_enlargement: float | None = None


def listed_sizes(options: SizeOptions) -> list[Size] | None:
    """The sizes that images are distributed over, by ascending area; None for one square. Raises TrainerError."""
    size, pixels, max_aspect, enlargement = options
    if size is not None and pixels is not None:
        raise TrainerError("--size and --pixels are both given: leave one out")
    if max_aspect is not None and pixels is None:
        raise TrainerError("--max-aspect is for --pixels: leave it out")
    for option, number in (("--max-aspect", max_aspect), ("--max-enlargement", enlargement)):
        if number is not None and not 1 <= number < math.inf:
            raise TrainerError(f"{option} {number:g} must be at least 1, and finite")
    if size is not None and re.fullmatch(r"-?\d+", str(size)) and int(size) < 1:
        raise TrainerError(f"--size {size} must be at least 1")
    if pixels is None and (size is None or str(size).isdecimal()):
        if enlargement is not None:
            raise TrainerError("--max-enlargement is for --pixels and for sizes such as --size 384x640: leave it out")
        return None
    if pixels is None:
        sizes = [parse_size(part) for part in str(size).split(",")]
        if None in sizes:
            raise TrainerError(
                f"--size {size}: give pixels of a square, or sizes as HEIGHTxWIDTH of at most {MOST_SIDE}, such as "
                "384x640,512x512"
            )
    else:
        aspect = DataConfig.max_aspect if max_aspect is None else max_aspect
        sizes = [one for side in _sides(pixels) for one in sizes_of(side, aspect, "--pixels")]
    sizes = by_area(sizes)
    if len(sizes) > MOST_BUCKETS:
        raise TrainerError(f"{len(sizes)} sizes are more than {MOST_BUCKETS}: lower --max-aspect, or shorten the list")
    return sizes


def _sides(pixels: str) -> list[int]:
    parts = str(pixels).split(",")
    if not all(part.isdecimal() for part in parts):
        raise TrainerError(f"--pixels {pixels}: give sides of squares in pixels, such as 512 or 256,512")
    return list(map(int, parts))


def make_views(kind: str, options: SizeOptions, config: DataConfig, factor: int) -> Views:
    """config: the run's, for what the options leave out. factor: pixels of a token's side. Raises TrainerError."""
    sizes = listed_sizes(options)
    if sizes is None:
        side = config.image_size if options.size is None else int(options.size)
        if side < 1 or side % factor:
            raise TrainerError(
                f"--size {side} is not a multiple of the tokenizer's factor {factor}: take {_multiple(side, factor)}"
            )
        return Views(kind, [as_size(side)], config.resize)
    if wrong := next((size for size in sizes if size.height % factor or size.width % factor), None):
        better = Size(*(_multiple(side, factor) for side in wrong))
        if options.pixels is None:
            raise TrainerError(f"--size {wrong} is not a multiple of the tokenizer's factor {factor}: take {better}")
        better = ",".join(str(_multiple(side, PARTS * factor)) for side in _sides(options.pixels))
        raise TrainerError(
            f"--pixels {options.pixels}: sides such as those of {wrong} are no multiples of the tokenizer's factor "
            f"{factor}: take {better}"
        )
    if config.resize == "adm_center_crop" and any(size.height != size.width for size in sizes):
        raise TrainerError("data.resize=adm_center_crop of the run is defined for squares only: give squares to --size")
    enlargement = config.max_enlargement if options.max_enlargement is None else options.max_enlargement
    return Views(kind, sizes, config.resize, float(enlargement))


def unused_buckets(options: SizeOptions, config: DataConfig) -> str | None:
    """A line for a run that was trained on buckets and whose images become squares, because no size is given; None
    otherwise. config: the run's."""
    if options.size is not None or options.pixels is not None or not (config.buckets or config.pixels):
        return None
    sizes = ",".join(map(str, image_sizes(config)))
    return (
        f"without --size, all images become squares of data.image_size={config.image_size} pixels, but the tokenizer "
        f"was trained on {sizes.replace(',', ', ')}: to keep their shapes, give --size {sizes}"
    )


def _multiple(side: int, factor: int) -> int:
    """The nearest one that is not 0."""
    return max(1, round(side / factor)) * factor
