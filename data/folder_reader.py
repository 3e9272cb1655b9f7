"""Folders and zip files of images: their files, and reading them as shards."""

import contextlib
import logging
import os
import stat
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

from data.errors import DataError, ImageError
from data.file_kinds import PACKED_TARS
from data.samples import ANY_IMAGE, IMAGE_SUFFIXES, UNREAD_IMAGES, Sample, Skipped, Window, WindowLimit
from data.text import printable
from data.transforms import MAX_BYTES, ImageHeader, image_header

logger = logging.getLogger(__name__)

BESIDE = ("txt", "cls", "json")  # suffixes of the files beside an image that belong to its sample
PICTURES = (*IMAGE_SUFFIXES, *UNREAD_IMAGES)
NAMED_SUFFIXES = 4  # of files that are not read


class Listing(NamedTuple):
    """Paths of images, sorted. unread: of pictures in formats that are not read. beside: of files that belong to an
    image and have a suffix in capitals, by the path with the suffix in lower case. others: of what is no picture."""

    images: list[PurePath]
    unread: list[PurePath]
    beside: dict[PurePath, PurePath]
    others: list[PurePath]


def list_folder(folder: Path) -> Listing:
    """The pictures of a folder relative to it, without hidden files and folders.

    Links to folders are followed, except to one that the link is in. Raises DataError, also for a folder that cannot be
    read, for a link to nothing that may have been a folder, and for images beside tars: a part of the samples would be
    missing in silence.
    """
    return _listing(folder, _files_in(folder))


def _files_in(folder: Path) -> list[Path]:
    """All files of a folder relative to it, without hidden ones. Raises as `list_folder`."""
    if not folder.is_dir():
        raise DataError(f"no such folder: {folder}")
    found = []
    for path in _walk(folder, _refuse):
        found.append(path.relative_to(folder))
        if path.suffix[1:].lower() not in (*PICTURES, *BESIDE):
            _check_link(path)
    return found


def _walk(folder: Path, on_error: Callable[[OSError], None] | None) -> Iterator[Path]:
    """All files of a folder and of its sub-folders, without hidden ones; those of a folder before those of its
    sub-folders. on_error: called with the error of a folder that cannot be read, which is passed over otherwise."""
    above = {}  # folder -> the identities of it and of the folders that it is in
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=on_error):
        own = above.pop(parent, frozenset()) | {_identity(parent)}
        inside = {name: os.path.join(parent, name) for name in folders if not is_hidden(Path(name))}
        folders[:] = [name for name, path in inside.items() if _identity(path) not in own]
        above.update({inside[name]: own for name in folders})
        yield from (Path(parent) / name for name in names if not is_hidden(Path(name)))


def part_beside_tars(folder: Path) -> PurePath | None:
    """A file in a folder of tars, relative to it, that holds more samples: an image, a packed tar, a zip file of images
    or tars, a tar in a sub-folder; None if there is none. Sub-folders that cannot be read, such as lost+found, are
    passed over."""
    for path in _walk(folder, None):
        name = path.name.lower()
        is_other_tar = name.endswith(".tar") and path.parent != folder
        if is_other_tar or name.endswith(PACKED_TARS) or name.rpartition(".")[2] in IMAGE_SUFFIXES or _is_set(path):
            return path.relative_to(folder)
    return None


def _is_set(path: Path) -> bool:
    """Whether it is a zip file of images or tars; a damaged one is none."""
    if not is_zip(path):
        return False
    try:
        with open_zip(path) as file:
            return any(name.lower().rpartition(".")[2] in (*IMAGE_SUFFIXES, "tar") for name in file.namelist())
    except DataError:
        return False


def _stems(image: PurePath) -> list[str]:
    """The names of an image without the suffix: also d of d.jpg.jpg, which is its key in a tar. Files beside it have
    one of them."""
    stem, short = image.stem, PurePath(image.stem).stem
    is_doubled = image.name[len(short) + 1 :].lower() in ANY_IMAGE and short != stem
    return [stem, short] if is_doubled else [stem]


