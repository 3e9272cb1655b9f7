"""Nothing in a folder, a zip file or a list is left out, repeated or mistaken for something else in silence."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from comparing import refusal
from field.mixed_folders import write_capitals, write_class_zip, write_coco, write_images_and_tars
from samples import Steps, encoded, index_of, members, picture, write_tar, write_tars

import data
from data import DataError
from data.classes import read_classes
from data.index import write_index
from data.loader import open_sources
from data.prep.check import check_shards
from data.shards import expand
from data.sources import open_source
from trainer import TrainerError
from trainer.recipes import load_recipe


def opened(root):
    return open_source(data.SourceConfig(root=str(root)))


@pytest.mark.parametrize("others", [[], ["README.txt"], ["labels/0.csv", "LICENSE"]], ids=["alone", "README", "folder"])
def test_files_beside_the_one_folder_of_a_zip_file_do_not_change_its_classes(tmp_path, others):
    report = data.pack(write_class_zip(tmp_path / "a.zip", *others), tmp_path / "tars", layout="imagenet")
    assert report.samples == 2 and read_classes(tmp_path / "tars/classes.json") == {"cat": 0, "dog": 1}


@pytest.mark.parametrize("as_zip", [False, True], ids=["folder", "zip"])
def test_captions_and_classes_in_files_with_capitals_are_read(tmp_path, as_zip):
    root = write_capitals(tmp_path / "photos")
    if as_zip:
        root = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", root))
    (sample,) = [opened(root).shards[0].read(0)]
    assert sample.members["txt"] == b"a wave" and sample.members["cls"] == b"5"
    (tar,) = data.pack(root, tmp_path / "tars").shards
    assert members(tar)["0.txt"] == b"a wave" and members(tar)["0.cls"] == b"5"


def test_jpegs_by_other_names_are_read_and_other_pictures_are_named(tmp_path):
    for name in ("a.jfif", "b.JPE", "c.ppm", "d.svg", "e.apng"):
        (tmp_path / name).write_bytes(encoded(picture(0)))
    images = data.evaluation_images(str(tmp_path), image_size=16)
    assert [image.key for image in images] == ["a.jfif", "b.JPE"]
    assert [skipped.key for skipped in images.skipped] == ["c.ppm", "d.svg", "e.apng"]


@pytest.mark.parametrize(
    ("image", "tar"), [("0.jpg", "a.tar"), ("0.jpg", "more/a.tar"), ("more/0.jpg", "more/a.tar")], ids=str
)
def test_images_and_tars_in_one_folder_are_refused_by_every_reader(tmp_path, image, tar):
    folder = write_images_and_tars(tmp_path / "set", image, tar)
    readers = {
        "train": lambda: opened(folder),
        "evaluate": lambda: data.evaluation_images(str(folder), image_size=16),
        "pack": lambda: data.pack(folder, tmp_path / "out"),
    }
    for reader in readers.values():
        said = refusal(DataError, reader)
        assert said.startswith(f"{folder} holds images and tars: ") and f"as {(folder / tar).parent}/*.tar" in said


def test_tars_in_sub_folders_of_a_folder_of_tars_are_refused_and_the_advice_reads_them(tmp_path):
    write_tars(tmp_path / "set", [2])
    write_tars(tmp_path / "set/more", [3])
    said = refusal(DataError, expand, str(tmp_path / "set"))
    assert "so does its sub-folder more" in said
    advised = said.split("'")[1::2]
    assert [len(expand(pattern)) for pattern in advised] == [1, 2]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("more/deep/1.tar", "so does its sub-folder more/deep: name '{folder}/*.tar', or all as '{folder}/**/*.tar'"),
        ("more/deep/1.JPG", "holds images and tars: to use the tars, name them as {folder}/*.tar"),
        (
            "1.tar.gz",
            "holds tars and 1.tar.gz, which would not be read: unpack it, or name the tars as '{folder}/*.tar'",
        ),
        ("1.tgz", "holds tars and 1.tgz,"),
        ("more/1.tar.zst", "holds tars and more/1.tar.zst,"),
        ("1.zip", "holds tars and 1.zip,"),
    ],
)
def test_no_part_of_a_folder_of_tars_is_left_out(tmp_path, name, said):
    folder = write_tars(tmp_path / "set", [2, 2])
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(write_class_zip(tmp_path / "a.zip") if name.endswith("zip") else folder / "00000.tar", path)
    assert said.format(folder=folder) in refusal(DataError, expand, str(folder))
    assert len(expand(f"{folder}/*.tar")) == 2


def test_what_usually_lies_beside_tars_is_not_refused(tmp_path):
    folder = write_tars(tmp_path / "set", [2, 2])
    (folder / "_tmp/.cache").mkdir(parents=True)
    names = [
        "README.md",
        "00000.parquet",
        "00000_stats.json",
        "index.safetensors.old",
        "_tmp/0.csv",
        "_tmp/.cache/0.jpg",
    ]
    for name in (*names, "broken.zip"):
        (folder / name).write_text("text")
    with zipfile.ZipFile(folder / "annotations.zip", "w") as file:
        file.writestr("captions.json", "[]")
    (folder / "_tmp/again").symlink_to(folder / "_tmp")
    assert len(expand(str(folder))) == 2


@pytest.mark.parametrize("as_zip", [False, True], ids=["folder", "zip"])
def test_files_that_belong_to_no_picture_are_counted(tmp_path, as_zip, ibq):
    root = tmp_path / "photos"
    root.mkdir()
    for name in ("a.jpg", "d.jpg.jpg", "g.gif"):
        (root / name).write_bytes(encoded(picture(0)))
    for name in ("a.txt", "d.txt", "d.CLS", "g.txt", "a.jpg.txt", "b.txt", "c.cls", "more.zip", "a.jpg~", "README"):
        (root / name).write_text("7" if name.lower().endswith("cls") else name)
    if as_zip:
        root = Path(shutil.make_archive(str(tmp_path / "photos"), "zip", root))
    said = "6 files belong to no picture and are not read: 2 .txt, 1 README, 1 .jpg~, 1 .cls, …; first README"
    source = opened(root)
    assert source.not_read == said
    texts = [source.pick(source.shards[0].read(n)) for n in range(2)]
    assert [(one.caption, one.label) for one in texts] == [("a.txt", None), ("d.txt", 7)]
    assert (
        said in ibq("shards", "check", root, "--jobs", 1).out and said in ibq("shards", "stats", root, "--jobs", 1).out
    )
    config = data.DataConfig(train=str(root), image_size=32, workers=0)
    assert f"train: {said}" in Steps(config, batch=2).streams[0].describe(1)
    names = {path.name for path in source.shards[0].own_files()}
    assert names == {"a.jpg", "a.txt", "d.jpg.jpg", "d.txt", "d.CLS"}


def test_a_folder_without_other_files_says_nothing(tmp_path):
    assert opened(write_capitals(tmp_path / "photos")).not_read == ""
    assert opened(write_tars(tmp_path / "tars", [2])).not_read == ""


def test_a_tar_that_is_a_link_to_nothing_is_refused_and_one_in_capitals_is_read(tmp_path):
    folder = write_tars(tmp_path / "set", [2, 2])
    (folder / "00001.tar").rename(folder / "00001.TAR")
    assert len(expand(str(folder))) == 2
    (folder / "00002.tar").symlink_to("/nowhere.tar")
    assert "00002.tar is a link to nothing (/nowhere.tar)" in refusal(DataError, opened, folder)


def test_a_folder_called_like_a_tar_is_a_folder(tmp_path):
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar/0.jpg").write_bytes(encoded(picture(0)))
    assert len(opened(tmp_path).shards[0]) == 1


def test_a_tar_that_is_named_twice_is_refused(tmp_path):
    folder = write_tars(tmp_path / "set", [2, 2])
    listed = tmp_path / "list.txt"
    listed.write_text(f"{folder}/*.tar\n{folder}/../set/00000.tar\n")
    for spec in (str(listed), [str(folder), f"{folder}/00000.tar"]):
        assert "00000.tar is named twice" in refusal(DataError, open_source, data.SourceConfig(root=spec))


def test_a_folder_of_images_in_a_list_of_tars_is_named_with_what_helps(tmp_path):
    tars, photos = write_tars(tmp_path / "tars", [2]), write_capitals(tmp_path / "photos")
    said = refusal(DataError, expand, [str(tars), str(photos)])
    assert "photos is a folder of images, which cannot be listed among tars: make it a source of data.sources" in said


def test_a_tar_of_the_index_that_is_gone_is_refused_unless_in_quarantine(tmp_path):
    folder = write_tars(tmp_path / "set", [2, 2, 2])
    index_of(folder, folder / "index.safetensors")
    (folder / "00001.tar").unlink()
    said = refusal(DataError, opened, folder)
    assert f"names 00001.tar, which {folder} does not hold" in said
    assert open_source(data.SourceConfig(root=f"{folder}/*.tar")).samples == 4  # a part that was asked for
    assert open_source(data.SourceConfig(root=str(folder)), quarantine=["00001.tar"]).samples == 4


def test_a_quarantine_that_fits_tars_of_two_sources_is_refused(tmp_path):
    sources = [data.SourceConfig(name=name, root=str(write_tars(tmp_path / name, [2, 2]))) for name in ("a", "b")]
    config = data.DataConfig(sources=sources, quarantine=["00001.tar"])
    assert "00001.tar is the end of 2 shards" in refusal(DataError, open_sources, config, frozenset(config.quarantine))
    config.quarantine = ["a/00001.tar"]
    assert [len(source.quarantined) for source in open_sources(config, frozenset(config.quarantine))] == [1, 0]


@pytest.mark.parametrize("weight", [1e300, 1e-300, 1e308])
def test_weights_by_which_a_source_is_never_read_are_refused(tmp_path, weight):
    """The last one's total with another is infinite."""
    sources = [
        data.SourceConfig(name=name, root=str(write_tars(tmp_path / name, [2])), weight=one)
        for name, one in (("a", 1.0), ("b", weight), ("c", weight))
    ]
    assert "no sample is ever read" in refusal(DataError, open_sources, data.DataConfig(sources=sources))


