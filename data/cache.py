"""Local copies of remote shards, in a folder that many processes share."""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from data.addresses import file_name, is_http, is_remote, redacted, scheme_of
from data.errors import DataError
from data.object_store import download_whole
from data.storage import DEFAULT_TIMEOUTS, Timeouts, probe, read, retry

DOWNLOAD_BYTES = 16 * 2**20  # in one request of a download
EVICTION_RETRIES = 5  # how often a copy may be evicted before it is read

T = TypeVar("T")


def cache_folder() -> Path:
    """$IBQ_CACHE, or ibq under $XDG_CACHE_HOME, or ~/.cache/ibq."""
    if "IBQ_CACHE" in os.environ:
        return Path(os.environ["IBQ_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ibq"


@dataclass
class Cache:
    """Whole objects in a local folder, which many processes may share.

    Only complete files have their final names. These hold at most `max_bytes` in total; downloads in progress come on
    top. The least recently used file is evicted first, so a path must be opened right away, and requested again if it
    has been evicted. A file is identified by its whole URL (http: without the fragment): a URL that is signed again
    each day is downloaded each day. An object that changes under the same URL is not noticed.
    """

    folder: Path
    max_bytes: int
    timeouts: Timeouts = DEFAULT_TIMEOUTS

    def holds(self, url: str) -> bool:
        """Whether there is a local copy of the object."""
        return (Path(self.folder) / self._name(url)).exists()

    def path(self, url: str) -> Path:
        """Local copy of the whole object, downloaded if it is missing; a local path is returned as it is.

        If many processes ask at once, one downloads and the others wait. Raises DataError.
        """
        if not is_remote(url):
            return Path(url)
        kept = Path(self.folder) / self._name(url)
        try:
            if _touched(kept):
                return kept
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_name(f".{kept.name}.part")
            with _locked(part) as file:
                if not _touched(kept):  # otherwise another process was faster
                    try:
                        self._download(url, file)
                        self._keep(part, kept, file)
                    except BaseException:
                        part.unlink()
                        raise
                else:
                    part.unlink()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(
                    f"no space left for {redacted(url)} in the cache {self.folder}: make room there, "
                    "allow the cache fewer bytes, or set data.cache to a folder on a larger disk"
                ) from error
            raise DataError(f"cannot write to the cache {self.folder}: {error.strerror}; set data.cache") from error
        return kept

    @staticmethod
    def _name(url: str) -> str:
        if is_http(scheme_of(url)):  # in buckets, # is an ordinary character
            url = url.split("#")[0]
        readable = re.sub(r"[^A-Za-z0-9._-]+", "_", file_name(url))
        return f"{hashlib.sha256(url.encode('utf-8', 'surrogateescape')).hexdigest()}-{readable[-100:]}"

    def _download(self, url: str, file: BinaryIO) -> None:
        answer, name = probe(url, self.timeouts), redacted(url)
        total = answer.object_bytes
        if total > self.max_bytes:
            raise DataError(f"{name} has {total:,} bytes, the cache is limited to {self.max_bytes:,}: allow it more")
        file.truncate(0)
        if answer.content is None and is_http(scheme_of(url)):
            # Allow as much time in total as the requests of a download in ranges would have.
            seconds = self.timeouts.total_seconds * max(1, -(-total // DOWNLOAD_BYTES))
            timeouts = self.timeouts._replace(total_seconds=seconds)
            retry(url, timeouts, lambda seconds_left: download_whole(url, file, seconds_left))
        else:
            for start in range(0, total, DOWNLOAD_BYTES):
                file.write(read(url, start, min(start + DOWNLOAD_BYTES, total), self.timeouts))
        file.flush()
        os.fsync(file.fileno())  # otherwise a crash may leave a short file under the final name
        if os.fstat(file.fileno()).st_size != total:
            raise DataError(f"{name} was replaced while it was read: it no longer has {total:,} bytes; start again")

    def _keep(self, part: Path, kept: Path, file: BinaryIO) -> None:
        """Give a downloaded file its final name, after evicting the least recently used files if necessary."""
        with _locked(kept.with_name(".lock")):
            for other in kept.parent.glob(".*.part"):
                if other != part:
                    with _locked(other, wait=False) as abandoned:
                        if abandoned is not None:
                            other.unlink()
            # Match the cache's own names only: other files in the folder are neither counted nor removed.
            files = [entry for entry in os.scandir(kept.parent) if re.match(r"[0-9a-f]{64}-", entry.name)]
            files = sorted((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in files)
            total = os.fstat(file.fileno()).st_size + sum(bytes_in_file for _, bytes_in_file, _ in files)
            for _, bytes_in_file, path in files:
                if total <= self.max_bytes:
                    break
                os.unlink(path)
                total -= bytes_in_file
            os.replace(part, kept)


class Access(NamedTuple):
    """How remote shards are read: the timeouts, and the cache if there is one."""

    timeouts: Timeouts = DEFAULT_TIMEOUTS
    cache: Cache | None = None

    def is_copied(self, url: str) -> bool:
        """Whether the shard is read from a local copy in the cache."""
        return self.cache is not None and is_remote(url)

    def read(self, url: str, start: int, stop: int) -> bytes:
        """The bytes start to stop of a shard. Raises DataError."""
        return self.apply(lambda place: read(place, start, stop, self.timeouts), url)

    def apply(self, action: Callable[[str], T], url: str) -> T:
        """`action(url)`, or `action(path of the local copy)`, repeated if another process evicts the copy. Raises
        DataError."""
        if not self.is_copied(url):
            return action(url)
        for _ in range(EVICTION_RETRIES):
            path = str(self.cache.path(url))
            try:
                return action(path)
            except DataError as error:
                if os.path.exists(path):
                    os.unlink(path)  # so that a repaired shard is downloaded
                    raise DataError(str(error).replace(path, redacted(url))) from error
        raise DataError(f"the cache {self.cache.folder} is too small for what is read at once: data.cache_gigabytes")


def _touched(path: Path) -> bool:
    """Whether the file exists; if so, mark it as just used."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[BinaryIO | None]:
    """The file, created if missing and locked for this process until the block or the process ends.

    With wait=False: None if another process holds the lock.
    """
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                acquired = True
            except BlockingIOError:
                acquired = False
            # The previous holder may have renamed or removed the file, and another process may have created a new one.
            if not acquired or _is_at(file, path):
                yield file if acquired else None
                return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
