"""Folders and zip files of images, read as shards."""

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError, ImageError
from data.samples import IMAGE_SUFFIXES, Sample, Shard, Window, WindowLimit, is_image
from data.transforms import MAX_BYTES

ZIP_SUFFIX = ".zip"


def find_images(folder: Path) -> list[Path]:
    """Paths of all images relative to `folder`, sorted, without hidden files and folders."""
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = (name for name in names if is_image(Path(name).suffix) and not name.startswith("."))
        found += [(Path(parent) / name).relative_to(folder) for name in images]
    return sorted(found, key=lambda path: path.as_posix())


def is_folder_of_images(spec) -> bool:
    """Whether `spec` is a local folder without tars."""
    return isinstance(spec, (str, os.PathLike)) and os.path.isdir(spec) and not any(Path(spec).glob("*.tar"))


def is_zip(spec) -> bool:
    """Whether `spec` is a local zip file."""
    return isinstance(spec, (str, os.PathLike)) and os.path.isfile(spec) and str(spec).lower().endswith(ZIP_SUFFIX)


@dataclass(eq=False)
class FolderShard:
    """The images of a folder and its sub-folders, in sorted order. The key of a sample is its relative path.

    Files NAME.txt, NAME.cls and NAME.json beside the image belong to the sample; ``cls`` may come from the top
    sub-folder instead.
    """

    url: str
    images: list[Path]
    classes: dict[str, int] | None = None

    @property
    def name(self) -> str:
        return self.url

    def __len__(self):
        return len(self.images)

    def windows(self, first: int, stop: int | None, limit: WindowLimit) -> Iterator[Window]:
        return _windows_by_count(self, first, len(self) if stop is None else stop, limit)

    def read(self, index: int) -> Sample:
        relative = self.images[index]
        path = Path(self.url) / relative
        try:
            members = {path.suffix.lower().lstrip("."): path.read_bytes()}
            for suffix in ("txt", "cls", "json"):
                if (beside := path.with_suffix(f".{suffix}")).exists():
                    members[suffix] = beside.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        if self.classes is not None:
            members["cls"] = str(self.classes[relative.parts[0]]).encode()
        return Sample(relative.as_posix(), members)


def folder_shard(folder: str, class_from_folder: bool = False) -> FolderShard:
    """Raises DataError for a folder without images, or with images and tars."""
    images, has_tars = find_images(Path(folder)), any(Path(folder).glob("*.tar"))
    if images and has_tars:
        raise DataError(
            f"{folder} holds images and tars: name a folder with one kind only, or the tars as {folder}/*.tar"
        )
    if not images:
        raise DataError(f"neither {', '.join(IMAGE_SUFFIXES)} nor tars under {folder}: name a folder that holds images")
    if not class_from_folder:
        return FolderShard(folder, images)
    if loose := [image for image in images if len(image.parts) == 1]:
        raise DataError(f"{folder}/{loose[0]} is in no class folder: move it into one")
    names = sorted({image.parts[0] for image in images})
    return FolderShard(folder, images, {name: number for number, name in enumerate(names)})


@dataclass(eq=False)
class ZipShard:
    """The images in a zip file, sorted by name."""

    url: str
    names: list[str]
    _file: tuple[int, zipfile.ZipFile] | None = None

    @property
    def name(self) -> str:
        return self.url

    def __len__(self):
        return len(self.names)

    def windows(self, first: int, stop: int | None, limit: WindowLimit) -> Iterator[Window]:
        return _windows_by_count(self, first, len(self) if stop is None else stop, limit)

    def read(self, index: int) -> Sample:
        name = self.names[index]
        suffix = name.rpartition(".")[2]
        try:
            if self._file is None or self._file[0] != os.getpid():  # a forked process must not share the file offset
                self._file = os.getpid(), zipfile.ZipFile(self.url)
            file = self._file[1]
            if (bytes_of_image := file.getinfo(name).file_size) > MAX_BYTES:
                raise ImageError(f"{bytes_of_image:,} bytes are more than {MAX_BYTES:,}")
            return Sample(name, {suffix.lower(): file.read(name)})
        except (zipfile.BadZipFile, zipfile.zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise ImageError(f"damaged or encrypted in the zip file: {error}") from error
        except OSError as error:
            raise DataError(f"cannot read {self.url}: {error.strerror or error}") from error


def zip_shard(path: str) -> ZipShard:
    """Raises DataError for a file that is not a zip file, or has no images."""
    try:
        with zipfile.ZipFile(path) as file:
            names = sorted(name for name in file.namelist() if is_image(name) and not _is_hidden(name))
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is no whole zip file: copy it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not names:
        raise DataError(f"no {', '.join(IMAGE_SUFFIXES)} in {path}: name a zip file of images")
    return ZipShard(path, names)


def _is_hidden(name: str) -> bool:
    return name.startswith("__MACOSX/") or any(part.startswith(".") for part in name.split("/"))


class _IndexedWindow(Window):
    def __init__(self, shard: Shard, first: int, count: int):
        super().__init__(first, count)
        self.shard = shard

    def read(self, n: int) -> Sample:
        return self.shard.read(self.first + n)


def _windows_by_count(shard: Shard, first: int, stop: int, limit: WindowLimit) -> Iterator[Window]:
    for begin in range(first, stop, limit.samples):
        yield _IndexedWindow(shard, begin, min(limit.samples, stop - begin))
