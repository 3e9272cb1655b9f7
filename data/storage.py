"""Bytes from local paths and object stores (http, https, s3, gs): sizes, ranges, listings, with retries.

Every failure ends in a DataError, within the time that `Timeouts` allows and without secrets: messages show addresses
as `redacted` writes them.
"""

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from data.addresses import is_http, is_remote, redacted, scheme_of
from data.errors import DataError, NoTarsError, ReplacedError
from data.file_kinds import PACKED_TARS
from data.object_store import Answer, TransientError, Version, client, request_listing, request_range
from data.text import printable

logger = logging.getLogger(__name__)

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 15.0  # between tries
PROBING_THREADS = 16  # that ask servers about many objects

T = TypeVar("T")


class Timeouts(NamedTuple):
    """request_seconds: limit of one request; total_seconds: limit of all tries for one read."""

    request_seconds: float = 30.0
    total_seconds: float = 300.0


DEFAULT_TIMEOUTS = Timeouts()

# The versions that `version` or the first `read` found, to notice an object that is replaced during a run. Workers
# inherit them when they are forked.
_versions: dict[str, Version] = {}


def version(url: str, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> Version:
    """The version of an object as it is now; of a local file only the size. Raises DataError."""
    if not is_remote(url):
        with _local_errors(url):
            return Version(os.path.getsize(url))
    return probe(url, timeouts).version


def content_state(url: str, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> tuple:
    """What changes with the content: the size, and the whole second of the last change of a local file, which a copy
    with times keeps, or an object's ETag or else Last-Modified, if its server sends them. Raises DataError."""
    if is_remote(url):
        return tuple(probe(url, timeouts).version)
    with _local_errors(url):
        status = os.stat(url)
    return status.st_size, int(status.st_mtime)


def read(
    url: str, start: int, stop: int, timeouts: Timeouts = DEFAULT_TIMEOUTS, expected: Version | None = None
) -> bytes:
    """Exactly the bytes start to stop (exclusive) of a local file or an object.

    Transient failures (no connection, a stall, an incomplete answer, HTTP 429 and 5xx) are retried with growing waits
    for timeouts.total_seconds. Raises DataError after that, and at once for permanent failures: a missing object, no
    permission, an object that is shorter than asked, or a server that ignores ranges (unless the range is the whole
    object).
    expected: the version of the object; None: the one that this process found last. Raises ReplacedError for bytes of
    another one, so that nothing is put together from two versions.
    """
    if start == stop:
        return b""
    if is_remote(url):
        content = retry(url, timeouts, lambda seconds_left: _read_once(url, start, stop, seconds_left(), expected))
    else:
        with _local_errors(url):
            file = os.open(url, os.O_RDONLY)  # unbuffered: a buffer would read whole pages around the range
            try:
                content = os.pread(file, stop - start, start)
            finally:
                os.close(file)
        if len(content) < stop - start:
            raise DataError(_too_short(url, stop))
    client().count(len(content))
    return content


def list_tars(url: str, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> list[str]:
    """The URLs of the *.tar directly in a folder of a bucket (s3://bucket/folder) or of a data set on the hub, sorted.

    The whole listing counts as one request. Raises NoTarsError if there are none; DataError, also for http, which has
    no listings.
    """
    scheme, name = scheme_of(url), redacted(url)
    if is_http(scheme):
        raise DataError(
            f"{name}: folders cannot be listed over {scheme}: give a brace pattern "
            "(…/train-{000000..000009}.tar) or a file that lists the tars"
        )
    entries = retry(url, timeouts, lambda seconds_left: request_listing(url, seconds_left()))
    names = [entry["name"] for entry in entries if entry["type"] == "file"]
    tars = sorted(f"{scheme}://{name}" for name in names if name.endswith(".tar"))
    if not tars:
        raise NoTarsError(f"no *.tar in the folder {name}: check its path")
    if packed := sorted(one for one in names if one.lower().endswith(PACKED_TARS)):
        _warn_of_packed(name, len(packed), packed[0].rpartition("/")[2])
    return tars


@functools.cache
def _warn_of_packed(folder: str, count: int, first: str) -> None:
    """Once, however often it is listed. No error, because a bucket knows no pattern that leaves them out."""
    what = f"{count:,} packed tar{'s' * (count != 1)}, not read, first {first}"
    logger.warning(printable(f"{folder} also holds {what}: unpack what is to be read"))


def bytes_read() -> int:
    """Bytes that `read` and downloads into a cache have taken in this process."""
    return client().bytes_read


def probe(url: str, timeouts: Timeouts) -> Answer:
    """A store's answer to a request for the first byte: signed addresses allow GET where they refuse HEAD."""
    answer = retry(url, timeouts, lambda seconds_left: request_range(url, 0, 1, seconds_left()))
    _versions[url] = answer.version
    return answer


def retry(url: str, timeouts: Timeouts, attempt: Callable[[Callable[[], float]], T]) -> T:
    """The result of `attempt`, which is called until it raises no TransientError.

    `attempt` gets a function that returns the seconds that its next request may take. Raises DataError after
    timeouts.total_seconds.
    """
    client().filesystem(scheme_of(url))  # connect before the clock starts, since this imports packages
    start = time.monotonic()

    def seconds_left() -> float:
        return min(timeouts.request_seconds, start + timeouts.total_seconds - time.monotonic())

    for tries in itertools.count(1):
        try:
            return attempt(seconds_left)
        except TransientError as error:
            reason = str(error)
        passed = time.monotonic() - start
        left = timeouts.total_seconds - passed
        if left < FIRST_WAIT_SECONDS:
            break
        wait = min(_wait_seconds(url, tries), left / 2)  # leave time for one more try
        logger.warning("%s: %s; try %d follows in %.1f s", printable(redacted(url)), printable(reason), tries + 1, wait)
        time.sleep(wait)
    raise DataError(
        f"cannot read {redacted(url)}: {reason} ({tries} {'try' if tries == 1 else 'tries'} in {passed:.1f} s); "
        "check that its server is up and can be reached from here"
    )


def _wait_seconds(url: str, tries: int) -> float:
    """Doubles with each try. A factor that depends on the URL keeps readers from retrying at the same moment."""
    digest = hashlib.sha256(f"{url} {tries}".encode("utf-8", "surrogateescape")).digest()
    longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (tries - 1))
    return longest * (0.5 + int.from_bytes(digest[:4], "big") / 2**33)


def _read_once(url: str, start: int, stop: int, seconds: float, expected: Version | None) -> bytes:
    answer, name = request_range(url, start, stop, seconds), redacted(url)
    known = expected or _versions.get(url)
    if answer.version.bytes < stop:
        if known and known.bytes >= stop:
            raise ReplacedError(f"{name} was replaced while it was read: it now ends before byte {stop:,}; start again")
        raise DataError(_too_short(url, stop))
    (known or _versions.setdefault(url, answer.version)).check(url, answer.version)
    if answer.content is None:
        raise DataError(f"the server of {name} ignores ranges: set data.cache=FOLDER")
    if len(answer.content) != stop - start:
        raise TransientError(f"{len(answer.content):,} of {stop - start:,} bytes came")
    return answer.content


def _too_short(url: str, stop: int) -> str:
    return f"{redacted(url)} ends before byte {stop:,}: it is cut off or was replaced; start again with the whole file"


@contextlib.contextmanager
def _local_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
