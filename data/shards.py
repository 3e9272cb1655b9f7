"""WebDataset tars: finding, scanning, reading and writing them, and the bundled photographs."""

import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import braceexpand
import numpy as np
from PIL import Image
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander
from webdataset.writer import ShardWriter

from data import DataError
from data.transforms import ImageError, decode

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


class Skipped(NamedTuple):
    """A sample that was left out: the file or shard, the sample's key or file name, the reason in one line."""

    source: str
    key: str
    reason: str


# ---------------------------------------------------------------------------------------------------------- finding


def expand(spec: str | Iterable[str]) -> list[str]:
    """The tars that `spec` names, as paths: a folder (its *.tar, sorted), one tar, a brace pattern, a glob,
    `bundled:train` or `bundled:val` (the photographs in scikit-image's wheel), or a list of these.

    Raises DataError naming the part that gives nothing.
    """
    if spec is None:
        raise DataError("no data named: set data.train (and data.val) to tars, a folder of tars or bundled:train")
    if isinstance(spec, os.PathLike):
        spec = os.fspath(spec)
    if isinstance(spec, (bytes, dict)) or not isinstance(spec, Iterable):
        raise DataError(f"{spec!r} names no data: give a path (./{spec}), a pattern in quotes or a list of these")
    if not isinstance(spec, str):
        paths = [path for part in spec for path in expand(part)]
        if not paths:
            raise DataError("no data named: the list of tars is empty")
        return paths
    spec = os.path.expanduser(spec)  # the shell leaves the ~ of data.train=~/tars alone
    if spec.startswith("bundled:"):
        return _bundled(spec)
    if spec.startswith("pipe:") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", spec):
        raise DataError(f"{spec}: only local paths are read so far; copy the tars here and name their folder")
    if os.path.isdir(spec):
        paths = sorted(str(path) for path in Path(spec).glob("*.tar"))
        if not paths:
            raise DataError(f"no *.tar in the folder {spec}: pack images with `ibq shards pack FOLDER --out {spec}`")
        return paths
    if os.path.exists(spec):
        return [spec]
    try:
        patterns = list(braceexpand.braceexpand(spec))
    except ValueError as error:
        raise DataError(f"{spec}: {error}; a brace pattern reads like train-{{000000..000009}}.tar") from error
    paths = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern] * os.path.exists(pattern)
        if not found:
            of = f" (from {spec})" if pattern != spec else ""
            raise DataError(f"no such tar or folder: {pattern}{of}")
        paths += [path for one in found for path in expand(one)]
    return paths


# ---------------------------------------------------------------------------------------------------------- reading


class Sample(NamedTuple):
    """A raw sample: its key and the image file's bytes."""

    key: str
    image: bytes


@dataclass(frozen=True, eq=False)
class Shard:
    """A scanned tar: sample n lies in bytes starts_n[n] to stops_n[n], its members' headers included."""

    path: str
    starts_n: np.ndarray
    stops_n: np.ndarray

    def __len__(self):
        return len(self.starts_n)

    def read(self, index: int) -> Sample:
        """The sample's key and image bytes. Raises ImageError for a sample without one, DataError where I/O fails."""
        start, stop = int(self.starts_n[index]), int(self.stops_n[index])
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                content = file.read(stop - start)
        except OSError as error:
            raise DataError(f"cannot read the shard {self.path}: {error.strerror}") from error
        if len(content) < stop - start:
            raise DataError(f"the shard {self.path} became shorter while it was read: start again with the whole file")
        # A sample's members are a tar of their own: webdataset groups them just as it would in the whole shard.
        members = tar_file_expander([{"url": self.path, "stream": io.BytesIO(content)}])
        try:
            (sample,) = group_by_keys(members)
        except (ValueError, tarfile.TarError) as error:
            raise ImageError(f"sample {index} is no single sample: {error.args[0]}") from error
        for suffix in sorted(sample):
            if _is_image(suffix):
                return Sample(sample["__key__"], sample[suffix])
        raise ImageError(f"sample {index} ({sample['__key__']}) holds no image")


