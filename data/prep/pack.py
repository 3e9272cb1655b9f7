"""Pack folders and zip files of images into WebDataset tars."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

from PIL import Image

from data.classes import CLASSES_NAME, read_classes
from data.errors import DataError, ImageError
from data.file_names import fitted
from data.folder_reader import FolderFiles, ZipFiles, class_numbers, open_files, why_unread
from data.locks import WriterLock, file_lock
from data.parallel import in_threads
from data.samples import IMAGE_SUFFIXES, NO_CLASS, Skipped, fields_of, text_of
from data.transforms import decode

LAYOUTS = ("folder", "imagenet", "coco")
SPLITS = {"train", "val", "test"}


class PackReport(NamedTuple):
    """What `pack` wrote: the tars' paths, the number of images in them, and the images that it left out.

    without_caption: images without an annotation; they are packed. without_image: images that have annotations but do
    not exist: file names, or ids if the annotations give no name.
    """

    shards: list[str]
    samples: int
    skipped: list[Skipped]
    without_caption: list[str]
    without_image: list[str]


def pack(
    source: str | Path,
    out: str | Path,
    *,
    layout: str = "folder",
    annotations: str | Path | None = None,
    classes: str | Path | None = None,
    prefix: str = "train",
    max_samples_per_shard: int = 10_000,
    max_bytes_per_shard: int = 1_000_000_000,
    shorter_side: int | None = None,
    quality: int = 95,
    shuffle: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackReport:
    """Write every jpg, png and webp of a folder or zip file, except hidden files, to WebDataset tars in `out`.

    A sample is the image (its original bytes unless it is resized), `.txt` and `.cls`, and `.json`: the fields of the
    file NAME.json beside the image, and key, width and height in pixels (as displayed) and the source's relative path,
    which replace fields of the same names. Equal images give equal tars, and a zip file that contains one folder gives
    the same tars as that folder. Images that cannot be decoded completely are left out and reported. `out` must be new
    or empty; it appears when all tars are complete, and after an error it does not exist.

    layout: `folder`: caption and class are in files NAME.txt and NAME.cls beside the image. `imagenet`: the class is
        the index of the image's top folder in sorted order, and `classes.json` lists the names. `coco`: captions are in
        the file `annotations`; the first is the caption, and json has all of them as `captions`, and `image_id`.
    classes: a classes.json whose numbers the layout imagenet uses, so that all splits number a class alike.
    shorter_side: larger images are resized so that their shorter side has this many pixels and stored as JPEG of
        `quality` (1 to 100, no chroma subsampling); others keep their bytes.
    shuffle: order samples by a hash of their paths, so that classes mix within shards; otherwise by path.
    progress: called with (images done, images in total).
    Raises DataError.
    """
    out = Path(out).resolve()
    if layout not in LAYOUTS:
        raise DataError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    if (layout == "coco") != (annotations is not None):
        raise DataError("the layout coco takes annotations, and no other does: give both or neither")
    if classes is not None and layout != "imagenet":
        raise DataError("classes number the folders of the layout imagenet: add --layout imagenet, or leave them out")
    _check_pack_options(prefix, max_samples_per_shard, max_bytes_per_shard, shorter_side, quality)
    files = open_files(source)
    paths, unread = files.listing()[:2]
    if not paths:
        raise DataError(f"no {', '.join(IMAGE_SUFFIXES)} under {source}: name a folder or zip file that holds images")
    _check_new(out)
    numbers = _folder_classes(files, paths, classes) if layout == "imagenet" else None
    coco = _read_coco(annotations, paths) if annotations is not None else None
    samples = _Samples(files, unique_keys(paths), numbers, coco, shorter_side, quality)
    if shuffle:
        paths = mixed(paths)
    skipped = [Skipped(files.name(path), path.as_posix(), why_unread(path)) for path in unread]

    def usable_samples() -> Iterator[dict]:
        for done, result in enumerate(in_threads(samples.make, paths, os.cpu_count()), start=1):
            if isinstance(result, Skipped):
                skipped.append(result)
            else:
                yield result
            progress(done, len(paths))

    limits = {"maxcount": max_samples_per_shard, "maxsize": max_bytes_per_shard}
    shards = _write_tars(usable_samples(), out, prefix, limits, numbers)
    if not shards:
        raise DataError(f"none of the {len(paths)} images under {source} can be read: {skipped[-1].reason}")
    missing = (coco.without_caption, coco.without_image) if coco else ([], [])
    return PackReport(shards, len(paths) + len(unread) - len(skipped), skipped, *missing)


def _write_tars(
    samples: Iterator[dict], out: Path, prefix: str, limits: dict[str, int], classes: dict[str, int] | None
) -> list[str]:
    """Write the samples to tars in `out`, which appear only if there are samples and no error occurs."""
    from webdataset.writer import ShardWriter  # on first use: importing it takes half a second

    is_empty = True
    try:
        with _scratch_folder(out) as scratch:
            pattern = str(scratch).replace("%", "%%") + f"/{prefix}-%06d.tar"
            # A fractional mtime would add a second header of 1 KiB to each member.
            with ShardWriter(pattern, **limits, verbose=0, encoder=False, mtime=0) as writer:
                for sample in samples:
                    writer.write(sample)
                    is_empty = False
            if is_empty:
                return []
            if classes is not None:
                (scratch / CLASSES_NAME).write_text(json.dumps(classes, indent=2) + "\n", encoding="utf-8")
            names = sorted(path.name for path in scratch.glob("*.tar"))
            out.parent.mkdir(parents=True, exist_ok=True)
            os.rename(scratch, out)
    except OSError as error:
        raise DataError(f"cannot write shards to {out}: {error.strerror}; choose another folder with --out") from error
    return [str(out / name) for name in names]


@contextlib.contextmanager
def _scratch_folder(out: Path) -> Iterator[Path]:
    """A new folder, which the caller may rename to `out`: one rename shows all tars or none, even if it is killed.

    It lies beside `out` under a name that is always the same, so what a killed packing left is removed by the next.
    """
    existing = next(parent for parent in out.parents if parent.exists())
    name = "_".join(out.relative_to(existing).parts)
    scratch = existing / fitted(".", name, ".packing")
    with WriterLock(file_lock(existing / name), out) as lock:
        lock.take()
        if out.exists():
            out.rmdir()  # tells now, and not after hours, that it cannot be replaced, as if it holds files
        if scratch.exists():
            shutil.rmtree(scratch)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            if scratch.exists():
                shutil.rmtree(scratch)


def _check_pack_options(prefix, max_samples_per_shard, max_bytes_per_shard, shorter_side, quality):
    if not re.fullmatch(r"[A-Za-z0-9_-]+", prefix):
        raise DataError(f"prefix {prefix!r} must consist of letters, digits, - and _")
    if min(max_samples_per_shard, max_bytes_per_shard) < 1:
        raise DataError("a shard must have room for at least 1 sample and 1 byte")
    if shorter_side is not None and shorter_side < 1:
        raise DataError(f"shorter side {shorter_side} must be at least 1 pixel")
    if not 1 <= quality <= 100:
        raise DataError(f"quality {quality} must be from 1 to 100")


def _check_new(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"cannot write shards to {out}: it is a file; name a folder with --out")
    if any(out.glob("*.tar")):
        raise DataError(f"{out} already holds tars: name another folder with --out, or remove them first")
    if out.exists() and out.samefile("."):
        raise DataError(f"{out} is the current folder, which cannot be replaced: name a new folder in it with --out")


# --------------------------------------------------------------------------------------------------------------- keys


def mixed(paths: list[PurePath]) -> list[PurePath]:
    """In an order that mixes folders, by a hash of each path; the same for the same paths."""
    return sorted(paths, key=lambda path: hashlib.sha256(path.as_posix().encode("utf-8", "surrogateescape")).digest())


def unique_keys(paths: list[PurePath]) -> dict[PurePath, str]:
    """Each path's key, of letters, digits, - and _ only, short enough for every tar format."""
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