def _sample_files(folder: Path, image: PurePath) -> list[PurePath]:
    """An image directly in a folder, and the files beside it that may belong to it. Raises DataError."""
    try:
        names = map(PurePath, os.listdir(folder))
    except OSError as error:
        _refuse(error)
    return [image, *(name for name in names if name.stem in _stems(image) and name.suffix[1:].lower() in BESIDE)]


def is_hidden(path: PurePath) -> bool:
    """Whether a path in a folder or a zip file is left out: it, or a folder of it, begins with a dot, or it lies in the
    folder ``__MACOSX``, in which macOS keeps metadata of the files of a zip file."""
    return any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in path.parts)


def find_images(folder: Path) -> list[Path]:
    """The images of `list_folder`."""
    return list_folder(folder).images


def _listing(place: Path, paths: Iterable[PurePath]) -> Listing:
    ordered = sorted(paths, key=lambda path: path.as_posix())
    suffixes = [path.suffix[1:].lower() for path in ordered]
    images = [path for path, suffix in zip(ordered, suffixes, strict=True) if suffix in IMAGE_SUFFIXES]
    unread = [path for path, suffix in zip(ordered, suffixes, strict=True) if suffix in UNREAD_IMAGES]
    if images and "tar" in suffixes:
        raise mixed_kinds(place, images[0], ordered[suffixes.index("tar")])
    beside = {
        path.with_suffix(f".{suffix}"): path
        for path, suffix in zip(ordered, suffixes, strict=True)
        if suffix in BESIDE and path.suffix != f".{suffix}"
    }
    others = [path for path, suffix in zip(ordered, suffixes, strict=True) if suffix not in PICTURES]
    return Listing(images, unread, beside, others)


def mixed_kinds(place: Path, image: PurePath, tar: PurePath) -> DataError:
    """The error of a folder or a zip file with images and tars. image, tar: one of each, in it."""
    return DataError(
        f"{place} holds images and tars: to use the tars, name them as {place / tar.parent}/*.tar; to use the images "
        f"(first {image}), move the tars (first {tar}) out of it"
    )


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _check_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to nothing ({os.readlink(path)}): repair or remove it")


def is_folder_of_images(spec) -> bool:
    """Whether `spec` is a local folder without tars. Raises DataError if it cannot be read."""
    return isinstance(spec, (str, os.PathLike)) and os.path.isdir(spec) and next(_tars(spec), None) is None


def tars_in(folder: str | Path) -> list[Path]:
    """The tars of a folder, without those of its sub-folders, sorted. Raises DataError if it cannot be read, and for a
    link to nothing."""
    return sorted(_tars(folder))


def _tars(folder: str | Path) -> Iterator[Path]:
    try:
        entries = os.scandir(folder)
    except OSError as error:
        _refuse(error)
    for entry in entries:
        if entry.name.lower().endswith(".tar") and not entry.name.startswith("."):
            if entry.is_symlink():
                _check_link(Path(entry.path))
            if entry.is_file():
                yield Path(entry.path)


def is_zip(spec) -> bool:
    """Whether `spec` is a local zip file."""
    return isinstance(spec, (str, os.PathLike)) and os.path.isfile(spec) and str(spec).lower().endswith(".zip")


def is_files(spec) -> bool:
    """Whether `spec` is read file by file: a local folder without tars, or a zip file."""
    return is_folder_of_images(spec) or is_zip(spec)


# -------------------------------------------------------------------------------------------------------------- files


