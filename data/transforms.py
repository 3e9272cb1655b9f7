"""From an image file's bytes to uint8 pixels: decoding, named resizes, crops, flips. No global random state."""

import functools
import io
import math
import random
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from data.config import DataConfig
from data.errors import DataError, Filtered, ImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 100_000_000
MAX_BYTES = 100_000_000
MAX_SCANNED = 200 * MAX_PIXELS  # pixels of a JPEG times its scans: some 15 seconds of work
BACKGROUND = (255, 255, 255)  # under alpha and palette transparency

# Pillow warns of damaged metadata, which do not matter, and of large images, which MAX_PIXELS refuses; it names none.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(
    content: bytes,
    *,
    draft_side: int | None = None,
    check_size: Callable[[int, int], None] = lambda width, height: None,
) -> Image.Image:
    """Decodes a JPEG, PNG or WebP file's bytes to an upright RGB image.

    The orientation of EXIF or XMP is applied, transparency is composited on white, 16-bit greys are divided by 257,
    CMYK goes through its profile, an animation gives its first frame. The header is checked against MAX_PIXELS before
    pixels are loaded.
    Neither JPEG's nor WebP's pixels have a checksum: of damage within them only a missing end is sure to be noticed.

    draft_side: lets a JPEG be decoded at 1/2, 1/4 or 1/8 scale, as long as its shorter side keeps this many pixels.
    check_size: called with the width and height of `image_header` before pixels are loaded; may raise Filtered or
        DataError.
    Raises ImageError, and what check_size raises.
    """
    if not content:
        raise ImageError("empty (0 bytes)")
    if len(content) > MAX_BYTES:
        raise ImageError(f"{len(content):,} bytes are more than {MAX_BYTES:,}")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ImageError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
        orientation = _orientation(image)
        check_size(*_displayed(image.size, orientation))
        if image.format == "PNG":
            _load_png(image, content)
        _check_scans(image, content)
        if draft_side is not None:
            reduction = min(image.size) / draft_side
            image.draft(None, (math.ceil(image.width / reduction), math.ceil(image.height / reduction)))
        return _to_rgb(image.transpose(TURNS[orientation]) if orientation in TURNS else image)
    except (DataError, ImageError, Filtered, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError("no JPEG, PNG or WebP image") from error
    except Exception as error:  # Pillow's plugins raise nearly every built-in type on damaged bytes
        raise ImageError(" ".join(f"{type(error).__name__}: {error}".split())) from error


class ImageHeader(NamedTuple):
    """width, height: pixels, as the image is displayed."""

    format: str
    width: int
    height: int


def image_header(content: bytes | BinaryIO) -> ImageHeader:
    """Format and size from the header of an image file, given as bytes or as an open file. Raises ImageError."""
    try:
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        image = Image.open(file, formats=FORMATS)
        width, height = _displayed(image.size, _orientation(image))
    except UnidentifiedImageError as error:
        raise ImageError("no JPEG, PNG or WebP image") from error
    except Exception as error:  # as in `decode`
        raise ImageError(" ".join(f"{type(error).__name__}: {error}".split())) from error
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
    return ImageHeader(image.format, width, height)


TURNED = range(5, 9)  # values of EXIF's orientation that swap width and height
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int | None:
    """The orientation of an image whose pixels are not loaded yet, by EXIF, a raw profile with EXIF, or else XMP.

    Headers and decoded pictures must agree, so both take it from here. `getexif` of a PNG would decode the pixels
    first, to look for metadata after them. Therefore that of the base class is called; such metadata have no effect.
    """
    try:
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except (SyntaxError, ValueError, struct.error):  # no EXIF in there; then it tells no orientation
        return None


def _displayed(size: tuple[int, int], orientation: int | None) -> tuple[int, int]:
    """Width and height of the upright image."""
    return size[::-1] if orientation in TURNED else size


def _check_scans(image: Image.Image, content: bytes) -> None:
    """A small progressive JPEG may hold thousands of scans, each of which goes over all pixels. Raises ImageError."""
    scans = content.count(b"\xff\xda") if "progressive" in image.info else 1
    if scans * image.width * image.height > MAX_SCANNED:
        raise ImageError(f"{scans:,} scans of {image.width} x {image.height} pixels are too many")


# Columns and rows of each pass: first column, first row, steps.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def _load_png(image: Image.Image, content: bytes) -> None:
    """Loads the pixels, and finds what Pillow passes over: a wrong checksum of the pixel data, rows that are missing
    (which it makes black), a missing palette (it makes all black). Raises ImageError.

    Pillow compares a transparent value that has not 8 bits with pixels that have; here it is made to fit them.
    """
    depth = color = interlaced = 0
    has_palette = False
    for kind, data in _chunks(content):
        if kind == b"IHDR":
            depth, color, interlaced = struct.unpack(">8xBBxxB", data)
        has_palette |= kind == b"PLTE"
    if image.mode == "P" and not has_palette:
        raise ImageError("its palette is missing")
    image.load()
    last_row = image.crop((0, image.height - 1, *image.size)).tobytes()
    if interlaced or not last_row.strip(b"\0"):
        expected = _raw_bytes(*image.size, depth, color, interlaced)
        compressed = b"".join(data for kind, data in _chunks(content) if kind == b"IDAT")
        if len(zlib.decompressobj().decompress(compressed, expected)) < expected:
            raise ImageError("it has fewer rows than its header says")
    transparent = image.info.get("transparency")
    if image.mode == "L" and depth < 8 and transparent is not None:
        image.info["transparency"] = transparent * 255 // (2**depth - 1)
    if image.mode == "RGB" and depth == 16 and transparent is not None:
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def _chunks(content: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(kind, data) of each chunk of a PNG up to its end mark. Raises ImageError for pixel data that are cut off or have
    changed."""
    view, start, kind = memoryview(content), 8, b""
    while start + 8 <= len(content) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, start)
        stop = start + 8 + length
        if kind == b"IDAT":
            if stop + 4 > len(content):
                raise ImageError("its pixel data are cut off")
            if content[stop : stop + 4] != zlib.crc32(view[start + 4 : stop]).to_bytes(4, "big"):
                raise ImageError("its pixel data are damaged (wrong checksum)")
        yield kind, view[start + 8 : stop]
        start = stop + 4


def _raw_bytes(width: int, height: int, depth: int, color: int, interlaced: bool) -> int:
    """Bytes of a PNG's pixel data, uncompressed, with the byte before each row that names its filter."""
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    total = 0
    for left, top, across, down in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -((left - width) // across), -((top - height) // down)
        total += rows * (1 + (columns * bits + 7) // 8) if columns else 0
    return total


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greys; Pillow keeps them in "I;16" or, when older, in "I"
        image = _to_eight_bits(image)
    if image.mode == "CMYK":
        return _cmyk_to_rgb(image)
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit greys -> "L", or "LA" where one of them is transparent."""
    grey_hw = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    pixels = ((grey_hw + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        pixels = np.stack([pixels, np.where(grey_hw == transparent, 0, 255).astype(np.uint8)], axis=-1)
    return Image.fromarray(pixels)


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
    margin: Callable[[int], int] = lambda spare: spare // 2


def resize_named(name: str) -> Resize:
    """The resize protocol of that name.

    `pil_antialias`: torchvision's Resize and CenterCrop on PIL images: antialiased bilinear, long side truncated.
    `cv2_bilinear`: cv2.INTER_LINEAR without antialias, sides rounded, floor centre crop.
    `adm_center_crop`: that of ADM (guided-diffusion), which DiT, SiT and others took over: both sides are halved by the
    mean of 2 x 2 pixels as long as the shorter one has twice the target, then antialiased bicubic, sides rounded, floor
    centre crop. A box is treated as a separate image.
    """
    if name not in RESIZES:
        raise DataError(f"unknown resize {name!r}: choose one of {', '.join(RESIZES)}")
    return RESIZES[name]()


def _pil_antialias() -> Resize:
    return Resize(
        apply=lambda image, size, box=None: image.resize(size, Image.Resampling.BILINEAR, box=box),
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

    return Resize(apply, long_side=lambda shorter, longer, target: round(longer * (target / shorter)))


def _adm_center_crop() -> Resize:
    def apply(image, size, box=None):
        image = image if box is None else image.crop(box)
        while min(image.size) >= 2 * min(size):
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        return image.resize(size, Image.Resampling.BICUBIC)

    def long_side(shorter, longer, target):
        while shorter >= 2 * target:
            shorter, longer = shorter // 2, longer // 2
        return round(longer * (target / shorter))

    return Resize(apply, long_side)


RESIZES = {"pil_antialias": _pil_antialias, "cv2_bilinear": _cv2_bilinear, "adm_center_crop": _adm_center_crop}


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @property
    def pixels(self) -> int:
        return self.height * self.width


def as_size(size: "Size | int") -> Size:
    """An int is the side of a square."""
    return Size(size, size) if isinstance(size, int) else size


def resize_to_cover(image: Image.Image, size: Size | int, resize: Resize) -> Image.Image:
    """Resizes so that the image just covers `size`, keeping the aspect ratio as the protocol rounds it.

    One side becomes that of `size`, the other one is not shorter. For a square, it is the shorter side.

    Raises ImageError where a picture like a thread would have more than MAX_PIXELS.
    """
    size = as_size(size)
    if image.width * size.height <= image.height * size.width:  # at most as wide for its height as `size`
        covered = size.width, resize.long_side(image.width, image.height, size.width)
    else:
        covered = resize.long_side(image.height, image.width, size.height), size.height
    if covered[0] * covered[1] > MAX_PIXELS:
        side = f"a shorter side of {size.width}" if size.height == size.width else f"{size.height} x {size.width}"
        raise ImageError(f"{image.width} x {image.height} pixels are too long and thin for {side}")
    return resize.apply(image, covered)


def resize_and_center_crop(image: Image.Image, size: Size | int, resize: Resize) -> Image.Image:
    """The centre of the image once it covers `size`."""
    size = as_size(size)
    image = resize_to_cover(image, size, resize)
    left, top = resize.margin(image.width - size.width), resize.margin(image.height - size.height)
    return image.crop((left, top, left + size.width, top + size.height))


def resize_and_random_crop(image: Image.Image, size: Size | int, resize: Resize, rng: random.Random) -> Image.Image:
    """A random part of the image once it covers `size`: from anywhere along the side that is too long."""
    size = as_size(size)
    image = resize_to_cover(image, size, resize)
    left, top = _below(rng, image.width - size.width + 1), _below(rng, image.height - size.height + 1)
    return image.crop((left, top, left + size.width, top + size.height))


def random_resized_crop(
    image: Image.Image,
    size: Size | int,
    resize: Resize,
    rng: random.Random,
    scale: tuple[float, float],
    enlargement: float = math.inf,
) -> Image.Image:
    """A random part with `scale` of the area, of 3/4 to 4/3 times the aspect ratio of `size`, resized to `size`. Parts
    that would be enlarged by more than `enlargement` are not taken.

    After ten draws that do not fit it takes the largest part of that aspect ratio in the centre, as torchvision's
    RandomResizedCrop nearly does.
    """
    size = as_size(size)
    aspect, least = size.width / size.height, (size.width / enlargement, size.height / enlargement)
    for _ in range(10):
        area = image.width * image.height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        ratio = aspect * math.exp((2 * rng.random() - 1) * math.log(4 / 3))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if max(1, least[0]) <= width <= image.width and max(1, least[1]) <= height <= image.height:
            left, top = _below(rng, image.width - width + 1), _below(rng, image.height - height + 1)
            break
    else:
        width = min(image.width, max(1, round(image.height * aspect)))
        height = min(image.height, max(1, round(image.width / aspect)))
        left, top = (image.width - width) // 2, (image.height - height) // 2
    return resize.apply(image, (size.width, size.height), (left, top, left + width, top + height))


def _below(rng: random.Random, bound: int) -> int:
    return int(rng.random() * bound)


CROPS = ("random_resized", "random", "center")


@dataclass(frozen=True)
class TrainingTransform:
    """Image bytes -> uint8 pixels (3, height, width); crop and flip are drawn from the given generator only.

    size: of the images; default: a square of `image_size`. enlargement: random parts that would be enlarged by more are
    not taken. JPEGs are decoded at reduced scale where even the smallest crop keeps twice the target's resolution.
    Raises DataError for settings that make no image.
    """

    config: DataConfig
    size: Size | None = None
    enlargement: float = math.inf

    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of what it gives."""
        return 3, *self.size

    def __post_init__(self):
        config = self.config
        resize_named(config.resize)
        if config.image_size < 1:
            raise DataError(f"data.image_size={config.image_size} must be at least 1")
        if config.crop not in CROPS:
            raise DataError(f"unknown data.crop {config.crop!r}: choose one of {', '.join(CROPS)}")
        if len(config.crop_scale) != 2 or not 0 < config.crop_scale[0] <= config.crop_scale[1] <= 1:
            raise DataError(f"data.crop_scale={config.crop_scale} must be two parts of the area, 0 < low <= high <= 1")
        if not 0 <= config.color_jitter <= 1:
            raise DataError(f"data.color_jitter={config.color_jitter} must lie between 0 and 1")
        if self.size is None:
            object.__setattr__(self, "size", as_size(config.image_size))

    def __call__(
        self,
        content: bytes,
        rng: random.Random,
        check_size: Callable[[int, int], None] = lambda width, height: None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """uint8 (3, height, width), in `out` where it is given. check_size: as of `decode`.

        Raises ImageError, Filtered, and what check_size raises; `out` may hold anything then."""
        config, size, resize = self.config, self.size, resize_named(self.config.resize)
        # The smallest crop's sides, as a part of the image's: its area at the most extreme aspect ratio.
        smallest = math.sqrt(config.crop_scale[0] * 3 / 4) if config.crop == "random_resized" else 1
        image = decode(content, draft_side=math.ceil(2 * max(size) / smallest), check_size=check_size)
        if config.crop == "random_resized":
            image = random_resized_crop(image, size, resize, rng, config.crop_scale, self.enlargement)
        elif config.crop == "random":
            image = resize_and_random_crop(image, size, resize, rng)
        else:
            image = resize_and_center_crop(image, size, resize)
        if config.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = pixels_chw(image, out)
        if config.color_jitter:
            pixels[:] = jitter_colors(pixels, rng, config.color_jitter)
        return pixels


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


def pixels_chw(image: Image.Image, out: np.ndarray | None = None) -> np.ndarray:
    """RGB image -> uint8 (3, height, width), contiguous and writable, in `out` where it is given."""
    return np.stack([np.asarray(band) for band in image.split()], out=out)  # half again as fast as to transpose
