"""The output of `ibq sample`: a folder of PNGs, an .npz in the format of ADM's evaluation, or one PNG grid."""

import glob
import hashlib
import itertools
import math
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.file_names import fitted
from data.folder_reader import find_images
from data.locks import file_lock
from data.unfinished import complete_file, remove_unfinished
from model_zoo.io.hashing import sha256_of
from trainer import TrainerError
from trainer.files import write_json, writing
from trainer.jobs.setup import SHARED_DISK, check_same_settings, read_record

SEEDS = "the first 63 bits of SHA-256 of 'SEED CLASS NTH', NTH the image's number among those of its class, from 0"
MAX_GRID_IMAGES = 1024  # a grid is built in memory
RECORD = "sample.json"
PARTS = "chunk_*.npy", "*_class_*.png"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"  # the last chunk of every PNG
NOT_FOLDERS = (".jpg", ".jpeg", ".webp", ".gif", ".tar", ".zip")  # suffixes that no folder is meant to have


class ImageToSample(NamedTuple):
    label: int
    seed: int


def seed_of(seed: int, label: int, nth: int) -> int:
    """See SEEDS. It depends on neither the other classes of a job nor its size."""
    return int.from_bytes(hashlib.sha256(f"{seed} {label} {nth}".encode()).digest()[:8], "big") >> 1


def output_bytes(out: Path) -> int:
    """The size of a file, or of all images in a folder."""
    return sum((out / image).stat().st_size for image in find_images(out)) if out.is_dir() else out.stat().st_size


def not_as_recorded(out: Path, record: Path) -> str:
    """What to say of files that `is_as_recorded` denies, up to the fix."""
    return f"{out} is not what {record} says it wrote: it was damaged or changed"


def is_as_recorded(out: Path, finished: dict) -> bool:
    """Whether the files have the bytes of a finished record, and an .npz its sha256. Raises OSError."""
    if finished.get("bytes") != output_bytes(out):
        return False
    return out.suffix.lower() != ".npz" or finished.get("sha256") == sha256_of(out)