class FolderFiles:
    """The files of a folder, by their paths in it. prefix: before a path in a sample's key.

    only: the one image to look at, directly in the folder; None: all. Raises DataError.
    """

    prefix = ""

    def __init__(self, path: str | Path, only: PurePath | None = None):
        self.path = Path(path)
        self._listing = list_folder(self.path) if only is None else _listing(self.path, _sample_files(self.path, only))

    def name(self, path: PurePath) -> str:
        """What messages call a file."""
        return str(self.path / path)

    def listing(self) -> Listing:
        """The pictures, without hidden ones, as they were when the folder was opened."""
        return self._listing

    def paths(self) -> list[Path]:
        """All files, without hidden ones. Raises DataError."""
        return _files_in(self.path)

    def state(self, path: PurePath) -> tuple:
        """Size and whole second of the last change, which a copy with times keeps; empty for a link to nothing. Raises
        DataError."""
        try:
            status = (self.path / path).stat()
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise DataError(f"cannot read {self.name(path)}: {error.strerror or error}") from error
        return status.st_size, int(status.st_mtime)

    def read(self, path: PurePath) -> bytes:
        """A file's content. Raises ImageError for a link to nothing and for what is no file; OSError."""
        file = self.path / path
        try:
            if not stat.S_ISREG(file.stat().st_mode):  # reading a pipe would never end
                raise ImageError("a pipe or a device, not a file", "no file")
            return file.read_bytes()
        except FileNotFoundError:
            if not file.is_symlink():
                raise
            raise ImageError(f"a link to nothing: {os.readlink(file)}", "link") from None

    def header(self, path: PurePath) -> ImageHeader:
        """Format and size of an image, of which only the header is read. Raises ImageError; DataError for a file that
        cannot be read now."""
        file = self.path / path
        try:
            if file.is_symlink() and not file.exists():
                raise ImageError(f"a link to nothing: {os.readlink(file)}", "link")
            if not stat.S_ISREG(file.stat().st_mode):
                raise ImageError("a pipe or a device, not a file", "no file")
            with file.open("rb") as content:
                content.peek(1)  # image_header takes an error of the disk for a damaged image
                return image_header(content)
        except OSError as error:
            raise DataError(f"cannot read {self.name(path)}: {error.strerror or error}") from error

    def beside(self, path: PurePath, suffix: str) -> bytes | None:
        """What the file of the same name with another suffix, in any case, holds. Raises as `read`."""
        for name in _stems(path):
            own = path.with_name(f"{name}.{suffix}")
            own = own if os.path.lexists(self.path / own) else self._listing.beside.get(own)
            if own is not None:
                return self.read(own)
        return None


class ZipFiles:
    """The files of a zip file, by their paths in it, or in the one folder that it holds. Raises DataError."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.members: dict[PurePosixPath, list[zipfile.ZipInfo]] = defaultdict(list)
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        with open_zip(path) as file:
            members = [(PurePosixPath(member.filename), member) for member in file.infolist() if not member.is_dir()]
        members = [(path, member) for path, member in members if not is_hidden(path)]
        pictures = [path for path, _ in members if path.suffix[1:].lower() in PICTURES]
        folders = {path.parts[0] if len(path.parts) > 1 else None for path in pictures} - {".."}
        only = folders.pop() if len(folders) == 1 else None
        self.prefix = f"{only}/" if only is not None else ""
        for path, member in members:
            self.members[path.relative_to(only) if only and path.is_relative_to(only) else path].append(member)
        self._listing = _listing(self.path, self.members)

    def name(self, path: PurePosixPath) -> str:
        return f"{self.path}/{path}"

    def listing(self) -> Listing:
        """The pictures, without hidden ones."""
        return self._listing

    def paths(self) -> list[PurePosixPath]:
        return list(self.members)

    def state(self, path: PurePosixPath) -> tuple:
        """Size and CRC-32 of the member."""
        return tuple((member.file_size, member.CRC) for member in self.members[path])

    def read(self, path: PurePosixPath) -> bytes:
        """A member's content. Raises ImageError for one that is damaged or has more than MAX_BYTES, for a link, and
        where two have the same name; OSError."""
        member, *others = self.members[path]
        if others:
            raise ImageError(f"{1 + len(others)} members are called {self.prefix}{path}", "duplicate key")
        if path.is_absolute() or ".." in path.parts:
            raise ImageError(f"the name {member.filename!r} leads out of its folder", "bad key")
        if member.file_size > MAX_BYTES:
            raise ImageError(f"{member.file_size:,} bytes are more than {MAX_BYTES:,}")
        if self._opened is None or self._opened[0] != os.getpid():  # a forked process must not share the file offset
            self._opened = os.getpid(), open_zip(self.path)
        with _zip_damage():
            content = self._opened[1].read(member)
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ImageError(f"a symbolic link to {content[:200].decode(errors='replace')}", "link")
        return content

    def header(self, path: PurePosixPath) -> ImageHeader:
        return image_header(self.read(path))

    def beside(self, path: PurePosixPath, suffix: str) -> bytes | None:
        for name in _stems(path):
            own = path.with_name(f"{name}.{suffix}")
            own = own if own in self.members else self._listing.beside.get(own)
            if own is not None:
                return self.read(own)
        return None


def open_files(path: str | Path) -> FolderFiles | ZipFiles:
    """The files of a folder or a zip file. Raises DataError."""
    return ZipFiles(path) if is_zip(path) else FolderFiles(path)


def open_zip(path: str | Path) -> zipfile.ZipFile:
    """Raises DataError for a file that is not a zip file."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is no whole zip file: copy it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def _zip_damage() -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zipfile.zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ImageError(f"damaged or encrypted in the zip file: {error}") from error


