import itertools
import json
import os
import re
import signal
import time
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest
from comparing import refusal, unchanged
from samples import encoded, members, picture

from data import DataError, pack, scan
from data.locks import WriterLock, file_lock
from data.prep import pack as packing
from tools import cli


def metadata_of(path):
    return [json.loads(value) for name, value in members(path).items() if name.endswith(".json")]


@pytest.fixture
def photos(tmp_path):
    """Two class folders: five good images (one with caption and class), one truncated, one that is text, one empty."""
    folder = tmp_path / "photos"
    (folder / "cat").mkdir(parents=True)
    (folder / "dog").mkdir()
    (folder / "cat" / "my cat.1.jpg").write_bytes(encoded(picture(0)))
    (folder / "cat" / "my cat.1.txt").write_text("ein schöner Kater", encoding="utf-8")
    (folder / "cat" / "my cat.1.cls").write_text("7\n")
    (folder / "cat" / "my_cat_1.PNG").write_bytes(encoded(picture(1), "PNG"))
    (folder / "dog" / "a.webp").write_bytes(encoded(picture(2), "WEBP"))
    (folder / "dog" / "猫.jpeg").write_bytes(encoded(picture(3)))
    (folder / "dog" / ("long" * 40 + ".jpg")).write_bytes(encoded(picture(4, (300, 200))))
    (folder / "dog" / "cut.jpg").write_bytes(encoded(picture(5, (200, 200)))[:2000])
    (folder / "dog" / "fake.png").write_text("no image")
    (folder / "dog" / "empty.png").touch()
    (folder / "dog" / "._a.jpg").write_text("hidden")
    return folder


def test_pack_keeps_bytes_captions_classes_and_names_bad_images(photos, tmp_path):
    calls = []
    report = pack(photos, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert report.samples == 5 and calls == [(n, 8) for n in range(1, 9)]
    assert sorted(Path(skipped.source).name for skipped in report.skipped) == ["cut.jpg", "empty.png", "fake.png"]
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
    sources = [metadata["source"] for metadata in metadata_of(ordered)]
    assert sources == sorted(sources)


def test_pack_resizes_larger_images_only(photos, tmp_path):
    (shard,) = pack(photos, tmp_path / "out", shorter_side=100).shards
    content = members(shard)
    sizes = {value["source"][:7]: (value["width"], value["height"]) for value in metadata_of(shard)}
    assert sizes["dog/lon"] == (150, 100) and sizes["cat/my "] == (48, 40)
    assert content["cat_my_cat_1.jpg"] == (photos / "cat" / "my cat.1.jpg").read_bytes()
    assert "quality" in refusal(DataError, pack, photos, tmp_path / "other", quality=0)


def test_imagenet_layout_numbers_the_folders(photos, tmp_path):
    (shard,) = pack(photos, tmp_path / "out", layout="imagenet").shards
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == {"cat": 0, "dog": 1}
    content = members(shard)
    assert content["cat_my_cat_1.cls"] == b"0" and content["dog_a.cls"] == b"1"
    assert content["cat_my_cat_1.txt"].decode() == "ein schöner Kater"
    (photos / "loose.jpg").write_bytes(encoded(picture(9)))
    with pytest.raises(DataError, match=r"loose\.jpg lies in no class folder"):
        pack(photos, tmp_path / "other", layout="imagenet")


def test_imagenet_itself(tmp_path):
    for number, synset in enumerate(("n01443537", "n01440764", "n15075141")):
        folder = tmp_path / "imagenet" / "train" / synset
        folder.mkdir(parents=True)
        for n in range(2):
            (folder / f"{synset}_{n}.JPEG").write_bytes(encoded(picture(10 * number + n)))
    report = pack(tmp_path / "imagenet" / "train", tmp_path / "out", layout="imagenet")
    assert report.samples == 6 and not report.skipped
    synsets = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert synsets == {"n01440764": 0, "n01443537": 1, "n15075141": 2}
    content = members(report.shards[0])
    for metadata in metadata_of(report.shards[0]):
        key = metadata["key"]
        assert int(content[f"{key}.cls"]) == synsets[metadata["source"].split("/")[0]]
        assert content[f"{key}.jpg"] == (tmp_path / "imagenet" / "train" / metadata["source"]).read_bytes()
    (tmp_path / "imagenet" / "val").mkdir()
    with pytest.raises(DataError, match="holds the folders train, which are no classes"):
        pack(tmp_path / "imagenet", tmp_path / "other", layout="imagenet")


# ---------------------------------------------------------------------------------------------------------------- coco


@pytest.fixture
def coco(tmp_path):
    """val2017 with four images, and captions of three of them and of two that are not there."""
    folder = tmp_path / "val2017"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number:012d}.jpg").write_bytes(encoded(picture(number)))
    annotations = {
        "images": [{"id": n, "file_name": f"{n:012d}.jpg", "width": 48, "height": 40} for n in (0, 1, 3, 7)],
        "annotations": [
            {"image_id": 1, "id": 11, "caption": "Ein Bär. "},
            {"image_id": 0, "id": 12, "caption": "A cat."},
            {"image_id": 1, "id": 13, "caption": "A bear in the snow.\n"},
            {"image_id": 3, "id": 14, "caption": "A \ud800 train."},
            {"image_id": 7, "id": 15, "caption": "Not there."},
            {"image_id": 99, "id": 16, "caption": "Without any image."},
        ],
    }
    (tmp_path / "captions_val2017.json").write_text(json.dumps(annotations))
    return folder