def _folder_classes(files: FolderFiles | ZipFiles, paths: list[PurePath], classes: str | Path | None) -> dict[str, int]:
    numbers = class_numbers(files, paths, None if classes is None else read_classes(classes))
    if classes is None and SPLITS.issuperset(numbers):
        raise DataError(f"{files.path} holds the folders {', '.join(numbers)}, which are no classes: name one of these")
    return numbers


# ---------------------------------------------------------------------------------------------------------------- coco


class _Coco(NamedTuple):
    """COCO's annotations, by the images' paths."""

    captions: dict[PurePath, list[str]]
    ids: dict[PurePath, int]
    without_caption: list[str]
    without_image: list[str]


def _read_coco(annotations: str | Path, paths: list[PurePath]) -> _Coco:
    try:
        content = json.loads(Path(annotations).read_bytes())
        files = {image["id"]: PurePosixPath(image["file_name"]) for image in content["images"]}
        captioned = [one for one in content["annotations"] if "caption" in one]
        texts = [(one["image_id"], one["caption"].strip().encode(errors="replace").decode()) for one in captioned]
    except OSError as error:
        raise DataError(f"cannot read the annotations {annotations}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{annotations} are no annotations as COCO has them: name captions_val2017.json") from error
    if not texts:
        raise DataError(f"{annotations} hold no captions: name captions_val2017.json or the like")
    captions = defaultdict(list)
    for number, text in texts:
        captions[files.get(number, PurePosixPath(f"image_id {number}"))].append(text)
    found = _annotated(annotations, captions.keys(), paths)
    if not found:
        raise DataError(f"{annotations} hold captions of none of the {len(paths)} images: name those of these images")
    ids = {file: number for number, file in reversed(files.items())}  # of entries for the same file, the first one's
    return _Coco(
        {path: captions[file] for path, file in found.items()},
        {path: ids[file] for path, file in found.items()},
        sorted(path.as_posix() for path in paths if path not in found),
        sorted(map(str, captions.keys() - set(found.values()))),
    )