def test_annotations_are_matched_by_path(tmp_path):
    photos, captions = write_coco(tmp_path, ["a/1.jpg", "b/1.jpg", "b/2.jpg"], ["set/a/1.jpg", "b/1.jpg", "2.jpg"])
    (tar,) = data.pack(photos, tmp_path / "tars", layout="coco", annotations=captions).shards
    found = {name: content for name, content in members(tar).items() if name.endswith(".json")}
    by_source = {one["source"]: (one["image_id"], one["captions"]) for one in map(json.loads, found.values())}
    assert by_source == {
        "a/1.jpg": (10, ["set/a/1.jpg"]), "b/1.jpg": (11, ["b/1.jpg"]), "b/2.jpg": (12, ["2.jpg"])
    }  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "names", "said"),
    [
        (["a/1.jpg", "b/1.jpg"], ["1.jpg"], "1.jpg may be a/1.jpg or b/1.jpg"),
        (["1.jpg"], ["a/1.jpg", "b/1.jpg"], "1.jpg may be a/1.jpg or b/1.jpg: pack one folder at a time"),
    ],
)
def test_annotations_that_fit_two_ways_are_refused(tmp_path, paths, names, said):
    photos, captions = write_coco(tmp_path, paths, names)
    assert said in refusal(DataError, data.pack, photos, tmp_path / "tars", layout="coco", annotations=captions)