def zipped(folder, path, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(f"{folder.name}/", b"")
        for image in sorted(folder.iterdir()):
            file.write(image, f"{folder.name}/{image.name}")
        file.writestr(f"__MACOSX/{folder.name}/._a.jpg", b"hidden")
    return path


def test_coco_takes_captions_from_its_annotations(coco, tmp_path):
    report = pack(coco, tmp_path / "out", layout="coco", annotations=tmp_path / "captions_val2017.json")
    assert report.samples == 4
    assert report.without_caption == ["000000000002.jpg"]
    assert report.without_image == ["000000000007.jpg", "image_id 99"]
    content = members(report.shards[0])
    assert content["000000000001.txt"].decode() == "Ein Bär."
    metadata = json.loads(content["000000000001.json"])
    assert metadata["captions"] == ["Ein Bär.", "A bear in the snow."] and metadata["image_id"] == 1
    assert content["000000000000.jpg"] == (coco / "000000000000.jpg").read_bytes()
    assert content["000000000003.txt"] == b"A ? train."
    assert "000000000002.txt" not in content and "captions" not in json.loads(content["000000000002.json"])


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_file_gives_the_same_tars_as_its_folder(coco, tmp_path, compression):
    archive = zipped(coco, tmp_path / "val2017.ZIP", compression)
    options = {"layout": "coco", "annotations": tmp_path / "captions_val2017.json"}
    (folder,), (from_zip,) = (pack(s, tmp_path / o, **options).shards for s, o in ((coco, "a"), (archive, "b")))
    assert Path(folder).read_bytes() == Path(from_zip).read_bytes()


def test_a_zip_file_of_folders_captions_and_classes(photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        for path in sorted(photos.rglob("*")):
            file.write(path, path.relative_to(photos))
    (folder,), (from_zip,) = (pack(s, tmp_path / o).shards for s, o in ((photos, "a"), (tmp_path / "photos.zip", "b")))
    assert Path(folder).read_bytes() == Path(from_zip).read_bytes()
    assert "cat_my_cat_1.txt" in members(from_zip)


def test_a_damaged_member_of_a_zip_file_is_skipped(coco, tmp_path):
    archive = zipped(coco, tmp_path / "val2017.zip")
    image = (coco / "000000000002.jpg").read_bytes()
    archive.write_bytes(archive.read_bytes().replace(image, image[:-1] + b"?"))
    report = pack(archive, tmp_path / "out")
    assert report.samples == 3
    (skipped,) = report.skipped
    assert skipped.source == f"{archive}/000000000002.jpg" and "damaged or encrypted in the zip file" in skipped.reason


def test_a_member_that_unpacks_to_too_much_is_not_unpacked(coco, tmp_path, monkeypatch):
    archive = zipped(coco, tmp_path / "val2017.zip")
    sizes = sorted(image.stat().st_size for image in coco.iterdir())
    monkeypatch.setattr("data.folder_reader.MAX_BYTES", sizes[-1] - 1)
    (skipped,) = pack(archive, tmp_path / "out").skipped
    assert skipped.reason == f"{sizes[-1]:,} bytes are more than {sizes[-1] - 1:,}"


def test_what_coco_and_zip_files_lack_is_said(coco, tmp_path):
    captions = tmp_path / "captions_val2017.json"
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "instances.json").write_text('{"images": [], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}')
    (tmp_path / "no.zip").write_text("no zip file")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as file:
        file.writestr("readme.txt", "no images here")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jpg").write_bytes((coco / "000000000000.jpg").read_bytes())
    cases = [
        (coco, {"layout": "coco"}, "takes annotations"),
        (coco, {"annotations": captions}, "takes annotations"),
        (coco, {"layout": "yolo"}, "unknown layout 'yolo': choose one of folder, imagenet, coco"),
        (coco, {"layout": "coco", "annotations": tmp_path / "none.json"}, "cannot read the annotations .*none.json"),
        (coco, {"layout": "coco", "annotations": tmp_path / "text.json"}, "text.json are no annotations"),
        (coco, {"layout": "coco", "annotations": tmp_path / "list.json"}, "list.json are no annotations"),
        (coco, {"layout": "coco", "annotations": tmp_path / "instances.json"}, "instances.json hold no captions"),
        (tmp_path / "other", {"layout": "coco", "annotations": captions}, "captions of none of the 1 images"),
        (tmp_path / "no.zip", {}, "no.zip is no whole zip file"),
        (tmp_path / "empty.zip", {}, "no jpg, jpeg, png, webp, jfif, jpe under .*empty.zip"),
    ]
    with unchanged(tmp_path):
        for source, options, message in cases:
            assert re.search(message, refusal(DataError, pack, source, tmp_path / "out", **options))


# -------------------------------------------------------------------------------------------------------------- errors


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
        (empty, "new", "no jpg, jpeg, png, webp, jfif, jpe under .*empty: name a folder or zip file that holds images"),
        (texts, "new", "no jpg, jpeg, png, webp, jfif, jpe under .*texts: name a folder or zip file that holds images"),
        (bad, "new/deep", "none of the 1 images .* can be read"),
        (photos, "file", "it is a file"),
        (photos, "file/below", "cannot write shards .*Not a directory.*--out"),
    ]
    for folder, out, message in cases:
        assert re.search(message, refusal(DataError, pack, folder, tmp_path / out))
    (photos / "cat" / "my cat.1.cls").write_text("siamese")
    assert "'siamese': a class is a number" in refusal(DataError, pack, photos, tmp_path / "new")
    assert sorted(tmp_path.rglob("*")) == before


