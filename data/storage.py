"""Bytes from local paths and object stores (http, https, s3, gs): sizes, ranges, listings, a cache of whole objects.

Whatever goes wrong ends in a DataError, within the time that `Patience` gives and without a secret: addresses appear
as `redacted` writes them, and the words of the libraries beneath, which quote whole addresses, do not appear at all.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import itertools
import logging
import os
import re
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import fsspec

from data.errors import DataError

logger = logging.getLogger(__name__)

PIECE_BYTES = 16 * 2**20  # of a download, in one request
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 15.0  # between tries

T = TypeVar("T")


class Patience(NamedTuple):
    """request_seconds: limit of one request; total_seconds: limit of all tries for one read."""

    request_seconds: float = 30.0
    total_seconds: float = 300.0


PATIENCE = Patience()


# -------------------------------------------------------------------------------------------------------- addresses


class _Scheme(NamedTuple):
    """package: what fsspec needs for it; may_read: what to do where reading is refused."""

    package: str
    may_read: str


_HTTP = _Scheme("aiohttp", "check its user and password, or sign it anew if it is a signed address")
_SCHEMES = {
    "http": _HTTP,
    "https": _HTTP,
    "s3": _Scheme("s3fs", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=1 for a public bucket"),
    "gs": _Scheme("gcsfs", "run `gcloud auth application-default login`, or set FSSPEC_GS_TOKEN=anon (public bucket)"),
}

_ADDRESS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<user>[^/?#]*@)?(?P<host>[^/?#@:\[\]]+|\[[0-9A-Fa-f:.]+\])(?P<port>:\d+)?"
    r"(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?(?P<fragment>#.*)?",
    re.DOTALL,
)


def is_remote(url: str) -> bool:
    """Whether `url` has a scheme, as in s3://bucket/a.tar. A local path has none, nor has `pipe:command`."""
    return "://" in url and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url) is not None  # asked for each sample


def redacted(url: str) -> str:
    """The URL for messages: without user:password@, query ("?…" tells that there was one) and fragment."""
    if not is_remote(url):
        return url
    parts = _ADDRESS.fullmatch(url)
    if parts is None:  # such as a password with a slash in it: then nothing tells where the secret ends
        return url.split("://")[0] + "://…"
    query = "?…" if parts["query"] else ""
    return f"{parts['scheme']}://{parts['host']}{parts['port'] or ''}{parts['path'] or ''}{query}"


def scheme_of(url: str) -> str:
    """The scheme of a remote URL. Raises DataError for one that cannot be read."""
    scheme = url.split("://")[0].lower()
    if scheme not in _SCHEMES:
        raise DataError(f"{redacted(url)} cannot be read: give a local path or an address of {', '.join(_SCHEMES)}")
    parts = _ADDRESS.fullmatch(url)
    if parts is None:
        raise DataError(f"{redacted(url)} is no address: percent-encode what is special in its user and password")
    if parts["user"] and _SCHEMES[scheme] is not _HTTP:
        raise DataError(f"{redacted(url)} must not hold credentials: {_SCHEMES[scheme].may_read}")
    return scheme


# ---------------------------------------------------------------------------------------------------------- reading

# Of what `size` or the first `read` found, so that an object that is replaced under a running job is noticed. Workers
# inherit it when they are forked.
_sizes: dict[str, int] = {}


def size(url: str, patience: Patience = PATIENCE) -> int:
    """Bytes of a local file or of an object. Raises DataError."""
    if not is_remote(url):
        with _local(url):
            return os.path.getsize(url)
    return _look(url, patience).object_bytes


