"""Inputs that people have: everything that is in them is used, or named with the reason."""

import itertools
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from comparing import refusal
from field.dots_in_names import NAMES, write_dotted_tar
from field.linked_folders import write_linked_classes
from field.links_and_doubles import write_doubled_zip, write_hard_linked_tar
from field.other_pictures import NO_TARS, write_gif
from field.several_pictures import write_two_of_one_name
from samples import Steps, encoded, members, picture, write_tar

import data
from data import DataConfig
from data.grouping import key_to_first_dot
from data.index import SampleTable, key_hash, write_index
from data.prep.check import check_shard
from data.sources import Layout, open_source


def trained_on(root, images: int, **changes) -> list[str]:
    """The keys of the first `images` images of training, sorted."""
    config = DataConfig(train=str(root), image_size=32, workers=0, max_bad_fraction=1.0, **changes)
    stream = Steps(config, batch=1).streams[0]
    return sorted(batch.keys[0] for batch in itertools.islice(stream, images))


def evaluated(root) -> list[str]:
    return [image.key for image in data.evaluation_images(str(root), image_size=32)]


def write_former_index(folder, path: str, keys: list[str]) -> None:
    """The index of a tar as it was written when keys ended at the first dot."""
    whole = data.scan(path)
    groups = [list(group) for _, group in itertools.groupby(range(len(keys)), key=keys.__getitem__)]
    starts = np.array([whole.starts_n[group[0]] for group in groups])
    stops = np.array([whole.stops_n[group[-1]] for group in groups])
    hashes = np.array([key_hash(keys[group[0]]) for group in groups], np.uint64)
    write_index(folder / "index.safetensors", [path], [SampleTable(whole.bytes, starts, stops, hashes)], ["0" * 64])


# -------------------------------------------------------------------------------------------------------------- names


def test_pictures_with_dots_in_their_names_are_samples(tmp_path, ibq):
    path = write_dotted_tar(tmp_path / "a.tar")
    assert trained_on(path, 40) == sorted(evaluated(path)) == NAMES
    (status,), (out,), _ = ibq("shards", "check", path, "--decode")
    assert status == 0 and "40 samples" in out and "1 ok" in out
    assert "40 keys have a dot" in out and "webdataset would end keys at the first dot" in out


def test_an_index_of_before_still_finds_a_picture_and_its_mask(tmp_path):
    image = encoded(picture(0))
    samples = [{"__key__": f"s{n}", "jpg": image, "mask.png": image, "txt": b"a"} for n in range(3)]
    path = write_tar(tmp_path / "a.tar", samples)
    keys = [key for n in range(3) for key in (f"s{n}",) * 3]
    write_former_index(tmp_path, path, keys)
    assert trained_on(tmp_path, 3) == ["s0", "s1", "s2"]


def test_an_index_of_before_that_hides_pictures_is_named(tmp_path):
    path = write_dotted_tar(tmp_path / "a.tar")
    write_former_index(tmp_path, path, ["IMG"] * 20 + ["scan_0/22"] * 20)
    images = data.evaluation_images(str(tmp_path), image_size=32)
    assert list(images) == []
    assert [skipped.key for skipped in images.skipped] == ["IMG", "scan_0/22"]
    assert all("20 images under one key" in skipped.reason for skipped in images.skipped)


def test_an_index_for_other_suffixes_than_the_source_names_is_refused_with_the_fix(tmp_path, ibq):
    names = ["a.1.rgb", "a.2.rgb"]
    write_tar(tmp_path / "a.tar", [{"__key__": name, "png": encoded(picture(0), "PNG")} for name in names])
    source = data.SourceConfig(root=str(tmp_path), image=["rgb.png"])
    for options, keys in (([], None), (["--image", "rgb.png"], ["a.1", "a.2"])):
        assert ibq("shards", "check", tmp_path, "--write-index", *options)[0] == [0]
        shard = open_source(source).shards[0]
        if keys is None:
            assert "is written with --image" in refusal(data.DataError, shard.read, 0)
        else:
            assert [shard.read(n).key for n in range(2)] == keys


@pytest.mark.parametrize("image", [None, ["png", "jpg"]])
def test_two_pictures_of_one_name_are_named_unless_the_source_chooses(tmp_path, image):
    path = write_two_of_one_name(tmp_path / "a.tar")
    layout = Layout(image=tuple(image or ()))
    checked = check_shard(path, layout=layout)
    config = DataConfig(sources=[data.SourceConfig(root=path, image=image)], image_size=32, workers=0)
    keys = {batch.keys[0] for batch in itertools.islice(Steps(config, batch=1).streams[0], 4)}
    if image:
        assert checked.status == "ok" and keys == {"a", "b"}
    else:
        assert checked.counts == {"several images": 1} and keys == {"b"}


def test_packed_names_form_the_same_samples_by_webdatasets_rule(tmp_path):
    for number, name in enumerate(("a.b", "a_b", *NAMES)):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / "photos" / f"{name}.png")
    (shard,) = data.pack(tmp_path / "photos", tmp_path / "tars").shards
    assert len({key_to_first_dot(name) for name in members(shard)}) == len(data.scan(shard)) == 2 + len(NAMES)


# -------------------------------------------------------------------------------------------------------------- links


def test_links_to_folders_are_followed_and_circles_are_not(tmp_path):
    folder = write_linked_classes(tmp_path)
    keys = ["bird/0.png", "bird/1.png", "cat/0.png", "cat/more/1.png", "dog/0.png", "dog/1.png"]
    assert evaluated(folder) == trained_on(folder, 6) == keys
    opened = open_source(data.SourceConfig(name="imagenet", root=str(folder)))
    labels = [opened.pick(opened.shards[0].read(n)).label for n in range(6)]
    assert labels == [0, 0, 1, 1, 2, 2]
    report = data.pack(folder, tmp_path / "tars", layout="imagenet")
    assert report.samples == 6 and not report.skipped


