import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from comparing import refusal
from PIL import ExifTags, Image
from samples import encoded, picture
from torchvision.transforms import v2

from data import DataConfig, DataError, ImageError, decode
from data.transforms import (
    TrainingTransform,
    image_header,
    jitter_colors,
    random_resized_crop,
    resize_and_center_crop,
    resize_named,
    resize_to_cover,
)


def transform_of(**settings) -> TrainingTransform:
    return TrainingTransform(DataConfig(**settings))


def pixel(image, x=0, y=0):
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def test_alpha_is_composited_on_white():
    half_red = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert pixel(decode(encoded(half_red, "PNG"))) == (255, 127, 127)
    assert pixel(decode(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG"))) == (255, 255, 255)
    assert pixel(decode(encoded(Image.new("LA", (4, 4), (0, 0)), "PNG"))) == (255, 255, 255)
    assert pixel(decode(encoded(half_red, "WEBP", lossless=True))) == (255, 127, 127)


def test_grey_and_cmyk_become_rgb():
    assert pixel(decode(encoded(Image.new("L", (4, 4), 90), "PNG"))) == (90, 90, 90)
    red = pixel(decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)))
    assert red[0] > 250 and max(red[1:]) < 5


def test_draft_keeps_the_asked_side_and_nearly_the_pixels():
    content = encoded(picture(3, (400, 320)), "JPEG", quality=95)
    assert decode(content, draft_side=80).size == (100, 80)
    assert decode(content, draft_side=81).size == (200, 160)
    assert decode(content, draft_side=1000).size == (400, 320)
    whole, drafted = (decode(content, draft_side=side).resize((40, 32), 2) for side in (None, 80))
    assert np.abs(np.asarray(whole).astype(int) - np.asarray(drafted)).mean() < 1.5


EXIF = Image.Exif()
EXIF[ExifTags.Base.Orientation] = 6
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def png_with(*chunks: tuple[bytes, bytes], after_pixels: bool = False) -> bytes:
    """A PNG of 16 x 8 pixels with these chunks before or after its pixels."""
    content = encoded(picture(0, (16, 8)), "PNG")
    at = content.index(b"IEND" if after_pixels else b"IDAT") - 4
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return content[:at] + b"".join(parts) + content[at:]


def raw_profile(exif: bytes) -> bytes:
    """As ImageMagick writes it."""
    return b"Raw profile type exif\0\nexif\n%8d\n" % len(exif) + exif.hex().encode()


TURNED_PICTURES = {
    "EXIF in a JPEG": lambda: encoded(picture(0, (16, 8)), exif=EXIF),
    "XMP in a JPEG": lambda: encoded(picture(0, (16, 8)), xmp=XMP),
    "EXIF in a WebP": lambda: encoded(picture(0, (16, 8)), "WEBP", exif=EXIF),
    "XMP in a WebP": lambda: encoded(picture(0, (16, 8)), "WEBP", xmp=XMP),
    "EXIF in a PNG": lambda: png_with((b"eXIf", EXIF.tobytes()[6:])),
    "XMP in a PNG": lambda: png_with((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
    "raw profile in a PNG": lambda: png_with((b"tEXt", raw_profile(EXIF.tobytes()))),
}
UPRIGHT_PICTURES = {
    "EXIF after the pixels": lambda: png_with((b"eXIf", EXIF.tobytes()[6:]), after_pixels=True),
    "raw profile that is none": lambda: png_with((b"tEXt", raw_profile(EXIF.tobytes())[:-3] + b"xyz")),
    "EXIF that is none": lambda: png_with((b"eXIf", b"nothing of the kind")),
}


@pytest.mark.parametrize("kind", [*TURNED_PICTURES, *UPRIGHT_PICTURES])
def test_the_header_has_the_size_of_the_decoded_picture(kind):
    content = (TURNED_PICTURES | UPRIGHT_PICTURES)[kind]()
    size = (8, 16) if kind in TURNED_PICTURES else (16, 8)
    told = []
    assert decode(content, check_size=lambda *one: told.append(one)).size == size
    assert told == [size] and image_header(content)[1:] == size


def test_a_header_is_read_without_the_pixels():
    for content in (encoded(picture(0, (16, 8)), xmp=XMP), TURNED_PICTURES["XMP in a PNG"]()):
        at = content.index(b"IDAT") + 4 if b"IDAT" in content else content.index(b"\xff\xda") + 14
        assert image_header(content[:at])[1:] == (8, 16)
        with pytest.raises(ImageError):
            decode(content[:at])


@pytest.mark.parametrize("size", [(61, 40), (40, 61), (50, 50), (97, 33), (20, 31)])
def test_pil_antialias_is_torchvision(size):
    image = picture(1, size)
    ours = resize_and_center_crop(image, 32, resize_named("pil_antialias"))
    theirs = v2.Compose([v2.Resize(32), v2.CenterCrop(32)])(image)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_cv2_bilinear_rounds_sides_and_has_no_antialias():
    cv2 = pytest.importorskip("cv2")
    image = picture(1, (97, 50))
    ours = resize_to_cover(image, 32, resize_named("cv2_bilinear"))
    assert ours.size == (62, 32)  # 62.08; and 83 -> 53.12, 84 -> 53.76
    assert resize_to_cover(picture(1, (84, 50)), 32, resize_named("cv2_bilinear")).size == (54, 32)
    assert resize_to_cover(picture(1, (84, 50)), 32, resize_named("pil_antialias")).size == (53, 32)
    assert np.array_equal(np.asarray(ours), cv2.resize(np.asarray(image), (62, 32), interpolation=cv2.INTER_LINEAR))


def box_kernel(distance):
    return np.where((distance > -0.5) & (distance <= 0.5), 1.0, 0.0)


def bicubic_kernel(distance):
    """Keys' with a = -1/2."""
    x = np.abs(distance)
    return np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((2.5 - 0.5 * x) * x - 4) * x + 2, 0.0))


