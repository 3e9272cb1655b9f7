import errno
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import fsspec.config
import pytest
from comparing import refusal
from ranks import wait_for
from serving import Fault, Server, s3, use_s3

import data.cache as caching
from data import DataError, object_store, storage
from data.addresses import is_remote, redacted
from data.cache import Cache
from data.storage import DEFAULT_TIMEOUTS, Timeouts, bytes_read, list_tars, read, version
from data.unfinished import locked_file

pytestmark = pytest.mark.usefixtures("clock")  # waits between tries take no time
CONTENT = bytes(range(256)) * 2000  # 512,000 bytes
BRIEF = Timeouts(request_seconds=0.4, total_seconds=1.2)  # for servers that do not answer
PATIENT = Timeouts(request_seconds=5, total_seconds=10)  # for servers that answer with an error; waits take no time
STEADY = Timeouts(request_seconds=30, total_seconds=120)  # for what succeeds in the end
THROTTLED = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>hunter2</Message></Error>"
BUCKET = "images"
error_of = partial(refusal, DataError)


def size(url: str, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> int:
    return version(url, timeouts).bytes


@pytest.fixture
def server():
    with Server({"/a.tar": CONTENT, "/empty.tar": b""}) as server:
        yield server


@pytest.fixture
def fresh(monkeypatch):
    """Clients that know the environment of now."""
    monkeypatch.setattr(object_store, "_clients", {})
    monkeypatch.setattr(storage, "_versions", {})
    monkeypatch.setattr(caching, "_chosen", {})
    monkeypatch.setattr(caching, "_given", set())
    monkeypatch.setattr(caching, "_listed", {})
    monkeypatch.setattr(caching, "_warned", set())


@pytest.fixture(scope="module")
def moto():
    files = {f"train/{number:06d}.tar": CONTENT for number in (2, 0, 1)}
    files |= {"train/deep/000009.tar": CONTENT, "train/note.txt": b"text", "empty.tar": b"", "odd #1?.tar": b"odd"}
    with s3(BUCKET, files) as endpoint:
        yield endpoint


@pytest.fixture
def bucket(moto, monkeypatch, fresh):
    use_s3(monkeypatch, moto)
    return f"s3://{BUCKET}"


@pytest.fixture
def faulty_bucket(server, monkeypatch, fresh):
    """An S3 of one object, s3://images/a.tar, which misbehaves as server.fault("/images/a.tar", …) says."""
    server.files[f"/{BUCKET}/a.tar"] = CONTENT
    use_s3(monkeypatch, server.url())
    return f"s3://{BUCKET}"


@pytest.fixture
def stores(server, faulty_bucket):
    """Scheme -> path for `server.fault` and address of an object with CONTENT."""
    return {
        "http": ("/a.tar", server.url("/a.tar", user="me:hunter2")),
        "s3": (f"/{BUCKET}/a.tar", f"{faulty_bucket}/a.tar"),
    }


def refused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# -------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("url", ["http://h/a.tar", "https://h/a", "s3://b/k", "gs://b/k", "HTTP://h/a"])
def test_schemes_are_remote(url):
    assert is_remote(url)


@pytest.mark.parametrize("path", ["a.tar", "/tars/a.tar", "pipe:curl http://h/a.tar", "./http:/a", "a{0..9}.tar", ""])
def test_paths_are_local(path):
    assert not is_remote(path)
    assert redacted(path) == path


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host:8080/tars/a.tar", "https://host:8080/tars/a.tar"),
        ("https://me:hunter2@host/a@1.tar", "https://host/a@1.tar"),
        ("https://hunter2@host/a.tar", "https://host/a.tar"),
        ("https://me:hunter@2@host/a.tar", "https://host/a.tar"),
        ("https://me:hunter/2@host/a.tar", "https://…"),
        ("https://me:hunter?2@host/a.tar", "https://…"),
        ("https://me:hunter#2@host/a.tar", "https://…"),
        ("https://host/a.tar?X-Amz-Signature=hunter2&at=/b", "https://host/a.tar?…"),
        ("https://host/a.tar#hunter2", "https://host/a.tar"),
        ("https://host?hunter2", "https://host?…"),
        ("http://[::1]:80/a.tar?hunter2#hunter2", "http://[::1]:80/a.tar?…"),
        ("s3://me:hunter2@bucket/folder/a.tar", "s3://bucket/folder/a.tar"),
        ("s3://bucket/a.tar?versionId=hunter2", "s3://bucket/a.tar?…"),
    ],
)
def test_messages_show_no_secrets_of_an_address(url, shown):
    assert redacted(url) == shown


