"""Asks stores for tars before anything is read, so that one start names all that are missing."""

import itertools
import logging
import posixpath
from collections.abc import Callable
from typing import NamedTuple

from data.addresses import is_http, redacted, scheme_of
from data.errors import DataError, DeniedError, MissingError
from data.object_store import request_listing
from data.parallel import in_threads
from data.shards import joined_names
from data.storage import Timeouts, probe, retry
from data.text import printable

logger = logging.getLogger(__name__)

THREADS = 32
LISTED_FROM = 32  # tars of a folder; fewer are asked for one by one, since the folder may hold very many others
MOST_ASKED = 20_000  # tars that are asked for one by one: 30 s, if an answer takes 50 ms

# What this process knows to be there. It is not asked for again, as for validation on the training data.
_there: set[str] = set()


def check_available(
    urls: list[str], timeouts: Timeouts, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Raises DataError that names all of the remote tars that are missing or denied.

    A folder of a bucket or of a data set on the hub is listed, if at least LISTED_FROM of the tars are in it. Other
    tars are asked for one by one; of more than MOST_ASKED, at most that many are, evenly spread. progress: called with
    (tars asked for, tars to ask for).
    """
    failed = _unavailable([url for url in dict.fromkeys(urls) if url not in _there], timeouts, progress)
    if not failed:
        return
    reason = str(next(iter(failed.values())))
    if len(failed) > 1:
        others = [redacted(url) for url in urls if url not in failed]
        reason += f"; {len(failed):,} of {len(urls):,} tars cannot be read: {joined_names([*map(redacted, failed)])}"
        reason += f"; these can be: '{joined_names(others)}'" if others else ""
    raise DataError(reason)


def _unavailable(urls: list[str], timeouts: Timeouts, progress: Callable[[int, int], None]) -> dict[str, DataError]:
    """Those that are missing or denied, with the reason, in the given order. Raises DataError for other failures."""
    listed = _by_listings(urls, timeouts)
    asked, failed = listed.to_ask, listed.missing
    if len(asked) > MOST_ASKED:
        step = -(-len(asked) // MOST_ASKED)
        said = "of %s remote tars, one in %d is asked for now; the others are asked for when they are read"
        logger.warning(said, f"{len(asked):,}", step)
        asked = asked[::step]

    def reason(url: str) -> DataError | None:
        try:
            probe(url, timeouts)
        except (MissingError, DeniedError) as error:
            return error
        return None

    for done, (url, error) in enumerate(zip(asked, in_threads(reason, asked, THREADS), strict=True), start=1):
        if error is None:
            _there.add(url)
        else:
            failed[url] = error
        progress(done, len(asked))
    return {url: failed[url] for url in urls if url in failed}


class _Listed(NamedTuple):
    """missing: tars that the listings of their folders lack, with the reason."""

    to_ask: list[str]
    missing: dict[str, DataError]


def _by_listings(urls: list[str], timeouts: Timeouts) -> _Listed:
    to_ask, missing = [], {}
    of_folder: dict[str, list[str]] = {}
    for url in urls:
        of_folder.setdefault(posixpath.dirname(url), []).append(url)
    for folder, inside in of_folder.items():
        names = None
        if len(inside) >= LISTED_FROM and not is_http(scheme_of(inside[0])):
            names = _names_in(folder, timeouts)
        if names is None:
            to_ask += inside
            continue
        there = [url for url in inside if posixpath.basename(url) in names]
        to_ask += there[:1]  # a listing does not tell whether what it names may be read
        _there.update(there[1:])
        for url in itertools.filterfalse({*there}.__contains__, inside):
            missing[url] = MissingError(f"there is no {redacted(url)} (its folder was listed): check its path")
    return _Listed(to_ask, missing)


def _names_in(folder: str, timeouts: Timeouts) -> set[str] | None:
    """The names of the files in a folder; None if it cannot be listed."""
    try:
        entries = retry(folder, timeouts, lambda seconds_left: request_listing(folder, seconds_left()))
    except MissingError:
        return set()
    except DataError as error:  # some buckets may be read, but not listed
        logger.warning("%s; its tars are asked for one by one", printable(str(error)))
        return None
    return {entry["name"].rsplit("/", 1)[-1] for entry in entries}
