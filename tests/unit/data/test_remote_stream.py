"""Streams from servers: the same images as from local tars, each byte fetched once."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from comparing import refusal
from ranks import wait_for
from samples import Steps, encoded, index_of, picture, pictured, write_tar, write_tars
from serving import Server, s3, use_s3

import data.cache as caching
from data import DataConfig, DataError, SourceConfig, check, evaluation_images, scan, storage
from data.cache import Access, Cache
from data.prep.check import check_shard
from data.samples import WindowLimit
from data.storage import Timeouts, bytes_read
from data.tar_reader import TarShard

pytestmark = pytest.mark.usefixtures("clock")  # waits between tries take no time
NAMES = [f"train-{n:06d}.tar" for n in range(8)]
BRIEF = Timeouts(request_seconds=0.8, total_seconds=1.8)
SHORT = {"request_seconds": 0.8, "retry_seconds": 1.8}
WORKERS = [0, pytest.param(2, marks=pytest.mark.process)]


@pytest.fixture
def folder(tmp_path):
    """Eight tars of 5 pictures."""
    return write_tars(tmp_path / "tars", [5] * 8, "train-{:06d}.tar")


@pytest.fixture
def server(folder):
    with Server(folder=folder) as server:
        yield server


@pytest.fixture
def root(server):
    """The eight tars on the server."""
    return server.url("/train-{000000..000007}.tar")


@pytest.fixture
def index(folder, tmp_path):
    return index_of(folder, tmp_path / "index.safetensors")


def infos(root, steps, index=None, state=None, **options):
    source = SourceConfig(root=root, index=index)
    settings = {"image_size": 8, "workers": 0, "lanes": 4, "shuffle_block": 3, **options}
    running = Steps(DataConfig(sources=[source], **settings), batch=4, state=state)
    taken = [(info.key, info.position, pixels) for step in running.infos(steps) for info, pixels in step]
    running.streams[0].close()
    return taken, running.states[0]


@pytest.mark.parametrize("workers", WORKERS)
def test_http_with_an_index_gives_what_local_tars_give(folder, index, root, workers):
    expected, _ = infos(str(folder), 20)
    assert infos(root, 20, index, workers=workers)[0] == expected


def test_resumes_on_a_server_what_began_on_a_disk(folder, index, root):
    expected, _ = infos(str(folder), 12)
    _, state = infos(str(folder), 5)
    assert infos(root, 7, index, state=state)[0] == expected[20:]


SHAPES = [(48, 40), (40, 80), (80, 40)]  # width, height


@pytest.fixture
def shapes(tmp_path):
    """Two tars of 24 pictures of three shapes in turn."""
    (tmp_path / "shapes").mkdir()
    for tar in range(2):
        keys = [f"{tar}-{n}" for n in range(24)]
        samples = [{"__key__": key, "png": encoded(picture(n, SHAPES[n % 3]), "PNG")} for n, key in enumerate(keys)]
        write_tar(tmp_path / "shapes" / f"train-{tar:06d}.tar", samples)
    return tmp_path / "shapes"


@pytest.mark.parametrize("unused", [0, 1 << 18])
def test_buckets_on_a_server_give_what_local_tars_give(shapes, tmp_path, monkeypatch, unused):
    """Wanted samples lie apart: with the bytes between them in one request, or in a request each."""
    monkeypatch.setattr("data.tar_reader.MOST_UNUSED_BYTES", unused)
    buckets = {"buckets": ["32x32", "40x20", "20x40"], "shuffle_block": 8}
    expected, _ = infos(str(shapes), 12, **buckets)
    index = index_of(shapes, tmp_path / "index.safetensors")
    with Server(folder=shapes) as server:
        root = server.url("/train-{000000..000001}.tar")
        before = bytes_read()
        assert infos(root, 12, index, **buckets)[0] == expected
        join_prefetches()
        read, requests = bytes_read() - before, len(server.requests)
        said = refusal(DataError, infos, root, 1, **buckets, lanes=2)
    needed = sum(path.stat().st_size for path in shapes.glob("*.tar"))  # 12 steps are about one epoch
    assert "source train: buckets need the size of every image: write an index with `ibq shards check" in said
    if unused:
        assert requests < 48  # of two tars, with versions: fewer than there are samples
    else:
        assert requests > 48 and read < 2 * needed  # one window ahead for each bucket and lane


def join_prefetches():
    """Wait for what is being fetched ahead."""
    for thread in threading.enumerate():
        if thread.name == "prefetch":
            thread.join(20)
            assert not thread.is_alive()


def test_each_byte_of_an_epoch_is_fetched_once(folder, index, root):
    needed = sum(int((table.stops_n - table.starts_n).sum()) for table in map(scan, map(str, folder.glob("*.tar"))))
    before = bytes_read()
    infos(root, 10, index)
    join_prefetches()
    first = bytes_read() - before
    infos(root, 40, index)
    join_prefetches()
    four_epochs = bytes_read() - before - first
    ahead = 4 * 3 * needed // 40  # one window for each lane
    assert needed <= first <= needed + ahead
    assert 4 * needed <= four_epochs <= 4 * needed + ahead


def test_http_without_an_index_gives_each_sample_once_an_epoch(root):
    taken, _ = infos(root, 20)
    counts = Counter((position.epoch, key) for key, position, _ in taken)
    assert set(counts.values()) == {1}
    assert len([key for epoch, key in counts if epoch == 0]) == 40
    _, state = infos(root, 7)
    assert infos(root, 13, state=state)[0] == taken[28:]


def test_few_shards_without_an_index_are_refused_with_the_mend(server):
    with pytest.raises(DataError, match=r"3 shards without an index.*write-index"):
        infos(server.url("/train-{000000..000002}.tar"), 1)


def test_s3_with_and_without_an_index(folder, index, monkeypatch):
    expected, _ = infos(str(folder), 11)  # an epoch and a step
    with s3("bucket", {f"set/{name}": (folder / name).read_bytes() for name in NAMES}) as endpoint:
        use_s3(monkeypatch, endpoint)
        assert infos("s3://bucket/set", 11, index)[0] == expected
        taken, _ = infos("s3://bucket/set", 11)
        assert sorted({key for key, position, _ in taken if position.epoch == 0}) == sorted(
            {key for key, _, _ in expected}
        )


def test_cache_holds_whole_shards(folder, index, server, root, tmp_path):
    expected, _ = infos(str(folder), 20)
    assert infos(root, 20, index, cache=str(tmp_path / "cache"))[0] == expected
    sent = server.bytes_sent
    assert infos(root, 20, index, cache=str(tmp_path / "cache"), workers=2)[0] == expected
    assert server.bytes_sent == sent
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 8


@pytest.mark.process
def test_pipes_where_they_are_allowed(folder):
    root = f"pipe:cat {folder}/train-{{000000..000007}}.tar"
    assert "allow it with data" in refusal(DataError, infos, root, 1)
    taken, _ = infos(root, 10, allow_pipes=True)
    assert len({(position.epoch, key) for key, position, _ in taken}) == 40
    with pytest.raises(DataError, match=r"ended with status 3|no whole"):
        infos([f"pipe:exit 3; echo {n}" for n in range(4)], 1, allow_pipes=True)


FAULTS = [
    {"silent": True},
    {"stall_after_bytes": 100},
    {"cut_after_bytes": 100},
    {"status": 404},
    {"status": 403},
    {"status": 500},
]


@pytest.mark.parametrize(
    ("fault", "workers"),
    [*((fault, 0) for fault in FAULTS), pytest.param(FAULTS[0], 2, marks=pytest.mark.process)],
    ids=str,
)
@pytest.mark.parametrize("indexed", [True, False])
def test_servers_that_fail_end_the_stream_in_time(server, index, fault, indexed, workers):
    server.fault("/train-000003.tar", **fault)
    began = time.monotonic()
    root = server.url("/train-{000000..000007}.tar?signature=SECRET", user="me:SECRET")
    said = refusal(DataError, infos, root, 40, index if indexed else None, workers=workers, **SHORT)
    assert time.monotonic() - began < 8
    assert "train-000003.tar" in said and "SECRET" not in said


def test_all_shards_that_a_server_lacks_are_named_at_the_start(folder, server, root, tmp_path):
    """Where they would be found one after the other: without an index, and where all are copied."""
    for number in (2, 4, 5):
        (folder / NAMES[number]).unlink()
    missing, others = "{000002,{000004..000005}}", "{{000000..000001},000003,{000006..000007}}"
    said = (
        f"there is no {server.url('/train-000002.tar')} (HTTP 404): check its path; 3 of 8 tars cannot be read: "
        f"{server.url(f'/train-{missing}.tar')}; these can be: '{server.url(f'/train-{others}.tar')}'"
    )
    assert refusal(DataError, check, DataConfig(train=root)) == said
    cached = {"cache": str(tmp_path / "cache"), "quarantine": [NAMES[4]]}
    assert "2 of 7 tars cannot be read" in refusal(DataError, check, DataConfig(train=root, **cached))
    assert refusal(DataError, evaluation_images, root, image_size=8) == said
    assert not any((tmp_path / "cache").glob("*")) and server.bytes_sent < 100  # nothing was downloaded


def test_copies_are_read_where_their_server_is_gone(server, root, tmp_path):
    access = Access(BRIEF, Cache(tmp_path / "cache", 10**9, BRIEF))
    assert len(evaluation_images(root, image_size=8, access=access)) == 40
    server.fault("/train-000003.tar", status=404)
    for known in (storage._versions, caching._chosen, caching._given, caching._listed):
        known.clear()
    assert len(evaluation_images(root, image_size=8, access=access)) == 40


def other_tar(folder, number: int) -> bytes:
    """A tar with as many bytes and samples as one of the folder's."""
    content = bytearray((folder / NAMES[number]).read_bytes())
    content[700] ^= 1  # behind the header of the first member
    return bytes(content)


