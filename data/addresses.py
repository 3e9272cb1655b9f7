"""Addresses of data: telling local paths from URLs, and writing URLs without their secrets."""

import re
from typing import NamedTuple

from data.errors import DataError


class Scheme(NamedTuple):
    """package: what fsspec needs for this scheme. access_fix: what the user can do if access is denied."""

    package: str
    access_fix: str


_HTTP = Scheme("aiohttp", "check its user and password; if it is a signed address, sign it again")
SCHEMES = {
    "http": _HTTP,
    "https": _HTTP,
    "s3": Scheme("s3fs", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=1 for a public bucket"),
    "gs": Scheme("gcsfs", "run `gcloud auth application-default login`, or set FSSPEC_GS_TOKEN=anon (public bucket)"),
    "hf": Scheme("huggingface_hub", "set HF_TOKEN, and accept the terms of a gated data set on its page"),
}

_ADDRESS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<user>[^/?#]*@)?(?P<host>[^/?#@:\[\]]+|\[[0-9A-Fa-f:.]+\])(?P<port>:\d+)?"
    r"(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?(?P<fragment>#.*)?",
    re.DOTALL,
)


def is_remote(url: str) -> bool:
    """Whether `url` has a scheme, as in s3://bucket/a.tar. Local paths and `pipe:command` have none."""
    # Called for each sample: the substring test is much faster than the regular expression.
    return "://" in url and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url) is not None


def redacted(url: str) -> str:
    """The URL for messages: without user:password@, fragment and query (a removed query is shown as "?…")."""
    if not is_remote(url):
        return url
    parts = _ADDRESS.fullmatch(url)
    if parts is None:  # for example a password with a slash in it: the end of the secret is unknown
        return url.split("://")[0] + "://…"
    query = "?…" if parts["query"] else ""
    return f"{parts['scheme']}://{parts['host']}{parts['port'] or ''}{parts['path'] or ''}{query}"


def scheme_of(url: str) -> str:
    """The scheme of a remote URL. Raises DataError if the URL cannot be read."""
    scheme = url.split("://")[0].lower()
    if scheme not in SCHEMES:
        raise DataError(f"{redacted(url)} cannot be read: give a local path or an address of {', '.join(SCHEMES)}")
    parts = _ADDRESS.fullmatch(url)
    if parts is None:
        raise DataError(f"{redacted(url)} is not an address: percent-encode special characters in user and password")
    if parts["user"] and not is_http(scheme):
        raise DataError(f"{redacted(url)} must not hold credentials: {SCHEMES[scheme].access_fix}")
    return scheme


def is_http(scheme: str) -> bool:
    """Whether the scheme is http or https: these cannot list folders, and their servers may ignore ranges."""
    return SCHEMES[scheme] is _HTTP


def file_name(url: str) -> str:
    """The last part of a URL's path."""
    return (_ADDRESS.fullmatch(url)["path"] or "").rsplit("/", 1)[-1]
