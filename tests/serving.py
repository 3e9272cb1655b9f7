"""Stores on loopback for tests: an HTTP server that misbehaves on request, and moto's S3."""

import contextlib
import email.utils
import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

STALL_SECONDS = 30.0  # a stalled answer ends then, or when its server does


@dataclass
class Fault:
    """How a path misbehaves, in its next `times` answers or (None) in all of them.

    status: what it answers instead of the file, with `headers` and `body`
    silent: takes the request and answers nothing
    stall_after_bytes, cut_after_bytes: of the body; then nothing more comes, or the connection is cut
    trickle_seconds: between any two bytes of the body
    ignore_ranges: always sends the whole file
    no_length: sends no Content-Length
    then: after the answer is made, the path has this content
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"no"
    silent: bool = False
    stall_after_bytes: int | None = None
    cut_after_bytes: int | None = None
    trickle_seconds: float | None = None
    ignore_ranges: bool = False
    no_length: bool = False
    then: bytes | None = None
    times: int | None = None


class Request(NamedTuple):
    """path: decoded, without the query; target: as it was sent; range: the Range header or ''; headers: by lower-case
    names."""

    path: str
    target: str
    range: str
    headers: dict[str, str]


class Server:
    """`with Server({"/a.tar": content}) as server: ... server.url("/a.tar")`; ranges and many connections at once.

    files: content (or the Path of a file) by path; folder: what is asked for otherwise.
    faults: by path, a list that is gone through in order.
    requests, bytes_sent: what came, and the bytes of bodies that went out.
    """

    def __init__(self, files: Mapping[str, bytes | Path] | None = None, folder: Path | None = None):
        self.files, self.folder = dict(files or {}), folder
        self.faults: dict[str, list[Fault]] = {}
        self.requests: list[Request] = []
        self.bytes_sent = 0
        self.lock, self.ended = threading.Lock(), threading.Event()

    def __enter__(self) -> "Server":
        self.http = _Listener(("127.0.0.1", 0), _Handler)
        self.http.store = self
        threading.Thread(target=self.http.serve_forever, args=(0.05,), name="serving", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()

    def url(self, path: str = "", user: str = "") -> str:
        """Address of a path; `user`: NAME:PASSWORD that goes before the host."""
        return f"http://{user + '@' if user else ''}127.0.0.1:{self.http.server_port}{path}"

    def fault(self, path: str, **how) -> None:
        """From now on `path` misbehaves like Fault(**how), once its earlier faults have had their times."""
        self.faults.setdefault(path, []).append(Fault(**how))

    def asked(self, path: str) -> int:
        """How many requests came for `path`."""
        return sum(request.path == path for request in self.requests)

    def find(self, path: str) -> bytes | None:
        content = self.files.get(path)
        if content is None and self.folder is not None and (self.folder / path.lstrip("/")).is_file():
            content = self.folder / path.lstrip("/")
        return content.read_bytes() if isinstance(content, Path) else content

    def next_fault(self, path: str) -> Fault:
        with self.lock:
            for fault in self.faults.get(path, []):
                if fault.times is None:
                    return fault
                if fault.times > 0:
                    fault.times -= 1
                    return fault
        return Fault()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    store: Server

    def handle_error(self, request, client_address) -> None:
        pass  # clients that give up are what the tests are about


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True  # otherwise each answer waits 40 ms between its headers and its body
    server: _Listener

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        store, path = self.server.store, unquote(urlsplit(self.path).path)
        self.tag = None
        headers = {name.lower(): value for name, value in self.headers.items()}
        with store.lock:
            store.requests.append(Request(path, self.path, headers.get("range", ""), headers))
        fault = store.next_fault(path)
        if fault.silent:
            self._stall()
            return
        content = store.find(path)
        if fault.status is not None or content is None:
            self._answer(fault.status or 404, fault.headers, fault.body, Fault())
            return
        self.tag = hashlib.sha256(content).hexdigest()
        if fault.then is not None:
            store.files[path] = fault.then
        given = None if fault.ignore_ranges else re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
        if given is None:
            self._answer(200, {}, content, fault)
            return
        start, stop = int(given[1]), min(int(given[2]) + 1, len(content))
        if start >= len(content):
            self._answer(416, {"Content-Range": f"bytes */{len(content)}"}, b"", fault)
        else:
            part = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            self._answer(206, part, content[start:stop], fault)

    do_HEAD = do_GET

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes, fault: Fault) -> None:
        self.send_response(status)
        if not fault.no_length:
            headers = {"Content-Length": str(len(body)), **headers}
        else:
            self.close_connection = True
        headers = {"Last-Modified": email.utils.formatdate(0, usegmt=True), **headers}
        if self.tag is not None:
            headers["ETag"] = f'"{self.tag}"'
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault.trickle_seconds is not None:
            for number in range(len(body)):
                if self.server.store.ended.wait(fault.trickle_seconds):
                    break
                self._send(body[number : number + 1])
        elif fault.stall_after_bytes is not None:
            self._send(body[: fault.stall_after_bytes])
            self._stall()
        elif fault.cut_after_bytes is not None:
            self._send(body[: fault.cut_after_bytes])
            self.close_connection = True
        else:
            self._send(body)

    def _send(self, content: bytes) -> None:
        for first in range(0, len(content), 1 << 16):
            piece = content[first : first + (1 << 16)]
            self.wfile.write(piece)
            with self.server.store.lock:
                self.server.store.bytes_sent += len(piece)

    def _stall(self) -> None:
        self.wfile.flush()
        self.server.store.ended.wait(STALL_SECONDS)
        self.close_connection = True


def use_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """S3 clients talk to the server at `endpoint` alone and find no other credentials."""
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@contextlib.contextmanager
def s3(bucket: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """The address of moto's S3 server, in a thread, with `files` by key in one bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        with pytest.MonkeyPatch.context() as environment:
            use_s3(environment, endpoint)
            client = boto3.client("s3")
        client.create_bucket(Bucket=bucket)
        for key, content in files.items():
            client.put_object(Bucket=bucket, Key=key, Body=content)
        yield endpoint
    finally:
        moto.stop()
