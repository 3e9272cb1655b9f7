"""Tars that a store lacks are all named by one start, however many there are."""

import threading

import pytest
from comparing import refusal
from samples import index_of, write_tars
from serving import Server, s3, use_s3

from data import DataConfig, DataError, SourceConfig, availability, check_remote_data, object_store
from data.availability import check_available
from data.storage import Timeouts

pytestmark = pytest.mark.usefixtures("clock", "unknown")
STEADY = Timeouts(request_seconds=30, total_seconds=120)
COUNT = 400  # more than what every process asks for, 256
GONE = (7, 300, 301, 302)


@pytest.fixture
def unknown(monkeypatch):
    """Nothing is known of any store."""
    monkeypatch.setattr(object_store, "_clients", {})
    monkeypatch.setattr(availability, "_there", set())


@pytest.fixture
def server():
    with Server({f"/{number:03}.tar": b"tar" for number in range(COUNT) if number not in GONE}) as server:
        yield server


@pytest.fixture(scope="module")
def moto():
    with s3("many", {f"set/{number:03}.tar": b"" for number in range(COUNT) if number not in GONE}) as endpoint:
        yield endpoint


@pytest.fixture
def bucket(moto, monkeypatch):
    use_s3(monkeypatch, moto)
    return "s3://many/set"


def asked_for(monkeypatch) -> list[str]:
    """The tars that are asked for one by one from now on."""
    asked, probe = [], availability.probe
    monkeypatch.setattr(availability, "probe", lambda url, timeouts: asked.append(url) or probe(url, timeouts))
    return asked


def test_all_of_a_pattern_that_an_http_server_lacks_are_named(server):
    done = []
    config = DataConfig(train=server.url("/{000..399}.tar"))
    said = refusal(DataError, check_remote_data, config, None, lambda *progress: done.append(progress))
    assert said.startswith(f"there is no {server.url('/007.tar')} (HTTP 404): check its path; 4 of 400 tars cannot")
    assert f"cannot be read: {server.url('/{007,{300..302}}.tar')}; these can be" in said
    assert done == [(number, COUNT) for number in range(1, COUNT + 1)]


def test_all_of_a_bucket_are_named_by_its_listing(bucket, monkeypatch):
    asked = asked_for(monkeypatch)
    said = refusal(DataError, check_remote_data, DataConfig(train=f"{bucket}/{{000..399}}.tar"), None)
    assert f"there is no {bucket}/007.tar (its folder was listed): check its path; 4 of 400 tars" in said
    assert f"{bucket}/{{007,{{300..302}}}}.tar; these can be" in said
    assert asked == [f"{bucket}/000.tar"]  # whether it may be read
    urls = [f"{bucket}/{number:03}.tar" for number in range(COUNT) if number not in GONE]
    check_available(urls, STEADY)
    assert len(asked) == 1  # what is known to be there is not asked for again


def test_tars_in_quarantine_are_not_asked_for(server):
    names = [f"{number:03}.tar" for number in GONE]
    config = DataConfig(train=server.url("/{000..399}.tar"), quarantine=names[:2])
    check_remote_data(config, {"quarantine": names[2:]})
    assert not any(server.asked(f"/{name}") for name in names)


def test_a_folder_that_does_not_exist_lacks_all(bucket):
    urls = [f"s3://many/other/{number:03}.tar" for number in range(40)]
    assert "40 of 40 tars cannot be read" in refusal(DataError, check_available, urls, STEADY)


def test_a_bucket_that_may_not_be_listed_is_asked_for_each_tar(server, monkeypatch, caplog):
    use_s3(monkeypatch, server.url())
    server.files |= {f"/bucket/{number:03}.tar": b"tar" for number in range(40) if number != 9}
    server.fault("/bucket", status=403, body=b"<Error><Code>AccessDenied</Code></Error>")
    urls = [f"s3://bucket/{number:03}.tar" for number in range(40)]
    assert "there is no s3://bucket/009.tar" in refusal(DataError, check_available, urls, STEADY)
    assert "s3://bucket may not be read" in caplog.text and "asked for one by one" in caplog.text


def test_of_very_many_tars_some_are_asked_for_and_this_is_told(server, monkeypatch, caplog):
    monkeypatch.setattr(availability, "MOST_ASKED", 100)
    asked = asked_for(monkeypatch)
    urls = [server.url(f"/{number:03}.tar") for number in range(COUNT)]
    said = refusal(DataError, check_available, urls, STEADY)
    assert sorted(asked) == urls[::4] and server.url("/300.tar") in said
    assert "of 400 remote tars, one in 4 is asked for now" in caplog.text


def test_requests_are_bounded(monkeypatch):
    now, most, lock, all_run = 0, 0, threading.Lock(), threading.Barrier(availability.THREADS)

    def probe(url, timeouts):
        nonlocal now, most
        with lock:
            now, most = now + 1, max(most, now + 1)
        all_run.wait(20)  # for exactly that many
        with lock:
            now -= 1

    monkeypatch.setattr(availability, "probe", probe)
    check_available([f"http://host/{number}.tar" for number in range(4 * availability.THREADS)], STEADY)
    assert most == availability.THREADS


def test_tars_of_an_index_are_asked_for(tmp_path):
    folder = write_tars(tmp_path / "tars", [5] * 3, "{:03d}.tar")
    index = index_of(folder, tmp_path / "index.safetensors")
    (folder / "001.tar").unlink()
    with Server(folder=folder) as server:
        root = server.url("/{000..002}.tar")
        config = DataConfig(sources=[SourceConfig(root=root, index=str(index))])
        said = refusal(DataError, check_remote_data, config, None)
        assert said == f"there is no {server.url('/001.tar')} (HTTP 404): check its path"


def test_local_and_streamed_data_are_not_asked_for(tmp_path, monkeypatch):
    asked = asked_for(monkeypatch)
    folder = write_tars(tmp_path / "tars", [5] * 3, "{:03d}.tar")
    sources = [SourceConfig(name=name, root=root) for name, root in (("a", str(folder)), ("b", ["pipe:cat a.tar"]))]
    check_remote_data(DataConfig(sources=sources, allow_pipes=True), None)
    assert asked == []