def test_pack_never_touches_existing_tars(photos, tmp_path):
    pack(photos, tmp_path / "out")
    before = (tmp_path / "out" / "train-000000.tar").read_bytes()
    assert "already holds tars" in refusal(DataError, pack, photos, tmp_path / "out", prefix="other")
    assert os.listdir(tmp_path / "out") == ["train-000000.tar"]
    assert (tmp_path / "out" / "train-000000.tar").read_bytes() == before


def test_pack_that_is_interrupted_leaves_nothing(photos, tmp_path):
    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(photos, tmp_path / "out", progress=stop)
    assert sorted(os.listdir(tmp_path)) == ["photos"]


def pack_until(number: int, arguments: list[str]) -> None:
    """`ibq shards pack`, which a signal ends after the first of several tars, between two of its images."""
    real, calls = packing.decode, itertools.count()

    def signalled(*inputs, **options):
        if next(calls) == 4:
            os.kill(os.getpid(), number)
            time.sleep(0.5)  # so that it ends here
        return real(*inputs, **options)

    packing.decode, packing.os.cpu_count = signalled, lambda: 1
    cli.main(["shards", "pack", *arguments])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_packing_that_a_signal_ends_leaves_nothing_that_the_next_one_keeps(photos, tmp_path, ranks, number):
    arguments = [str(photos), "--out", str(tmp_path / "new" / "out"), "--max-samples-per-shard", "1"]
    ended = ranks.command(1, pack_until, number, arguments)
    if number == signal.SIGKILL:
        assert ended.statuses == [-number]
        assert sorted(os.listdir(tmp_path)) == [".new_out.lock", ".new_out.packing", "photos"]
        assert "train-000000.tar" in os.listdir(tmp_path / ".new_out.packing")
    else:
        assert ended.statuses == [128 + number], ended.err
        assert os.listdir(tmp_path) == ["photos"]
    assert len(pack(photos, tmp_path / "new" / "out").shards) == 1
    assert sorted(os.listdir(tmp_path)) == ["new", "photos"]
    assert os.listdir(tmp_path / "new") == ["out"] and os.listdir(tmp_path / "new" / "out") == ["train-000000.tar"]


