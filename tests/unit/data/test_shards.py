import hashlib
import json
import multiprocessing
import os
import signal
import tarfile
from pathlib import Path

import pytest
from comparing import refusal
from faults.corpus import member, tar, with_header
from samples import encoded, members, picture, write_tar

import data
from data import DataError, expand, scan
from data.loader import open_sources
from data.locks import WriterLock
from data.shards import PHOTOGRAPHS
from data.storage import Timeouts
from data.tar_reader import TarShard

# -------------------------------------------------------------------------------------------------- expand and scan


def test_expand_finds_folders_files_braces_globs_and_lists(tars):
    paths = [str(tars / f"train-{n:06d}.tar") for n in range(3)]
    assert expand(str(tars)) == paths
    assert expand(paths[1]) == [paths[1]]
    assert expand(f"{tars}/train-{{000000..000001}}.tar") == paths[:2]
    assert expand(f"{tars}/train-*[12].tar") == paths[1:]
    assert expand([paths[2], f"{tars}/*0.tar"]) == [paths[2], paths[0]]


def test_two_stars_stand_for_any_number_of_folders(tmp_path):
    paths = []
    for name in ("0.tar", "x/1.tar", "x/y/2.tar", "x/y/z/3.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        paths.append(write_tar(tmp_path / name, [{"__key__": "a", "jpg": encoded(picture(0))}]))
    assert sorted(expand(f"{tmp_path}/**/*.tar")) == paths
    assert expand(f"{tmp_path}/x/**/{{2,3}}.tar") == paths[2:]


def test_a_folder_that_exists_as_it_is_written_is_meant(tmp_path):
    """And not one that its brackets, stars and braces stand for."""
    for name in ("s[1]", "s1", "s*", "{a,b}", "a"):
        (tmp_path / name).mkdir()
        for number in range(2):
            write_tar(tmp_path / name / f"{number}.tar", [{"__key__": "a", "jpg": encoded(picture(0))}])
    for name in ("s[1]", "s*", "{a,b}"):
        paths = [f"{tmp_path}/{name}/{number}.tar" for number in range(2)]
        for spec in ("{0..1}.tar", "*.tar", "[01].tar", "", "**/*.tar"):
            assert expand(f"{tmp_path}/{name}/{spec}") == paths
        assert f"{name}/2.tar (1 of the 3" in refusal(DataError, expand, f"{tmp_path}/{name}/{{0..2}}.tar")
    assert len(expand(f"{tmp_path}/s[1-9]/*.tar")) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{tars}/no-*.tar", "no such tar or folder: {tars}/no-"),
        ("{tars}/train-{{000002..000003}}.tar", "train-000003.tar"),
        ("{tars}/..", "no *.tar in the folder"),
        ("ftp://example.com/a.tar", "an address of http, https, s3, gs"),
        ("https://example.com/folder", "folders cannot be listed over https"),
        ("pipe:cat a.tar", "data.allow_pipes=true"),
        ("bundled:test", "bundled:train and bundled:val"),
    ],
)
def test_expand_names_what_gives_nothing(tars, spec, message):
    for given in (spec.format(tars=tars), [str(tars), spec.format(tars=tars)]):
        assert message.format(tars=tars) in refusal(DataError, expand, given)


def test_expand_of_nothing():
    for spec in (None, []):
        assert "no data named" in refusal(DataError, expand, spec)


def test_scan_finds_what_webdataset_groups(tmp_path):
    images = [encoded(picture(n)) for n in range(3)]
    samples = [{"__key__": f"part/{'x' * 60}{n}", "JPG": image, "txt": b"t"} for n, image in enumerate(images)]
    samples.insert(1, {"__key__": "caption-only", "txt": b"t"})
    path = write_tar(tmp_path / "a.tar", samples)
    shard = TarShard(path, scan(path))
    assert len(shard) == 4
    assert [shard.read(n).image() for n in (0, 2, 3)] == images
    assert shard.read(2).key == f"part/{'x' * 60}1"
    with pytest.raises(data.ImageError, match="no image among its members: txt"):
        shard.read(1).image()