# ------------------------------------------------------------------------------------------------------------- shards


@dataclass(eq=False)
class FileShard:
    """The images of a folder or a zip file, and of its sub-folders, in sorted order. The key of a sample is the image's
    path.

    Files NAME.txt, NAME.cls and NAME.json beside the image belong to the sample; ``cls`` may come from the top
    sub-folder instead. unread: pictures in formats that are not read; they are no samples.
    """

    url: str
    files: FolderFiles | ZipFiles
    images: list[PurePath]
    classes: dict[str, int] | None = None
    unread: list[PurePath] = field(default_factory=list)

    is_streamed = False

    @property
    def name(self) -> str:
        return self.url

    @property
    def has_class_folders(self) -> bool:
        """Whether every image lies in a sub-folder."""
        return all(len(image.parts) > 1 for image in self.images)

    def __len__(self):
        return len(self.images)

    def windows(
        self, first: int, stop: int | None, limit: WindowLimit, numbers: Sequence[int] | None = None
    ) -> Iterator[Window]:
        chosen = (range(len(self)) if numbers is None else numbers)[first:stop]
        for begin in range(0, len(chosen), limit.samples):
            yield Window(chosen[begin : begin + limit.samples], self)

    def key(self, path: PurePath) -> str:
        return self.files.prefix + path.as_posix()

    def own_files(self) -> list[PurePath]:
        """The images and the files beside them, sorted."""
        stems = _all_stems(self.images)
        suffixes = (*IMAGE_SUFFIXES, *BESIDE)
        own = [path for path in self.files.paths() if _stem_of(path) in stems]
        return sorted((path for path in own if path.suffix[1:].lower() in suffixes), key=PurePath.as_posix)

    def states(self) -> list[tuple]:
        """Of `own_files`: the path of each, and what changes with its content."""
        return [(path.as_posix(), *self.files.state(path)) for path in self.own_files()]

    def skipped_unread(self, dataset: str = "") -> list[Skipped]:
        """The account of `unread`, as of samples that cannot be used."""
        return [Skipped(self.name, self.key(path), why_unread(path), dataset) for path in self.unread]

    def not_read(self) -> str:
        """How many files are neither pictures nor beside one, by suffix, in a line; empty if there are none."""
        others = self.files.listing().others
        stems = _all_stems([*self.images, *self.unread]) if others else set()
        unused = [path for path in others if path.suffix[1:].lower() not in BESIDE or _stem_of(path) not in stems]
        if not unused:
            return ""
        counts = Counter(path.suffix.lower() or path.name for path in unused).most_common()
        named = ", ".join(f"{count:,} {suffix}" for suffix, count in counts[:NAMED_SUFFIXES])
        more = ", …" if len(counts) > NAMED_SUFFIXES else ""
        files = "1 file belongs" if len(unused) == 1 else f"{len(unused):,} files belong"
        return printable(
            f"{files} to no picture and {'is' if len(unused) == 1 else 'are'} not read: {named}{more}; "
            f"first {unused[0]}"
        )

    def header(self, index: int) -> ImageHeader:
        """Format and size of an image. Raises ImageError."""
        return self.files.header(self.images[index])

    def read(self, index: int) -> Sample:
        path = self.images[index]
        try:
            members = {path.suffix.lower().lstrip("."): self.files.read(path)}
            for suffix in BESIDE:
                if (content := self.files.beside(path, suffix)) is not None:
                    members[suffix] = content
        except ImageError as error:
            error.key = self.key(path)
            raise
        except (
            OSError
        ) as error:  # of the file beside the image where that cannot be read; a zip file's error names none
            name = error.filename or self.files.name(path)
            raise DataError(f"cannot read {name}: {error.strerror or error}") from error
        if self.classes is not None:
            members["cls"] = str(self.classes[path.parts[0]]).encode()
        return Sample(self.key(path), members)


