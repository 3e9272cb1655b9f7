"""Finding shards: from what a recipe or a command names to a list of tars."""

import glob
import hashlib
import itertools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path, PurePath
from typing import NamedTuple

import braceexpand

from data.addresses import is_remote, redacted, scheme_of
from data.cache import cache_folder
from data.errors import DataError
from data.folder_reader import list_folder, mixed_kinds, part_beside_tars, tars_in
from data.index import INDEX_NAME
from data.locks import WriterLock
from data.prep.pack import pack
from data.samples import is_image
from data.storage import DEFAULT_TIMEOUTS, Timeouts, list_tars
from data.tar_reader import PIPE

LIST_SUFFIX = ".txt"
TOKENS_RECORD = "tokens.json"  # what `ibq tokenize` writes of itself beside its tars
TOKENS_RECORD_KEYS = frozenset({"tokenizer", "views", "input"})
MOST_SHARDS = 2_000_000  # of one pattern
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
PACKING_SECONDS = 300.0  # for another process to pack them
PHOTOGRAPH_QUALITY = 95  # JPEG decodes about three times as fast as PNG here


def expand(spec: str | Iterable[str], *, allow_pipes: bool = False, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> list[str]:
    """The tars that `spec` names, as paths or URLs.

    spec: a folder (its *.tar, sorted), one tar, a brace pattern, a glob (** for sub-folders at any depth), an http(s),
        s3 or gs URL with or without braces, a folder in s3 or gs, a .txt file that lists one of these in each line,
        `bundled:train` or `bundled:val` (the photographs in scikit-image's wheel), or a list of these. A folder that
        exists as it is written is that one, whatever characters its name holds.
    allow_pipes: also accept `pipe:COMMAND`, which runs a shell. timeouts: of listing a folder in s3 or gs.
    Raises DataError that names all parts without tars.
    """
    missing: list[_Missing] = []
    paths = _expand(spec, allow_pipes, timeouts, missing)
    if missing:
        raise DataError(_names_missing(missing))
    return paths


class _Missing(NamedTuple):
    """A pattern, and which of the paths that it stands for exist and do not."""

    pattern: str
    there: list[str]
    missing: list[str]


def _names_missing(parts: list[_Missing]) -> str:
    """All at once, so that they need not be found one after the other."""
    single = [part.pattern for part in parts if part.missing == [part.pattern]]
    said = [joined_names(single) + (f" ({len(single):,} paths)" if len(single) > 1 else "")] if single else []
    for part in parts:
        if part.missing != [part.pattern]:
            count = f"{len(part.missing):,} of the {len(part.missing) + len(part.there):,} of {part.pattern}"
            fix = f"; those that exist are '{joined_names(part.there)}'" if part.there else ""
            said.append(f"{joined_names(part.missing)} ({count}{fix})")
    return f"no such tar or folder: {', '.join(said)}"


def check_different(urls: list[str]) -> None:
    """Raises DataError for a tar that is named twice."""
    places = Counter(url if is_remote(url) or url.startswith(PIPE) else os.path.realpath(url) for url in urls)
    if twice := next((place for place, count in places.items() if count > 1), None):
        raise DataError(f"{redacted(twice)} is named twice, and would be read twice in each epoch: name it once")


def joined_names(names: list[str]) -> str:
    """The brace pattern that stands for these names, in their order: train-{0001..0004}.tar."""
    if len(names) == 1:
        return names[0]
    start = re.sub(r"[0-9]+$", "", _common_start(names))
    rest = [name[len(start) :] for name in names]
    end = re.sub(r"^[0-9]+", "", _common_start([one[::-1] for one in rest])[::-1])
    parts = [one[: len(one) - len(end)] for one in rest]
    ranges = list(_ranges(parts))
    return start + (ranges[0] if len(ranges) == 1 else f"{{{','.join(ranges)}}}") + end


def _common_start(names: list[str]) -> str:
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same)


def _ranges(parts: list[str]) -> Iterator[str]:
    """Runs of consecutive numbers of the same width, as {FIRST..LAST}, and all others as they are."""
    run: list[str] = []
    for part in [*parts, ""]:
        follows = run and part.isdecimal() and len(part) == len(run[-1]) and int(part) == int(run[-1]) + 1
        if run and not follows:
            yield f"{{{run[0]}..{run[-1]}}}" if len(run) > 1 else run[0]
            run = []
        if part.isdecimal() or not part:
            run.append(part)
        else:
            yield part


