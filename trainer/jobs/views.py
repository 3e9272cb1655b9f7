"""Views of an image that `ibq tokenize` writes as codes."""

import numpy as np
from PIL import Image

from data.transforms import decode, pixels_chw, resize_and_center_crop, resize_named

VIEWS = {"original": 1, "flip": 2, "ten-crop": 10}  # kind -> views per image


def image_views(content: bytes, kind: str, side: int, resize: str) -> np.ndarray:
    """An image file's bytes -> uint8 (views, 3, side, side); view 0 is the centre crop, not mirrored.

    ten-crop: the centre and four corners of the centre square at 1.1 times the side, then the mirror images of all
    five. Raises ImageError.
    """
    image, protocol = decode(content), resize_named(resize)
    if kind == "ten-crop":
        larger = round(1.1 * side)
        crops = _five_crops(resize_and_center_crop(image, larger, protocol), side, protocol.margin(larger - side))
    else:
        crops = [resize_and_center_crop(image, side, protocol)]
    views_vchw = np.stack([pixels_chw(crop) for crop in crops])
    return views_vchw if kind == "original" else np.concatenate([views_vchw, views_vchw[..., ::-1]])


def _five_crops(image: Image.Image, side: int, margin: int) -> list[Image.Image]:
    far = image.width - side
    corners = [(margin, margin), (0, 0), (far, 0), (0, far), (far, far)]
    return [image.crop((left, top, left + side, top + side)) for left, top in corners]