class SampleOutput:
    """The output and its chunks, one per batch: the PNGs of a folder, or the .npy files in FILE.parts until a file is
    complete. Chunks are renamed when they are complete, so a chunk that has its name is valid, unless it is empty, as a
    crash of the machine may leave it."""

    def __init__(self, out: Path, classes: list[int], count: int, seed: int, batch_size: int, no_class: int):
        self.out, self.classes, self.count, self.seed, self.batch_size = out, classes, count, seed, batch_size
        self.no_class = no_class
        self.kind = out.suffix.lower() if out.suffix.lower() in (".npz", ".png") else "folder"
        self.is_folder = self.kind == "folder"
        self.parts = out if self.is_folder else out.with_name(fitted("", out.name, ".parts"))
        self.record = out / RECORD if self.is_folder else out.with_name(fitted("", out.name, ".json"))
        self.lock = file_lock(out.resolve())
        self.chunks = math.ceil(count / batch_size)
        self.whole_bytes: int | None = None  # of a folder that was finished before it lost images, see `finish`

    def images(self, chunk: int) -> list[ImageToSample]:
        """The images of a chunk, in order."""
        labels = self._labels(chunk).items()
        return [ImageToSample(label, seed_of(self.seed, label, n // len(self.classes))) for n, label in labels]

    def _labels(self, chunk: int) -> dict[int, int]:
        """The classes of a chunk's images, by their numbers."""
        numbers = range(chunk * self.batch_size, min((chunk + 1) * self.batch_size, self.count))
        return {number: self.classes[number % len(self.classes)] for number in numbers}

    def _names(self, chunk: int) -> list[str]:
        """The files of a chunk."""
        if not self.is_folder:
            return [f"chunk_{chunk:06d}.npy"]
        labels = self._labels(chunk).items()
        return [f"{n:06d}_class_{'none' if label == self.no_class else f'{label:04d}'}.png" for n, label in labels]

    def missing(self) -> list[int]:
        """The chunks that are not complete. Raises TrainerError."""
        with writing(self.out):
            files = (entry for entry in os.scandir(self.parts) if not entry.name.startswith("."))
            existing = {entry.name for entry in files if entry.stat().st_size}
        return [chunk for chunk in range(self.chunks) if not existing.issuperset(self._names(chunk))]

    def finished_images(self, missing: list[int]) -> int:
        """The number of images outside the missing chunks."""
        return self.count - sum(len(self._labels(chunk)) for chunk in missing)

    def begin(self, record: dict) -> bool:
        """Creates the output, or continues that of a job with the same settings; returns whether it is complete
        already. Raises TrainerError if the path is in use otherwise."""
        if self.kind == ".png" and self.count > MAX_GRID_IMAGES:
            raise TrainerError(
                f"a grid holds up to {MAX_GRID_IMAGES} images, not {self.count}: name a folder or FILE.npz with --out"
            )
        with writing(self.out):
            self._check_name()
            finished, begun = _read_record(self.record), _read_record(self.parts / RECORD)
            former = finished or begun
            if former is None and self.out.exists() and not (self.is_folder and not any(self.out.iterdir())):
                raise _not_ours(self.out)
            if former is not None:
                # Earlier versions recorded no size: their generators had one grid.
                before = {"size": record["settings"]["size"]} | former["settings"]
                check_same_settings(self.out, "samples", before, record["settings"], _how_to_repeat)
                if former["finished"] and self.out.exists() and not (self.is_folder and self.missing()):
                    if "bytes" in former["finished"] and not is_as_recorded(self.out, former["finished"]):
                        raise self._was_changed()
                    self._remove_parts()
                    return True
            self.parts.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.parts, RECORD, *PARTS)
            remove_unfinished(self.out.parent, glob.escape(self.out.name))
            if former is not None:
                self._remove_cut_off()
            if begun is None and not self.is_folder and any(self.parts.iterdir()):
                raise _not_ours(self.parts)
            if self.is_folder and former is not None:
                self.whole_bytes = (former["finished"] or {}).get("bytes", former.get("whole_bytes"))
            write_json(self.parts / RECORD, {**record, "finished": None, "whole_bytes": self.whole_bytes})
        return False

    def _was_changed(self) -> TrainerError:
        fix = "remove it to sample it again, or choose another --out"
        return TrainerError(f"{not_as_recorded(self.out, self.record)}; {fix}")

    def write(self, chunk: int, images_bhwc: np.ndarray) -> None:
        """Raises TrainerError."""
        arrays = images_bhwc if self.is_folder else [images_bhwc]
        with writing(self.out):
            for name, array in zip(self._names(chunk), arrays, strict=True):
                with complete_file(self.parts / name) as temporary, temporary.open("wb") as file:
                    if self.is_folder:
                        Image.fromarray(array).save(file, "PNG")
                    else:
                        np.save(file, array)
                    file.flush()
                    os.fsync(file.fileno())  # a crash of the machine could leave a part of it under its name

    def finish(self, record: dict) -> None:
        """Merges the chunks into the file, writes the record, and removes the chunks. Raises TrainerError, also where a
        folder that lost images is not the former one again: then others of its images were changed."""
        if gone := self.missing():
            raise TrainerError(
                f"{self.count - self.finished_images(gone):,} of {self.count:,} images are in {self.parts}, though all "
                f"were written: {SHARED_DISK}"
            )
        counts = np.bincount(np.arange(self.count) % len(self.classes))
        record["images_per_class"] = dict(zip(map(str, self.classes), counts.tolist(), strict=False))
        with writing(self.out):
            if not self.is_folder:
                with complete_file(self.out) as temporary, temporary.open("wb") as file:
                    self._write_npz(file) if self.kind == ".npz" else self._grid().save(file, "PNG")
            # See `is_as_recorded`.
            record["finished"]["bytes"] = output_bytes(self.out)
            if self.whole_bytes not in (None, record["finished"]["bytes"]):
                raise self._was_changed()
            if self.kind == ".npz":
                record["finished"]["sha256"] = sha256_of(self.out)
            write_json(self.record, record)
            self._remove_parts()

    def _check_name(self) -> None:
        """Raises TrainerError for an unknown kind of output, and for a folder in place of a file or the reverse."""
        if self.out.suffix.lower() in NOT_FOLDERS:
            raise TrainerError(f"{self.out} cannot be written: name a folder, FILE.npz or FILE.png with --out")
        if self.is_folder:
            if self.out.is_file():
                raise TrainerError(f"{self.out} is a file: name a folder, FILE.npz or FILE.png with --out")
        elif self.out.is_dir():
            raise TrainerError(f"{self.out} is a folder: name a file, or a folder without {self.kind}, with --out")

    def _remove_cut_off(self) -> None:
        """Removes chunks that a crash of the machine cut off, which are then sampled again."""
        for name in itertools.chain(*map(self._names, range(self.chunks))):
            path = self.parts / name
            if path.exists() and not (_is_whole_png(path) if self.is_folder else _is_whole_array(path)):
                path.unlink()

    def _remove_parts(self) -> None:
        """Removes the chunks of a file, the record last, and leaves files that are not ours."""
        if self.is_folder or _read_record(self.parts / RECORD) is None:
            return
        for name in os.listdir(self.parts):
            if re.fullmatch(r"chunk_\d+\.npy", name):
                (self.parts / name).unlink()
        remove_unfinished(self.parts, RECORD, *PARTS)
        (self.parts / RECORD).unlink(missing_ok=True)
        if not os.listdir(self.parts):
            self.parts.rmdir()

    def _arrays(self) -> Iterator[np.ndarray]:
        return (np.load(self.parts / name) for chunk in range(self.chunks) for name in self._names(chunk))

    def _write_npz(self, file) -> None:
        """``arr_0`` uint8 (n, h, w, 3), as ADM's evaluation reads it, and ``classes`` int64 (n,); chunk by chunk."""
        arrays = self._arrays()
        first_bhwc = next(arrays)
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, *first_bhwc.shape[1:])}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            # ZipInfo's default date makes the file depend on the images only.
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                member.write(first_bhwc.tobytes())
                for images_bhwc in arrays:
                    member.write(images_bhwc.tobytes())
            with archive.open(zipfile.ZipInfo("classes.npy"), "w") as member:
                labels = np.resize(np.array(self.classes, dtype=np.int64), self.count)
                np.lib.format.write_array(member, labels)

    def _grid(self) -> Image.Image:
        """One row per class if there are several images of each, else as square as possible."""
        images_nhwc = np.concatenate(list(self._arrays()))
        classes = min(len(self.classes), self.count)
        by_class = 1 < classes < self.count
        columns = math.ceil(self.count / classes if by_class else math.sqrt(self.count))
        rows = classes if by_class else math.ceil(self.count / columns)
        height, width = images_nhwc.shape[1:3]
        grid_hwc = np.full((rows * height, columns * width, 3), 255, dtype=np.uint8)
        for number, image_hwc in enumerate(images_nhwc):
            row, column = (number % classes, number // classes) if by_class else divmod(number, columns)
            grid_hwc[row * height :, column * width :][:height, :width] = image_hwc
        return Image.fromarray(grid_hwc)


def _is_whole_png(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-min(len(PNG_END), path.stat().st_size), os.SEEK_END)
        return file.read() == PNG_END


def _is_whole_array(path: Path) -> bool:
    try:
        np.load(path, mmap_mode="r")  # compares the size with the header
    except (ValueError, EOFError):
        return False
    return True


def _read_record(path: Path) -> dict | None:
    return read_record(path, {"settings", "finished"}, _not_ours(path))


def _not_ours(path: Path) -> TrainerError:
    return TrainerError(f"{path} already exists and was not written by `ibq sample`: choose another --out")


def _how_to_repeat(key: str, former: dict) -> str:
    value = former.get(key)
    if key == "generator":
        return "the same weights of the generator"
    option = f"--{key.replace('_', '-')}"
    return f"the same {option}" if value is None or key in ("classes", "tokenizer") else f"{option} {value}"
