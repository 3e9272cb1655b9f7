"""Bad and odd images and tars, each with its right outcome: `IMAGES` and `TARS`. All are made here, always alike.

The expected pixels are computed from the picture that was encoded, in NumPy, and never by `data.transforms`.
"""

import gzip
import io
import itertools
import pickle
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

SIDE = 32  # of the tars' pictures


class Pixels(NamedTuple):
    """It is used, with these pixels: uint8 (h, w, 3). tolerance: most that one may differ by; JPEG and WebP round."""

    rgb_hwc: np.ndarray
    tolerance: int = 0


class Skipped(NamedTuple):
    """It is left out, for this reason (a part of it)."""

    reason: str


class Undetectable(NamedTuple):
    """It is used with wrong pixels, and nothing that Pillow tells gives it away. rgb_hwc: what it was.

    share_off: of the pixels, so many are off by more than 16 of 255.
    """

    rgb_hwc: np.ndarray
    share_off: float


class Refused(NamedTuple):
    """The shard is refused with a DataError that names it and says this."""

    reason: str


class Delivered(NamedTuple):
    """The shard is read. pictures: (key, number of the picture) of all samples; skipped: key -> part of the reason."""

    pictures: list[tuple[str, int]]
    skipped: dict[str, str]


class Kind(NamedTuple):
    """One kind of image or tar. suffix: the image's in a tar."""

    name: str
    content: bytes
    outcome: Pixels | Skipped | Undetectable | Refused | Delivered
    why: str
    suffix: str = "jpg"


def picture(number: int, width: int = SIDE, height: int = SIDE) -> np.ndarray:
    """A smooth picture, another one for each number, which no turn or mirror leaves as it is: uint8 (h, w, 3)."""
    y, x = np.mgrid[0:height, 0:width] / 40
    waves = [np.sin(4 * x + number + 2 * c) * np.cos(3 * y + 3 * number - c) + (x - y) / 3 for c in range(3)]
    return np.rint(127.5 + 90 * np.stack(waves, -1)).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    """By Pillow. JPEG: quality 95 without chroma subsampling, unless the options say otherwise."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if kind == "JPEG":
        options = {"quality": 95, "subsampling": 0, **options}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def patched(content: bytes, start: int, replacement: bytes) -> bytes:
    """With other bytes from `start` on, as many as are given."""
    return content[:start] + replacement + content[start + len(replacement) :]


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    """With one bit of one byte turned."""
    return patched(content, place, bytes([content[place] ^ 1 << bit]))


def on_white(rgb_hwc: np.ndarray, alpha_hw: np.ndarray) -> np.ndarray:
    """Composited on white: uint8 (h, w, 3). alpha_hw: 0 to 1."""
    alpha = alpha_hw[..., None]
    return np.rint(rgb_hwc * alpha + 255 * (1 - alpha)).astype(np.uint8)


def grey(levels_hw1: np.ndarray) -> np.ndarray:
    return np.repeat(levels_hw1, 3, -1).astype(np.uint8)


def keyed(rgb_hwc: np.ndarray, transparent_hw1: np.ndarray) -> np.ndarray:
    """White where it is transparent."""
    return np.where(transparent_hw1, 255, rgb_hwc).astype(np.uint8)


# -------------------------------------------------------------------------------------------------------------- JPEG


PICTURE = picture(0, 48, 40)
TWO_FRAMES = {"save_all": True, "append_images": [Image.fromarray(~PICTURE)]}
JPEG_ROUNDS = 8  # of 255, at most, where chroma has full resolution; twice or three times that elsewhere
PLAIN = encoded(PICTURE, "JPEG")
PROGRESSIVE = encoded(PICTURE, "JPEG", progressive=True)
ALPHA = picture(7, 48, 40)[..., :1]
LARGE_PICTURE = picture(3, 192, 160)
LARGE = encoded(LARGE_PICTURE, "JPEG", quality=85)

# By libjpeg-turbo's jpeg_compress_struct.arith_code, which Pillow cannot set: 16 x 16 pixels, see `arithmetic_picture`.
ARITHMETIC = bytes.fromhex("""
    ffd8ffe000104a46494600010100000100010000ffdb004300080606070605080707070909080a0c140d0c0b0b0c1912130f141d1a1f1e1d
    1a1c1c20242e2720222c231c1c2837292c30313434341f27393d38323c2e333432ffdb0043010909090c0b0c180d0d1832211c2132323232
    32323232323232323232323232323232323232323232323232323232323232323232323232323232323232323232ffc90011080010001003
    011100021101031101ffcc000a0010100501101105ffda000c03010002110311003f00ff00a1a935600f44fdc21cd73384175de7300db0b6
    f7eb38ad1f5f636b5dd61f7cef8ac61b40809b16d7eeaa10355f500068a6bf80ffd9
""")
ARITHMETIC_PROGRESSIVE = bytes.fromhex("""
    ffd8ffe000104a46494600010100000100010000ffdb004300080606070605080707070909080a0c140d0c0b0b0c1912130f141d1a1f1e1d
    1a1c1c20242e2720222c231c1c2837292c30313434341f27393d38323c2e333432ffdb0043010909090c0b0c180d0d1832211c2132323232
    32323232323232323232323232323232323232323232323232323232323232323232323232323232323232323232ffca0011080010001003
    011100021101031101ffcc000600100110ffda000c03010002110310000001ff004663c7e895cdc50db51cf5b6a514ffcc00041005ffda00
    0801010001050218190dedbc25ffcc00041105ffda0008010301013f01156c15782cb1d0ffcc00041105ffda0008010201013f0138f2d2f2
    920f80ffcc00041005ffda0008010100063f02c0ffcc00041005ffda0008010100013f211f553c80ffda000c030100020003000000106a70
    ffcc00041105ffda0008010301013f1050b8d8ffcc00041105ffda0008010201013f1021a4e2b0ffcc00041005ffda0008010100013f1054
    6916ffd9
""")


def arithmetic_picture() -> np.ndarray:
    y, x = np.mgrid[0:16, 0:16]
    return np.stack([16 * x, 16 * y, 255 - 8 * x - 8 * y], -1).astype(np.uint8)


class Segment(NamedTuple):
    """A JPEG's marker and what belongs to it, up to the next marker; of the last one, to the end of the file."""

    marker: int
    start: int
    stop: int


def segments(jpeg: bytes) -> list[Segment]:
    """Those between the first marker and the pixels of the first scan."""
    found, start = [], 2
    while not found or found[-1].marker != 0xDA:
        stop = start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")
        found.append(Segment(jpeg[start + 1], start, stop))
        start = stop
    return found


def segment(jpeg: bytes, marker: int) -> Segment:
    return next(one for one in segments(jpeg) if one.marker == marker)


