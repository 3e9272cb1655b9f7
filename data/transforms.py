"""From an image file's bytes to uint8 pixels: decoding, named resizes, crops, flips. No global random state."""

import functools
import io
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from data import DataError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 100_000_000
MAX_BYTES = 100_000_000
BACKGROUND = (255, 255, 255)  # under alpha and palette transparency

# Pillow warns about images that are too large; here MAX_PIXELS refuses them.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(Exception):
    """An image that cannot be used: unreadable, truncated or too large. The message is the reason in one line."""


def decode(content: bytes, *, draft_side: int | None = None) -> Image.Image:
    """Decodes a JPEG, PNG or WebP file's bytes to an upright RGB image.

    EXIF orientation is applied, transparency is composited on white, 16-bit greys are divided by 257, CMYK goes through
    its profile, an animation gives its first frame. The header is checked against MAX_PIXELS before pixels are loaded.

    draft_side: lets a JPEG be decoded at 1/2, 1/4 or 1/8 scale, as long as its shorter side keeps this many pixels.
    Raises ImageError.
    """
    if len(content) > MAX_BYTES:
        raise ImageError(f"{len(content):,} bytes are more than {MAX_BYTES:,}")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
        if draft_side is not None:
            reduction = min(image.size) / draft_side
            image.draft(None, (math.ceil(image.width / reduction), math.ceil(image.height / reduction)))
        return _to_rgb(ImageOps.exif_transpose(image))
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError("no JPEG, PNG or WebP image") from error
    except Exception as error:  # Pillow's plugins raise nearly every built-in type on damaged bytes
        raise ImageError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greys; Pillow keeps them in "I;16" or, when older, in "I"
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "CMYK":
        return _cmyk_to_rgb(image)
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    if "icc_profile" not in image.info:
        return image.convert("RGB")
    profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    if profile.profile.xcolor_space.strip() != "CMYK":
        return image.convert("RGB")
    return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")


class Resize(NamedTuple):
    """A named resize protocol. Two protocols are 25 to 37 dB apart on ordinary pictures, so names are never mixed.

    apply: (image, (width, height), box or None) -> image; box is (left, top, right, bottom) in integer pixels.
    long_side: (shorter, longer, target) -> the longer side once the shorter one is `target`.
    margin: pixels to spare -> offset of the centre crop.
    """

    apply: Callable[..., Image.Image]
    long_side: Callable[[int, int, int], int]
    margin: Callable[[int], int]


def resize_named(name: str) -> Resize:
    """The resize protocol of that name.

    `pil_antialias`: torchvision's Resize and CenterCrop on PIL images: antialiased bilinear, long side truncated.
    `cv2_bilinear`: cv2.INTER_LINEAR without antialias, sides rounded, floor centre crop.
    """
    if name not in RESIZES:
        raise DataError(f"unknown resize {name!r}: choose one of {', '.join(RESIZES)}")
    return RESIZES[name]()


def _pil_antialias() -> Resize:
    def apply(image, size, box=None):
        return image.resize(size, Image.Resampling.BILINEAR, box=box)

    return Resize(
        apply,
        long_side=lambda shorter, longer, target: int(target * longer / shorter),
        margin=lambda spare: round(spare / 2),
    )


@functools.cache
def _cv2_bilinear() -> Resize:
    try:
        import cv2
    except ImportError as error:
        raise DataError("resize 'cv2_bilinear' needs OpenCV: pip install opencv-python-headless") from error
    cv2.setNumThreads(0)  # its thread pool does not survive the fork of a loader worker

    def apply(image, size, box=None):
        pixels_hwc = np.asarray(image if box is None else image.crop(box))
        return Image.fromarray(cv2.resize(pixels_hwc, size, interpolation=cv2.INTER_LINEAR))

    return Resize(
        apply,
        long_side=lambda shorter, longer, target: round(longer * (target / shorter)),
        margin=lambda spare: spare // 2,
    )


RESIZES = {"pil_antialias": _pil_antialias, "cv2_bilinear": _cv2_bilinear}


def resize_shorter_side(image: Image.Image, side: int, resize: Resize) -> Image.Image:
    """Resizes so that the shorter side has `side` pixels, keeping the aspect ratio as the protocol rounds it."""
    longer = resize.long_side(min(image.size), max(image.size), side)
    return resize.apply(image, (side, longer) if image.width <= image.height else (longer, side))


def resize_and_center_crop(image: Image.Image, side: int, resize: Resize) -> Image.Image:
    """Shorter side to `side` pixels, then the centre `side` x `side` pixels."""
    image = resize_shorter_side(image, side, resize)
    left, top = resize.margin(image.width - side), resize.margin(image.height - side)
    return image.crop((left, top, left + side, top + side))