def _expand(spec, allow_pipes: bool, timeouts: Timeouts, missing: list[_Missing]) -> list[str]:
    """What exists of it; what does not is added to `missing`."""
    if spec is None:
        raise DataError("no data named: set data.train (and data.val) to tars, a folder of tars or bundled:train")
    if isinstance(spec, os.PathLike):
        spec = os.fspath(spec)
    if isinstance(spec, (bytes, dict)) or not isinstance(spec, Iterable):
        raise DataError(f"{spec!r} names no data: give a path, in quotes if it is a number, or a list of paths")
    if not isinstance(spec, str):
        paths = [path for part in spec for path in _expand(part, allow_pipes, timeouts, missing)]
        if not paths and not missing:
            raise DataError("no data named: the list of tars is empty")
        return paths
    if spec.startswith(BUNDLED):
        return _expand(_photographs(spec), allow_pipes, timeouts, missing)
    if spec.startswith(PIPE):
        if not allow_pipes:
            raise DataError("pipe: runs a shell command: allow it with data.allow_pipes=true, if you trust the recipe")
        return expand_braces(spec)
    if is_remote(spec):
        return [url for expanded in expand_braces(spec) for url in _remote_tars(expanded, timeouts)]
    # The shell does not expand the ~ of data.train=~/tars.
    return _local_tars(os.path.expanduser(spec), allow_pipes, timeouts, missing)


def _remote_tars(url: str, timeouts: Timeouts) -> list[str]:
    scheme_of(url)
    if re.split(r"[?#]", url)[0].endswith(".tar"):
        return [url]
    return list_tars(url, timeouts)


def _local_tars(spec: str, allow_pipes: bool, timeouts: Timeouts, missing: list[_Missing]) -> list[str]:
    if os.path.isdir(spec):
        return _tars_of_folder(spec)
    if os.path.isfile(spec) and spec.endswith(LIST_SUFFIX):
        return _expand(read_list(spec), allow_pipes, timeouts, missing)
    if os.path.exists(spec):
        return [spec]
    # What exists as it is written means itself: s[1]/*.tar is not s1/*.tar where there is a folder s[1].
    there = existing_folder(spec)
    found = {one: matching(one) for one in (there + rest for rest in expand_braces(spec[len(there) :]))}
    expanded = list(found)
    for folder in {os.path.dirname(path) for one in expanded if found[one] != [one] for path in found[one]}:
        _check_finished(folder)
    if absent := [one for one in expanded if not found[one]]:
        missing.append(_Missing(spec, [one for one in expanded if found[one]], absent))
    return [path for paths in found.values() for one in paths for path in _expand(one, False, timeouts, missing)]


def existing_folder(spec: str) -> str:
    """The part of a pattern that is a folder as it is written, with a / at its end."""
    ends = [at for at, letter in enumerate(spec, start=1) if letter == "/"]
    return next((spec[:end] for end in reversed(ends) if os.path.isdir(spec[:end])), "")


def matching(path: str) -> list[str]:
    """The paths that a pattern without braces stands for, sorted. ** stands for any number of folders."""
    if os.path.exists(path):
        return [path]
    folder = existing_folder(path)
    rest = path[len(folder) :]
    return sorted(glob.glob(glob.escape(folder) + rest, recursive=True)) if glob.has_magic(rest) else []


def _tars_of_folder(folder: str) -> list[str]:
    """Raises DataError if there are none, and if more lies there or is missing, which would be left out in silence."""
    _check_finished(folder)
    paths = [str(path) for path in tars_in(folder)]
    if not paths:
        if list_folder(Path(folder)).images:
            raise DataError(
                f"{folder} is a folder of images, which cannot be listed among tars: make it a source of data.sources, "
                f"or pack it with `ibq shards pack {folder} --out TARS`"
            )
        raise DataError(f"no *.tar in the folder {folder}: pack images with `ibq shards pack FOLDER --out {folder}`")
    if (other := part_beside_tars(Path(folder))) is None:
        return paths
    if other.suffix.lower() == ".tar":
        raise DataError(
            f"{folder} holds tars, and so does its sub-folder {other.parent}: name '{folder}/*.tar', or all as "
            f"'{folder}/**/*.tar'"
        )
    if is_image(other.name):
        raise mixed_kinds(Path(folder), other, PurePath(os.path.basename(paths[0])))
    raise DataError(
        f"{folder} holds tars and {other}, which would not be read: unpack it, or name the tars as '{folder}/*.tar'"
    )