def test_a_picture_in_another_format_has_the_same_reason_everywhere(tmp_path, ibq):
    picture(0).save(tmp_path / "a.png")
    write_gif(tmp_path / "b.gif")
    said = {skipped.reason for skipped in data.pack(tmp_path, tmp_path / "tars").skipped}
    shutil.rmtree(tmp_path / "tars")
    images = data.evaluation_images(str(tmp_path), image_size=32)
    assert len(list(images)) == 1 and {skipped.reason for skipped in images.skipped} == said
    _, (out,), _ = ibq("shards", "check", tmp_path)
    assert f"no image: b.gif: {said.pop()}\n" in out
    assert out.endswith("1 shard, 1 sample: 1 flawed\n")  # and no size, which is that of tars


def test_a_link_to_nothing_is_named(tmp_path):
    folder = write_linked_classes(tmp_path)
    (folder / "dog" / "2.png").symlink_to("nowhere.png")
    images = data.evaluation_images(str(folder), image_size=32)
    assert len(list(images)) == 6
    assert [(skipped.key, skipped.reason) for skipped in images.skipped] == [
        ("dog/2.png", "a link to nothing: nowhere.png")
    ]
    (folder / "fish").symlink_to(tmp_path / "not_mounted")
    assert "fish is a link to nothing" in refusal(data.DataError, evaluated, folder)


def test_a_pipe_in_a_folder_does_not_stop_the_reader(tmp_path):
    picture(0).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    images = data.evaluation_images(str(tmp_path), image_size=32)
    assert [image.key for image in images] == ["a.png"]
    assert "a pipe or a device" in images.skipped[0].reason


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = write_linked_classes(tmp_path)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("bird"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"cannot read the folder {folder}/bird: Permission denied" in refusal(data.DataError, evaluated, folder)


def test_a_file_beside_an_image_that_cannot_be_read_is_named(tmp_path, monkeypatch, ibq):
    folder = tmp_path / "images"
    folder.mkdir()
    picture(0).save(folder / "a.png")
    (folder / "a.cls").write_text("1")
    read = Path.read_bytes

    def refuse(path):
        if path.suffix == ".cls":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert f"cannot read {folder}/a.cls: Permission denied" in refusal(data.DataError, evaluated, folder)
    assert "a.cls: Permission denied" in refusal(data.DataError, data.pack, folder, tmp_path / "out")
    printed = ibq("shards", "check", folder, "--jobs", 1).out
    assert f"cannot read {folder}/a.cls" in printed and "data.quarantine" not in printed  # which would name all


@pytest.mark.parametrize(("kind", "called"), [(tarfile.LNKTYPE, "hard link"), (tarfile.SYMTYPE, "symbolic link")])
def test_links_in_a_tar_are_named(tmp_path, kind, called, ibq):
    path = write_hard_linked_tar(tmp_path / "a.tar", kind)
    images = data.evaluation_images(path, image_size=32)
    assert [image.key for image in images] == [f"a{n}" for n in range(10)]
    assert [skipped.key for skipped in images.skipped] == [f"b{n}" for n in range(10)]
    assert f"b0.png is a {called} to a0.png" in images.skipped[0].reason
    (status,), (out,), _ = ibq("shards", "check", path)
    assert status == 1 and "20 samples" in out and "1 flawed" in out and "link: sample 10: b0: b0.png is a" in out


def test_links_and_doubles_in_a_zip_file_are_named(tmp_path):
    path = write_doubled_zip(tmp_path / "a.zip")
    images = data.evaluation_images(path, image_size=32)
    assert [image.key for image in images] == ["a.png"]
    assert {skipped.key: skipped.reason for skipped in images.skipped} == {
        "b.png": "2 members are called b.png",
        "c.png": "a symbolic link to a.png",
        "../d.png": "the name '../d.png' leads out of its folder",
    }
    report = data.pack(path, tmp_path / "tars")
    assert report.samples == 1 and len(report.skipped) == 3


def test_a_zip_file_has_captions_and_classes_as_its_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name, content in (("cat/0.png", encoded(picture(0), "PNG")), ("cat/0.txt", b"a cat"), ("cat/0.cls", b"3")):
            file.writestr(f"set/{name}", content)
    opened = open_source(data.SourceConfig(root=str(tmp_path / "a.zip")))
    picked = opened.pick(opened.shards[0].read(0))
    assert (picked.caption, picked.label) == ("a cat", 3)
    opened = open_source(data.SourceConfig(name="imagenet", root=str(tmp_path / "a.zip")))
    assert opened.pick(opened.shards[0].read(0)).label == 0 and opened.shards[0].classes == {"cat": 0}


# -------------------------------------------------------------------------------------------------- no tar and no image


def test_a_picture_of_another_format_is_called_what_it_is(tmp_path):
    path = write_gif(tmp_path / "x.gif")
    for use in (evaluated, lambda root: trained_on(root, 1)):
        said = refusal(data.DataError, use, path)
        assert "it is a GIF image: convert it to PNG" in said and "JPEG, PNG or WebP" in said
    (problem,) = check_shard(path).problems
    assert problem.message.startswith("no tar: it is a GIF image")


@pytest.mark.parametrize(("content", "said"), NO_TARS.items())
def test_what_else_is_no_tar_is_called_what_it_is(tmp_path, content, said):
    (tmp_path / "x.bin").write_bytes(content)
    assert said in refusal(data.DataError, trained_on, tmp_path / "x.bin", 1)