def _all_stems(images: Iterable[PurePath]) -> set[str]:
    return {f"{_folder_of(image)}{stem}" for image in images for stem in _stems(image)}


def _stem_of(path: PurePath) -> str:
    return f"{_folder_of(path)}{path.stem}"


def _folder_of(path: PurePath) -> str:
    """With a / at its end, as text, which is faster than a path of each of a million files."""
    folder, slash, _ = path.as_posix().rpartition("/")
    return folder + slash


def why_unread(path: PurePath) -> str:
    """Why a picture in another format is not used, in the words for a tar's."""
    return f"no image among its members: {path.suffix[1:].lower()}"


def file_shard(path: str, class_from_folder: bool = False, classes: dict[str, int] | None = None) -> FileShard:
    """The images of a folder or a zip file. classes: numbers of the class folders, see `class_numbers`.

    Raises DataError if there are no images, or a folder has images and tars.
    """
    files = open_files(path)
    images, unread = files.listing()[:2]
    if not images:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        others = f"; it has {len(unread):,} pictures in other formats, first {unread[0]}" if unread else ""
        fix = f"name a folder or zip file that holds images{others}"
        raise DataError(f"neither {suffixes} nor tars under {path}: {fix}")
    numbers = class_numbers(files, images, classes) if class_from_folder else None
    return FileShard(path, files, images, numbers, unread)


def class_numbers(
    files: FolderFiles | ZipFiles, images: list[PurePath], classes: dict[str, int] | None = None
) -> dict[str, int]:
    """The numbers of the top folders: `classes`, or their numbers in sorted order.

    Raises DataError for an image that is in none, and for a folder that is not among the classes."""
    if loose := next((image for image in images if len(image.parts) == 1), None):
        raise DataError(f"{files.name(loose)} lies in no class folder: move it into one, or leave out the classes")
    names = sorted({image.parts[0] for image in images})
    if classes is None:
        others = [(name, number) for number, name in enumerate(names) if name.isdecimal() and int(name) != number]
        if others and all(name.isdecimal() for name in names):
            logger.warning(
                "%s: classes are numbered in the sorted order of their folders, so that folder %s is class %d: give a "
                "classes.json if the names are the numbers",
                files.path,
                *others[0],
            )
        return {name: number for number, name in enumerate(names)}
    if unknown := [name for name in names if name not in classes]:
        more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
        raise DataError(
            f"{files.name(PurePath(unknown[0]))}{more}: no such class among the {len(classes):,} of the given "
            "classes.json: leave the folder out, or pack everything with a classes.json that has it"
        )
    return classes