@pytest.mark.parametrize("times", [b"15303351673\0" * 2, b"\x80" + bytes(6) + b"\x6b\x00\x00\x00\x01"])
def test_times_in_the_headers_of_gnu_tars_are_no_part_of_the_names(tmp_path, times):
    """`tar --incremental` writes them where POSIX has a prefix of the name."""
    image, name = encoded(picture(0)), "x" * 120  # in a header for long names
    parts = [member(f"{key}.jpg", image, tarfile.GNU_FORMAT) for key in ("./a", "./b", name)]
    at = [0, len(parts[0]), len(parts[0]) + len(parts[1]) + 1024]
    content = tar(*parts)
    for start in at:
        content = with_header(content, start, 345, times)
    (tmp_path / "a.tar").write_bytes(content)
    shard = TarShard(str(tmp_path / "a.tar"), scan(str(tmp_path / "a.tar")))
    assert [shard.read(n).key for n in range(3)] == ["./a", "./b", name]


def test_a_prefix_of_a_posix_header_is_a_part_of_the_name(tmp_path):
    name = "y" * 90 + "/" + "z" * 90
    content = tar(member(f"{name}.jpg", encoded(picture(0)), tarfile.USTAR_FORMAT))
    (tmp_path / "a.tar").write_bytes(content)
    shard = TarShard(str(tmp_path / "a.tar"), scan(str(tmp_path / "a.tar")))
    assert shard.read(0).key == name


