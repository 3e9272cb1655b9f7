"""Requests to object stores (http, https, s3, gs, hf): one request each, and what its answer or failure means.

Every failure ends in a `TransientError` (a retry may help) or a DataError. Error messages never contain the text of the
libraries' exceptions, which quote whole addresses with their secrets.
"""

import asyncio
import concurrent.futures
import functools
import logging
import os
import re
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from data.addresses import SCHEMES, redacted, scheme_of
from data.errors import DataError, DeniedError, MissingError, ReplacedError, UnreadableError

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOGGERS = (
    "fsspec",
    "aiohttp",
    "s3fs",
    "aiobotocore",
    "botocore",
    "gcsfs",
    "google",
    "urllib3",
    "huggingface_hub",
    "httpx",
)


class TransientError(Exception):
    """A failure that a retry may fix. The message is our own wording, since the libraries quote addresses."""


# ---------------------------------------------------------------------------------------------------------- clients


class Client:
    """One process's connections: a thread that runs an event loop, and one fsspec filesystem for each scheme in use.

    fsspec has such a loop too, but a forked worker may inherit its lock in the locked state.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.filesystems: dict[str, Any] = {}
        self.bytes_read = 0

    def filesystem(self, scheme: str) -> Any:
        """The filesystem of a scheme, created on first use."""
        with self.lock:
            if self.loop is None:
                self.loop = asyncio.new_event_loop()
                self.loop.set_exception_handler(_log_loop_error)
                threading.Thread(target=self.loop.run_forever, name="storage", daemon=True).start()
            if scheme not in self.filesystems:
                self.filesystems[scheme] = _connect(scheme, self.loop)
            return self.filesystems[scheme]

    def run(self, url: str, coroutine: Coroutine[Any, Any, T], seconds: float) -> T:
        """The coroutine's result. Raises TransientError or DataError, also after `seconds` without a result."""
        future, seconds = asyncio.run_coroutine_threadsafe(coroutine, self.loop), max(seconds, 0.0)
        try:
            # The time limit is enforced here, outside the loop, so it holds even if bytes trickle or the loop is stuck.
            return future.result(seconds)
        except (TransientError, DataError):
            raise
        except (concurrent.futures.TimeoutError, asyncio.TimeoutError, TimeoutError):
            raise TransientError(f"no whole answer within {seconds:.3g} s") from None
        except Exception as error:
            raise _error_from_exception(url, error) from None
        finally:
            future.cancel()

    def count(self, bytes_taken: int) -> None:
        with self.lock:
            self.bytes_read += bytes_taken


# By process id: a forked process has neither its parent's thread nor the right to use its connections. The inherited
# client is kept but not used: freeing it would remove its sockets from the epoll that it shares with the parent.
_clients: dict[int, Client] = {}


def client() -> Client:
    """This process's client."""
    return _clients.get(os.getpid()) or _clients.setdefault(os.getpid(), Client())


def _log_loop_error(_: asyncio.AbstractEventLoop, context: dict) -> None:
    """Replaces asyncio's own log line, which prints exceptions and arguments and thus addresses."""
    cause = context.get("exception")
    logger.warning("outside of any request: %s", context["message"] if cause is None else type(cause).__name__)