def _is_image(name: str) -> bool:
    return name.lower().rsplit(".", 1)[-1] in IMAGE_SUFFIXES


def scan(path: str) -> Shard:
    """Reads a tar's headers only: where each sample lies.

    webdataset alone passes over a tar that ends early, a broken header or zeroed blocks in silence. Here each of them,
    and a tar without any image, is a DataError that names the file. An unchanged file is scanned once in a process.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror}") from error
    if stat.st_size == 0:
        raise DataError(f"the shard {path} is empty (0 bytes): pack or copy it again, or leave it out")
    return _scan(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _scan(path: str, bytes_in_file: int, mtime_ns: int) -> Shard:
    starts, stops, images = [], [], 0
    try:
        with tarfile.open(path, mode="r:") as tar:
            last_key = None
            while (member := tar.next()) is not None:
                tar.members = []  # tarfile keeps every member otherwise
                key, suffix = base_plus_ext(member.name)
                if not member.isreg() or key is None or re.match(r"__[^/]*__($|/)", member.name):
                    continue
                if key != last_key:
                    starts.append(member.offset)
                    stops.append(0)
                    last_key = key
                stops[-1] = tar.offset
                images += _is_image(suffix)
            _check_end(path, tar)
    except tarfile.TarError as error:
        raise DataError(
            f"the shard {path} is no whole, uncompressed tar ({error}): pack or copy it again, or leave it out"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror}") from error
    if not images:
        raise DataError(f"the shard {path} holds no image ({', '.join(IMAGE_SUFFIXES)}): leave it out")
    return Shard(path, np.array(starts, np.int64), np.array(stops, np.int64))


def _check_end(path: str, tar: tarfile.TarFile) -> None:
    """A whole tar ends in zero blocks and has nothing after them."""
    tar.fileobj.seek(tar.offset)
    ended = False
    while block := tar.fileobj.read(1 << 20):
        if block.count(0) != len(block):
            raise tarfile.ReadError(f"damaged at byte {tar.offset:,}")
        ended = True
    if not ended:
        raise tarfile.ReadError("cut off before its end mark")


# ---------------------------------------------------------------------------------------------------------- packing


class PackReport(NamedTuple):
    """What `pack` wrote: the tars' paths, the count of images in them, and the images that it left out."""

    shards: list[str]
    samples: int
    skipped: list[Skipped]