def without(jpeg: bytes, marker: int) -> bytes:
    """Without all segments of that marker."""
    kept = [jpeg[one.start : one.stop] for one in segments(jpeg) if one.marker != marker]
    return jpeg[:2] + b"".join(kept) + jpeg[segments(jpeg)[-1].stop :]


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    """With one more segment, before all others."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + jpeg[2:]


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """A baseline JPEG with another size in its header."""
    return patched(jpeg, segment(jpeg, 0xC0).start + 5, struct.pack(">HH", height, width))


ORIENTED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: upright.transpose(1, 0, 2)[::-1],
    7: lambda upright: upright.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda upright: upright.transpose(1, 0, 2)[:, ::-1],
}


def as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """How a picture is stored that EXIF's orientation turns upright. (Row 0 of 6 is the picture's right side.)"""
    return np.ascontiguousarray(ORIENTED[orientation](upright))


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def ycc_of(rgb_hwc: np.ndarray) -> np.ndarray:
    """JFIF's Y, Cb, Cr."""
    red, green, blue = np.moveaxis(rgb_hwc.astype(float), -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.rint(np.stack([luma, 128 + (blue - luma) / 1.772, 128 + (red - luma) / 1.402], -1)).clip(0, 255)


def inks() -> np.ndarray:
    """Cyan, magenta, yellow, black: uint8 (h, w, 4)."""
    return np.concatenate([picture(5, 48, 40), picture(6, 48, 40)[..., :1] // 2], -1)


def rgb_of_inks(cmyk_hwc: np.ndarray) -> np.ndarray:
    """Without any profile, each ink takes its part away."""
    light = 255 - cmyk_hwc.astype(float)
    return np.rint(light[..., :3] * light[..., 3:] / 255).astype(np.uint8)


def ycck_jpeg() -> bytes:
    """Inks as Photoshop stores them: inverted, as Y, Cb, Cr and K. Pillow inverts what it stores, so Y, Cb and Cr go in
    inverted, and Adobe's marker then says how they are meant."""
    cmyk = inks()
    stored = np.concatenate([255 - ycc_of(cmyk[..., :3]), cmyk[..., 3:]], -1).astype(np.uint8)
    jpeg = encoded(Image.fromarray(stored, "CMYK"), "JPEG")
    adobe = segment(jpeg, 0xEE)
    return patched(jpeg, adobe.stop - 1, b"\x02")


def press_lab(cyan: float, magenta: float, yellow: float, black: float) -> tuple[float, float, float]:
    """CIE L*a*b* that a made-up press of pale inks gives for inks from 0 to 1; white and black are whole."""
    paper = 1 - black
    return paper * (100 - 20 * (cyan + magenta + yellow)), paper * 20 * (magenta - cyan), paper * 20 * yellow


def press_profile() -> bytes:
    """An ICC profile (version 2) of that press: one table with two grid points for each ink."""

    def fixed(*numbers: float) -> bytes:
        return b"".join(struct.pack(">i", round(65536 * number)) for number in numbers)

    grid = b"".join(
        bytes([round(2.55 * light), round(128 + a), round(128 + b)])
        for light, a, b in (press_lab(*levels) for levels in itertools.product((0, 1), repeat=4))
    )
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += bytes(range(256)) * 4 + grid + bytes(range(256)) * 3
    table += bytes(-len(table) % 4)
    white = b"XYZ " + bytes(4) + fixed(0.9642, 1.0, 0.8249)
    start = 128 + 4 + 2 * 12
    tags = struct.pack(">I", 2) + b"A2B0" + struct.pack(">II", start, len(table))
    tags += b"wtpt" + struct.pack(">II", start + len(table), len(white))
    header = struct.pack(">I4xI", start + len(table) + len(white), 0x02100000) + b"prtrCMYKLab " + bytes(12) + b"acsp"
    header = (header + bytes(28) + fixed(0.9642, 1.0, 0.8249)).ljust(128, b"\0")
    return header + tags + table + white


def srgb_of_lab(light: float, a: float, b: float) -> np.ndarray:
    """CIE L*a*b* under D50 -> sRGB, 0 to 255."""
    y = (light + 16) / 116
    cubes = [t**3 if t > 6 / 29 else 3 * (6 / 29) ** 2 * (t - 4 / 29) for t in (y + a / 500, y, y - b / 200)]
    to_linear = np.array(  # Bradford adaptation from D50 to D65 within
        [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    )
    linear = (to_linear @ (np.array(cubes) * [0.9642, 1.0, 0.8249])).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def press_sheet() -> tuple[bytes, np.ndarray]:
    """A JPEG with a patch for each mixture of full inks, and its colours on that press."""
    mixtures = list(itertools.product((0, 1), repeat=4))
    patches = np.array(mixtures, np.uint8).reshape(4, 4, 4) * 255
    colors = np.array([srgb_of_lab(*press_lab(*levels)) for levels in mixtures]).reshape(4, 4, 3)
    large = [np.kron(values, np.ones((16, 16, 1))) for values in (patches, np.rint(colors))]
    sheet = Image.fromarray(large[0].astype(np.uint8), "CMYK")
    return encoded(sheet, "JPEG", quality=100, icc_profile=press_profile()), large[1].astype(np.uint8)


def scan_bomb() -> bytes:
    """1000 x 1000 pixels, and after them thousands of scans that say that nothing changes."""
    jpeg = encoded(np.zeros((1000, 1000), np.uint8), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:-2] + jpeg[last:-2] * 25_000 + jpeg[-2:]


def good_jpegs() -> list[Kind]:
    def good(name: str, content: bytes, why: str, rgb_hwc=PICTURE, tolerance=JPEG_ROUNDS) -> Kind:
        return Kind(f"JPEG {name}", content, Pixels(rgb_hwc, tolerance), why)

    levels = picture(4, 48, 40)[..., :1]
    cmyk = encoded(Image.fromarray(inks(), "CMYK"), "JPEG")
    sheet, sheet_colors = press_sheet()
    as_ycc = without(encoded(Image.fromarray(PICTURE, "YCbCr"), "JPEG"), 0xE0)
    pair = encoded(PICTURE, "MPO", quality=95, subsampling=0, **TWO_FRAMES)
    kinds = [
        good("baseline", PLAIN, "the most common of all"),
        good("with chroma at half resolution", encoded(PICTURE, "JPEG", subsampling=2), "as in cameras", tolerance=24),
        good("progressive", PROGRESSIVE, "as on the web"),
        good("with restart markers", encoded(PICTURE, "JPEG", restart_marker_blocks=3), "as cameras write it"),
        good("with arithmetic coding", ARITHMETIC, "libjpeg-turbo reads it", arithmetic_picture()),
        good("arithmetic and progressive", ARITHMETIC_PROGRESSIVE, "libjpeg-turbo reads it", arithmetic_picture()),
        good(
            "without the standard's Huffman tables",
            without(PLAIN, 0xC4),
            "as frames of motion JPEG: the tables are known",
        ),
        good("of grey", encoded(levels[..., 0], "JPEG"), "grey is red, green and blue alike", grey(levels)),
        good("of RGB, not YCbCr", with_segment(as_ycc, 0xEE, b"Adobe\0d\0\0\0\0\0"), "Adobe's marker says: no YCbCr"),
        good("of CMYK", cmyk, "Adobe stores inks inverted; without a profile each takes its part", rgb_of_inks(inks())),
        good("of CMYK without Adobe's marker", without(cmyk, 0xEE), "browsers take it as Adobe's", rgb_of_inks(inks())),
        good("of YCCK", ycck_jpeg(), "Photoshop's way to store CMYK", rgb_of_inks(inks())),
        good("of CMYK with a profile", sheet, "colours are what the profile says", sheet_colors, 4),
        good("with a second picture (MPO)", pair, "the first is the picture; as phones write it"),
        good("with bytes behind its end", PLAIN + b"\0" * 100 + PROGRESSIVE, "as phones append films"),
        good("with fill bytes before a marker", PLAIN[:2] + b"\xff" * 3 + PLAIN[2:], "allowed by the standard"),
        good("with cut EXIF", with_segment(PLAIN, 0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff"), "it turns nothing"),
        good("with EXIF of no sense", with_segment(PLAIN, 0xE1, b"Exif\0\0" + bytes(range(40))), "it turns nothing"),
        good("with EXIF orientation 9", encoded(PICTURE, "JPEG", exif=exif(9)), "there is no such turn"),
        good("with a comment of 60 kB", with_segment(PLAIN, 0xFE, b"c" * 60_000), "comments do not matter"),
        good("of 1 x 1", encoded(PICTURE[:1, :1], "JPEG"), "small, but whole", PICTURE[:1, :1]),
        good("of 10000 x 1", encoded(picture(1, 10_000, 1), "JPEG"), "a thread, but whole", picture(1, 10_000, 1), 24),
        Kind("JPEG named .png", PLAIN, Pixels(PICTURE, JPEG_ROUNDS), "what counts is the content", "png"),
        Kind("JPEG named .JPEG", PLAIN, Pixels(PICTURE, JPEG_ROUNDS), "upper case is as good", "JPEG"),
    ]
    for orientation in range(1, 9):
        jpeg = encoded(as_stored(PICTURE, orientation), "JPEG", exif=exif(orientation))
        kinds.append(good(f"with EXIF orientation {orientation}", jpeg, "shown upright by every viewer"))
    return kinds


def bad_jpegs() -> list[Kind]:
    places = {
        "in its first marker": (PLAIN, 1, "no JPEG"),
        "behind its first marker": (PLAIN, 2, "no JPEG"),
        "before its last two bytes": (PLAIN, len(PLAIN) - 2, "truncated"),
        "before its last byte": (PLAIN, len(PLAIN) - 1, "truncated"),
        "in its first rows": (LARGE, segments(LARGE)[-1].stop + 50, "truncated"),
        "in its middle": (LARGE, len(LARGE) // 2, "truncated"),
        "in its last rows": (LARGE, len(LARGE) - 30, "truncated"),
        "between two scans": (PROGRESSIVE, PROGRESSIVE.index(b"\xff\xc4", segments(PROGRESSIVE)[-1].stop), "truncated"),
        "in its last scan": (PROGRESSIVE, len(PROGRESSIVE) - 10, "truncated"),
    }
    names = {0xE0: "header", 0xDB: "quantization table", 0xC0: "size", 0xC4: "Huffman table", 0xDA: "scan's header"}
    for marker, name in names.items():
        one = segment(PLAIN, marker)
        places[f"in its {name}"] = (PLAIN, (one.start + one.stop) // 2, "runcated")
    places["before its pixels"] = (PLAIN, segments(PLAIN)[-1].stop, "truncated")
    kinds = [
        Kind(f"JPEG cut {place}", jpeg[:count], Skipped(reason), "part of it is missing")
        for place, (jpeg, count, reason) in places.items()
    ]

    def bad(name: str, content: bytes, reason: str, why: str) -> Kind:
        return Kind(f"JPEG {name}", content, Skipped(reason), why)

    size = segment(PLAIN, 0xC0).start
    bad_profile = encoded(Image.fromarray(inks(), "CMYK"), "JPEG", icc_profile=b"no profile" * 20)
    kinds += [
        bad("without pixels", PLAIN[: segments(PLAIN)[-1].start] + b"\xff\xd9", "cannot load", "nothing to see"),
        bad("without quantization tables", without(PLAIN, 0xDB), "broken", "cannot be decoded"),
        bad(
            "of height 0",
            with_size(PLAIN, 48, 0),
            "no JPEG",
            "its height would come behind the pixels: nobody writes it",
        ),
        bad("of 12 bits", patched(PLAIN, size + 4, b"\x0c"), "no JPEG", "Pillow has no room for it"),
        bad("of two components", patched(PLAIN, size + 9, b"\x02"), "no JPEG", "there are no such colours"),
        bad("of an unknown process", patched(PLAIN, size + 1, b"\xc5"), "broken", "differential JPEG: nobody reads it"),
        bad("of 65500 x 65500", with_size(PLAIN, 65500, 65500), "pixels", "a bomb of 4.3 billion pixels"),
        bad("of 25,000 scans", scan_bomb(), "scans", "a bomb: each scan goes over all pixels, which may take hours"),
        bad("behind a line break", b"\n" + PLAIN, "no JPEG", "a download gone wrong: not a JPEG any more"),
        bad("behind HTTP's header", b"HTTP/1.1 200 OK\r\n\r\n" + PLAIN, "no JPEG", "a download gone wrong"),
        bad("as text", PLAIN.decode("latin-1").encode(), "no JPEG", "written as UTF-8, which changes its bytes"),
        bad("gzipped", gzip.compress(PLAIN, mtime=0), "no JPEG", "Content-Encoding was not undone"),
        bad("CMYK with a broken profile", bad_profile, "profile", "what its inks look like is not known"),
    ]
    return kinds


def undetectable() -> list[Kind]:
    """Neither JPEG's nor WebP's pixels have a checksum: a bit turned within is most often decoded without a word.

    libjpeg knows more than Pillow tells: it warns where codes do not fit, and Pillow drops the warnings (its issue
    9106). With one bit turned, 400 times in 40 photographs of 256 x 256 pixels, Pillow 13.0 decodes 396, of which 100
    have more than 1% of the pixels off by more than 16; libjpeg-turbo 2.1.5 warns of 57 of these. With 512 bytes zeroed
    Pillow decodes 399, all of them off, and libjpeg warns of 359. So warnings would help and not suffice. What does is
    a checksum from elsewhere: `ibq shards check` holds a tar against the SHA-256 of its index.
    """
    pixels = segments(LARGE)[-1].stop
    tables = segment(LARGE, 0xDB)
    webp = encoded(LARGE_PICTURE, "WEBP", quality=80)
    webps = (flipped(webp, place) for place in range(60, len(webp)))

    def silent(name: str, content: bytes, share_off: float, why: str) -> Kind:
        return Kind(name, content, Undetectable(LARGE_PICTURE, share_off), why)

    return [
        silent("JPEG with a flipped bit in its pixels", flipped(LARGE, pixels + 21), 0.5, "codes have no checksum"),
        silent("JPEG with 512 zero bytes", patched(LARGE, pixels + 300, bytes(512)), 0.5, "codes have no checksum"),
        silent("JPEG with a flipped bit in its table", flipped(LARGE, tables.start + 5, 6), 0.5, "no checksum either"),
        silent("JPEG with a greater height", with_size(LARGE, 192, 168), 0.04, "what is missing is made grey"),
        silent("WebP with a flipped bit", next(filter(readable, webps)), 0.1, "codes have no checksum"),
    ]


def readable(content: bytes) -> bool:
    """Whether Pillow finds nothing wrong."""
    try:
        Image.open(io.BytesIO(content)).load()
    except OSError:
        return False
    return True


# --------------------------------------------------------------------------------------------------------------- PNG


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def packed(values_hwc: np.ndarray, depth: int) -> list[bytes]:
    """Rows of samples of so many bits, each with the byte before it that says: not filtered."""
    rows = []
    for row in values_hwc.reshape(len(values_hwc), -1):
        if depth == 16:
            rows.append(b"\0" + row.astype(">u2").tobytes())
        else:
            bits = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :]
            rows.append(b"\0" + np.packbits(bits).tobytes())
    return rows


GREY, COLORS, PALETTE, GREY_ALPHA, COLORS_ALPHA = 0, 2, 3, 4, 6  # PNG's colour types


def png(
    values_hwc: np.ndarray,
    depth: int,
    color: int,
    *chunks: tuple[bytes, bytes],
    interlaced: bool = False,
    size: tuple[int, int] | None = None,
    kept_rows: int | None = None,
    split: int = 1 << 30,
) -> bytes:
    """Of every kind, which Pillow cannot write. chunks: before the pixels; size: (width, height) if the header is to
    lie; kept_rows: only so many are written; split: bytes of pixel data in a chunk."""
    height, width = values_hwc.shape[:2]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = [row for top, left, down, across in passes for row in packed(values_hwc[top::down, left::across], depth)]
    pixels = zlib.compress(b"".join(rows[:kept_rows]))
    header = struct.pack(">IIBBBBB", *(size or (width, height)), depth, color, 0, 0, interlaced)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunk(*one) for one in chunks)
    for start in range(0, len(pixels), split):
        content += chunk(b"IDAT", pixels[start : start + split])
    return content + chunk(b"IEND", b"")


def shorts(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def good_pngs() -> list[Kind]:
    levels = PICTURE[..., :1]
    deep = PICTURE.astype(np.int64) * 257 + picture(8, 48, 40) - 128
    deep = deep.clip(0, 65535)
    deep_alpha = (ALPHA.astype(np.int64) * 257 + 77).clip(0, 65535)
    numbers = levels // 32
    colors = picture(9, 8, 1)[0]
    clear = picture(10, 8, 1)[0, :, 0]

    def good(name: str, content: bytes, rgb_hwc: np.ndarray, why: str, tolerance: int = 0) -> Kind:
        return Kind(f"PNG {name}", content, Pixels(rgb_hwc, tolerance), why, "png")

    plain = png(PICTURE, 8, COLORS)
    kinds = [
        good("of 8 bits", plain, PICTURE, "as it is"),
        good("in many chunks", png(PICTURE, 8, COLORS, split=100), PICTURE, "chunks of any size are one stream"),
        good("interlaced", png(PICTURE, 8, COLORS, interlaced=True), PICTURE, "seven passes are one picture"),
        good("of 16 bits, grey", png(deep[..., :1], 16, GREY), grey((deep[..., :1] + 128) // 257), "divided by 257"),
        good("of 16 bits", png(deep, 16, COLORS), (deep + 128) // 257, "by 257; Pillow cuts the low byte off", 1),
        good("of 16 bits, interlaced", png(deep, 16, COLORS, interlaced=True), (deep + 128) // 257, "the same", 1),
        good("of 8 bits with alpha", *_with_alpha(PICTURE, ALPHA, 8, COLORS_ALPHA), "on white", 1),
        good("of 16 bits with alpha", *_with_alpha(deep, deep_alpha, 16, COLORS_ALPHA), "on white", 1),
        good("grey with alpha", *_with_alpha(levels, ALPHA, 8, GREY_ALPHA), "on white", 1),
        good("grey of 16 bits with alpha", *_with_alpha(deep[..., :1], deep_alpha, 16, GREY_ALPHA), "on white", 1),
        good("with a transparent colour", *_with_key(PICTURE, 8, COLORS), "on white"),
        good("of 16 bits with a transparent colour", *_with_key(deep, 16, COLORS), "on white", 1),
        good(
            "of palette colours with transparency",
            png(numbers, 8, PALETTE, (b"PLTE", colors.tobytes()), (b"tRNS", clear[:6].tobytes())),
            on_white(colors[numbers[..., 0]], np.append(clear[:6], [255, 255])[numbers[..., 0]] / 255),
            "each entry has its own alpha, later ones none",
            1,
        ),
        good(
            "of palette colours, one of them transparent",
            png(numbers, 8, PALETTE, (b"PLTE", colors.tobytes()), (b"tRNS", b"\xff\xff\xff\0")),
            keyed(colors[numbers[..., 0]], numbers == 3),
            "on white",
        ),
        good(
            "with a number beyond its palette",
            png(numbers, 8, PALETTE, (b"PLTE", colors[:7].tobytes())),
            np.append(colors[:7], [[0, 0, 0]], 0)[numbers[..., 0]],
            "black, as in libpng and in browsers",
        ),
        good("animated (APNG)", encoded(PICTURE, "PNG", **TWO_FRAMES), PICTURE, "its first frame"),
        good(
            "animated, with a separate still picture",
            encoded(PICTURE, "PNG", default_image=True, **TWO_FRAMES),
            PICTURE,
            "the still one is what is shown where nothing moves",
        ),
        good("with EXIF", encoded(as_stored(PICTURE, 6), "PNG", exif=exif(6)), PICTURE, "shown upright"),
        good("with a broken EXIF", png(PICTURE, 8, COLORS, (b"eXIf", b"Ex")), PICTURE, "it turns nothing"),
        good("with a gamma", png(PICTURE, 8, COLORS, (b"gAMA", struct.pack(">I", 100_000))), PICTURE, "numbers stay"),
        good(
            "with a profile",
            encoded(PICTURE, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
            PICTURE,
            "numbers of RGB stay as they are, here as in every other trainer",
        ),
        good("with a broken profile", png(PICTURE, 8, COLORS, (b"iCCP", b"a\0\0none")), PICTURE, "numbers stay"),
        good("without its end mark", plain[:-12], PICTURE, "all pixels are there, and their checksum is right"),
        good("with bytes behind its end", plain + b"more", PICTURE, "viewers ignore them"),
        good("of 1 x 10000", png(picture(2, 1, 10_000), 8, COLORS), picture(2, 1, 10_000), "a thread, but whole"),
        good("of black only", png(0 * PICTURE, 8, COLORS), 0 * PICTURE, "black rows are not missing rows"),
        Kind("PNG named .webp", plain, Pixels(PICTURE), "what counts is the content", "webp"),
    ]
    for depth in (1, 2, 4):
        few = levels >> 8 - depth
        shown = grey(few * (255 // (2**depth - 1)))
        kinds += [
            good(f"of {depth} bits, grey", png(few, depth, GREY), shown, "spread over 0 to 255"),
            good(
                f"of {depth} bits, grey, one transparent",
                png(few, depth, GREY, (b"tRNS", shorts(0))),
                keyed(shown, few == 0),
                "on white",
            ),
            good(
                f"of {depth} bits, palette",
                png(few, depth, PALETTE, (b"PLTE", picture(11, 2**depth, 1).tobytes())),
                picture(11, 2**depth, 1)[0][few[..., 0]],
                "colours by number",
            ),
        ]
    for depth, values in ((2, levels >> 6), (4, levels >> 4), (8, levels), (16, deep[..., :1])):
        key = int(values[20, 20, 0])
        shown = grey((values + 128) // 257 if depth == 16 else values * (255 // (2**depth - 1)))
        content = png(values, depth, GREY, (b"tRNS", shorts(key)))
        name = f"of {depth} bits, grey, a middle one transparent"
        kinds.append(good(name, content, keyed(shown, values == key), "on white"))
    return kinds


def _with_alpha(values_hwc: np.ndarray, alpha_hw1: np.ndarray, depth: int, color: int) -> tuple[bytes, np.ndarray]:
    most = 2**depth - 1
    rgb = np.broadcast_to(values_hwc, (*values_hwc.shape[:2], 3)) * (255 / most)
    return png(np.concatenate([values_hwc, alpha_hw1], -1), depth, color), on_white(rgb, alpha_hw1[..., 0] / most)


def _with_key(values_hwc: np.ndarray, depth: int, color: int) -> tuple[bytes, np.ndarray]:
    """With the colour of one pixel transparent."""
    key = values_hwc[20, 20]
    shown = values_hwc if depth == 8 else (values_hwc + 128) // 257
    transparent = (values_hwc == key).all(-1, keepdims=True)
    return png(values_hwc, depth, color, (b"tRNS", shorts(*key))), keyed(shown, transparent)


def bad_pngs() -> list[Kind]:
    plain = png(PICTURE, 8, COLORS)
    many = png(PICTURE, 8, COLORS, split=100)
    pixels = plain.index(b"IDAT")
    places = {
        "in its signature": (plain, 5, "no JPEG, PNG"),
        "behind its signature": (plain, 8, "no JPEG, PNG"),
        "in its header": (plain, 22, "runcated"),
        "before its pixels": (plain, pixels - 4, "no JPEG, PNG"),
        "in its pixels": (plain, pixels + 500, "cut off"),
        "in its checksum": (plain, len(plain) - 14, "cut off"),
        "between two chunks": (many, many.index(b"IDAT", many.index(b"IDAT") + 1) - 4, "truncated"),
    }
    kinds = [
        Kind(f"PNG cut {place}", content[:count], Skipped(reason), "part of it is missing", "png")
        for place, (content, count, reason) in places.items()
    ]

    def bad(name: str, content: bytes, reason: str, why: str) -> Kind:
        return Kind(f"PNG {name}", content, Skipped(reason), why, "png")

    fewer_rows = png(PICTURE, 8, COLORS, interlaced=True, kept_rows=60)
    text = b"a\0\0" + zlib.compress(bytes(5_000_000))
    numbers = PICTURE[..., :1] // 32
    kinds += [
        bad("with a flipped bit in its pixels", flipped(plain, pixels + 700), "checksum", "its checksum tells"),
        bad("with a flipped bit near the end", flipped(plain, len(plain) - 18), "checksum", "its checksum tells"),
        bad("with a flipped bit in its header", flipped(plain, 19), "no JPEG, PNG", "its checksum tells"),
        bad("with 512 zero bytes", patched(plain, pixels + 300, bytes(512)), "checksum", "its checksum tells"),
        bad("with CR before each LF", plain.replace(b"\n", b"\r\n"), "no JPEG, PNG", "copied as if it were text"),
        bad("of fewer rows", png(PICTURE, 8, COLORS, kept_rows=39), "fewer rows", "the rest is not black"),
        bad("of fewer rows, interlaced", fewer_rows, "fewer rows", "of seven passes there are six and a half"),
        bad("without its palette", png(numbers, 8, PALETTE), "palette", "its colours are not known"),
        bad("of width 0", png(PICTURE[:, :0], 8, COLORS), "no JPEG, PNG", "nothing to see"),
        bad("of an unknown colour type", png(PICTURE, 8, 5), "no JPEG, PNG", "no such thing"),
        bad("of 12000 x 12000", png(PICTURE, 8, COLORS, size=(12_000, 12_000)), "12000 x 12000", "a bomb"),
        bad("of 4 billion pixels", png(PICTURE, 8, COLORS, size=(65_535, 65_535)), "pixels", "a bomb"),
        bad("with a text of 5 MB in 5 kB", png(PICTURE, 8, COLORS, (b"zTXt", text)), "too large", "a bomb"),
    ]
    return kinds


# -------------------------------------------------------------------------------------------------- WebP and others


def webps() -> list[Kind]:
    lossless = encoded(PICTURE, "WEBP", lossless=True)
    lossy = encoded(PICTURE, "WEBP", quality=95)
    moving = encoded(PICTURE, "WEBP", lossless=True, **TWO_FRAMES)
    with_alpha = encoded(np.concatenate([PICTURE, ALPHA], -1), "WEBP", lossless=True, exact=True)
    turned = encoded(as_stored(PICTURE, 8), "WEBP", lossless=True, exif=exif(8))
    size = lossless.index(b"VP8L") + 9  # 14 bits of width - 1, then 14 of height - 1

    def good(name: str, content: bytes, why: str, rgb_hwc=PICTURE, tolerance=0) -> Kind:
        return Kind(f"WebP {name}", content, Pixels(rgb_hwc, tolerance), why, "webp")

    def bad(name: str, content: bytes, reason: str, why: str) -> Kind:
        return Kind(f"WebP {name}", content, Skipped(reason), why, "webp")

    return [
        good("lossy", lossy, "as on the web", tolerance=24),
        good("lossless", lossless, "as it is"),
        good("with alpha", with_alpha, "on white", on_white(PICTURE, ALPHA[..., 0] / 255), 1),
        good("animated", moving, "its first frame"),
        good("with EXIF", turned, "shown upright"),
        bad("cut in its header", lossy[:10], "no JPEG, PNG or WebP", "part of it is missing"),
        bad("cut behind its header", lossy[:20], "decoder", "part of it is missing"),
        bad("cut in its middle", lossy[: len(lossy) // 2], "decoder", "part of it is missing"),
        bad("cut before its last bytes", lossless[:-8], "decoder", "part of it is missing"),
        bad("animated, cut in its first frame", moving[:200], "decoder", "part of it is missing"),
        bad("of 16384 x 16384", patched(lossless, size, b"\xff\xff\xff\x0f"), "pixels", "a bomb"),
    ]


def no_images() -> list[Kind]:
    html = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>no such picture</body></html>"
    contents = {
        "HTML": (html, "what many servers send in place of a missing picture"),
        "JSON": (b'{"error": "rate limited"}', "what many servers send in place of a picture"),
        "zeros": (bytes(5000), "a hole in a file, or a download that was never written"),
        "noise": (random.Random(0).randbytes(5000), "encrypted or overwritten"),
        "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "not fetched"),
        "PDF": (b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\ntrailer<<>>\n%%EOF\n", "no picture"),
        "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "a drawing and no pixels"),
        "an animated GIF": (encoded(PICTURE, "GIF", **TWO_FRAMES), "formats are JPEG, PNG and WebP"),
        "BMP": (encoded(PICTURE, "BMP"), "formats are JPEG, PNG and WebP"),
        "TIFF": (encoded(PICTURE, "TIFF"), "formats are JPEG, PNG and WebP"),
        "AVIF": (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(200), "formats are JPEG, PNG and WebP"),
    }
    kinds = [
        Kind(f"{name} named .jpg", content, Skipped("no JPEG, PNG or WebP image"), why)
        for name, (content, why) in contents.items()
    ]
    return [*kinds, Kind("0 bytes", b"", Skipped("empty (0 bytes)"), "nothing was written")]


THREADS = ("JPEG of 10000 x 1", "PNG of 1 x 10000")
IMAGES = [*good_jpegs(), *bad_jpegs(), *undetectable(), *good_pngs(), *bad_pngs(), *webps(), *no_images()]


# -------------------------------------------------------------------------------------------------------------- tars


BLOCK = 512
END = bytes(2 * BLOCK)


def member(name: str, content: bytes = b"", form: int = tarfile.USTAR_FORMAT, **fields) -> bytes:
    """A tar's member. fields: of its header, as tarfile.TarInfo names them."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(form, errors="surrogateescape") + content + bytes(-len(content) % BLOCK)


def tar(*members: bytes, end: bytes = END) -> bytes:
    return b"".join(members) + end


def good(number: int) -> bytes:
    """A sample that is as it should be: key g0, g1, ...; its picture has the same number."""
    return member(f"g{number}.png", pixels(number)) + member(f"g{number}.txt", b"a caption")


def pixels(number: int) -> bytes:
    return encoded(picture(number), "PNG")


def with_header(content: bytes, start: int, field: int, value: bytes) -> bytes:
    """With a field of the header at `start` changed, and its checksum made right."""
    header = patched(patched(content[start : start + BLOCK], field, value), 148, b" " * 8)
    return patched(content, start, patched(header, 148, b"%06o\0 " % sum(header)))


SIZE, TYPE = 124, 156  # places in a tar's header
GOODS = [("g0", 0), ("g1", 1), ("g2", 2)]
WHOLE = tar(good(0), good(1), good(2))
SECOND = len(good(0))  # where the header of g1.png is
THIRD = SECOND + len(good(1))


def damaged_tars() -> list[Kind]:
    """What webdataset by itself passes over in silence, wherever that is possible."""
    data = SECOND + BLOCK + 100
    image = len(pixels(1))
    padded = image + -image % BLOCK

    def bad(name: str, content: bytes, reason: str, why: str) -> Kind:
        return Kind(name, content, Refused(reason), why, "tar")

    def claiming(size_bytes: int, content: bytes = WHOLE, start: int = SECOND) -> bytes:
        """A size in binary, as GNU's tar writes large ones."""
        return with_header(content, start, SIZE, b"\x80" + size_bytes.to_bytes(11, "big"))

    def sized(size: str) -> bytes:
        """With a size of g1.png in a PAX header."""
        return tar(good(0), member("g1.png", pixels(1), tarfile.PAX_FORMAT, pax_headers={"size": size}), good(2))

    pax_bomb = tar(good(0), member("x", type=tarfile.XHDTYPE) * 1000, good(2))
    torn_pax = tar(good(0), member("pax", b"11 path=abc", type=tarfile.XHDTYPE))
    long_name = member("g1.png", b"long/" * 30, type=tarfile.GNUTYPE_LONGNAME)
    very_long_name = tar(good(0), claiming(1 << 80, long_name, 0), good(2))
    return [
        bad("cut between two samples", WHOLE[:THIRD], "end mark", "samples are missing, and nothing else tells it"),
        bad("cut between two members", WHOLE[: SECOND + BLOCK + padded], "end mark", "a member is missing"),
        bad("cut in a header", WHOLE[: SECOND + 200], "no whole", "samples are missing"),
        bad("cut behind a header", WHOLE[: SECOND + BLOCK], "no whole", "the member's bytes are missing"),
        bad("cut in an image", WHOLE[:data], "no whole", "samples are missing"),
        bad("cut in the padding", WHOLE[: SECOND + BLOCK + image + 1], "no whole", "samples are missing"),
        bad("without its end mark", WHOLE[: -len(END)], "end mark", "whether samples are missing is not known"),
        bad("flipped bit in a header's name", flipped(WHOLE, SECOND + 1), "damaged at byte", "its checksum tells"),
        bad("flipped bit in a header's size", flipped(WHOLE, SECOND + SIZE + 8), "damaged at byte", "the same"),
        bad("flipped bit in the first header", flipped(WHOLE, 1), "no whole", "its checksum tells"),
        bad("flipped bit in the last header", flipped(WHOLE, THIRD + 1), "damaged at byte", "its checksum tells"),
        bad("zeroed header", patched(WHOLE, SECOND, bytes(BLOCK)), "damaged at byte", "it looks like the end mark"),
        bad("zeroed first header", patched(WHOLE, 0, bytes(BLOCK)), "damaged at byte", "it looks like the end mark"),
        bad("noise in place of a header", patched(WHOLE, SECOND, b"\xa5" * BLOCK), "damaged at byte", "no header"),
        bad("bytes behind the end", WHOLE + b"garbage", "damaged at byte", "whose they are is not known"),
        bad("two tars in one file", WHOLE + WHOLE, "damaged at byte", "tar -A was meant: readers see the first only"),
        bad("a byte too much in its middle", WHOLE[:data] + b"x" + WHOLE[data:], "no whole", "all behind it is moved"),
        bad("a byte too few in its middle", WHOLE[:data] + WHOLE[data + 1 :], "no whole", "all behind it is moved"),
        bad("0 bytes", b"", "is empty (0 bytes)", "nothing was written"),
        bad("end mark only", bytes(10_240), "holds no sample", "tar made it of no files"),
        bad("HTML named .tar", b"<html>" + b" " * 2000, "no whole", "what servers send in place of a tar"),
        bad("gzipped", gzip.compress(WHOLE, mtime=0), "no whole, uncompressed tar", "its samples cannot be found"),
        bad("claim of 1 GB", with_header(WHOLE, SECOND, SIZE, b"07777777777\0"), "no whole", "there is no such end"),
        bad("claim of 2 GB", with_header(WHOLE, SECOND, SIZE, b"20000000000\0"), "claims", "no image is as large"),
        bad("claim of 2^60 bytes", claiming(1 << 60), "no whole", "no image is as large"),
        bad("claim of 2^80 bytes", claiming(1 << 80), "no whole", "no file is as large"),
        bad("long name of 2^80 bytes", very_long_name, "no whole", "no name is as long"),
        bad("1000 PAX headers in a row", pax_bomb, "no whole", "a bomb"),
        bad(
            "negative size",
            with_header(WHOLE, SECOND, SIZE, b"\xff" * 10 + b"\xfc\x00"),
            "no whole",
            "-1024 bytes, which lead tarfile back to where it was, for ever",
        ),
        bad("size of -2^80 bytes", with_header(WHOLE, SECOND, SIZE, b"\xff" + bytes(11)), "no whole", "no size"),
        bad("size that is no number", with_header(WHOLE, SECOND, SIZE, b"a lot......\0"), "no whole", "no number"),
        bad("PAX header with another size", sized("700"), "no whole", "the next header is not where it should be"),
        bad("PAX header with a negative size", sized("-1536"), "no whole", "it leads back to where it was, for ever"),
        bad("PAX header at the end", torn_pax, "no whole", "torn"),
        bad("texts only", tar(member("a.txt", b"text"), member("b.txt", b"text")), "holds no image", "not meant"),
        bad("GIFs only", tar(member("a.gif", encoded(PICTURE, "GIF"))), "holds no image", "formats: JPEG, PNG, WebP"),
        bad("folders only", tar(member("a", type=tarfile.DIRTYPE)), "holds no sample", "not meant"),
        bad("names without a suffix", tar(member("README", b"text")), "holds no sample", "not meant"),
    ]


def sparse(name: str, content: bytes, hole: int) -> bytes:
    """GNU tar's old sparse member: `content`, then `hole` bytes that are zero and not stored."""
    header = member(name, content, tarfile.GNU_FORMAT, type=tarfile.GNUTYPE_SPARSE)
    pieces = [(0, len(content)), (len(content) + hole, 0)]
    where = b"".join(b"%011o\0%011o\0" % piece for piece in pieces)
    header = with_header(header, 0, 386, where.ljust(96, b"\0"))
    return with_header(header, 0, 483, b"%011o\0" % (len(content) + hole))


class Opened:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self):
        return (exec, ("import builtins; builtins.ibq_unpickled = True",))


def sample(**members: bytes) -> bytes:
    """A sample with the key s; by itself the picture 7."""
    return b"".join(member(f"s.{suffix}", content) for suffix, content in members.items())


def odd_tars() -> list[Kind]:
    """Legal, but not what most writers write. Each between g0 and g1, which nothing may happen to."""

    def tar_of(members, pictures, skipped, end=END) -> tuple[bytes, Delivered]:
        members = [members] if isinstance(members, bytes) else members
        outcome = Delivered([("g0", 0), *pictures, ("g1", 1)], skipped)
        return tar(good(0), *members, good(1), end=end), outcome

    def read(name: str, members: bytes | list[bytes], why: str, *keys: str, end: bytes = END) -> Kind:
        """Comes with the picture 7 under each of the keys, if not as s."""
        return Kind(name, *tar_of(members, [(key, 7) for key in keys or ("s",)], {}, end), why, "tar")

    def skipped(name: str, members: bytes | list[bytes], reason: str, why: str, key: str = "s") -> Kind:
        return Kind(name, *tar_of(members, [], {key: reason}), why, "tar")

    image = pixels(7)
    plain = sample(png=image)
    long_key, very_long_key = "folder/" * 20 + "picture", "folder/" * 50 + "picture"
    gnu, pax, ustar = tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT
    comment = member("pax_global_header", b"52 comment=0123456789012345678901234567890123456789\n")
    links = [
        member("l.png", linkname="g0.png", type=tarfile.SYMTYPE),
        member("h.png", linkname="g0.png", type=tarfile.LNKTYPE),
        member("p.png", type=tarfile.FIFOTYPE),
        member("c.png", type=tarfile.CHRTYPE),
    ]
    no_file = {"p": "a pipe or a device", "c": "a pipe or a device"}
    own = [member("__meta__/a.json", b"{}"), member("__b__", b"1")]
    evil = pickle.dumps(Opened())
    zeroed = patched(plain, 2 * BLOCK, bytes(BLOCK))
    apart = [member("a.png", pixels(5)), member("b.png", pixels(6)), member("a.txt", b"caption of a")]
    apart_outcome = [("a", 5), ("b", 6)], {"a": "no image among its members: txt"}
    twice = [plain, good(4), sample(png=pixels(8))]
    outside = "leads out of its folder"
    return [
        read("as it should be", sample(png=image, json=b'{"width": 32}'), "most are"),
        read("PAX long name", member(f"{long_key}.png", image, pax), "more than 100 bytes", long_key),
        read("GNU long name", member(f"{long_key}.png", image, gnu), "more than 100 bytes", long_key),
        read("ustar long name", member(f"{long_key}.png", image, ustar), "in two fields", long_key),
        read("very long name", member(f"{very_long_key}.png", image, pax), "350 bytes", very_long_key),
        read("PAX times", member("s.png", image, pax, mtime=1.5), "as Python and bsdtar write them"),
        read("GNU's large numbers", member("s.png", image, gnu, uid=1 << 30), "in binary"),
        read("format of 1979", with_header(plain, 0, 257, bytes(8)), "no magic, no owner's name"),
        read("PAX global header", [with_header(comment, 0, TYPE, tarfile.XGLTYPE), plain], "by `git archive`"),
        read("unicode key", member("猫/été.png", image, pax), "UTF-8", "猫/été"),
        read("key that is no UTF-8", member("caf\udce9.png", image, gnu), "Latin-1, from an old disk", "caf\udce9"),
        read("key with a blank and a quote", member("a 'b\" c.png", image), "a name like any", "a 'b\" c"),
        read("./ before names", member("./s.png", image), "as `tar -c .` writes them", "./s"),
        read("suffix in upper case", sample(PNG=image, TXT=b"text"), "as good"),
        read("two dots in a name", member("s.large.png", image), "a dot in a name is a dot in a name", "s.large"),
        read("a mask, not an image", [plain, member("s.mask.npy", b"1")], "a member of the sample before it"),
        skipped("two images", sample(jpg=encoded(picture(7), "JPEG"), png=image), "2 images", "which is meant?"),
        read("class -1", sample(png=image, cls=b"-1"), "no class, which the picture does not need"),
        read("empty class", sample(png=image, cls=b""), "the same"),
        read("folders", [member("d", type=tarfile.DIRTYPE, mode=0o755), plain], "no samples"),
        Kind(
            "links, a pipe and a device",
            *tar_of(
                [*links, plain], [("s", 7)], {"l": "symbolic link to g0.png", "h": "hard link to g0.png", **no_file}
            ),
            "they hold no bytes, and are named",
            "tar",
        ),
        read("sparse member, old GNU", sparse("s.png", image, 2048), "zeros are filled in"),
        read("end mark of one block", plain, "GNU tar warns of it and reads on; all is there", end=bytes(BLOCK)),
        read("end mark of 1 MB", plain, "tar -b writes full records", end=bytes(1 << 20)),
        read("webdataset's own members", [*own, plain], "no samples"),
        read("a name without a suffix", [member("README", b"text"), plain], "no sample"),
        read("other members", sample(png=image, npy=b"1", bin=b"2"), "not looked at"),
        read("pickles", sample(png=image, pkl=evil, pickle=evil, pyd=evil, pth=evil), "never opened"),
        read("json that is no JSON", sample(png=image, json=b"{no json"), "nobody asks for it"),
        read("text that is no UTF-8", sample(png=image, txt=b"caf\xe9"), "what cannot be read is replaced"),
        read("empty text", sample(png=image, txt=b""), "a caption may be empty"),
        Kind("key twice", *tar_of(twice, [("s", 7), ("g4", 4), ("s", 8)], {}), "two samples", "tar"),
        Kind("members apart", *tar_of(apart, *apart_outcome), "tars are read forwards, without a search", "tar"),
        skipped("image of 0 bytes", sample(png=b""), "empty (0 bytes)", "nothing was written"),
        skipped("GIF", sample(gif=encoded(PICTURE, "GIF")), "no image among its members: gif", "not of our formats"),
        skipped("text alone", sample(txt=b"text"), "no image among its members: txt", "no image"),
        skipped("member twice", plain + plain, "two members are called s.png", "which one is meant is not known"),
        skipped("key that leads out", member("../s.png", image), outside, "keys name files", "../s"),
        skipped("key that leads out later", member("a/../../s.png", image), outside, "keys name files", "a/../../s"),
        skipped("absolute key", member("/etc/s.png", image), outside, "keys name files", "/etc/s"),
        skipped("class that is no number", sample(png=image, cls=b"cat"), "'cat' is no number", "it is not known"),
        skipped("class below 0", sample(png=image, cls=b"-2"), "'-2' is no number", "classes count from 0"),
        skipped(
            "class of 5000 digits", sample(png=image, cls=b"9" * 5000), "is no number", "there are no such classes"
        ),
        skipped("flipped bit in a PNG", sample(png=flipped(image, 900)), "checksum", "the PNG's checksum tells"),
        skipped("zeroed block in a PNG", zeroed, "checksum", "the PNG's checksum tells"),
    ]


class Silent(NamedTuple):
    """A tar whose damage no header tells, and the tar before it."""

    kind: Kind
    sound: bytes


def silent_tars() -> list[Silent]:
    """An index has their sha256, and `ibq shards check` compares it."""
    jpeg = tar(good(0), member("s.jpg", LARGE), good(1))
    block = (SECOND + BLOCK + segments(LARGE)[-1].stop) // BLOCK * BLOCK + 2 * BLOCK
    zeroed = Kind(
        "zeroed block in a JPEG",
        patched(jpeg, block, bytes(BLOCK)),
        Undetectable(LARGE_PICTURE, 0.1),
        "its pixels have no checksum, nor have the tar's bytes",
        "tar",
    )
    shorter = patched(WHOLE, THIRD, bytes(len(WHOLE) - THIRD))
    cut = Kind("zeros to the end", shorter, Delivered(GOODS[:2], {}), "it is a whole tar of fewer samples", "tar")
    key = "folder/" * 20 + "picture"
    named = tar(good(0), member(f"{key}.png", pixels(7), tarfile.GNU_FORMAT), good(1))
    renamed = Kind(
        "flipped bit in a long name",
        flipped(named, named.index(b"picture")),
        Delivered([("g0", 0), (key.replace("picture", "qicture"), 7), ("g1", 1)], {}),
        "names of more than 100 bytes lie outside the header and its checksum",
        "tar",
    )
    return [Silent(zeroed, jpeg), Silent(cut, WHOLE), Silent(renamed, named)]


SILENT = silent_tars()
TARS = [*damaged_tars(), *odd_tars(), *(silent.kind for silent in SILENT)]


def named(kinds: list[Kind]) -> Callable[[Kind], str]:
    """For pytest's ids; raises where two have the same name."""
    names = [kind.name for kind in kinds]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return lambda kind: kind.name