def slowly_resized(pixels_hwc, size, kernel):
    """Each output pixel is the kernel's mean of the input, first along rows, then along columns, rounded each time. The
    kernel is as wide as an output pixel where that is the wider one."""
    for axis, count in ((1, size[0]), (0, size[1])):
        length = pixels_hwc.shape[axis]
        scale = length / count
        centers = (np.arange(count) + 0.5) * scale
        weights = kernel((np.arange(length) + 0.5 - centers[:, None]) / max(scale, 1))
        weights /= weights.sum(1, keepdims=True)
        pixels_hwc = np.floor(np.moveaxis(np.tensordot(weights, pixels_hwc, (1, axis)), 0, axis) + 0.5)
    return pixels_hwc


def slow_adm(pixels_hwc, side):
    while min(pixels_hwc.shape[:2]) >= 2 * side:
        height, width = pixels_hwc.shape[0] // 2, pixels_hwc.shape[1] // 2
        pixels_hwc = slowly_resized(pixels_hwc, (width, height), box_kernel)
    scale = side / min(pixels_hwc.shape[:2])
    size = round(pixels_hwc.shape[1] * scale), round(pixels_hwc.shape[0] * scale)
    pixels_hwc = slowly_resized(pixels_hwc, size, bicubic_kernel)
    top, left = (pixels_hwc.shape[0] - side) // 2, (pixels_hwc.shape[1] - side) // 2
    return pixels_hwc[top : top + side, left : left + side]


