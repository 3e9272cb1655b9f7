import hashlib
import json
import multiprocessing
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import data
from data import DataError, expand, pack, scan
from data.photographs import PHOTOGRAPHS
from data.shards import TarShard
from tools.shards import app


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.fixture
def photos(tmp_path, make_picture, encode):
    """Two class folders with five good images (one with caption and class), one truncated, one that is text."""
    folder = tmp_path / "photos"
    (folder / "cat").mkdir(parents=True)
    (folder / "dog").mkdir()
    (folder / "cat" / "my cat.1.jpg").write_bytes(encode(make_picture(0)))
    (folder / "cat" / "my cat.1.txt").write_text("ein schöner Kater", encoding="utf-8")
    (folder / "cat" / "my cat.1.cls").write_text("7\n")
    (folder / "cat" / "my_cat_1.PNG").write_bytes(encode(make_picture(1), "PNG"))
    (folder / "dog" / "a.webp").write_bytes(encode(make_picture(2), "WEBP"))
    (folder / "dog" / "猫.jpeg").write_bytes(encode(make_picture(3)))
    (folder / "dog" / ("long" * 40 + ".jpg")).write_bytes(encode(make_picture(4, (300, 200))))
    (folder / "dog" / "cut.jpg").write_bytes(encode(make_picture(5, (200, 200)))[:2000])
    (folder / "dog" / "fake.png").write_text("no image")
    (folder / "dog" / "._a.jpg").write_text("hidden")
    return folder