def _check_finished(folder: str) -> None:
    """Raises DataError for a folder that `ibq tokenize` has begun and not finished: it holds a part of the samples.
    Tars that are named one by one are read nevertheless."""
    path = os.path.join(folder, TOKENS_RECORD)
    try:
        record = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return
    except ValueError:
        record = None  # another program's file of this name, as one without the keys is
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not isinstance(record, dict) or not record.keys() >= TOKENS_RECORD_KEYS:
        return
    if not is_finished(folder, record):
        there = [str(tar) for tar in tars_in(folder or ".")]
        part = f"; to use only what is there, name '{joined_names(there)}'" if there else ""
        raise DataError(
            f"{folder or '.'} is not finished: run the same `ibq tokenize` again, or wait until it ends{part}"
        )


def is_finished(folder: str | Path, record: dict) -> bool:
    """Whether `ibq tokenize` finished a folder with this record. Earlier versions recorded the settings alone; their
    last step was the index."""
    return record.get("finished", os.path.exists(os.path.join(folder, INDEX_NAME)))


def read_list(path: str) -> list[str]:
    """The lines of a list file, without comments."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"the list {path} is not in UTF-8: save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"cannot read the list {path}: {error.strerror or error}") from error
    parts = [line for line in lines if line and not line.startswith("#")]
    if not parts:
        raise DataError(f"the list {path} is empty: write one tar, pattern or URL in each line")
    if nested := next((part for part in parts if part.endswith(LIST_SUFFIX)), None):
        raise DataError(f"the list {path} names a list, {nested}: write tars, patterns or URLs")
    return parts


def expand_braces(pattern: str) -> list[str]:
    """All that a pattern with braces stands for; a text without braces is itself. Raises DataError."""
    name = PIPE + "…" if pattern.startswith(PIPE) else redacted(pattern)
    try:
        found = list(itertools.islice(braceexpand.braceexpand(pattern), MOST_SHARDS + 1))
    except ValueError as error:
        raise DataError(
            f"{name}: its braces do not match; a pattern reads like train-{{000000..000009}}.tar"
        ) from error
    if len(found) > MOST_SHARDS:
        raise DataError(f"{name} stands for more than {MOST_SHARDS:,} tars: look at its braces")
    return found


def _photographs(spec: str) -> str:
    """The folder of tars for `bundled:train` or `bundled:val`: the photographs in scikit-image's wheel, each of which
    is one class. Raises DataError."""
    split = spec.removeprefix(BUNDLED)
    if split not in PHOTOGRAPHS:
        raise DataError(f"unknown {spec}: there are bundled:train and bundled:val")
    return str(_packed_photographs() / split)


def _packed_photographs() -> Path:
    """Pack both splits into the cache, once. The folder's name contains a hash of its content."""
    try:
        source = resources.files("skimage") / "data"
    except ModuleNotFoundError as error:
        raise DataError("the bundled photographs come with scikit-image: pip install scikit-image") from error
    names = list(itertools.chain(*PHOTOGRAPHS.values()))
    if missing := [name for name in names if not (source / name).is_file()]:
        raise DataError(f"this scikit-image lacks {', '.join(missing)}: pip install 'scikit-image>=0.22'")
    contents = {name: (source / name).read_bytes() for name in names}
    digest = hashlib.sha256(f"{PHOTOGRAPHS} {PHOTOGRAPH_SIDE} {PHOTOGRAPH_QUALITY} classes".encode())
    for content in contents.values():
        digest.update(content)
    cache = cache_folder()
    folder = cache / f"photographs-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with WriterLock(cache / ".photographs.lock", f"the bundled photographs in {cache}") as lock:
            lock.take(PACKING_SECONDS)
            for left in cache.glob(".photographs-*"):  # their writers were killed: a live one would have the lock
                shutil.rmtree(left)
            if not folder.is_dir():  # otherwise another process was faster
                _pack_photographs(contents, folder)
    except OSError as error:
        raise DataError(f"cannot write the bundled photographs to {cache}: {error.strerror}; set IBQ_CACHE") from error
    return folder


def _pack_photographs(contents: dict[str, bytes], folder: Path) -> None:
    """One rename shows both splits, and leaves nothing else."""
    scratch = folder.with_name(f".{folder.name}")
    try:
        for split, names in PHOTOGRAPHS.items():
            images = scratch / "images"
            images.mkdir(parents=True)
            for number, name in enumerate(names):
                (images / name).write_bytes(contents[name])
                (images / name).with_suffix(".cls").write_text(str(number))
            pack(images, scratch / split, prefix=split, shorter_side=PHOTOGRAPH_SIDE, quality=PHOTOGRAPH_QUALITY)
            shutil.rmtree(images)
        scratch.rename(folder)
    finally:
        if scratch.exists():
            shutil.rmtree(scratch)