@pytest.mark.parametrize(
    ("url", "fix"),
    [
        ("ftp://me:hunter2@host/a.tar", "http, https, s3, gs, hf"),
        ("https://me:hunter/2@host/a.tar", "percent-encode"),
        ("https:///a.tar", "percent-encode"),
        ("s3://key:hunter2@bucket/a.tar", "set AWS_ACCESS_KEY_ID"),
        ("gs://key:hunter2@bucket/a.tar", "gcloud auth"),
    ],
)
def test_addresses_that_cannot_be_read_are_named_at_once(url, fix):
    for function in (lambda: size(url), lambda: read(url, 0, 9), lambda: Cache(Path("x"), 9).path(url)):
        message = error_of(function)
        assert fix in message
        assert "hunter" not in message


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("https", "aiohttp")])
def test_a_missing_package_is_named(scheme, package, monkeypatch, fresh):
    def missing(*_, **__):
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    assert error_of(size, f"{scheme}://host/a.tar").endswith(f"pip install {package}")


# ------------------------------------------------------------------------------------------------------- local paths


def test_local_files_are_read(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    before = bytes_read()
    assert size(str(path)) == len(CONTENT)
    assert read(str(path), 1000, 3000) == CONTENT[1000:3000]
    assert read(str(path), 5, 5) == b""
    assert bytes_read() - before == 2000


def test_errors_of_local_files_name_path_and_reason(tmp_path):
    path = tmp_path / "a.tar"
    assert error_of(size, str(path)) == f"cannot read {path}: No such file or directory"
    assert error_of(read, str(path), 0, 1) == f"cannot read {path}: No such file or directory"
    assert error_of(read, str(tmp_path), 0, 1) == f"cannot read {tmp_path}: Is a directory"
    path.write_bytes(b"1234")
    assert f"{path} ends before byte 5" in error_of(read, str(path), 0, 5)


# -------------------------------------------------------------------------------------------------------------- http


def test_ranges_are_read_over_http(server):
    url, before = server.url("/a.tar"), bytes_read()
    assert size(url) == len(CONTENT)
    assert read(url, 1000, 3000) == CONTENT[1000:3000]
    assert read(url, 0, len(CONTENT)) == CONTENT
    assert read(url, 7, 7) == b""
    assert bytes_read() - before == 2000 + len(CONTENT)
    assert [request.range for request in server.requests] == ["bytes=0-0", "bytes=1000-2999", f"bytes=0-{512_000 - 1}"]
    assert size(server.url("/empty.tar")) == 0


def test_what_is_signed_is_sent_as_it_was_given(server):
    signed = "/%61.tar?X-Amz-Credential=A%2FB&sig=a%2Bb%3d&x=1+2"
    assert read(server.url(signed), 0, 4) == CONTENT[:4]
    assert server.requests[0].target == signed


def test_letters_that_no_address_may_hold_are_encoded(server):
    server.files["/größe 1.tar"] = CONTENT
    assert read(server.url("/größe 1.tar"), 0, 4) == CONTENT[:4]


def test_user_and_password_are_sent(server):
    assert read(server.url("/a.tar", user="me:p%40ss"), 0, 4) == CONTENT[:4]
    assert server.requests[0].headers["authorization"] == "Basic bWU6cEBzcw=="  # me:p@ss


def test_proxies_of_the_environment_are_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url())
    assert read("http://host.invalid/a.tar", 0, 4, STEADY) == CONTENT[:4]


PASSING = [{"cut_after_bytes": 100}, {"silent": True}, {"stall_after_bytes": 100}]
PASSING_OF_HTTP = [
    *PASSING,
    {"status": 503},
    {"status": 500},
    {"status": 429},
    {"cut_after_bytes": 0},
    {"trickle_seconds": 0.05},
]
PASSING_OF_S3 = [
    *PASSING,
    {"status": 503, "body": THROTTLED},
    {"status": 500, "body": b""},
    {"status": 400, "body": THROTTLED.replace(b"SlowDown", b"RequestTimeout")},
]


@pytest.mark.parametrize(
    ("scheme", "fault"),
    [*(("http", fault) for fault in PASSING_OF_HTTP), *(("s3", fault) for fault in PASSING_OF_S3)],
    ids=str,
)
def test_what_may_pass_is_tried_again(stores, server, scheme, fault):
    path, url = stores[scheme]
    assert size(url, STEADY) == len(CONTENT)  # the first request makes the client, which takes a while
    server.fault(path, **fault, times=2)
    assert read(url, 0, 1000, Timeouts(0.25, 120)) == CONTENT[:1000]
    assert server.asked(path) >= 4


@pytest.mark.parametrize(
    ("scheme", "fault", "timeouts", "happened"),
    [
        ("http", {"status": 503}, PATIENT, "HTTP 503"),
        ("http", {"cut_after_bytes": 100}, PATIENT, "the answer broke off"),
        ("http", {"silent": True}, BRIEF, "no whole answer within 0."),
        ("http", {"trickle_seconds": 0.05}, BRIEF, "no whole answer within 0."),
        ("s3", {"status": 503, "body": THROTTLED}, PATIENT, "HTTP 503 SlowDown"),
        ("s3", {"silent": True}, BRIEF, "no whole answer within 0."),
    ],
    ids=str,
)
def test_tries_end_in_time_are_ours_alone_and_tell_what_happened(
    stores, server, clock, scheme, fault, timeouts, happened
):
    path, url = stores[scheme]
    size(url, STEADY)
    server.requests.clear()
    server.fault(path, **fault)
    start = clock.monotonic()
    message = error_of(read, url, 0, 1000, timeouts)
    assert timeouts.total_seconds - storage.FIRST_WAIT_SECONDS < clock.monotonic() - start < timeouts.total_seconds + 1
    assert message.startswith(f"cannot read {redacted(url)}: {happened}")
    assert f"({server.asked(path)} tries in" in message and server.asked(path) > 1


