"""Folders and zip files of images, read as shards."""

import contextlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from data.errors import DataError, ImageError
from data.samples import IMAGE_SUFFIXES, Sample, Window, WindowLimit, is_image
from data.transforms import MAX_BYTES


def is_hidden(path: PurePath) -> bool:
    """Whether a path in a folder or a zip file is left out: it, or a folder of it, begins with a dot, or it lies in the
    folder ``__MACOSX``, in which macOS keeps metadata of the files of a zip file."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def find_images(folder: Path) -> list[Path]:
    """Paths of all images relative to `folder`, sorted, without hidden files and folders."""
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(Path(name))]
        images = (name for name in names if is_image(Path(name).suffix) and not is_hidden(Path(name)))
        found += [(Path(parent) / name).relative_to(folder) for name in images]
    return sorted(found, key=lambda path: path.as_posix())


def is_folder_of_images(spec) -> bool:
    """Whether `spec` is a local folder without tars."""
    return isinstance(spec, (str, os.PathLike)) and os.path.isdir(spec) and not any(Path(spec).glob("*.tar"))


def is_zip(spec) -> bool:
    """Whether `spec` is a local zip file."""
    return isinstance(spec, (str, os.PathLike)) and os.path.isfile(spec) and str(spec).lower().endswith(".zip")


@dataclass(eq=False)
class _ListedShard:
    """A shard that knows its samples from a list of files. Subclasses have `__len__` and `read`."""

    url: str

    @property
    def name(self) -> str:
        return self.url

    def windows(self, first: int, stop: int | None, limit: WindowLimit) -> Iterator[Window]:
        stop = len(self) if stop is None else stop
        for begin in range(first, stop, limit.samples):
            yield Window(begin, min(limit.samples, stop - begin), self)


@dataclass(eq=False)
class FolderShard(_ListedShard):
    """The images of a folder and its sub-folders, in sorted order. The key of a sample is its relative path.

    Files NAME.txt, NAME.cls and NAME.json beside the image belong to the sample; ``cls`` may come from the top
    sub-folder instead.
    """

    images: list[Path]
    classes: dict[str, int] | None = None

    def __len__(self):
        return len(self.images)

    def read(self, index: int) -> Sample:
        """Raises DataError for a file that cannot be read."""
        try:
            return self.load(index)
        except OSError as error:
            path = Path(self.url) / self.images[index]
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error

    def load(self, index: int) -> Sample:
        """Raises OSError for a file that cannot be read."""
        relative = self.images[index]
        path = Path(self.url) / relative
        members = {path.suffix.lower().lstrip("."): path.read_bytes()}
        for suffix in ("txt", "cls", "json"):
            if (beside := path.with_suffix(f".{suffix}")).exists():
                members[suffix] = beside.read_bytes()
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
class ZipShard(_ListedShard):
    """The images in a zip file, sorted by name."""

    names: list[str]
    _file: tuple[int, zipfile.ZipFile] | None = None

    def __len__(self):
        return len(self.names)

    def read(self, index: int) -> Sample:
        name = self.names[index]
        try:
            if self._file is None or self._file[0] != os.getpid():  # a forked process must not share the file offset
                with _zip_damage():
                    self._file = os.getpid(), zipfile.ZipFile(self.url)
            file = self._file[1]
            return Sample(name, {name.rpartition(".")[2].lower(): read_from_zip(file, file.getinfo(name))})
        except OSError as error:
            raise DataError(f"cannot read {self.url}: {error.strerror or error}") from error


def zip_shard(path: str) -> ZipShard:
    """Raises DataError for a file that is not a zip file, or has no images."""
    with open_zip(path) as file:
        names = sorted(name for name in file.namelist() if is_image(name) and not is_hidden(PurePosixPath(name)))
    if not names:
        raise DataError(f"no {', '.join(IMAGE_SUFFIXES)} in {path}: name a zip file of images")
    return ZipShard(path, names)


def open_zip(path: str | Path) -> zipfile.ZipFile:
    """Raises DataError for a file that is not a zip file."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is no whole zip file: copy it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def read_from_zip(file: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """A member's content. Raises ImageError for one that is damaged or has more than MAX_BYTES, and OSError."""
    if member.file_size > MAX_BYTES:
        raise ImageError(f"{member.file_size:,} bytes are more than {MAX_BYTES:,}")
    with _zip_damage():
        return file.read(member)


@contextlib.contextmanager
def _zip_damage() -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zipfile.zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ImageError(f"damaged or encrypted in the zip file: {error}") from error