def pack(
    folder: str | Path,
    out: str | Path,
    *,
    prefix: str = "train",
    max_samples_per_shard: int = 10_000,
    max_bytes_per_shard: int = 1_000_000_000,
    shorter_side: int | None = None,
    quality: int = 95,
    classes_from_folders: bool = False,
    shuffle: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackReport:
    """Writes every jpg, png and webp under `folder` (hidden files left aside) to WebDataset tars in the folder `out`.

    A sample is the image (its own bytes, unless it is resized), `.txt` and `.cls` from files of the same stem beside
    it, and `.json` with key, width and height in pixels (as displayed) and the source's relative path. The same folder
    always gives the same bytes. Images that cannot be decoded whole are left out and reported. On an error nothing
    appears in `out`.

    shorter_side: larger images are resized so that their shorter side has this many pixels and stored as JPEG of
        `quality` (1 to 100, no chroma subsampling); others keep their bytes.
    classes_from_folders: the class is the index of the image's top sub-folder, sorted; names go to `classes.json`.
    shuffle: orders samples by a hash of their paths, so that classes mix within shards; otherwise by path.
    progress: called with (images done, images in all).
    Raises DataError.
    """
    folder, out = Path(folder), Path(out).absolute()
    _check_pack_options(prefix, max_samples_per_shard, max_bytes_per_shard, shorter_side, quality)
    paths = find_images(folder)
    if not paths:
        raise DataError(f"no {', '.join(IMAGE_SUFFIXES)} under {folder}: name a folder that holds images")
    _check_no_tars(out)
    keys = _unique_keys(paths)
    classes = _folder_classes(folder, paths) if classes_from_folders else None

    def prepare(path: Path) -> dict | Skipped:
        try:
            return _prepare(folder, path, keys[path], shorter_side, quality, classes)
        except ImageError as error:
            return Skipped(str(folder / path), keys[path], str(error))
        except OSError as error:
            return Skipped(str(folder / path), keys[path], error.strerror or str(error))

    if shuffle:
        paths.sort(key=lambda path: hashlib.sha256(path.as_posix().encode("utf-8", "surrogateescape")).digest())
    skipped, samples = [], 0
    place = next(parent for parent in [out, *out.parents] if parent.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".ibq-pack-", dir=place) as scratch:
            pattern = scratch.replace("%", "%%") + f"/{prefix}-%06d.tar"
            limits = {"maxcount": max_samples_per_shard, "maxsize": max_bytes_per_shard}
            with ShardWriter(pattern, **limits, verbose=0, encoder=False, mtime=0.0) as writer:
                for done, result in enumerate(_map_in_threads(prepare, paths), start=1):
                    if isinstance(result, Skipped):
                        skipped.append(result)
                    else:
                        writer.write(result)
                        samples += 1
                    progress(done, len(paths))
            if not samples:
                raise DataError(f"none of the {len(paths)} images under {folder} can be read: {skipped[0].reason}")
            if classes is not None:
                (Path(scratch) / "classes.json").write_text(json.dumps(classes, indent=2) + "\n", encoding="utf-8")
            _check_no_tars(out)
            out.mkdir(parents=True, exist_ok=True)
            written = sorted(Path(scratch).iterdir())
            for file in written:
                os.replace(file, out / file.name)
    except OSError as error:
        raise DataError(f"cannot write shards to {out}: {error.strerror}; name another folder with --out") from error
    return PackReport([str(out / file.name) for file in written if file.suffix == ".tar"], samples, skipped)


def _check_pack_options(prefix, max_samples_per_shard, max_bytes_per_shard, shorter_side, quality):
    if not re.fullmatch(r"[A-Za-z0-9_-]+", prefix):
        raise DataError(f"prefix {prefix!r} must consist of letters, digits, - and _")
    if min(max_samples_per_shard, max_bytes_per_shard) < 1:
        raise DataError("a shard must have room for at least 1 sample and 1 byte")
    if shorter_side is not None and shorter_side < 1:
        raise DataError(f"shorter side {shorter_side} must be at least 1 pixel")
    if not 1 <= quality <= 100:
        raise DataError(f"quality {quality} must be from 1 to 100")


def _check_no_tars(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"cannot write shards to {out}: it is a file; name a folder with --out")
    if any(out.glob("*.tar")):
        raise DataError(f"{out} already holds tars: name another folder with --out, or remove them first")


def find_images(folder: Path) -> list[Path]:
    """Paths relative to `folder`, sorted, without hidden files and folders."""
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = (name for name in names if _is_image(Path(name).suffix) and not name.startswith("."))
        found += [(Path(parent) / name).relative_to(folder) for name in images]
    return sorted(found, key=lambda path: path.as_posix())


def _unique_keys(paths: list[Path]) -> dict[Path, str]:
    """Keys of letters, digits, - and _ only, short enough for every tar format."""
    keys, taken = {}, set()
    for path in paths:
        stem = path.with_suffix("").as_posix()
        base = re.sub(r"[^A-Za-z0-9_-]+", "_", stem.replace("/", "_")).strip("_") or "image"
        if len(base) > 72:
            base = base[:63] + "-" + hashlib.sha256(stem.encode("utf-8", "surrogateescape")).hexdigest()[:8]
        key = next(k for k in itertools.chain([base], (f"{base}-{n}" for n in itertools.count(2))) if k not in taken)
        taken.add(key)
        keys[path] = key
    return keys


def _folder_classes(folder: Path, paths: list[Path]) -> dict[str, int]:
    loose = [path for path in paths if len(path.parts) == 1]
    if loose:
        raise DataError(f"{folder / loose[0]} lies in no class folder: move it into one, or leave out the classes")
    return {name: index for index, name in enumerate(sorted({path.parts[0] for path in paths}))}


def _prepare(folder, path, key, shorter_side, quality, classes) -> dict:
    source = folder / path
    content = source.read_bytes()
    image = decode(content, draft_side=2 * shorter_side if shorter_side else None)
    suffix = {b"\xff\xd8": "jpg", b"\x89P": "png"}.get(content[:2], "webp")
    if shorter_side is not None and min(image.size) > shorter_side:
        scale = shorter_side / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
        content, suffix = buffer.getvalue(), "jpg"
    name = path.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    metadata = {"key": key, "width": image.width, "height": image.height, "source": name}
    sample = {"__key__": key, suffix: content, "json": json.dumps(metadata, ensure_ascii=False).encode()}
    if source.with_suffix(".txt").exists():
        sample["txt"] = source.with_suffix(".txt").read_bytes()
    if classes is not None:
        sample["cls"] = str(classes[path.parts[0]]).encode()
    elif source.with_suffix(".cls").exists():
        text = source.with_suffix(".cls").read_text(errors="replace").strip()
        if not re.fullmatch(r"\d+", text):
            raise DataError(f"{source.with_suffix('.cls')} holds {text[:40]!r}: a class is a number from 0")
        sample["cls"] = text.encode()
    return sample


def _map_in_threads(function, values: list) -> Iterator:
    """Results in order; Pillow releases the interpreter's lock while it decodes. At most 64 results wait in memory."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(values), 64):
            yield from pool.map(function, values[first : first + 64])


# --------------------------------------------------------------------------------------------- bundled photographs

# Photographs in scikit-image's wheel; its drawings and its downloads are left aside. Whole photographs are held out,
# of different kinds (people, an animal, things in rows), whose colours others have too: fifteen pictures are no web,
# and only the rocket has a blue sky. The motorcycles are one scene seen twice.
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


def _bundled(spec: str) -> list[str]:
    split = spec.removeprefix("bundled:")
    if split not in PHOTOGRAPHS:
        raise DataError(f"unknown {spec}: there are bundled:train and bundled:val")
    return expand(str(_bundled_folder() / split))


def _bundled_folder() -> Path:
    """Packs both splits into the cache once; many processes may start together. Its name holds its content's hash."""
    try:
        source = resources.files("skimage") / "data"
    except ModuleNotFoundError as error:
        raise DataError("the bundled photographs come with scikit-image: pip install scikit-image") from error
    missing = [name for names in PHOTOGRAPHS.values() for name in names if not (source / name).is_file()]
    if missing:
        raise DataError(f"this scikit-image lacks {', '.join(missing)}: pip install 'scikit-image>=0.22'")
    content = hashlib.sha256(f"{PHOTOGRAPHS} {PHOTOGRAPH_SIDE} {PHOTOGRAPH_QUALITY}".encode())
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
                for name in names:
                    (images / name).write_bytes((source / name).read_bytes())
                packed = Path(scratch) / "packed" / split
                pack(images, packed, prefix=split, shorter_side=PHOTOGRAPH_SIDE, quality=PHOTOGRAPH_QUALITY)
            try:
                os.rename(Path(scratch) / "packed", folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was first
                    raise
    except OSError as error:
        raise DataError(f"cannot write the bundled photographs to {cache}: {error.strerror}; set IBQ_CACHE") from error
    return folder


def cache_folder() -> Path:
    """$IBQ_CACHE, or ibq under $XDG_CACHE_HOME, or ~/.cache/ibq."""
    if "IBQ_CACHE" in os.environ:
        return Path(os.environ["IBQ_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ibq"
