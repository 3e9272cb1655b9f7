"""The photographs in scikit-image's wheel, as tars: `bundled:train` and `bundled:val`. Each photograph is one class."""

import hashlib
import itertools
import os
import tempfile
from importlib import resources
from pathlib import Path

from data.cache import cache_folder
from data.errors import DataError
from data.prep.pack import pack

BUNDLED = "bundled:"
# Without the wheel's drawings and its downloads. The held-out photographs are of different kinds (a person, an animal,
# coins) and have colours that training photographs also have; only the rocket has a blue sky. Both motorcycles show the
# same scene, so they are in the same split.
PHOTOGRAPHS = {
    "train": (
        *("brick.png", "cell.png", "clock_motion.png", "coffee.png", "grass.png", "gravel.png"),
        *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "page.png"),
        *("retina.jpg", "rocket.jpg", "text.png"),
    ),
    "val": ("astronaut.png", "camera.png", "chelsea.png", "coins.png"),
}
PHOTOGRAPH_SIDE = 256
PHOTOGRAPH_QUALITY = 95  # JPEG decodes about three times as fast as PNG here


def photographs(spec: str) -> str:
    """The folder of tars for `bundled:train` or `bundled:val`. Raises DataError."""
    split = spec.removeprefix(BUNDLED)
    if split not in PHOTOGRAPHS:
        raise DataError(f"unknown {spec}: there are bundled:train and bundled:val")
    return str(_folder() / split)


def _folder() -> Path:
    """Pack both splits into the cache, once. The folder's name contains a hash of its content."""
    try:
        source = resources.files("skimage") / "data"
    except ModuleNotFoundError as error:
        raise DataError("the bundled photographs come with scikit-image: pip install scikit-image") from error
    missing = [name for names in PHOTOGRAPHS.values() for name in names if not (source / name).is_file()]
    if missing:
        raise DataError(f"this scikit-image lacks {', '.join(missing)}: pip install 'scikit-image>=0.22'")
    content = hashlib.sha256(f"{PHOTOGRAPHS} {PHOTOGRAPH_SIDE} {PHOTOGRAPH_QUALITY} classes".encode())
    for name in itertools.chain(*PHOTOGRAPHS.values()):
        content.update((source / name).read_bytes())
    cache = cache_folder()
    folder = cache / f"photographs-{content.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".photographs-", dir=cache) as scratch:
            for split, names in PHOTOGRAPHS.items():
                images = Path(scratch) / "images" / split
                images.mkdir(parents=True)
                for number, name in enumerate(names):
                    (images / name).write_bytes((source / name).read_bytes())
                    (images / name).with_suffix(".cls").write_text(str(number))
                packed = Path(scratch) / "packed" / split
                pack(images, packed, prefix=split, shorter_side=PHOTOGRAPH_SIDE, quality=PHOTOGRAPH_QUALITY)
            try:
                os.rename(Path(scratch) / "packed", folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster
                    raise
    except OSError as error:
        raise DataError(f"cannot write the bundled photographs to {cache}: {error.strerror}; set IBQ_CACHE") from error
    return folder