def read(url: str, start: int, stop: int, patience: Patience = PATIENCE) -> bytes:
    """Exactly the bytes start to stop (exclusive) of a local file or of an object.

    Failures that may pass (no connection, a stall, an answer that breaks off, HTTP 429 and 5xx) are tried again, at
    growing intervals, for patience.total_seconds. Raises DataError then, and at once for what does not pass: a missing
    object, no right to read it, one that is shorter than asked or has another size than before, or a server that does
    not answer ranges, unless the range is the whole object.
    """
    if start == stop:
        return b""
    if is_remote(url):
        content = _patiently(url, patience, lambda seconds_left: _read_once(url, start, stop, seconds_left()))
    else:
        with _local(url):
            file = os.open(url, os.O_RDONLY)  # no buffer, which would read whole pages on either side
            try:
                content = os.pread(file, stop - start, start)
            finally:
                os.close(file)
        if len(content) < stop - start:
            raise DataError(_shorter(url, stop))
    _client().count(len(content))
    return content


def list_tars(url: str, patience: Patience = PATIENCE) -> list[str]:
    """The URLs of the *.tar right in a folder of a bucket (s3://bucket/folder, gs://bucket), sorted.

    The whole listing counts as one request. Raises DataError, also where there are none, and for http, which has no
    listings.
    """
    scheme, name = scheme_of(url), redacted(url)
    if _SCHEMES[scheme] is _HTTP:
        raise DataError(
            f"{name}: folders cannot be listed over {scheme}: give a brace pattern "
            "(…/train-{000000..000009}.tar) or a file that lists the tars"
        )

    def attempt(seconds_left: Callable[[], float]) -> list[dict]:
        client = _client()
        return client.run(url, _list(client.filesystem(scheme), url), seconds_left())

    entries = _patiently(url, patience, attempt)
    names = (entry["name"] for entry in entries if entry["type"] == "file")
    tars = sorted(f"{scheme}://{name}" for name in names if name.endswith(".tar"))
    if not tars:
        raise DataError(f"no *.tar in the folder {name}: check its path")
    return tars


def bytes_read() -> int:
    """Bytes that `read` and downloads into a `Cache` have taken in this process."""
    return _client().bytes_read


@contextlib.contextmanager
def _local(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _look(url: str, patience: Patience) -> "_Answer":
    """What a store says to a request for the first byte, which signed addresses allow where they refuse HEAD."""
    answer = _patiently(url, patience, lambda seconds_left: _ask(url, 0, 1, seconds_left()))
    _sizes[url] = answer.object_bytes
    return answer


def _read_once(url: str, start: int, stop: int, seconds: float) -> bytes:
    answer, name = _ask(url, start, stop, seconds), redacted(url)
    if answer.object_bytes < stop:
        raise DataError(_shorter(url, stop))
    before = _sizes.setdefault(url, answer.object_bytes)
    if before != answer.object_bytes:
        change = f"it had {before:,} bytes and has {answer.object_bytes:,}"
        raise DataError(f"{name} was replaced while it was read: {change}; start again")
    if answer.content is None:
        raise DataError(f"the server of {name} does not answer ranges: set data.cache=FOLDER")
    if len(answer.content) != stop - start:
        raise _Again(f"{len(answer.content):,} of {stop - start:,} bytes came")
    return answer.content


def _shorter(url: str, stop: int) -> str:
    return f"{redacted(url)} ends before byte {stop:,}: it is cut off or was replaced; start again with the whole file"


class _Again(Exception):
    """A failure that may pass. Its text tells what happened in words of ours, since the libraries quote addresses."""


def _patiently(url: str, patience: Patience, attempt: Callable[[Callable[[], float]], T]) -> T:
    """What `attempt` returns, tried until it raises no _Again. It is given a function: what its next request may take,
    in seconds. Raises DataError when patience.total_seconds are over."""
    _client().filesystem(scheme_of(url))  # before the clock runs, since it imports
    start = time.monotonic()

    def seconds_left() -> float:
        return min(patience.request_seconds, start + patience.total_seconds - time.monotonic())

    for tries in itertools.count(1):
        try:
            return attempt(seconds_left)
        except _Again as error:
            happened = str(error)
        passed = time.monotonic() - start
        left = patience.total_seconds - passed
        if left < FIRST_WAIT_SECONDS:
            break
        wait = min(_wait_seconds(url, tries), left / 2)  # a further try is to have some time too
        logger.warning("%s: %s; try %d follows in %.1f s", redacted(url), happened, tries + 1, wait)
        time.sleep(wait)
    raise DataError(
        f"cannot read {redacted(url)}: {happened} ({tries} {'try' if tries == 1 else 'tries'} in {passed:.1f} s); "
        "check that its server is up and can be reached from here"
    )


def _wait_seconds(url: str, tries: int) -> float:
    """Doubles with the tries; a part that hangs on the URL keeps readers from coming back at the same moment."""
    digest = hashlib.sha256(f"{url} {tries}".encode("utf-8", "surrogateescape")).digest()
    longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (tries - 1))
    return longest * (0.5 + int.from_bytes(digest[:4], "big") / 2**33)