def resize_and_random_crop(image: Image.Image, side: int, resize: Resize, rng: random.Random) -> Image.Image:
    """Shorter side to `side` pixels, then `side` x `side` pixels from anywhere along the longer one."""
    image = resize_shorter_side(image, side, resize)
    left, top = _below(rng, image.width - side + 1), _below(rng, image.height - side + 1)
    return image.crop((left, top, left + side, top + side))


def random_resized_crop(
    image: Image.Image, side: int, resize: Resize, rng: random.Random, scale: tuple[float, float]
) -> Image.Image:
    """A random part with `scale` of the area and an aspect ratio of 3/4 to 4/3, resized to `side` x `side` pixels.

    After ten draws that do not fit it takes the centre square, as torchvision's RandomResizedCrop nearly does.
    """
    for _ in range(10):
        area = image.width * image.height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        ratio = math.exp((2 * rng.random() - 1) * math.log(4 / 3))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = _below(rng, image.width - width + 1), _below(rng, image.height - height + 1)
            break
    else:
        width = height = min(image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
    return resize.apply(image, (side, side), (left, top, left + width, top + height))


def _below(rng: random.Random, bound: int) -> int:
    return int(rng.random() * bound)


CROPS = ("random_resized", "random", "center")


@dataclass(frozen=True)
class TrainingTransform:
    """Image bytes -> uint8 pixels (3, image_size, image_size); crop and flip are drawn from the given generator only.

    JPEGs are decoded at reduced scale where even the smallest crop keeps twice the target's resolution.
    """

    image_size: int
    crop: str
    crop_scale: tuple[float, float]
    resize: str
    flip: bool
    color_jitter: float = 0.0

    def __post_init__(self):
        resize_named(self.resize)
        if self.image_size < 1:
            raise DataError(f"data.image_size={self.image_size} must be at least 1")
        if self.crop not in CROPS:
            raise DataError(f"unknown data.crop {self.crop!r}: choose one of {', '.join(CROPS)}")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise DataError(
                f"data.crop_scale={list(self.crop_scale)} must be two parts of the area, 0 < low <= high <= 1"
            )
        if not 0 <= self.color_jitter <= 1:
            raise DataError(f"data.color_jitter={self.color_jitter} must lie between 0 and 1")

    def __call__(self, content: bytes, rng: random.Random) -> np.ndarray:
        """uint8 (3, image_size, image_size). Raises ImageError."""
        side, resize = self.image_size, resize_named(self.resize)
        # The smallest crop's shorter side, as a part of the image's: its area at the most extreme aspect ratio.
        smallest = math.sqrt(self.crop_scale[0] * 3 / 4) if self.crop == "random_resized" else 1
        image = decode(content, draft_side=math.ceil(2 * side / smallest))
        if self.crop == "random_resized":
            image = random_resized_crop(image, side, resize, rng, self.crop_scale)
        elif self.crop == "random":
            image = resize_and_random_crop(image, side, resize, rng)
        else:
            image = resize_and_center_crop(image, side, resize)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = pixels_chw(image)
        return jitter_colors(pixels, rng, self.color_jitter) if self.color_jitter else pixels


def jitter_colors(image_chw: np.ndarray, rng: random.Random, strength: float) -> np.ndarray:
    """uint8 (3, h, w) -> the same with other contrast, saturation, hue, brightness and tint, drawn from ``rng``.

    strength s from 0 to 1: contrast and saturation times 1 - s to 1 + s, hue turned by up to s half-turns about the
    grey axis, each channel moved by up to s/4 of the range; all as one affine map of colour space.
    """
    contrast, saturation, turn, *tint = (strength * (2 * rng.random() - 1) for _ in range(6))
    grey = np.full((3, 3), 1 / 3)  # projects on the grey axis
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # turns about it by a right angle
    angle = math.pi * turn
    chroma = math.cos(angle) * (np.eye(3) - grey) + math.sin(angle) * cross
    matrix = (1 + contrast) * (grey + (1 + saturation) * chroma)
    colors = matrix.astype(np.float32) @ (image_chw.reshape(3, -1).astype(np.float32) - 127.5)
    offset = 127.5 + 255 / 4 * np.array(tint, dtype=np.float32)[:, None]
    return np.rint(colors + offset).clip(0, 255).astype(np.uint8).reshape(image_chw.shape)


def pixels_chw(image: Image.Image) -> np.ndarray:
    """RGB image -> uint8 (3, height, width), contiguous and writable."""
    return np.array(np.asarray(image).transpose(2, 0, 1), order="C")