def test_the_total_limits_a_request_that_may_take_longer(server):
    server.fault("/a.tar", trickle_seconds=0.05)
    start = time.monotonic()
    assert "(1 try in " in error_of(read, server.url("/a.tar"), 0, 1000, Timeouts(30, 0.5))
    assert time.monotonic() - start < 1.5


def test_a_refused_connection_is_tried_until_the_time_is_over(clock):
    start = clock.monotonic()
    message = error_of(size, f"http://127.0.0.1:{refused_port()}/a.tar", PATIENT)
    assert "Connect call failed" in message and " tries in " in message
    assert PATIENT.total_seconds - storage.FIRST_WAIT_SECONDS < clock.monotonic() - start < PATIENT.total_seconds + 1


def test_waits_grow_and_differ_between_addresses():
    waits = [[storage._wait_seconds(url, tries) for tries in range(1, 12)] for url in ("http://h/1", "http://h/2")]
    assert all(0.25 <= wait <= 15 for wait in waits[0])
    assert waits[0][4] > waits[0][2] > waits[0][0]
    assert waits[0] != waits[1]
    assert waits[0] == [storage._wait_seconds("http://h/1", tries) for tries in range(1, 12)]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 404}, "there is no {url} (HTTP 404): check its path"),
        ({"status": 401}, "{url} may not be read (HTTP 401): check its path, and check its user and password"),
        ({"status": 403}, "{url} may not be read (HTTP 403): check its path, and check its user and password"),
        ({"status": 400}, "{url} cannot be read: its server answers HTTP 400; check the address"),
        ({"status": 302, "headers": {"Location": "/a.tar"}}, "{url} cannot be read (TooManyRedirects)"),
        ({"ignore_ranges": True}, "the server of {url} ignores ranges: set data.cache=FOLDER"),
        ({"no_length": True, "ignore_ranges": True}, "the server of {url} does not tell its size"),
    ],
    ids=str,
)
def test_what_does_not_pass_is_told_at_once(server, clock, fault, message):
    server.fault("/a.tar", **fault)
    assert error_of(read, server.url("/a.tar"), 10, 20).startswith(message.format(url=server.url("/a.tar")))
    assert clock.slept == 0  # no second try


def test_a_whole_answer_serves_where_the_whole_is_asked_for(server):
    server.fault("/a.tar", ignore_ranges=True)
    assert size(server.url("/a.tar")) == len(CONTENT)
    assert read(server.url("/a.tar"), 0, len(CONTENT)) == CONTENT


def test_an_object_shorter_than_asked_is_named(server):
    url = server.url("/a.tar")
    assert error_of(read, url, 511_000, 512_001).startswith(f"{url} ends before byte 512,001: ")
    assert error_of(read, url, 600_000, 600_001).startswith(f"{url} ends before byte 600,001: ")


def test_an_object_that_changes_its_size_is_named(server):
    url = server.url("/a.tar")
    assert size(url) == 512_000
    server.files["/a.tar"] = CONTENT + b"more"
    assert f"{url} was replaced while it was read: it had 512,000 bytes and has 512,004" in error_of(read, url, 0, 4)
    assert size(url) == 512_004  # the new answer replaces the old one
    assert read(url, 0, 4) == CONTENT[:4]


def test_the_time_is_kept_where_the_loop_is_stuck(server, monkeypatch, fresh):
    async def stuck(*_):
        time.sleep(1.5)

    monkeypatch.setattr(object_store, "_get_http", stuck)
    start = time.monotonic()
    assert "no whole answer within 0.4 s" in error_of(size, server.url("/a.tar"), Timeouts(0.4, 0.5))
    assert time.monotonic() - start < 1


def test_threads_read_at_once(server):
    server.fault("/a.tar", stall_after_bytes=10, times=3)
    url = server.url("/a.tar")
    with ThreadPoolExecutor(16) as pool:
        parts = pool.map(lambda n: read(url, 1000 * n, 1000 * n + 999, Timeouts(0.7, 120)), range(64))
    assert list(parts) == [CONTENT[1000 * n : 1000 * n + 999] for n in range(64)]


# ---------------------------------------------------------------------------------------------------------------- s3


def test_objects_are_read_from_s3(bucket):
    url, before = f"{bucket}/train/000000.tar", bytes_read()
    assert size(url, STEADY) == len(CONTENT)
    assert read(url, 1000, 3000, STEADY) == CONTENT[1000:3000]
    assert read(url, 0, len(CONTENT), STEADY) == CONTENT
    assert bytes_read() - before == 2000 + len(CONTENT)
    assert size(f"{bucket}/empty.tar", STEADY) == 0
    assert read(f"{bucket}/odd #1?.tar", 0, 3, STEADY) == b"odd"


