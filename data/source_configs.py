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
    """found: each with its root. missing: names of those that are not in `data.root`, with data.missing=skip."""

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
        return Sources([SourceConfig(root=config.train)], [])  # in place of sources that nobody has placed
    if config.root is None and unplaced:
        raise DataError(
            f"the sources {', '.join(unplaced)} have no root: give data.root=FOLDER that holds a folder for each of "
            "them, or data.train=TARS in their place"
        )
    if config.root is not None and not unplaced:
        raise DataError("data.root is for sources without a root of their own, and there are none: leave it out")
    placed = [_placed(config.root, source) for source in config.sources] or [SourceConfig()]
    timeouts = Timeouts(config.request_seconds, config.retry_seconds)
    missing = [one.name for one in placed if one.name in unplaced and not _is_there(one.root, timeouts)]
    found = [one for one in placed if one.name not in missing]
    if missing and (config.missing == "refuse" or not found):
        raise DataError(_what_is_missing(config.root, missing, len(found)))
    check_weights(found)
    return Sources(found, missing)


def _placed(root: str | None, source: SourceConfig) -> SourceConfig:
    if source.root is not None:
        return source
    folder = root if is_remote(root) else os.path.expanduser(root)
    return replace(source, root=f"{folder.rstrip('/')}/{source.name}")


@lru_cache(maxsize=256)
def _is_there(place: str, timeouts: Timeouts) -> bool:
    """Whether a folder exists and holds anything, in a bucket: tars. Raises DataError for a bucket that cannot be
    listed."""
    if is_remote(place):
        try:
            return bool(list_tars(place, timeouts))
        except NoTarsError:
            return False
    return os.path.isdir(place) and any(os.scandir(place))


def _what_is_missing(root: str, missing: list[str], found: int) -> str:
    known = next((name for name in missing if name in catalogue()), None)
    download = f"download them (`ibq shards sources {known}` says how)" if known else "copy them there"
    others = ", or continue without them: data.missing=skip" if found else ""
    count = len(missing) + found
    return (
        f"data.root={redacted(root)} lacks {len(missing)} of {count} sources: {', '.join(missing)}: {download}{others}"
    )