def test_a_tar_without_an_index_is_read_of_one_version(folder, server, monkeypatch):
    """A second window, and a second pass over the same address, do not hide that the first one's tar is gone."""
    monkeypatch.setattr("data.tar_reader.RANGE_BYTES", 1024)
    url = server.url("/" + NAMES[3])
    first = TarShard(url).windows(0, None, WindowLimit(1, 10**9))
    next(first)
    server.files["/" + NAMES[3]] = other_tar(folder, 3)
    next(TarShard(url).windows(0, None, WindowLimit(1, 10**9)))  # a new pass reads what is there now
    assert "was replaced while it was read: it has the same size" in refusal(DataError, list, first)
    server.fault("/" + NAMES[4], times=2)
    server.fault("/" + NAMES[4], then=other_tar(folder, 4), times=1)
    (problem,) = check_shard(server.url("/" + NAMES[4])).problems
    assert problem.kind == "unreadable" and "was replaced" in problem.message


def test_windows_of_an_index_are_of_the_version_whose_size_was_checked(folder, server):
    url, tables = server.url("/" + NAMES[3]), scan(str(folder / NAMES[3]))
    first, second = (TarShard(url, tables).windows(0, None, WindowLimit(1, 10**9)) for _ in range(2))
    next(first).fetch()
    server.files["/" + NAMES[3]] = other_tar(folder, 3)
    next(second).fetch()
    assert "was replaced" in refusal(DataError, next(first).fetch)