@pytest.mark.parametrize("slash", ["", "/"])
def test_tars_of_a_folder_are_listed(bucket, slash):
    tars = [f"{bucket}/train/{number:06d}.tar" for number in range(3)]
    assert list_tars(f"{bucket}/train{slash}", STEADY) == tars
    assert list_tars(bucket + slash, STEADY) == [f"{bucket}/empty.tar", f"{bucket}/odd #1?.tar"]


def test_listings_are_never_stale(moto, bucket):
    import boto3

    client = boto3.client("s3", endpoint_url=moto)
    client.put_object(Bucket=BUCKET, Key="new/0.tar", Body=b"0")
    assert list_tars(f"{bucket}/new", STEADY) == [f"{bucket}/new/0.tar"]
    client.put_object(Bucket=BUCKET, Key="new/1.tar", Body=b"1")
    assert list_tars(f"{bucket}/new", STEADY) == [f"{bucket}/new/0.tar", f"{bucket}/new/1.tar"]


def test_what_s3_lacks_is_named(bucket):
    assert error_of(size, f"{bucket}/none.tar") == f"there is no {bucket}/none.tar (HTTP 404 NoSuchKey): check its path"
    assert "there is no s3://none/a.tar (HTTP 404 NoSuchBucket)" in error_of(read, "s3://none/a.tar", 0, 4)
    assert "there is no s3://none (HTTP 404 NoSuchBucket)" in error_of(list_tars, "s3://none")
    assert error_of(list_tars, f"{bucket}/none") == f"no *.tar in the folder {bucket}/none: check its path"
    url = f"{bucket}/train/000000.tar"
    assert f"{url} ends before byte 512,001" in error_of(read, url, 511_000, 512_001)
    assert f"{url} ends before byte 600,001" in error_of(read, url, 600_000, 600_001)
    assert "check the address" in error_of(size, bucket)


def test_listing_over_http_names_what_to_give_instead(server):
    assert "a brace pattern" in error_of(list_tars, server.url("/tars"))
    assert server.requests == []