def _connect(scheme: str, loop: asyncio.AbstractEventLoop) -> Any:
    """An fsspec filesystem without its own retries and time limits. FSSPEC_S3_ANON=1 and the like set options."""
    import fsspec  # on first use: importing it takes a tenth of a second

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
        "hf": {"endpoint": os.environ.get("HF_ENDPOINT")},
    }.get(scheme, {"client_kwargs": {"trust_env": True}})
    try:
        filesystem = fsspec.filesystem(scheme, loop=loop, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError:
        package = SCHEMES[scheme].package
        raise DataError(f"{scheme}:// needs {package}: pip install {package}") from None
    if scheme == "s3":
        filesystem.retries = 1
    # Their logs contain whole addresses and headers; failures reach us as exceptions anyway.
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return filesystem


# --------------------------------------------------------------------------------------------------------- requests


class Version(NamedTuple):
    """What tells one version of an object from another.

    bytes: size of the whole object. tag: its ETag or else Last-Modified; empty if the server sends neither.
    """

    bytes: int
    tag: str = ""

    def check(self, url: str, found: "Version") -> None:
        """Raises ReplacedError if an answer is of another version. Tags of different kinds are not compared: a server
        may leave out the ETag of some answers."""
        if found.bytes != self.bytes:
            change = f"it had {self.bytes:,} bytes and has {found.bytes:,}"
        elif self.tag and found.tag and _is_etag(self.tag) == _is_etag(found.tag) and _opaque(self) != _opaque(found):
            change = f"it has the same size, but another {'ETag' if _is_etag(self.tag) else 'date'}"
        else:
            return
        raise ReplacedError(f"{redacted(url)} was replaced while it was read: {change}; start again")


def _is_etag(tag: str) -> bool:
    return tag.endswith('"')


def _opaque(version: Version) -> str:
    """A tag without the mark of a weak one, which servers add where they may compress answers."""
    return version.tag.removeprefix("W/")


class Answer(NamedTuple):
    """The answer to a request for a range of bytes.

    content: the bytes; None if the server sends the whole, larger object instead, which is not downloaded. version: of
    the object that they are from.
    """

    content: bytes | None
    version: Version


def request_range(url: str, start: int, stop: int, seconds: float) -> Answer:
    """One request for the bytes start to stop. Raises TransientError or DataError."""
    scheme = scheme_of(url)
    get = _get_s3 if scheme == "s3" else _get_http
    return client().run(url, get(client().filesystem(scheme), url, start, stop), seconds)


def request_listing(url: str, seconds: float) -> list[dict]:
    """One request for what is directly in a folder, as fsspec's entries. Raises TransientError or DataError."""
    return client().run(url, _list(client().filesystem(scheme_of(url)), url), seconds)


def download_whole(url: str, version: Version, file: BinaryIO, seconds_left: Callable[[], float]) -> None:
    """Write the whole object into `file`, for a server that ignores ranges. Raises TransientError, DataError, and
    ReplacedError for another version."""
    ours = client()
    answer = ours.run(url, _open(ours.filesystem(scheme_of(url)), url), seconds_left())
    try:
        length = answer.headers.get("content-length", "")
        version.check(url, Version(int(length) if length.isdigit() else version.bytes, _tag(answer.headers)))
        file.seek(0)
        file.truncate()
        while content := ours.run(url, answer.content.readany(), seconds_left()):
            file.write(content)
            ours.count(len(content))
    finally:
        ours.loop.call_soon_threadsafe(answer.close)


class _Place(NamedTuple):
    """Where the bytes of an object are requested over HTTP. session: aiohttp's."""

    session: Any
    address: Any
    headers: dict


async def _place(filesystem: Any, url: str) -> _Place:
    scheme = scheme_of(url)
    if scheme == "gs":
        await filesystem._set_session()
        return _Place(filesystem.session, _unchanged(filesystem.url(url)), filesystem._get_headers({}))
    if scheme == "hf":
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        # It asks once for each repository whether the revision exists.
        found = await asyncio.get_running_loop().run_in_executor(None, filesystem.resolve_path, url)
        where = {"repo_type": found.repo_type, "revision": found.revision, "endpoint": filesystem.endpoint}
        address = hf_hub_url(found.repo_id, found.path_in_repo, **where)
        session = await client().filesystem("https").set_session()
        return _Place(session, _unchanged(address), build_hf_headers(token=filesystem.token))
    return _Place(await filesystem.set_session(), _unchanged(url), {})


async def _get_http(filesystem: Any, url: str, start: int, stop: int) -> Answer:
    session, address, headers = await _place(filesystem, url)
    headers = {**headers, **_UNCOMPRESSED, "Range": f"bytes={start}-{stop - 1}"}
    async with session.get(address, headers=headers, timeout=_no_time_limit()) as answer:
        return await _parse_answer(url, answer.status, answer.headers, answer.read, start, stop)


async def _get_s3(filesystem: Any, url: str, start: int, stop: int) -> Answer:
    bucket, _, key = url.split("://", 1)[1].partition("/")
    try:
        answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}")
    except OSError as error:
        response = _response(error)
        if response is None or _status(response) != 416:
            raise
        return await _parse_answer(url, 416, {}, None, start, stop)
    async with answer["Body"] as body:
        headers = answer["ResponseMetadata"]["HTTPHeaders"]
        return await _parse_answer(url, _status(answer), headers, body.read, start, stop)


async def _list(filesystem: Any, url: str) -> list[dict]:
    path = url.split("://", 1)[1].rstrip("/")
    if url.lower().startswith("s3:"):
        return await filesystem._lsdir(path, refresh=True)  # s3fs' own `_ls` takes a failure for an empty folder
    if url.lower().startswith("hf:"):  # the only one that is not asynchronous
        ls = functools.partial(filesystem.ls, path, detail=True, refresh=True)
        return await asyncio.get_running_loop().run_in_executor(None, ls)
    return await filesystem._ls(path, detail=True, refresh=True)


async def _open(filesystem: Any, url: str) -> Any:
    session, address, headers = await _place(filesystem, url)
    answer = await session.get(address, headers={**headers, **_UNCOMPRESSED}, timeout=_no_time_limit())
    if answer.status != 200:
        answer.close()
        raise _error_from_status(url, answer.status)
    return answer


# If a server compressed its answers, ranges and sizes would not be those of the object.
_UNCOMPRESSED = {"Accept-Encoding": "identity"}


def _no_time_limit() -> Any:
    import aiohttp  # installed and imported with the first http filesystem

    return aiohttp.ClientTimeout(total=None)