def test_passing_faults_are_not_seen(folder, index, server, root):
    expected, _ = infos(str(folder), 20)
    for number, fault in enumerate(({"status": 503}, {"cut_after_bytes": 50}, {"stall_after_bytes": 60})):
        server.fault(f"/train-00000{number}.tar", times=1, **fault)
    assert infos(root, 20, index, request_seconds=0.5, retry_seconds=20.0)[0] == expected


def test_a_shard_that_is_not_the_one_of_the_index_is_refused(folder, index):
    write_tar(folder / NAMES[2], pictured(f"other{n}" for n in range(15)))
    with pytest.raises(DataError, match=r"train-000002.tar has .* bytes, but its index says .*.*quarantine"):
        infos(str(folder), 20, index)
    content = (folder / NAMES[4]).read_bytes()
    (folder / NAMES[4]).write_bytes(content.replace(b"4-3.jpg", b"4-x.jpg"))
    with pytest.raises(DataError, match=r"train-00000[24].tar"):
        infos(str(folder), 20, index)
    with pytest.raises(DataError, match=r"train-000004.tar is damaged, or not the one .*bad checksum.*quarantine"):
        infos(str(folder), 20, index, quarantine=[NAMES[2]])
    (folder / NAMES[4]).write_bytes(content)
    infos(str(folder), 20, index, quarantine=[NAMES[2]])
    shutil.copy(folder / NAMES[5], folder / NAMES[4])
    with pytest.raises(DataError, match=r"train-000004.tar .* not the one .*\(sample . is 5-.\)"):
        infos(str(folder), 20, index, quarantine=[NAMES[2]])
    taken, _ = infos(str(folder), 20, index, quarantine=[NAMES[2], NAMES[4]])
    assert {key[0] for key, _, _ in taken} == set("013567")


def test_a_truncated_remote_tar_without_an_index_is_named(folder, root):
    content = (folder / NAMES[5]).read_bytes()
    (folder / NAMES[5]).write_bytes(content[: len(content) // 2 // 512 * 512])
    assert "train-000005.tar" in refusal(DataError, infos, root, 40)


@pytest.mark.process
def test_a_worker_that_waits_for_a_server_does_not_keep_the_process(folder, index, server, root):
    first = {key[0] for key, _, _ in infos(str(folder), 1)[0]}
    silent = [f"/train-00000{number}.tar" for number in sorted(set("01234567") - first)]
    for path in silent:
        server.fault(path, silent=True)
    script = f"""
import data
source = data.SourceConfig(root={root!r}, index={index!r})
config = data.DataConfig(sources=[source], image_size=8, workers=2, lanes=4, shuffle_block=3, request_seconds=20.0)
options = dict(global_batch_size=4, micro_batch_size=4, rank=0, world_size=1, seed=3)
stream = data.train_batches(config, **options)
next(stream)
input()  # until the workers wait
"""
    running = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: any(map(server.asked, silent)), "request of a worker", 60, running)
        began = time.monotonic()
        _, said = running.communicate("\n", timeout=60)
    finally:
        running.kill()
    assert running.returncode == 0, re.sub(r"\s+", " ", said)
    assert time.monotonic() - began < 15
