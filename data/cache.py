"""Local copies of remote shards, in a folder that many processes share."""

import errno
import hashlib
import itertools
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from data.addresses import file_name, is_http, is_remote, redacted, scheme_of
from data.errors import DataError, ReplacedError
from data.object_store import Answer, Version, download_whole
from data.storage import DEFAULT_TIMEOUTS, Timeouts, probe, read, retry
from data.text import printable
from data.unfinished import locked_file, remove_abandoned

DOWNLOAD_BYTES = 16 * 2**20  # in one request of a download
EVICTION_RETRIES = 5  # how often a copy may be evicted before it is read
DOWNLOAD_RESTARTS = 3  # of a download during which the object is replaced
ASKING_SECONDS = 5.0  # for a server to say whether a copy is still what it holds

T = TypeVar("T")
logger = logging.getLogger(__name__)

# By folder and URL, the name of the copy that this process reads: the server is asked once, and a process reads one
# version of an object. Workers inherit it when they are forked.
_chosen: dict[tuple[str, str], str] = {}
_given: set[tuple[str, str]] = set()  # whose copies were given out, so that no other version may follow
# By folder and the start of copies' names, what a folder holds: it is listed once, not for each of its tars.
_listed: dict[str, dict[str, str]] = {}
_warned: set[tuple[str, type[DataError]]] = set()  # hosts, and the kinds of failure to ask them that were told


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
    has been evicted. A file is identified by its whole URL (http: without the fragment), the object's size, and its
    ETag or else Last-Modified: an object that changes is downloaded again, and a URL that is signed again each day is
    downloaded each day. The server is asked once for each process and URL. If it cannot be, the copy is used as it is.
    """

    folder: Path
    max_bytes: int
    timeouts: Timeouts = DEFAULT_TIMEOUTS

    def held(self, urls: list[str]) -> dict[str, str]:
        """The names of the objects' copies, of the most recently used version, by URL, as they were when this process
        first asked. Raises DataError."""
        names = _listed.get(str(self.folder))
        if names is None:
            names = _listed[str(self.folder)] = self._list()
        return {url: names[key] for url in urls if (key := _key(url)) in names}

    def _list(self) -> dict[str, str]:
        try:
            entries = list(os.scandir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise DataError(f"cannot read the cache {self.folder}: {error.strerror}; set data.cache") from error
        return {entry.name.split("-")[0]: entry.name for entry in sorted(entries, key=_last_used)}

    def path(self, url: str) -> Path:
        """Local copy of the whole object, downloaded if it is missing or old; a local path is returned as it is.

        If many processes ask at once, one downloads and the others wait. If the object is replaced meanwhile, the
        download starts again from its first byte, DOWNLOAD_RESTARTS times. Raises DataError.
        """
        if not is_remote(url):
            return Path(url)
        where = str(self.folder), url
        for restart in itertools.count(1):
            try:
                kept = self._copy(url)
                _given.add(where)
                return kept
            except ReplacedError as error:
                if where in _given:
                    raise
                if restart > DOWNLOAD_RESTARTS:
                    raise DataError(
                        f"{redacted(url)} was replaced during each of {restart} downloads: start again when nothing "
                        "writes it any more"
                    ) from error
                said = "%s was replaced while it was downloaded; the download starts again from byte 0 (%d of %d)"
                logger.warning(said, printable(redacted(url)), restart, DOWNLOAD_RESTARTS)
                _chosen.pop(where, None)

    def _copy(self, url: str) -> Path:
        """The copy of the version that this process reads, downloaded if it is missing. Raises DataError, and
        ReplacedError if the server has another version."""
        where, answer = (str(self.folder), url), None
        try:
            if where not in _chosen:
                answer, _chosen[where] = self._choose(url)
            kept = Path(self.folder) / _chosen[where]
            if _touched(kept):
                return kept
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_name(f".{kept.name}.part")
            with locked_file(part) as file:
                if not _touched(kept):  # otherwise another process was faster
                    try:
                        answer = answer or probe(url, self.timeouts)
                        if _name(url, answer.version) != kept.name:
                            raise ReplacedError(f"{redacted(url)} was replaced while it was read; start again")
                        self._download(url, answer, file)
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

    def forget(self, url: str, path: str) -> None:
        """Remove a damaged copy, so that a repaired object is downloaded."""
        os.unlink(path)
        _chosen.pop((str(self.folder), url), None)
        _given.discard((str(self.folder), url))

    def _choose(self, url: str) -> tuple[Answer | None, str]:
        """The server's answer and the name of the object's copy; None and that of an existing copy if the server
        cannot be asked."""
        copy, host = self.held([url]).get(url), url.split("/")[2]
        if copy is not None and (host, DataError) in _warned:  # it does not answer for other tars either
            return None, copy
        brief = Timeouts(*(min(seconds, ASKING_SECONDS) for seconds in self.timeouts))
        try:
            answer = probe(url, self.timeouts if copy is None else brief)
            return answer, _name(url, answer.version)
        except DataError as error:
            copy = copy or self._list().get(_key(url))  # another process may have made one meanwhile
            if copy is None:
                raise
            if (host, type(error)) not in _warned:
                _warned.add((host, type(error)))
                logger.warning("%s; copies in the cache %s are used as they are", printable(str(error)), self.folder)
            return None, copy

    def _download(self, url: str, answer: Answer, file: BinaryIO) -> None:
        name, version = redacted(url), answer.version
        total = version.bytes
        if total > self.max_bytes:
            raise DataError(f"{name} has {total:,} bytes, the cache is limited to {self.max_bytes:,}: allow it more")
        file.truncate(0)
        if answer.content is None and is_http(scheme_of(url)):
            # Allow as much time in total as the requests of a download in ranges would have.
            seconds = self.timeouts.total_seconds * max(1, -(-total // DOWNLOAD_BYTES))
            timeouts = self.timeouts._replace(total_seconds=seconds)
            retry(url, timeouts, lambda seconds_left: download_whole(url, version, file, seconds_left))
        else:
            for start in range(0, total, DOWNLOAD_BYTES):
                file.write(read(url, start, min(start + DOWNLOAD_BYTES, total), self.timeouts, version))
        file.flush()
        os.fsync(file.fileno())  # otherwise a crash may leave a short file under the final name
        if os.fstat(file.fileno()).st_size != total:
            raise ReplacedError(f"{name} was replaced while it was read: it no longer has {total:,} bytes; start again")

    def _keep(self, part: Path, kept: Path, file: BinaryIO) -> None:
        """Give a downloaded file its final name, after evicting the least recently used files if necessary."""
        with locked_file(kept.with_name(".lock")):
            remove_abandoned(other for other in kept.parent.glob(".*.part") if other != part)
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

    def read(self, url: str, start: int, stop: int, expected: Version | None = None) -> bytes:
        """The bytes start to stop of a shard; expected: see `data.storage.read`. Raises DataError."""
        return self.apply(lambda place: read(place, start, stop, self.timeouts, expected), url)

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
                    self.cache.forget(url, path)
                    raise DataError(str(error).replace(path, redacted(url))) from error
        raise DataError(f"the cache {self.cache.folder} is too small for what is read at once: data.cache_gigabytes")


def _key(url: str) -> str:
    """What the names of an object's copies begin with."""
    if is_http(scheme_of(url)):  # in buckets, # is an ordinary character
        url = url.split("#")[0]
    return hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()


def _name(url: str, version: Version) -> str:
    """The name of the copy of one version of an object."""
    digest = hashlib.sha256(f"{version.bytes} {version.tag}".encode("utf-8", "surrogateescape")).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", file_name(url))
    return f"{_key(url)}-{digest[:16]}-{readable[-100:]}"


def _last_used(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_mtime_ns
    except FileNotFoundError:  # another process has just evicted it
        return 0


def _touched(path: Path) -> bool:
    """Whether the file exists; if so, mark it as just used."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True