def test_classes_with_a_name_twice_are_refused(tmp_path):
    (tmp_path / "classes.json").write_text('{"cat": 0, "dog": 1, "cat": 2}')
    assert "a name stands there twice" in refusal(DataError, read_classes, tmp_path / "classes.json")


def test_class_folders_that_are_numbers_and_not_their_classes_are_reported(tmp_path, caplog):
    for name in (*range(11),):
        (tmp_path / "set" / str(name)).mkdir(parents=True)
        (tmp_path / "set" / str(name) / "0.jpg").write_bytes(encoded(picture(name)))
    data.pack(tmp_path / "set", tmp_path / "tars", layout="imagenet")
    assert "folder 10 is class 2" in caplog.text


def test_a_value_that_is_not_utf8_is_one_line():
    assert "set LC_ALL=C.UTF-8" in refusal(TrainerError, load_recipe, "debug", ["run=r/\udcfc"])


def test_tars_in_a_zip_file_of_images_are_refused(tmp_path):
    path = write_class_zip(tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as file:
        file.write(write_tar(tmp_path / "a.tar", [{"__key__": "a", "jpg": encoded(picture(1))}]), "set/a.tar")
    assert "holds images and tars" in refusal(DataError, opened, path)


def test_one_index_of_two_folders_serves_each(tmp_path):
    for name in ("train", "val"):
        write_tars(tmp_path / name, [2, 2], name=name + "-{:05d}.tar")
    found = list(check_shards(sorted(map(str, tmp_path.glob("*/*.tar")))))
    place = tmp_path / "index.safetensors"
    write_index(place, *zip(*((one.url, one.table, one.sha256) for one in found), strict=True))
    assert open_source(data.SourceConfig(root=str(tmp_path / "train"), index=str(place))).samples == 4


def test_the_same_path_wins_and_entries_for_one_file_are_joined(tmp_path):
    photos, captions = write_coco(tmp_path, ["1.jpg", "backup/1.jpg"], ["1.jpg", "1.jpg"])
    (tar,) = data.pack(photos, tmp_path / "tars", layout="coco", annotations=captions).shards
    assert json.loads(members(tar)["1.json"])["captions"] == ["1.jpg", "1.jpg"]
    assert "captions" not in json.loads(members(tar)["backup_1.json"])


def test_a_folder_that_cannot_be_read_beside_tars_is_passed_over(tmp_path, monkeypatch):
    folder = write_tars(tmp_path / "set", [2])
    (folder / "lost+found").mkdir()
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", denied)
    assert len(expand(str(folder))) == 1


def test_one_quarantine_entry_for_a_tar_of_two_sources_is_enough(tmp_path):
    tars = str(write_tars(tmp_path / "set", [2, 2]))
    config = data.DataConfig(
        sources=[data.SourceConfig(name=name, root=tars) for name in "ab"], quarantine=["00001.tar"]
    )
    assert [len(one.quarantined) for one in open_sources(config, frozenset(config.quarantine))] == [1, 1]