def _annotated(
    annotations: str | Path, files: Collection[PurePosixPath], paths: list[PurePath]
) -> dict[PurePath, PurePosixPath]:
    """The annotated file that each image is: the one with the same path, or else one whose path ends with the image's,
    or the other way round. Annotations name `1.jpg` or `val/1.jpg` where the folder of images may be `val` or the one
    above. Raises DataError where this is not unique."""
    by_parts = {file.parts: file for file in files}
    found = {path: by_parts[path.parts] for path in paths if path.parts in by_parts}
    rest = {parts: file for parts, file in by_parts.items() if file not in set(found.values())}
    by_end = defaultdict(list)
    for parts, file in rest.items():
        for start in range(1, len(parts)):
            by_end[parts[start:]].append(file)
    owners: dict[PurePosixPath, PurePath] = {}
    for path in paths:
        if path in found:
            continue
        ends = [path.parts[start:] for start in range(1, len(path.parts))]
        same = [rest[parts] for parts in ends if parts in rest] + by_end.get(path.parts, [])
        if len(same) > 1:
            raise DataError(f"{annotations}: {path} may be {same[0]} or {same[1]}: pack one folder at a time")
        for file in same:
            if (other := owners.setdefault(file, path)) != path:
                raise DataError(
                    f"{annotations}: {file} may be {other} or {path}: pack one of their folders at a time, or write "
                    "the folder into file_name"
                )
            found[path] = file
    return found


# ------------------------------------------------------------------------------------------------------------- samples


class _Samples(NamedTuple):
    """Makes the samples of `pack`. keys: by path. classes: by name of the top folder, for the layout imagenet."""

    files: FolderFiles | ZipFiles
    keys: dict[PurePosixPath, str]
    classes: dict[str, int] | None
    coco: "_Coco | None"
    shorter_side: int | None
    quality: int

    def make(self, path: PurePosixPath) -> dict | Skipped:
        try:
            return self._sample(path)
        except ImageError as error:
            reason = str(error)
        except OSError as error:
            reason = f"{Path(error.filename).name}: {error.strerror}" if error.filename else str(error)
        return Skipped(self.files.name(path), self.keys[path], reason)

    def _sample(self, path: PurePosixPath) -> dict:
        content = self.files.read(path)
        image = decode(content, draft_side=2 * self.shorter_side if self.shorter_side else None)
        suffix = {b"\xff\xd8": "jpg", b"\x89P": "png"}.get(content[:2], "webp")
        if self.shorter_side is not None and min(image.size) > self.shorter_side:
            scale = self.shorter_side / min(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=self.quality, subsampling=0)
            content, suffix = buffer.getvalue(), "jpg"
        more, members = self._texts(path)
        name = path.as_posix().encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        key = self.keys[path]
        own = {"key": key, "width": image.width, "height": image.height, "source": name, **more}
        metadata = {**own, **self._json(path), **own}
        return {"__key__": key, suffix: content, "json": json.dumps(metadata).encode(), **members}

    def _texts(self, path: PurePath) -> tuple[dict, dict[str, bytes]]:
        """Additional fields of the sample's json, and its txt and cls. Raises DataError for files that hold neither."""
        if self.coco is not None:
            if path not in self.coco.captions:
                return {}, {}
            captions = self.coco.captions[path]
            return {"image_id": self.coco.ids[path], "captions": captions}, {"txt": captions[0].encode()}
        members = {}
        if (content := self.files.beside(path, "txt")) is not None:
            try:
                members["txt"] = text_of(content).encode()
            except ImageError as error:
                fix = f"save it as UTF-8 (`ibq shards check {self.files.path}` lists all such files)"
                raise self._unusable(path, "txt", f"is not in UTF-8: {fix}") from error
        if self.classes is not None:
            members["cls"] = str(self.classes[path.parts[0]]).encode()
        elif (content := self.files.beside(path, "cls")) is not None:
            label = text_of(content, errors="replace").strip()
            if label not in NO_CLASS:
                if not re.fullmatch("[0-9]+", label):
                    raise self._unusable(path, "cls", f"holds {label[:40]!r}: a class is a number from 0")
                members["cls"] = label.encode()
        return {}, members

    def _json(self, path: PurePath) -> dict:
        """What NAME.json beside the image holds. Raises DataError for a file that holds no fields."""
        if (content := self.files.beside(path, "json")) is None:
            return {}
        try:
            return fields_of(content)
        except ImageError as error:
            raise self._unusable(path, "json", f"cannot be kept ({error}): repair or remove it") from error

    def _unusable(self, path: PurePath, suffix: str, what: str) -> DataError:
        return DataError(f"{self.files.name(path.with_suffix(f'.{suffix}'))} {what}")