# ---------------------------------------------------------------------------------------------------------- clients


class _Client:
    """A process's connections: a thread that runs an event loop, and a filesystem for each scheme in use.

    fsspec has such a loop too, but its lock may be inherited locked by a forked worker.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.filesystems: dict[str, Any] = {}
        self.bytes_read = 0

    def filesystem(self, scheme: str) -> Any:
        with self.lock:
            if self.loop is None:
                self.loop = asyncio.new_event_loop()
                self.loop.set_exception_handler(_tell)
                threading.Thread(target=self.loop.run_forever, name="storage", daemon=True).start()
            if scheme not in self.filesystems:
                self.filesystems[scheme] = _connect(scheme, self.loop)
            return self.filesystems[scheme]

    def run(self, url: str, coroutine: Coroutine[Any, Any, T], seconds: float) -> T:
        """What the coroutine returns. Raises _Again or DataError, also where it takes longer than `seconds`."""
        future, seconds = asyncio.run_coroutine_threadsafe(coroutine, self.loop), max(seconds, 0.0)
        try:
            # The limit of the whole request, waited for here: it also holds where bytes trickle, or the loop is stuck.
            return future.result(seconds)
        except (_Again, DataError):
            raise
        except (concurrent.futures.TimeoutError, asyncio.TimeoutError, TimeoutError):
            raise _Again(f"no whole answer within {seconds:.3g} s") from None
        except Exception as error:
            raise _explained(url, error) from None
        finally:
            future.cancel()

    def count(self, bytes_taken: int) -> None:
        with self.lock:
            self.bytes_read += bytes_taken


# By process, since a forked one has neither its parent's thread nor the right to its connections. What it inherits
# stays here unused: to free it would take the sockets out of the epoll that it shares with its parent.
_clients: dict[int, _Client] = {}


def _client() -> _Client:
    return _clients.get(os.getpid()) or _clients.setdefault(os.getpid(), _Client())


def _tell(_: asyncio.AbstractEventLoop, context: dict) -> None:
    """Instead of asyncio's own line, which prints exceptions and arguments and thus addresses."""
    cause = context.get("exception")
    logger.warning("outside of any request: %s", context["message"] if cause is None else type(cause).__name__)


