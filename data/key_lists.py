"""Lists of keys that the filters of sources name: reading them, and the keys of a list that no sample has."""

import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from data.errors import DataError
from data.folder_reader import FileShard
from data.index import key_hashes
from data.samples import Shard
from data.tar_reader import TarShard

MOST_COMPARED_KEYS = 20_000_000  # of samples with a list, at the start


def read_keys(path: str | None) -> frozenset[str] | None:
    """The lines of a list. Raises DataError."""
    if path is None:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # a key may hold U+2028, where splitlines splits
    except OSError as error:
        raise DataError(f"cannot read the list of keys {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the list of keys {path} is not in UTF-8: save it as UTF-8") from error
    return frozenset(lines) - {""}


def occurring(keys: list[str], shards: list[Shard]) -> np.ndarray | None:
    """Which keys samples of the shards have; None if that is not known, or if there are too many samples to compare."""
    known = [shard for shard in shards if not isinstance(shard, TarShard) or shard.table is not None]
    if len(known) < len(shards) or sum(map(len, known)) > MOST_COMPARED_KEYS:
        return None
    found = np.zeros(len(keys), bool)
    numbers = {key: number for number, key in enumerate(keys)}
    hashes = key_hashes(keys)
    order = np.argsort(hashes)
    for shard in known:
        if isinstance(shard, FileShard):
            found[[numbers[key] for key in map(shard.key, shard.images) if key in numbers]] = True
        elif keys:
            place = np.searchsorted(hashes, shard.table.keys_n, sorter=order)
            number = order[np.minimum(place, len(keys) - 1)]
            found[number[hashes[number] == shard.table.keys_n]] = True
    return found


def check_not_keys(name: str, path: str, keys: Iterable[str], shards: list[Shard]) -> None:
    """Raises DataError where no sample of a source has one of the keys that are to be left out, but some have them in
    another spelling: they would be used. A list of other keys may be shared by several sources. name: of the source."""
    found = occurring(listed := list(keys), shards)
    if not listed or found is None or found.any():
        return
    spelled = {other: key for key in listed for other in _spellings(key)}
    others = list(spelled)
    pairs = [(spelled[others[number]], others[number]) for number in np.flatnonzero(occurring(others, shards))]
    plain = {_plain(key): key for key in listed}
    files = [shard for shard in shards if isinstance(shard, FileShard)]
    pairs += [
        (plain[_plain(key)], key) for shard in files for key in map(shard.key, shard.images) if _plain(key) in plain
    ]
    if pairs:
        wrong, right = pairs[0]
        if unicodedata.normalize("NFC", wrong).strip() == unicodedata.normalize("NFC", right):
            wrong, right = ascii(wrong), ascii(right)  # otherwise they look alike
        raise DataError(
            f"source {name}: none of the keys in {path} is there, but {right} is where the list says {wrong}: keys of "
            "folders and zip files are paths with suffixes, those of tars have none, and all are matched exactly; "
            "write the list so"
        )


def describe_lists(sources: Iterable) -> list[str]:
    """A line for each list that holds keys of no sample of the sources that name it, or that could not be compared.
    sources: of `data.sources.Source`."""
    lists: dict[tuple[str, str], list[Shard]] = {}
    contents = {}
    for source in sources:
        for option in ("keys", "not_keys"):
            if (path := getattr(source.filters.config, option)) is not None:
                contents[option, path] = getattr(source.filters, option)
                shards = [shard for number, shard in enumerate(source.shards) if number not in source.quarantined]
                lists.setdefault((option, path), []).extend(shards)
    lines = []
    for (option, path), shards in lists.items():
        keys = list(contents[option, path])
        found = occurring(keys, shards)
        if found is None:
            lines.append(f"filters.{option}={path}: not compared with the samples: too many, or tars without an index")
        elif not found.all():
            missing = [keys[number] for number in np.flatnonzero(~found)]
            count = f"{len(missing):,} of {len(keys):,} keys occur in no source that names the list"
            lines.append(f"filters.{option}={path}: {count}, first {min(missing)!r}")
    return lines


def _spellings(key: str) -> set[str]:
    """Keys of tars that a key of a list may mean."""
    path = PurePosixPath(key.strip().replace("\\", "/"))
    forms = [path.as_posix(), path.with_suffix("").as_posix() if path.name else ""]
    forms += [form.lower() for form in forms]
    return {unicodedata.normalize(form, text) for text in forms for form in ("NFC", "NFD")} - {key}


def _plain(key: str) -> str:
    """What all spellings of the key of a file have in common."""
    path = PurePosixPath(key.strip().replace("\\", "/"))
    return unicodedata.normalize("NFC", path.with_suffix("").as_posix() if path.name else "").casefold()