def test_missing_credentials_are_named(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    message = error_of(size, f"{bucket}/train/000000.tar")
    assert "no credentials" in message and "AWS_ACCESS_KEY_ID" in message and "FSSPEC_S3_ANON=1" in message


def test_a_public_bucket_needs_no_credentials(faulty_bucket, server, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    fsspec.config.set_conf_env(conf := {}, {"FSSPEC_S3_ANON": "1"})
    monkeypatch.setitem(fsspec.config.conf, "s3", conf["s3"])
    assert read(f"{faulty_bucket}/a.tar", 0, 4, STEADY) == CONTENT[:4]
    assert "authorization" not in server.requests[0].headers


def test_s3_that_refuses_is_told_at_once(faulty_bucket, server):
    server.fault(f"/{BUCKET}/a.tar", status=403, body=DENIED)
    message = error_of(read, f"{faulty_bucket}/a.tar", 0, 10)
    assert f"{faulty_bucket}/a.tar may not be read (HTTP 403 AccessDenied)" in message
    assert "AWS_ACCESS_KEY_ID" in message


def test_objects_are_read_from_google(server, monkeypatch, fresh):
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # which asks Google's own servers
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url())
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    server.files["/download/storage/v1/b/images/o/train/a.tar"] = CONTENT
    url = "gs://images/train/a.tar"
    assert size(url, STEADY) == len(CONTENT)
    assert read(url, 1000, 3000, STEADY) == CONTENT[1000:3000]
    assert "there is no gs://images/b.tar" in error_of(size, "gs://images/b.tar")
    listing = (
        b'{"kind": "x", "items": [{"name": "train/a.tar", "bucket": "images", "size": "1"}], "prefixes": ["train/b/"]}'
    )
    server.fault("/storage/v1/b/images/o", status=200, body=listing, headers={"Content-Type": "application/json"})
    assert list_tars("gs://images/train", STEADY) == ["gs://images/train/a.tar"]


# ----------------------------------------------------------------------------------------------------------- secrets


REFUSALS = [
    {},
    {"status": 404},
    {"status": 403, "body": DENIED},
    {"status": 503},
    {"status": 400, "body": b"hunter2"},
    {"status": 302, "headers": {"Location": "http://hunter2:hunter2@host:hunter2/?hunter2"}},
    {"cut_after_bytes": 3},
    {"silent": True},
    {"ignore_ranges": True},
]
REFUSALS_OF_HTTP = [
    *REFUSALS,
    {"status": 302, "headers": {"Location": "/a.tar?hunter2"}},
    {"status": 302, "headers": {"Location": "ftp://hunter2/a.tar?hunter2"}},
    {"status": 206, "headers": {"Content-Range": "bytes hunter2"}},
    {"stall_after_bytes": 3},
    {"no_length": True, "ignore_ranges": True},
]


@pytest.mark.parametrize(
    ("scheme", "fault"),
    [*(("http", fault) for fault in REFUSALS_OF_HTTP), *(("s3", fault) for fault in REFUSALS)],
    ids=str,
)
def test_no_secret_comes_out(scheme, fault, server, faulty_bucket, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    if scheme == "http":
        path, url = "/a.tar", server.url("/a.tar?X-Amz-Signature=hunter2&b=hunter2#hunter2", user="hunter2:hunter2")
    else:
        path, url = f"/{BUCKET}/a.tar", f"{faulty_bucket}/a.tar?versionId=hunter2#hunter2"
        server.files[f"{path}?versionId=hunter2#hunter2"] = CONTENT
    if fault:
        server.fault(path, **fault)
        server.fault(f"{path}?versionId=hunter2#hunter2", **fault)
    short = Timeouts(0.2, 0.3)
    actions = [
        lambda: size(url, short),
        lambda: read(url, 4, 600_000, short),
        lambda: Cache(tmp_path, 1000, short).path(url),
        lambda: list_tars(url, short),
    ]
    failures = 0
    for action in actions:
        try:
            action()
        except DataError as error:
            failures += 1
            assert "hunter2" not in str(error)
            assert "hunter2" not in "".join(traceback.format_exception(error))
    assert failures >= 2
    assert "hunter2" not in caplog.text
    assert "hunter2" not in "".join(capfd.readouterr())
    assert "hunter2" not in "".join(path.name for path in tmp_path.iterdir())


def test_no_secret_comes_out_where_nothing_answers(caplog):
    caplog.set_level(logging.DEBUG)
    for host in (f"127.0.0.1:{refused_port()}", "host.invalid", "127.0.0.1:99999"):
        url = f"https://hunter2:hunter2@{host}/a.tar?hunter2#hunter2"
        with pytest.raises(DataError) as caught:
            size(url, Timeouts(0.3, 0.5))
        assert "hunter2" not in "".join(traceback.format_exception(caught.value)) + caplog.text


def test_no_secret_comes_out_of_the_event_loop(server, caplog):
    def broken(address):
        raise KeyError(address)

    size(server.url("/a.tar"))
    object_store.client().loop.call_soon_threadsafe(broken, "http://me:hunter2@host/a.tar")
    size(server.url("/a.tar"))
    assert "outside of any request: KeyError" in caplog.text
    assert "hunter2" not in caplog.text


def test_no_secret_comes_out_of_a_librarys_mistake(server, monkeypatch):
    async def broken(*_):
        raise KeyError("http://me:hunter2@host/a.tar")

    monkeypatch.setattr(object_store, "_get_http", broken)
    with pytest.raises(DataError, match=r"KeyError in test_storage\.py, line \d+$") as caught:
        size(server.url("/a.tar"))
    assert "hunter2" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- processes


def in_forked(function, processes: int = 1) -> list:
    """What `function` returns in forked processes, as DataLoader makes its workers."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [context.Process(target=lambda: results.put(function()), daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(20)
            assert worker.exitcode == 0
        return [results.get() for _ in workers]
    finally:
        for worker in workers:
            worker.kill()


@pytest.mark.process
def test_forked_workers_read_on_their_own(server, bucket):
    urls = [server.url("/a.tar"), f"{bucket}/train/000000.tar"]
    for url in urls:
        assert size(url, STEADY) == len(CONTENT)

    def work():
        assert bytes_read() == 0
        return b"".join(read(url, start, start + 4, STEADY) for url in urls for start in (0, 1000))

    for _ in range(2):  # the parent reads on, and forks again
        expected = b"".join(read(url, start, start + 4, STEADY) for url in urls for start in (0, 1000))
        assert in_forked(work, processes=2) == [expected] * 2


@pytest.mark.process
def test_a_worker_knows_the_size_that_its_parent_found(server):
    url = server.url("/a.tar")
    size(url)
    server.files["/a.tar"] = CONTENT + b"more"
    assert "was replaced" in in_forked(lambda: error_of(read, url, 0, 4))[0]


@pytest.mark.process
def test_a_process_that_read_ends_in_silence(server, bucket):
    urls = [server.url("/a.tar"), f"{bucket}/train/000000.tar"]
    code = f"from data.storage import read; print([len(read(url, 0, 9)) for url in {urls}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[9, 9]\n", "")


# -------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def pieces(monkeypatch):
    """Downloads in pieces of 100,000 bytes."""
    monkeypatch.setattr(caching, "DOWNLOAD_BYTES", 100_000)


def test_an_object_is_downloaded_once_and_in_pieces(server, tmp_path, pieces):
    cache, url, before = Cache(tmp_path / "cache", 10**6), server.url("/a.tar"), bytes_read()
    path = cache.path(url)
    assert path.read_bytes() == CONTENT
    assert path.name.endswith("-a.tar")
    assert bytes_read() - before == len(CONTENT)
    assert server.asked("/a.tar") == 1 + 6
    assert cache.path(url) == path
    assert server.asked("/a.tar") == 1 + 6
    assert sorted(os.listdir(path.parent)) == sorted([".lock", path.name])


def new_process() -> None:
    for known in (storage._versions, caching._chosen, caching._given, caching._listed, caching._warned):
        known.clear()


def test_an_object_that_changes_is_downloaded_again_by_the_next_process(server, tmp_path, fresh):
    cache, url, other = Cache(tmp_path, 10**7, STEADY), server.url("/a.tar"), CONTENT[::-1]  # of the same size
    former = cache.path(url)
    new_process()
    assert cache.path(url) == former
    assert server.asked("/a.tar") == 1 + 1 + 1
    server.files["/a.tar"] = other
    assert cache.path(url) == former  # a process reads one version
    new_process()
    assert cache.path(url).read_bytes() == other
    assert former.read_bytes() == CONTENT  # as other processes may still read it


def test_a_copy_that_is_gone_is_not_replaced_by_another_version(server, tmp_path, fresh):
    cache, url = Cache(tmp_path, 10**7, STEADY), server.url("/a.tar")
    cache.path(url).unlink()
    assert cache.path(url).read_bytes() == CONTENT
    cache.path(url).unlink()
    server.files["/a.tar"] = CONTENT[::-1]
    assert "was replaced" in error_of(cache.path, url)


def test_last_modified_tells_versions_apart_where_there_is_no_etag(server, tmp_path, fresh):
    def content_of(date: str) -> bytes:
        new_process()
        headers = {"Last-Modified": date, "Content-Range": "bytes 0-0/1"}
        server.fault("/x.tar", status=206, headers=headers, body=date[:1].encode(), times=2)
        return Cache(tmp_path, 1000, STEADY).path(server.url("/x.tar")).read_bytes()

    assert [content_of(date) for date in ("1 Jan", "2 Jan")] == [b"1", b"2"]


@pytest.mark.parametrize("fault", [{"status": 403}, {"status": 503}, {"silent": True}], ids=str)
def test_copies_are_used_with_one_warning_where_the_server_cannot_be_asked(server, tmp_path, fresh, caplog, fault):
    cache, urls = Cache(tmp_path, 10**7, BRIEF), [server.url("/a.tar"), server.url("/b.tar")]
    server.files["/b.tar"] = b"b"
    paths = [cache.path(url) for url in urls]
    new_process()
    for path in ("/a.tar", "/b.tar"):
        server.fault(path, **fault)
    assert [cache.path(url) for url in urls] == paths
    said = [record.getMessage() for record in caplog.records if record.name == "data.cache"]
    assert len(said) == 1 and f"copies in the cache {tmp_path} are used as they are" in said[0]


def test_local_paths_are_their_own_copies(tmp_path):
    assert Cache(tmp_path / "cache", 10).path(str(tmp_path / "a.tar")) == tmp_path / "a.tar"


def test_entries_go_by_the_whole_address_but_for_the_fragment(server, bucket, tmp_path):
    cache = Cache(tmp_path, 10**7, STEADY)
    paths = [cache.path(server.url(path)) for path in ("/a.tar", "/a.tar?signed=1", "/a.tar?signed=2", "/a.tar#1")]
    assert len(set(paths)) == 3
    assert paths[3] == paths[0]
    assert cache.path(f"{bucket}/odd #1?.tar").read_bytes() == b"odd"


def test_empty_objects_are_kept(server, tmp_path):
    assert Cache(tmp_path, 10).path(server.url("/empty.tar")).read_bytes() == b""


@pytest.mark.parametrize("fault", [{}, {"cut_after_bytes": 300_000}, {"stall_after_bytes": 300_000}], ids=str)
def test_the_one_answer_of_a_server_without_ranges_is_used(server, tmp_path, pieces, fault):
    server.fault("/a.tar", ignore_ranges=True, times=1)
    if fault:
        server.fault("/a.tar", ignore_ranges=True, **fault, times=1)
    server.fault("/a.tar", ignore_ranges=True)
    path = Cache(tmp_path, 10**6, Timeouts(0.5, 10)).path(server.url("/a.tar"))
    assert path.read_bytes() == CONTENT
    assert server.asked("/a.tar") == 2 + bool(fault)


def test_a_download_goes_on_behind_a_broken_piece(server, tmp_path, pieces):
    server.fault("/a.tar", times=3)
    server.fault("/a.tar", cut_after_bytes=5, times=2)
    assert Cache(tmp_path, 10**6).path(server.url("/a.tar")).read_bytes() == CONTENT
    assert server.asked("/a.tar") == 1 + 6 + 2


def test_a_slow_download_may_take_longer_than_one_request(server, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "DOWNLOAD_BYTES", 4)
    content = server.files["/slow.tar"] = bytes(range(28))  # 0.08 s for a piece and 0.56 s for all
    for ignore_ranges in (False, True):
        server.faults["/slow.tar"] = [Fault(trickle_seconds=0.02, ignore_ranges=ignore_ranges)]
        folder = tmp_path / str(ignore_ranges)
        assert Cache(folder, 100, Timeouts(0.4, 0.5)).path(server.url("/slow.tar")).read_bytes() == content


def test_the_least_recently_used_go_first(server, tmp_path):
    names = ["a", "b", "c", "d"]
    server.files |= {f"/{name}.tar": name.encode() * 1000 for name in names}
    cache = Cache(tmp_path, 3500)
    (tmp_path / "notes.txt").write_text("mine" * 1000)

    def kept() -> set[str]:
        return {path.name.split("-")[2][0] for path in tmp_path.glob("*.tar")}

    for name in names[:3]:
        cache.path(server.url(f"/{name}.tar"))
    assert kept() == {"a", "b", "c"}
    time.sleep(0.02)  # the kernel's clock of files ticks every 4 ms or so
    with open(cache.path(server.url("/b.tar")), "rb") as b_open:
        cache.path(server.url("/a.tar"))  # which makes b the one used first, but for c
        cache.path(server.url("/d.tar"))
        assert kept() == {"a", "b", "d"}
        server.files["/large.tar"] = bytes(3000)
        cache.path(server.url("/large.tar"))
        assert kept() == {"l"}
        assert b_open.read() == b"b" * 1000
    assert cache.path(server.url("/b.tar")).read_bytes() == b"b" * 1000
    assert (tmp_path / "notes.txt").exists()


def test_an_object_larger_than_the_cache_is_named(server, tmp_path):
    message = error_of(Cache(tmp_path, 1000).path, server.url("/a.tar"))
    assert f"{server.url('/a.tar')} has 512,000 bytes, the cache is limited to 1,000" in message


def test_a_failed_download_leaves_nothing(server, tmp_path, pieces):
    server.fault("/a.tar", times=3)
    server.fault("/a.tar", status=403)
    assert "may not be read" in error_of(Cache(tmp_path, 10**6).path, server.url("/a.tar"))
    assert os.listdir(tmp_path) == []


OTHER = CONTENT[::-1]  # of the same size


@pytest.mark.parametrize("scheme", ["http", "s3"])
@pytest.mark.parametrize("other", [OTHER, CONTENT[:-1], CONTENT[:250_000]], ids=len)
@pytest.mark.parametrize("broken", [False, True])
def test_a_download_starts_again_where_the_object_is_replaced(
    stores, server, tmp_path, pieces, caplog, scheme, other, broken
):
    """Between two pieces, or while a piece that broke off is tried again: a copy is never of two versions."""
    path, url = stores[scheme]
    server.fault(path, times=3)
    server.fault(path, then=other, times=1, cut_after_bytes=10 if broken else None)
    assert Cache(tmp_path, 10**6, STEADY).path(url).read_bytes() == other
    assert len([name for name in os.listdir(tmp_path) if name != ".lock"]) == 1
    assert sum("starts again from byte 0 (1 of 3)" in record.getMessage() for record in caplog.records) == 1
    assert "hunter2" not in caplog.text


def test_the_one_answer_of_a_server_without_ranges_is_of_the_version_that_was_found(server, tmp_path, pieces):
    server.fault("/a.tar", ignore_ranges=True, then=OTHER, times=1)
    server.fault("/a.tar", ignore_ranges=True)
    path = Cache(tmp_path, 10**6, STEADY).path(server.url("/a.tar"))
    new_process()
    assert path.read_bytes() == OTHER and Cache(tmp_path, 10**6, STEADY).path(server.url("/a.tar")) == path


def test_an_object_that_is_replaced_in_every_download_is_named(server, tmp_path, pieces):
    contents = [bytes([number]) * 300_000 for number in range(8)]
    for content in contents:  # of two answers, the size and a piece, the second one replaces it
        server.fault("/a.tar", times=1)
        server.fault("/a.tar", then=content, times=1)
    message = error_of(Cache(tmp_path, 10**6, STEADY).path, server.url("/a.tar"))
    assert message == (
        f"{server.url('/a.tar')} was replaced during each of 4 downloads: start again when nothing writes it any more"
    )
    assert not [name for name in os.listdir(tmp_path) if name != ".lock"]


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_ranges_of_two_versions_of_the_same_size_are_never_mixed(stores, server, scheme):
    path, url = stores[scheme]
    assert read(url, 0, 4, STEADY) == CONTENT[:4]
    server.files[path] = OTHER
    said = error_of(read, url, 4, 8, STEADY)
    assert "a.tar was replaced while it was read: it has the same size, but another ETag; start again" in said


def test_marks_of_weak_tags_and_missing_ones_tell_no_versions_apart():
    strong = object_store.Version(9, '"a"')
    for same in ('W/"a"', "", "Mon, 30 Nov 2026 15:00:00 GMT"):
        strong.check("http://h/a.tar", object_store.Version(9, same))
    assert "another ETag" in error_of(strong.check, "http://h/a.tar", object_store.Version(9, '"b"'))
    dated = object_store.Version(9, "Mon, 30 Nov 2026 15:00:00 GMT")
    assert "another date" in error_of(dated.check, "http://h/a.tar", object_store.Version(9, "Tue"))


def test_the_cache_is_listed_once_for_all_addresses(server, tmp_path, fresh, monkeypatch):
    server.files |= {f"/{number}.tar": b"x" for number in range(5)}
    cache, listed = Cache(tmp_path, 10**6, STEADY), []
    scandir = os.scandir
    monkeypatch.setattr("data.cache.os.scandir", lambda path: listed.append(path) or scandir(path))
    urls = [server.url(f"/{number}.tar") for number in range(5)]
    assert cache.held(urls) == {}
    monkeypatch.setattr(Cache, "_keep", lambda self, part, kept, file: os.replace(part, kept))  # it lists, too
    for url in urls:
        cache.path(url)
    assert listed == [tmp_path]


def test_a_copy_that_another_process_made_meanwhile_is_found_where_the_server_is_gone(server, tmp_path, fresh):
    cache, url = Cache(tmp_path, 10**6, BRIEF), server.url("/a.tar")
    assert cache.held([url]) == {}
    known = dict(caching._listed)
    made = cache.path(url)
    new_process()
    caching._listed.update(known)
    server.fault("/a.tar", status=503)
    assert cache.path(url) == made


@pytest.mark.process
def test_processes_download_an_object_once(server, tmp_path, pieces):
    url = server.url("/a.tar")
    server.fault("/a.tar", trickle_seconds=0.3, times=1)  # of the size, one byte: so that all come before the end
    paths = in_forked(lambda: Cache(tmp_path, 10**6, STEADY).path(url), processes=6)
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == CONTENT
    assert server.asked("/a.tar") == 6 + 6  # each process asks for the version


def test_threads_download_an_object_once(server, tmp_path, pieces):
    cache, url = Cache(tmp_path, 10**6, STEADY), server.url("/a.tar")
    with ThreadPoolExecutor(6) as pool:
        paths = list(pool.map(lambda _: cache.path(url), range(6)))
    assert len(set(paths)) == 1
    assert sum(request.range != "bytes=0-0" for request in server.requests) == 6


@pytest.mark.process
def test_many_processes_keep_within_the_bound(server, tmp_path):
    server.files |= {f"/{number}.tar": bytes([number]) * 1000 for number in range(12)}
    cache, urls = Cache(tmp_path, 3000, STEADY), [server.url(f"/{number}.tar") for number in range(12)]

    def work():
        seen = []
        for number in range(12):
            cache.path(urls[number])
            sizes = [entry.stat().st_size for entry in os.scandir(tmp_path) if entry.name.endswith(".tar")]
            seen.append((len(sizes), set(sizes)))
        return all(count <= 3 and sizes <= {1000} for count, sizes in seen)

    assert in_forked(work, processes=4) == [True] * 4
    assert [name for name in os.listdir(tmp_path) if name.endswith(".part")] == []


@pytest.mark.process
def test_the_work_of_a_killed_process_is_taken_over(server, tmp_path, pieces):
    url = server.url("/a.tar")
    server.fault("/a.tar", times=3)
    server.fault("/a.tar", silent=True, times=1)
    code = f"""
from pathlib import Path
from data import cache
cache.DOWNLOAD_BYTES = 100_000
cache.Cache(Path({str(tmp_path)!r}), 10**6).path({url!r})
"""
    holder = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for(lambda: server.asked("/a.tar") >= 4, "piece that hangs", 20)
        threading.Timer(0.3, holder.send_signal, [signal.SIGKILL]).start()
        assert Cache(tmp_path, 10**6, STEADY).path(url).read_bytes() == CONTENT
    finally:
        holder.kill()
        holder.wait(10)
    assert holder.returncode == -signal.SIGKILL
    assert server.asked("/a.tar") == 4 + 1 + 6


def test_leftovers_of_dead_processes_are_removed_and_those_of_others_stay(server, tmp_path):
    dead, live = (tmp_path / f".{letter * 64}-x.tar.part" for letter in "01")
    dead.write_bytes(b"half")
    with locked_file(live):
        Cache(tmp_path, 10**6).path(server.url("/a.tar"))
        assert not dead.exists()
        assert live.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_the_mend(server, tmp_path, monkeypatch, number):
    def full(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    message = error_of(Cache(tmp_path, 10**6).path, server.url("/a.tar"))
    assert f"no space left for {server.url('/a.tar')} in the cache {tmp_path}: make room there" in message
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    message = error_of(Cache(tmp_path / "file", 10**6).path, server.url("/a.tar"))
    assert message == f"cannot write to the cache {tmp_path / 'file'}: Not a directory; set data.cache"


def test_packed_tars_in_a_bucket_are_named_once(monkeypatch, caplog):
    names = ["set/0.tar", "set/1.tar.gz", "set/2.TGZ", "set/README.md"]
    entries = [{"name": f"b/{name}", "type": "file"} for name in names]
    monkeypatch.setattr("data.storage.request_listing", lambda url, seconds: entries)
    for _ in range(2):
        assert list_tars("s3://b/set") == ["s3://b/set/0.tar"]
    assert caplog.messages == [
        "s3://b/set also holds 2 packed tars, not read, first 1.tar.gz: unpack what is to be read"
    ]