def test_tars_appear_together(photos, tmp_path, monkeypatch):
    renamed = []

    def rename(*paths):
        assert not renamed, "a kill here would leave a part of the tars"
        renamed.append(paths)
        move(*paths)

    move = os.rename
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", rename)
    assert len(pack(photos, tmp_path / "out", max_samples_per_shard=1).shards) == 5 and len(renamed) == 1


def test_an_output_that_cannot_be_replaced_or_has_a_writer_is_refused_before_packing(photos, tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "README").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(packing, "in_threads", Mock(side_effect=AssertionError("it packs")))
    assert "used: Directory not empty; choose another folder with --out" in refusal(
        DataError, pack, photos, tmp_path / "used"
    )
    assert "empty is the current folder" in refusal(DataError, pack, photos, ".")
    monkeypatch.undo()
    with WriterLock(file_lock(tmp_path / "empty"), "the folder") as other:
        other.take()
        said = refusal(DataError, pack, photos, tmp_path / "link")
    assert f"{tmp_path / 'empty'} is being written by process {os.getpid()} on " in said
    assert sorted(tmp_path.rglob("*")) == before
    pack(photos, tmp_path / "link")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "empty" / "train-000000.tar"])


def test_pack_command(ibq, refused_by_ibq, photos, tmp_path):
    command = "shards", "pack", photos, "--out", tmp_path / "out", "--max-samples-per-shard", 2
    ended = ibq(*command).succeeded()
    assert "packed 5 images into 3 tars" in ended.out
    assert "skipped 3 that cannot be read:" in ended.err and "fake.png: no JPEG, PNG or WebP" in ended.err
    assert "cut.jpg" in ended.err and "empty.png" in ended.err
    assert "already holds tars" in refused_by_ibq(*command)


def test_pack_command_of_coco(ibq, coco, tmp_path):
    archive, captions = zipped(coco, tmp_path / "val2017.zip"), tmp_path / "captions_val2017.json"
    options = "--out", tmp_path / "out", "--layout", "coco", "--annotations", captions
    ended = ibq("shards", "pack", archive, *options).succeeded()
    assert "packed 4 images into 1 tar" in ended.out
    assert f"packed 1 without a caption in {captions}:\n  000000000002.jpg\n" in ended.err
    assert f"left out captions of 2 that are not in {archive}:\n  000000000007.jpg\n" in ended.err