# ---------------------------------------------------------------------------------------------- bundled photographs


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """split -> the tar of its photographs, packed into a fresh cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IBQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {split: expand(f"bundled:{split}")[0] for split in PHOTOGRAPHS}


@pytest.fixture
def few_photographs(monkeypatch):
    """One in each split, which take little time to pack."""
    monkeypatch.setattr("data.shards.PHOTOGRAPHS", {"train": ("brick.png",), "val": ("coins.png",)})


def test_no_photograph_is_in_both_splits(packed):
    scenes, pixels = {}, {}
    for split, path in packed.items():
        content = members(path)
        sources = {json.loads(value)["source"] for name, value in content.items() if name.endswith(".json")}
        assert sources == set(PHOTOGRAPHS[split])
        scenes[split] = {name.split("_left")[0].split("_right")[0].split(".")[0] for name in sources}
        images = {name: value for name, value in content.items() if name.endswith(("jpg", "png"))}
        pixels[split] = {hashlib.sha256(value).hexdigest() for value in images.values()}
        assert len(pixels[split]) == len(images) == len(sources)
    assert not scenes["train"] & scenes["val"]
    assert not pixels["train"] & pixels["val"]
    assert len(scenes["val"]) >= 4 and "motorcycle" in scenes["train"]


def test_every_photograph_decodes_and_has_at_most_the_stated_size(packed):
    for split, path in packed.items():
        images = data.evaluation_images(path, image_size=None)
        sides = [min(sample.image_chw.shape[1:]) for sample in images if sample.image_chw.shape[0] == 3]
        assert len(sides) == len(images) == len(PHOTOGRAPHS[split])
        assert max(sides) == 256 and (split == "train" or min(sides) == 256)  # smaller ones keep their size


def test_photographs_are_packed_once(tmp_path, monkeypatch, few_photographs):
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))
    (path,) = expand("bundled:val")
    before = os.stat(path).st_mtime_ns
    assert expand("bundled:val") == [path] and os.stat(path).st_mtime_ns == before
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    assert "IBQ_CACHE" in refusal(DataError, expand, "bundled:val")


@pytest.mark.process
def test_what_a_killed_process_left_of_the_photographs_is_removed(tmp_path, monkeypatch, few_photographs):
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))

    def killed() -> None:
        monkeypatch.setattr("data.shards.pack", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        expand("bundled:val")

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").glob(".photographs-*")
    assert any(left.rglob("*.png")) or any(left.rglob("*.jpg"))
    (path,) = expand("bundled:val")
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [Path(path).parents[1].name]


def test_photographs_that_a_live_process_packs_are_left_alone(tmp_path, monkeypatch, few_photographs):
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path))
    monkeypatch.setattr("data.shards.PACKING_SECONDS", 0.0)
    (tmp_path / ".photographs-other").mkdir()
    with WriterLock(tmp_path / ".photographs.lock", "them") as lock:
        lock.take()
        said = refusal(DataError, expand, "bundled:val")
        assert f"the bundled photographs in {tmp_path} is being written" in said and "wait until it ends" in said
        assert (tmp_path / ".photographs-other").is_dir()
    expand("bundled:val")
    assert not (tmp_path / ".photographs-other").exists()


@pytest.mark.process
def test_many_processes_may_start_together(tmp_path, monkeypatch, few_photographs):
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(expand, ["bundled:train", "bundled:val"] * 4, chunksize=1)
    assert {len(paths) for paths in found} == {1}
    assert len(os.listdir(tmp_path / "cache")) == 1
    for paths in found:
        scan(paths[0])


def test_listings_of_buckets_take_the_time_limits_of_the_recipe(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(
        "data.shards.list_tars", lambda url, timeouts: given.append((url, timeouts)) or [f"{url}/0.tar"]
    )
    monkeypatch.setattr("data.sources.check_available", lambda urls, timeouts, _: given.append((urls, timeouts)))
    listed = tmp_path / "list.txt"
    listed.write_text("s3://bucket/a\n")
    config = data.DataConfig(train=["s3://bucket/b", str(listed)], request_seconds=3.0, retry_seconds=7.0)
    sources = open_sources(config)
    urls = ["s3://bucket/b/0.tar", "s3://bucket/a/0.tar"]
    assert [shard.url for shard in sources[0].shards] == urls
    assert given == [(what, Timeouts(3.0, 7.0)) for what in ("s3://bucket/b", "s3://bucket/a", urls)]


@pytest.mark.parametrize(
    ("there", "spec", "said"),
    [
        (
            [0, 1, 4, 5, 9],
            "a-{00..09}.tar",
            "T/a-{{02..03},{06..08}}.tar (5 of the 10 of T/a-{00..09}.tar; "
            "those that exist are 'T/a-{{00..01},{04..05},09}.tar')",
        ),
        ([0], "a-{00..02}.tar", "T/a-{01..02}.tar (2 of the 3 of T/a-{00..02}.tar; those that exist are 'T/a-00.tar')"),
        ([], "{a,b}-{00..01}.tar", "T/{a-00,a-01,b-00,b-01}.tar (4 of the 4 of T/{a,b}-{00..01}.tar)"),
    ],
)
def test_all_missing_tars_are_named_at_once(tmp_path, there, spec, said):
    """And the pattern that the error proposes is one that works."""
    for number in there:
        (tmp_path / f"a-{number:02}.tar").touch()
    found = refusal(DataError, expand, str(tmp_path / spec))
    assert found == "no such tar or folder: " + said.replace("T/", f"{tmp_path}/")
    if there:
        assert expand(found.split("'")[1]) == [str(tmp_path / f"a-{number:02}.tar") for number in there]


def test_all_missing_lines_of_a_list_are_named_at_once(tmp_path):
    (tmp_path / "a-02.tar").touch()
    (tmp_path / "list.txt").write_text("".join(f"{tmp_path}/a-{number:02}.tar\n" for number in range(5)))
    found = refusal(DataError, expand, str(tmp_path / "list.txt"))
    assert found == f"no such tar or folder: {tmp_path}/a-{{{{00..01}},{{03..04}}}}.tar (4 paths)"