def _connect(scheme: str, loop: asyncio.AbstractEventLoop) -> Any:
    """A filesystem of fsspec whose retries and time limits are ours alone. Options: FSSPEC_S3_ANON=1 and the like."""
    options = {
        "s3": {
            "config_kwargs": {
                "retries": {"total_max_attempts": 1},
                "connect_timeout": None,
                "read_timeout": None,
                "max_pool_connections": 100,
            }
        },
        "gs": {"session_kwargs": {"trust_env": True}},
    }.get(scheme, {"client_kwargs": {"trust_env": True}})
    try:
        filesystem = fsspec.filesystem(scheme, loop=loop, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError:
        package = _SCHEMES[scheme].package
        raise DataError(f"{scheme}:// needs {package}: pip install {package}") from None
    if scheme == "s3":
        filesystem.retries = 1
    # What they log holds whole addresses and headers; what fails reaches us as exceptions anyway.
    for name in ("fsspec", "aiohttp", "s3fs", "aiobotocore", "botocore", "gcsfs", "google", "urllib3"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return filesystem


# --------------------------------------------------------------------------------------------------------- requests


class _Answer(NamedTuple):
    """What a store says to a request for a range.

    content: the bytes; None where the whole, larger object would come instead, of which nothing is taken.
    object_bytes: the whole object's size.
    """

    content: bytes | None
    object_bytes: int


def _ask(url: str, start: int, stop: int, seconds: float) -> _Answer:
    """One request for the bytes start to stop. Raises _Again or DataError."""
    scheme, client = scheme_of(url), _client()
    get = {"s3": _get_s3, "gs": _get_gs}.get(scheme, _get_http)
    return client.run(url, get(client.filesystem(scheme), url, start, stop), seconds)


async def _get_http(filesystem: Any, url: str, start: int, stop: int) -> _Answer:
    return await _get(await filesystem.set_session(), _as_given(url), {}, url, start, stop)


async def _get_gs(filesystem: Any, url: str, start: int, stop: int) -> _Answer:
    await filesystem._set_session()
    address, headers = _as_given(filesystem.url(url)), filesystem._get_headers({})
    return await _get(filesystem.session, address, headers, url, start, stop)


async def _get(session: Any, address: Any, headers: dict, url: str, start: int, stop: int) -> _Answer:
    headers = {**headers, **_UNPACKED, "Range": f"bytes={start}-{stop - 1}"}
    async with session.get(address, headers=headers, timeout=_no_limit()) as answer:
        return await _judged(url, answer.status, answer.headers, answer.read, start, stop)


async def _get_s3(filesystem: Any, url: str, start: int, stop: int) -> _Answer:
    bucket, _, key = url.split("://", 1)[1].partition("/")
    try:
        answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
    except OSError as error:
        response = _response(error)
        if response is None or _status(response) != 416:
            raise
        return await _judged(url, 416, {}, None, start, stop)
    async with answer["Body"] as body:
        return await _judged(url, _status(answer), answer["ResponseMetadata"]["HTTPHeaders"], body.read, start, stop)


# A server that packs its answers would count other bytes than the object's.
_UNPACKED = {"Accept-Encoding": "identity"}


def _no_limit() -> Any:
    import aiohttp  # comes with the first http address

    return aiohttp.ClientTimeout(total=None)


def _as_given(url: str) -> Any:
    """For aiohttp, which writes addresses anew otherwise; but signatures are of the very letters."""
    import yarl

    return yarl.URL(
        url, encoded=re.fullmatch(r"(%[0-9A-Fa-f]{2}|[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-])+", url) is not None
    )


async def _judged(
    url: str,
    status: int,
    headers: Mapping[str, str],
    content: Callable[[], Awaitable[bytes]] | None,
    start: int,
    stop: int,
) -> _Answer:
    """The answer to a request for a range; `content` takes its body."""
    part = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", headers.get("content-range", ""))
    if status == 206 and part and part[1]:
        if int(part[1]) != start:
            raise _Again(f"bytes from {int(part[1]):,} on came instead of those from {start:,} on")
        return _Answer(await content(), int(part[2]))
    if status == 200 and headers.get("content-length", "").isdigit():
        whole = int(headers["content-length"])
        return _Answer(await content() if (start, stop) == (0, whole) else None, whole)
    if status == 416:  # it ends before `start`
        return _Answer(b"", int(part[2]) if part else start)
    if status in (200, 206):
        raise DataError(f"the server of {redacted(url)} does not tell its size: put it on one that does")
    raise _refusal(url, status)


async def _list(filesystem: Any, url: str) -> list[dict]:
    """What lies right in a folder, as fsspec's entries; s3fs' own `_ls` takes a failure for an empty folder."""
    path = url.split("://", 1)[1].rstrip("/")
    if url.lower().startswith("s3:"):
        return await filesystem._lsdir(path, refresh=True)
    return await filesystem._ls(path, detail=True, refresh=True)


# --------------------------------------------------------------------------------------------------------- failures


def _refusal(url: str, status: int, code: str = "") -> Exception:
    """What an HTTP status (and S3's code for it) means: _Again or DataError."""
    what = f"HTTP {status} {code}".rstrip()
    if status in (408, 425, 429) or status >= 500 or code == "RequestTimeout":
        return _Again(what)
    if status in (404, 410):
        return DataError(f"there is no {redacted(url)} ({what}): check its path")
    if status in (401, 403, 407) or code in ("ExpiredToken", "InvalidToken"):
        mend = _SCHEMES[scheme_of(url)].may_read
        return DataError(f"{redacted(url)} may not be read ({what}): check its path, and {mend}")
    return DataError(f"{redacted(url)} cannot be read: its server answers {what}; check the address")


def _response(error: BaseException) -> dict | None:
    """botocore's account of an answer, from its exception or from the one that s3fs made of it."""
    accounts = (getattr(one, "response", None) for one in (error, error.__cause__))
    return next((account for account in accounts if isinstance(account, dict)), None)


def _status(response: dict) -> int:
    return response["ResponseMetadata"]["HTTPStatusCode"]


_IN_WORDS = {
    "ClientPayloadError": "the answer broke off",
    "ServerDisconnectedError": "the server hung up",
    "ClientConnectorDNSError": "its host is not known",
}


# What aiohttp, botocore, requests and google-auth raise where there was no answer, or none that could be read.
_MAY_PASS = {"ClientError", "HTTPClientError", "ConnectionError", "RequestException", "TransportError"}
_MAY_PASS |= {"ResponseParserError", "CredentialRetrievalError", "MetadataRetrievalError"}


def _explained(url: str, error: Exception) -> Exception:
    """_Again or DataError for what a library raised. Classes go by name: their packages may not be installed."""
    names = [kind.__name__ for kind in type(error).__mro__]
    response, name = _response(error), redacted(url)
    if response is not None:
        code = response.get("Error", {}).get("Code", "")
        return _refusal(url, _status(response), code if re.fullmatch(r"[A-Za-z.]{1,64}", code) else "")
    if "HttpError" in names and str(getattr(error, "code", "")).isdigit():  # of gcsfs, as are the next two
        return _refusal(url, int(error.code))
    if isinstance(error, FileNotFoundError):
        return _refusal(url, 404)
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):
        return _refusal(url, 403)
    if {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"} & {*names}:
        return DataError(f"there are no credentials to read {name} with: {_SCHEMES[scheme_of(url)].may_read}")
    if {"ClientConnectorCertificateError", "SSLCertVerificationError"} & {*names}:
        return DataError(f"the certificate of {name} is not trusted here: set SSL_CERT_FILE, or check the address")
    if {"InvalidURL", "NonHttpUrlClientError", "TooManyRedirects", "ParamValidationError", "ValueError"} & {*names}:
        return DataError(f"{name} cannot be read ({names[0]}): check the address")
    if isinstance(error, OSError) or _MAY_PASS & {*names}:
        words = (_IN_WORDS[kind] for kind in names if kind in _IN_WORDS)
        return _Again(next(words, None) or getattr(error, "strerror", None) or names[0])
    place = traceback.extract_tb(error.__traceback__)[-1]
    return DataError(f"{name} cannot be read: {names[0]} in {Path(place.filename).name}, line {place.lineno}")


# ------------------------------------------------------------------------------------------------------------ cache


@dataclass
class Cache:
    """Whole objects in a local folder, which many processes may share.

    Only complete files bear their final names. These hold at most `max_bytes`; downloads under way come on top. The
    least recently used go first, so that a path should be opened when it is given, and asked for again where it has
    gone since. A file is known by its whole URL (http: but for the fragment): one that is signed anew each day is
    downloaded each day. An object that changes under its URL is not noticed.
    """

    folder: Path
    max_bytes: int
    patience: Patience = PATIENCE

    def path(self, url: str) -> Path:
        """Local copy of the whole object, downloaded if it is missing; a local path is its own.

        Of many processes that ask for it at once, one downloads and the others wait. Raises DataError.
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
        if _SCHEMES[scheme_of(url)] is _HTTP:  # elsewhere # is a letter like others
            url = url.split("#")[0]
        readable = re.sub(r"[^A-Za-z0-9._-]+", "_", (_ADDRESS.fullmatch(url)["path"] or "").rsplit("/", 1)[-1])
        return f"{hashlib.sha256(url.encode('utf-8', 'surrogateescape')).hexdigest()}-{readable[-100:]}"

    def _download(self, url: str, file: BinaryIO) -> None:
        answer, name = _look(url, self.patience), redacted(url)
        total = answer.object_bytes
        if total > self.max_bytes:
            raise DataError(f"{name} has {total:,} bytes, the cache is limited to {self.max_bytes:,}: allow it more")
        file.truncate(0)
        if answer.content is None and _SCHEMES[scheme_of(url)] is _HTTP:
            # As much time in all as its pieces would have.
            seconds = self.patience.total_seconds * max(1, -(-total // PIECE_BYTES))
            patience = self.patience._replace(total_seconds=seconds)
            _patiently(url, patience, lambda seconds_left: _take_whole(url, file, seconds_left))
        else:
            for start in range(0, total, PIECE_BYTES):
                file.write(read(url, start, min(start + PIECE_BYTES, total), self.patience))
        file.flush()
        os.fsync(file.fileno())  # or a machine that goes down may leave a short file under the final name
        if os.fstat(file.fileno()).st_size != total:
            raise DataError(f"{name} was replaced while it was read: it no longer has {total:,} bytes; start again")

    def _keep(self, part: Path, kept: Path, file: BinaryIO) -> None:
        """Gives a downloaded file its final name, in place of the least recently used ones if need be."""
        with _locked(kept.with_name(".lock")):
            for other in kept.parent.glob(".*.part"):
                if other != part:
                    with _locked(other, wait=False) as dead:
                        if dead is not None:
                            other.unlink()
            # Names of ours only: other files in the folder are not the cache's to count or to remove.
            files = [entry for entry in os.scandir(kept.parent) if re.match(r"[0-9a-f]{64}-", entry.name)]
            files = sorted((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in files)
            total = os.fstat(file.fileno()).st_size + sum(bytes_in_file for _, bytes_in_file, _ in files)
            for _, bytes_in_file, path in files:
                if total <= self.max_bytes:
                    break
                os.unlink(path)
                total -= bytes_in_file
            os.replace(part, kept)


def _take_whole(url: str, file: BinaryIO, seconds_left: Callable[[], float]) -> None:
    """Writes the one answer that a server without ranges gives."""
    client = _client()
    answer = client.run(url, _open(client.filesystem(scheme_of(url)), url), seconds_left())
    try:
        file.seek(0)
        file.truncate()
        while content := client.run(url, answer.content.readany(), seconds_left()):
            file.write(content)
            client.count(len(content))
    finally:
        client.loop.call_soon_threadsafe(answer.close)


async def _open(filesystem: Any, url: str) -> Any:
    session = await filesystem.set_session()
    answer = await session.get(_as_given(url), headers=_UNPACKED, timeout=_no_limit())
    if answer.status != 200:
        answer.close()
        raise _refusal(url, answer.status)
    return answer


def _touched(path: Path) -> bool:
    """Whether the file is there; then it counts as just used."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[BinaryIO | None]:
    """The file, made if it is missing, for this process alone until the block or the process ends.

    Without `wait`: None where another has it.
    """
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                alone = True
            except BlockingIOError:
                alone = False
            # Whoever had it before may have renamed or removed it, and another may have made it anew.
            if not alone or _is_at(file, path):
                yield file if alone else None
                return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