# The shorter side below the target, between it and its double, at its double, and halved two and three times.
@pytest.mark.parametrize("size", [(20, 31), (32, 32), (61, 40), (40, 63), (64, 97), (131, 130), (300, 259), (33, 331)])
def test_adm_center_crop_is_as_it_is_described(size):
    noise = np.random.default_rng(0).integers(-20, 21, (size[1], size[0], 3))
    image = Image.fromarray((np.asarray(picture(1, size)) // 2 + 64 + noise).astype(np.uint8))  # nothing clipped
    ours = np.asarray(resize_and_center_crop(image, 32, resize_named("adm_center_crop"))).astype(int)
    difference = np.abs(ours - slow_adm(np.asarray(image).astype(float), 32))
    assert difference.max() <= 1 and difference.mean() < 0.3  # Pillow goes along columns first where it is less work
    other = np.asarray(resize_and_center_crop(image, 32, resize_named("pil_antialias"))).astype(int)
    assert np.abs(ours - other).mean() > 1 or size == (32, 32)


def test_adm_center_crop_of_a_part():
    """A random crop is its box, and nothing from outside it."""
    image = picture(2, (200, 150))
    ours = resize_named("adm_center_crop").apply(image, (32, 32), (10, 20, 150, 149))
    alone = resize_named("adm_center_crop").apply(image.crop((10, 20, 150, 149)), (32, 32))
    assert np.array_equal(np.asarray(ours), np.asarray(alone))
    transform = transform_of(image_size=32, crop="random_resized", resize="adm_center_crop", flip=False)
    assert transform(encoded(image, "PNG"), random.Random(0)).shape == (3, 32, 32)


@pytest.mark.parametrize("resize", ["pil_antialias", "cv2_bilinear", "adm_center_crop"])
def test_a_thread_is_refused_before_it_fills_the_memory(resize):
    """1 x 10000 pixels with a shorter side of 256 would have 655 million of them."""
    thread = encoded(Image.new("RGB", (1, 10_000)), "PNG")
    for crop in ("center", "random"):
        with pytest.raises(ImageError, match="1 x 10000 pixels are too long and thin"):
            transform_of(crop=crop, resize=resize, flip=False)(thread, random.Random(0))
    assert transform_of(crop="random_resized", resize=resize, flip=False)(thread, random.Random(0)).any() == 0


def test_missing_opencv_is_named(monkeypatch):
    resize_named.__globals__["_cv2_bilinear"].cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    assert "pip install opencv-python-headless" in refusal(DataError, resize_named, "cv2_bilinear")


def test_unknown_names_are_errors():
    assert "pil_antialias, cv2_bilinear, adm_center_crop" in refusal(DataError, resize_named, "bicubic")
    transform_of()
    for name, value in [("crop", "middle"), ("crop_scale", [0.0, 1.0]), ("crop_scale", [1.0, 0.5]), ("image_size", 0)]:
        assert name in refusal(DataError, transform_of, **{name: value})


@pytest.mark.parametrize("crop", ["random_resized", "random", "center"])
@pytest.mark.parametrize("size", [(90, 41), (41, 90), (20, 20), (300, 8)])
def test_training_transform_depends_on_its_generator_only(crop, size):
    transform = transform_of(image_size=24, crop=crop)
    content = encoded(picture(2, size))
    first = transform(content, random.Random(5))
    random.random(), np.random.random(), torch.rand(1)
    assert first.shape == (3, 24, 24) and first.dtype == np.uint8 and first.flags.c_contiguous
    assert np.array_equal(first, transform(content, random.Random(5)))
    assert len({transform(content, random.Random(seed)).tobytes() for seed in range(12)}) > 1


def test_random_resized_crop_covers_the_asked_areas():
    boxes = []

    class Recorder:
        def apply(self, image, size, box):
            boxes.append(box)

    rng = random.Random(0)
    for _ in range(500):
        random_resized_crop(Image.new("RGB", (120, 80)), 16, Recorder(), rng, (0.2, 1.0))
    areas = [(right - left) * (bottom - top) / (120 * 80) for left, top, right, bottom in boxes]
    ratios = [(right - left) / (bottom - top) for left, top, right, bottom in boxes]
    assert 0.19 < min(areas) < 0.25 and max(areas) > 0.8
    assert 0.7 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.4
    assert all(0 <= left < right <= 120 and 0 <= top < bottom <= 80 for left, top, right, bottom in boxes)


def test_flip_happens_half_the_time_and_can_be_left_out():
    content = encoded(picture(2, (30, 30)), "PNG")
    results = {}
    for flip in (True, False):
        transform = transform_of(image_size=30, crop="center", crop_scale=[1.0, 1.0], flip=flip)
        results[flip] = [transform(content, random.Random(seed)).tobytes() for seed in range(60)]
    upright = np.asarray(Image.open(io.BytesIO(content))).transpose(2, 0, 1).tobytes()
    assert set(results[False]) == {upright}
    assert 15 < results[True].count(upright) < 45 and len(set(results[True])) == 2


class Drawn:
    """A generator with chosen draws: contrast, saturation, hue, and the offsets of red, green and blue."""

    def __init__(self, *draws):
        self.draws = iter(draws)

    def random(self):
        return next(self.draws)


def jittered(color, *draws):
    return jitter_colors(np.array(color, dtype=np.uint8)[:, None, None], Drawn(*draws), 1.0)[:, 0, 0].tolist()


def test_color_jitter_is_drawn_from_the_generator_given():
    colors = np.random.default_rng(0).integers(0, 256, (3, 5, 7), dtype=np.uint8)
    assert np.array_equal(jitter_colors(colors, random.Random(0), 0.0), colors)
    for seed in range(5):
        once, again = (jitter_colors(colors, random.Random(seed), 0.5) for _ in range(2))
        assert np.array_equal(once, again) and not np.array_equal(once, colors)


def test_color_jitter_changes_one_thing_at_a_time():
    keep = 0.5
    assert jittered((200, 90, 30), keep, keep, keep, keep, keep, keep) == [200, 90, 30]
    assert jittered((200, 90, 30), 0.0, keep, keep, keep, keep, keep) == [128, 128, 128]  # no contrast: mid grey
    assert jittered((200, 90, 40), keep, 0.0, keep, keep, keep, keep) == [110, 110, 110]  # no saturation: the mean
    assert jittered((255, 0, 0), keep, keep, 0.5 + 1 / 3, keep, keep, keep) == [0, 255, 0]  # a third of a turn
    assert jittered((77, 77, 77), keep, keep, 0.9, keep, keep, keep) == [77, 77, 77]  # hue turns about the grey axis
    assert jittered((100, 100, 100), keep, keep, keep, 1.0, keep, 0.0) == [164, 100, 36]  # a quarter of the range