def _unchanged(url: str) -> Any:
    """The URL for aiohttp, which would re-encode it: a signature is only valid for the exact characters."""
    import yarl

    is_encoded = re.fullmatch(r"(%[0-9A-Fa-f]{2}|[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-])+", url) is not None
    return yarl.URL(url, encoded=is_encoded)


def _tag(headers: Mapping[str, str]) -> str:
    return headers.get("etag") or headers.get("last-modified", "")


async def _parse_answer(
    url: str,
    status: int,
    headers: Mapping[str, str],
    content: Callable[[], Awaitable[bytes]] | None,
    start: int,
    stop: int,
) -> Answer:
    """The answer to a request for a range; `content` reads its body."""
    tag = _tag(headers)
    part = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", headers.get("content-range", ""))
    if status == 206 and part and part[1]:
        if int(part[1]) != start:
            raise TransientError(f"the answer starts at byte {int(part[1]):,} instead of {start:,}")
        return Answer(await content(), Version(int(part[2]), tag))
    if status == 200 and headers.get("content-length", "").isdigit():
        whole = int(headers["content-length"])
        return Answer(await content() if (start, stop) == (0, whole) else None, Version(whole, tag))
    if status == 416:  # the object ends before `start`
        return Answer(b"", Version(int(part[2]) if part else start, tag))
    if status in (200, 206):
        raise DataError(f"the server of {redacted(url)} does not tell its size: put it on one that does")
    raise _error_from_status(url, status)


# --------------------------------------------------------------------------------------------------------- failures


def _error_from_status(url: str, status: int, code: str = "") -> Exception:
    """TransientError or DataError for an HTTP status (and S3's code for it)."""
    what = f"HTTP {status} {code}".rstrip()
    if status in (408, 425, 429) or status >= 500 or code == "RequestTimeout":
        return TransientError(what)
    if status in (404, 410):
        return MissingError(f"there is no {redacted(url)} ({what}): check its path")
    if status in (401, 403, 407) or code in ("ExpiredToken", "InvalidToken"):
        fix = SCHEMES[scheme_of(url)].access_fix
        return DeniedError(f"{redacted(url)} may not be read ({what}): check its path, and {fix}")
    return UnreadableError(f"{redacted(url)} cannot be read: its server answers {what}; check the address")


def _response(error: BaseException) -> dict | None:
    """botocore's record of an answer, from its exception or from the one that s3fs made of it."""
    responses = (getattr(one, "response", None) for one in (error, error.__cause__))
    return next((response for response in responses if isinstance(response, dict)), None)


def _status(response: dict) -> int:
    return response["ResponseMetadata"]["HTTPStatusCode"]


_IN_WORDS = {
    "ClientPayloadError": "the answer broke off",
    "ServerDisconnectedError": "the server hung up",
    "ClientConnectorDNSError": "its host is not known",
}

# Raised by aiohttp, botocore, requests and google-auth if there was no answer, or an unreadable one.
_TRANSIENT = {"ClientError", "HTTPClientError", "ConnectionError", "RequestException", "TransportError"}
_TRANSIENT |= {"ResponseParserError", "CredentialRetrievalError", "MetadataRetrievalError"}


def _error_from_exception(url: str, error: Exception) -> Exception:
    """TransientError or DataError for a library's exception. Compares class names: the packages are optional."""
    names = [kind.__name__ for kind in type(error).__mro__]
    response, name = _response(error), redacted(url)
    if response is not None:
        code = response.get("Error", {}).get("Code", "")
        return _error_from_status(url, _status(response), code if re.fullmatch(r"[A-Za-z.]{1,64}", code) else "")
    if "HttpError" in names and str(getattr(error, "code", "")).isdigit():  # of gcsfs, as are the next two
        return _error_from_status(url, int(error.code))
    for one in (error, error.__cause__):
        if "HfHubHTTPError" in [kind.__name__ for kind in type(one).__mro__]:
            return _error_from_status(url, one.response.status_code)
    if isinstance(error, FileNotFoundError):
        return _error_from_status(url, 404)
    if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):
        return _error_from_status(url, 403)
    if {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"} & {*names}:
        return DataError(f"there are no credentials to read {name} with: {SCHEMES[scheme_of(url)].access_fix}")
    if {"ClientConnectorCertificateError", "SSLCertVerificationError"} & {*names}:
        return DataError(f"the certificate of {name} is not trusted here: set SSL_CERT_FILE, or check the address")
    if {"InvalidURL", "NonHttpUrlClientError", "TooManyRedirects", "ParamValidationError", "ValueError"} & {*names}:
        return DataError(f"{name} cannot be read ({names[0]}): check the address")
    if isinstance(error, OSError) or _TRANSIENT & {*names}:
        words = (_IN_WORDS[kind] for kind in names if kind in _IN_WORDS)
        return TransientError(next(words, None) or getattr(error, "strerror", None) or names[0])
    line = traceback.extract_tb(error.__traceback__)[-1]
    return DataError(f"{name} cannot be read: {names[0]} in {Path(line.filename).name}, line {line.lineno}")