def test_pack_keeps_bytes_captions_classes_and_names_bad_images(photos, tmp_path):
    calls = []
    report = pack(photos, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert report.samples == 5 and calls == [(n, 7) for n in range(1, 8)]
    assert sorted(Path(skipped.source).name for skipped in report.skipped) == ["cut.jpg", "fake.png"]
    assert [os.path.basename(path) for path in report.shards] == ["train-000000.tar"]
    content = members(report.shards[0])
    keys = {name.split(".")[0] for name in content}
    assert {"cat_my_cat_1", "cat_my_cat_1-2", "dog_a", "dog"} < keys and len(keys) == 5
    assert all(len(key) <= 80 for key in keys)
    assert content["cat_my_cat_1.jpg"] == (photos / "cat" / "my cat.1.jpg").read_bytes()
    assert content["cat_my_cat_1.txt"].decode() == "ein schöner Kater"
    assert content["cat_my_cat_1.cls"] == b"7"
    metadata = json.loads(content["cat_my_cat_1.json"])
    assert metadata == {"key": "cat_my_cat_1", "width": 48, "height": 40, "source": "cat/my cat.1.jpg"}
    assert len(scan(report.shards[0])) == 5
    assert sorted(os.listdir(tmp_path / "out")) == ["train-000000.tar"]


def test_pack_is_deterministic_and_splits_into_shards(photos, tmp_path):
    for out in ("a", "b"):
        report = pack(photos, tmp_path / out, prefix="val", max_samples_per_shard=2)
        assert [os.path.basename(path) for path in report.shards] == [f"val-{n:06d}.tar" for n in range(3)]
        for path in photos.rglob("*"):
            os.utime(path, (1, 1))
    for name in os.listdir(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    ordered = pack(photos, tmp_path / "c", shuffle=False).shards[0]
    sources = [json.loads(value)["source"] for name, value in members(ordered).items() if name.endswith("json")]
    assert sources == sorted(sources)


def test_pack_resizes_larger_images_only(photos, tmp_path):
    (shard,) = pack(photos, tmp_path / "out", shorter_side=100).shards
    content = members(shard)
    sizes = {value["source"][:7]: (value["width"], value["height"]) for value in map(json.loads, _json(content))}
    assert sizes["dog/lon"] == (150, 100) and sizes["cat/my "] == (48, 40)
    assert content["cat_my_cat_1.jpg"] == (photos / "cat" / "my cat.1.jpg").read_bytes()
    with pytest.raises(DataError, match="quality"):
        pack(photos, tmp_path / "other", quality=0)


def _json(content):
    return [value for name, value in content.items() if name.endswith(".json")]


def test_pack_classes_from_folders(photos, tmp_path, make_picture, encode):
    (shard,) = pack(photos, tmp_path / "out", classes_from_folders=True).shards
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == {"cat": 0, "dog": 1}
    content = members(shard)
    assert content["cat_my_cat_1.cls"] == b"0" and content["dog_a.cls"] == b"1"
    (photos / "loose.jpg").write_bytes(encode(make_picture(9)))
    with pytest.raises(DataError, match=r"loose\.jpg lies in no class folder"):
        pack(photos, tmp_path / "other", classes_from_folders=True)


def test_pack_errors_name_the_mistake_and_leave_nothing(photos, tmp_path):
    empty, texts, bad = (tmp_path / name for name in ("empty", "texts", "bad"))
    for folder in (empty, texts, bad):
        folder.mkdir()
    (texts / "readme.txt").write_text("no images here")
    (bad / "a.jpg").write_text("no image")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (tmp_path / "nowhere", "new", "no such folder"),
        (empty, "new", "no jpg, jpeg, png, webp under"),
        (texts, "new", "no jpg, jpeg, png, webp under"),
        (bad, "new/deep", "none of the 1 images .* can be read"),
        (photos, "file", "it is a file"),
        (photos, "file/below", "cannot write shards .*Not a directory.*--out"),
    ]
    for folder, out, message in cases:
        with pytest.raises(DataError, match=message) as error:
            pack(folder, tmp_path / out)
        assert "\n" not in str(error.value)
    (photos / "cat" / "my cat.1.cls").write_text("siamese")
    with pytest.raises(DataError, match="'siamese': a class is a number"):
        pack(photos, tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


def test_pack_never_touches_existing_tars(photos, tmp_path):
    pack(photos, tmp_path / "out")
    before = (tmp_path / "out" / "train-000000.tar").read_bytes()
    with pytest.raises(DataError, match="already holds tars"):
        pack(photos, tmp_path / "out", prefix="other")
    assert os.listdir(tmp_path / "out") == ["train-000000.tar"]
    assert (tmp_path / "out" / "train-000000.tar").read_bytes() == before


def test_pack_that_is_interrupted_leaves_nothing(photos, tmp_path):
    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(photos, tmp_path / "out", progress=stop)
    assert sorted(os.listdir(tmp_path)) == ["photos"]


def test_pack_command(photos, tmp_path):
    command = ["pack", str(photos), "--out", str(tmp_path / "out"), "--max-samples-per-shard", "2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "packed 5 images into 3 tars" in result.output
    assert "skipped 2" in result.output and "fake.png" in result.output
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, DataError)


# -------------------------------------------------------------------------------------------------- expand and scan


def test_expand_finds_folders_files_braces_globs_and_lists(tars):
    paths = [str(tars / f"train-{n:06d}.tar") for n in range(3)]
    assert expand(str(tars)) == paths
    assert expand(paths[1]) == [paths[1]]
    assert expand(f"{tars}/train-{{000000..000001}}.tar") == paths[:2]
    assert expand(f"{tars}/train-*[12].tar") == paths[1:]
    assert expand([paths[2], f"{tars}/*0.tar"]) == [paths[2], paths[0]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{tars}/no-*.tar", "no such tar or folder: .*no-"),
        ("{tars}/train-{{000002..000003}}.tar", "train-000003.tar"),
        ("{tars}/..", "no \\*.tar in the folder"),
        ("ftp://example.com/a.tar", "an address of http, https, s3, gs"),
        ("https://example.com/folder", "folders cannot be listed over https"),
        ("pipe:cat a.tar", "data.allow_pipes=true"),
        ("bundled:test", "bundled:train and bundled:val"),
    ],
)
def test_expand_names_what_gives_nothing(tars, spec, message):
    with pytest.raises(DataError, match=message):
        expand(spec.format(tars=tars))
    with pytest.raises(DataError, match=message):
        expand([str(tars), spec.format(tars=tars)])


def test_expand_of_nothing():
    for spec in (None, []):
        with pytest.raises(DataError, match="no data named"):
            expand(spec)


def test_scan_finds_what_webdataset_groups(tmp_path, make_tar, make_picture, encode):
    images = [encode(make_picture(n)) for n in range(3)]
    samples = [{"__key__": f"part/{'x' * 60}{n}", "JPG": image, "txt": b"t"} for n, image in enumerate(images)]
    samples.insert(1, {"__key__": "caption-only", "txt": b"t"})
    path = make_tar(tmp_path / "a.tar", samples)
    shard = TarShard(path, scan(path))
    assert len(shard) == 4
    assert [shard.read(n).image() for n in (0, 2, 3)] == images
    assert shard.read(2).key == f"part/{'x' * 60}1"
    with pytest.raises(data.ImageError, match="no image among its members: txt"):
        shard.read(1).image()


def test_damaged_tars_are_named_where_webdataset_is_silent(tars, tmp_path):
    whole = (tars / "train-000001.tar").read_bytes()
    second_header = whole.index(b"1-1.jpg")
    damaged = {
        "zero bytes": b"",
        "text": b"this is no tar at all\n" * 100,
        "cut at a member": whole[:second_header],
        "cut in a header": whole[: second_header + 200],
        "cut in an image": whole[: second_header + 900],
        "flipped bit in a header": whole[:second_header] + b"\xff" + whole[second_header + 1 :],
        "zeroed block": whole[:second_header] + bytes(512) + whole[second_header + 512 :],
    }
    for name, content in damaged.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.tar") as error:
            scan(str(path))
        assert "\n" not in str(error.value)
        with pytest.raises(DataError, match=f"{name}.tar"):
            data.check(data.DataConfig(train=[str(tars), str(path)], image_size=16))


def test_tar_without_images_is_named(tmp_path, make_tar):
    path = make_tar(tmp_path / "texts.tar", [{"__key__": "a", "txt": b"t"}])
    with pytest.raises(DataError, match=r"texts\.tar holds no image"):
        scan(path)


# ---------------------------------------------------------------------------------------------- bundled photographs


def photographs(split):
    (path,) = expand(f"bundled:{split}")
    return {json.loads(value)["source"]: members(path) for value in _json(members(path))}, path


def test_no_photograph_is_in_both_splits(tmp_path, monkeypatch):
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))
    scenes, pixels = {}, {}
    for split in PHOTOGRAPHS:
        sources, path = photographs(split)
        assert set(sources) == set(PHOTOGRAPHS[split])
        scenes[split] = {name.split("_left")[0].split("_right")[0].split(".")[0] for name in sources}
        images = {name: value for name, value in members(path).items() if name.endswith(("jpg", "png"))}
        pixels[split] = {hashlib.sha256(value).hexdigest() for value in images.values()}
        assert len(pixels[split]) == len(images) == len(sources)
    assert not scenes["train"] & scenes["val"]
    assert not pixels["train"] & pixels["val"]
    assert len(scenes["val"]) >= 4 and "motorcycle" in scenes["train"]


def test_photographs_have_the_stated_size_and_are_packed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))
    (path,) = expand("bundled:val")
    for sample in data.evaluation_images("bundled:val", image_size=None):
        assert min(sample.image_chw.shape[1:]) == 256
    before = os.stat(path).st_mtime_ns
    assert expand("bundled:val") == [path] and os.stat(path).st_mtime_ns == before
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="IBQ_CACHE"):
        expand("bundled:val")


def test_many_processes_may_start_together(tmp_path, monkeypatch):
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(expand, ["bundled:train", "bundled:val"] * 4, chunksize=1)
    assert {len(paths) for paths in found} == {1}
    assert len(os.listdir(tmp_path / "cache")) == 1
    for paths in found:
        scan(paths[0])


def test_decode_of_every_photograph_is_rgb(tmp_path, monkeypatch):
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))
    for split in PHOTOGRAPHS:
        (path,) = expand(f"bundled:{split}")
        shard = TarShard(path, scan(path))
        assert all(isinstance(data.decode(shard.read(n).image()), Image.Image) for n in range(len(shard)))
