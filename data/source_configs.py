"""Which sources a `data` section means, and where each of them lies."""

import os
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from data.addresses import is_remote, redacted
from data.config import DataConfig, SourceConfig
from data.errors import DataError, NoTarsError
from data.sources import catalogue, check_weights
from data.storage import Timeouts, list_tars

MISSING = ("refuse", "skip")


class Sources(NamedTuple):
    """found: the sources to read; each has its root. missing: the names of sources that `data.root` does not hold;
    empty unless data.missing=skip."""

    found: list[SourceConfig]
    missing: list[str]


def source_configs(config: DataConfig) -> Sources:
    """The sources of a `data` section. Raises DataError for contradictions, and for sources that are missing."""
    if config.missing not in MISSING:
        raise DataError(f"unknown data.missing {config.missing!r}: choose one of {', '.join(MISSING)}")
    unplaced = [source.name for source in config.sources if source.root is None]
    if config.train is not None:
        if config.root is not None or len(unplaced) < len(config.sources):
            other = "data.sources" if config.root is None else "data.root"
            raise DataError(f"data.train and {other} are both given: leave one out")
        return Sources([SourceConfig(root=config.train)], [])  # the recipe's sources have no root: it replaces them
    if config.root is None and unplaced:
        raise DataError(
            f"the sources {', '.join(unplaced)} have no root: give data.root=FOLDER that holds a folder for each of "
            "them, or data.train=TARS in their place"
        )
    if config.root is not None and not unplaced:
        raise DataError(
            "data.root has no effect: no source of data.sources is without its own root: leave data.root out"
        )
    placed = [_placed(config.root, source) for source in config.sources] or [SourceConfig()]
    check_weights(placed)
    if config.root is not None and not is_remote(config.root) and not os.path.isdir(os.path.expanduser(config.root)):
        raise DataError(f"data.root={config.root}: no such folder")
    timeouts = Timeouts(config.request_seconds, config.retry_seconds)
    missing = [one.name for one in placed if one.name in unplaced and not _is_there(one.root, timeouts)]
    found = [one for one in placed if one.name not in missing]
    if missing and (config.missing == "refuse" or not found):
        raise DataError(_what_is_missing(config.root, missing, len(found)))
    return Sources(found, missing)


def _placed(root: str | None, source: SourceConfig) -> SourceConfig:
    if source.root is not None:
        return source
    folder = root if is_remote(root) else os.path.expanduser(root)
    return replace(source, root=f"{folder.rstrip('/')}/{source.name}")


@lru_cache(maxsize=256)
def _is_there(place: str, timeouts: Timeouts) -> bool:
    """Whether a local folder holds any entry that is not hidden, or a remote one holds tars. Raises DataError if it
    cannot be listed."""
    if is_remote(place):
        try:
            return bool(list_tars(place, timeouts))
        except NoTarsError:
            return False
    try:
        return os.path.isdir(place) and any(not name.startswith(".") for name in os.listdir(place))
    except OSError as error:
        raise DataError(f"cannot read {place}: {error.strerror}") from error


def _what_is_missing(root: str, missing: list[str], found: int) -> str:
    known = next((name for name in missing if name in catalogue()), None)
    download = f"download them (`ibq shards sources {known}` says how)" if known else "copy them there"
    others = ", or continue without them: data.missing=skip" if found else ""
    count = len(missing) + found
    parent, slash, folder = root.rstrip("/").rpartition("/")
    if folder in missing and not found:
        holder = redacted(parent) + ("" if parent else slash or ".")
        download = f"it is the folder of one source, so give the folder that holds it: data.root={holder}"
    return (
        f"data.root={redacted(root)} lacks {len(missing)} of {count} sources: {', '.join(missing)}: {download}{others}"
    )
