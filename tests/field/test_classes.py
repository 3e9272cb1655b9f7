"""A class has one number, in every split and in the run that learned it."""

import json
from pathlib import Path

import pytest
from comparing import refusal
from field.no_class import write_folder_without_classes, write_tar_without_classes
from field.splits_of_classes import write_splits
from samples import picture
from serving import Server
from tokens import write_tokens

import data
from data import DataConfig, DataError
from data.classes import classes_beside
from data.prep.check import check_shard
from data.sources import Layout
from trainer.config import GeneratorRun
from trainer.run_folder import RunFolder
from trainer.start_plan import Source, StartPlan, check_inputs, open_folder

NUMBERS = {"bird": 0, "cat": 1, "dog": 2}


def labels(tars: Path) -> set[tuple[str, int]]:
    images = data.evaluation_images(str(tars), image_size=16)
    return {(image.key.partition("_")[0], image.label) for image in images}


def test_a_split_without_a_class_is_numbered_as_the_first_one(tmp_path, refused_by_ibq, ibq):
    train, val = write_splits(tmp_path)
    (status,), (out,), _ = ibq("shards", "pack", train, "--out", tmp_path / "a", "--layout", "imagenet")
    first = tmp_path / "a" / "classes.json"
    assert status == 0 and f"pack other splits with --classes {first}" in out
    data.pack(val, tmp_path / "b", layout="imagenet", classes=first)
    assert labels(tmp_path / "a") == {("bird", 0), ("cat", 1), ("dog", 2)}
    assert labels(tmp_path / "b") == {("bird", 0), ("dog", 2)}
    assert json.loads((tmp_path / "b" / "classes.json").read_text()) == NUMBERS

    said = refused_by_ibq("shards", "pack", val, "--out", tmp_path / "c", "--classes", first)
    assert "layout imagenet" in said
    (train / "eel").mkdir()
    picture(0).save(train / "eel" / "0.png")
    said = refused_by_ibq("shards", "pack", train, "--out", tmp_path / "c", "--layout", "imagenet", "--classes", first)
    assert "eel: no such class among the 3" in said


def test_class_folders_are_read_with_given_numbers(tmp_path):
    _, val = write_splits(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps(NUMBERS))
    source = data.SourceConfig(name="imagenet", root=str(val))
    config = DataConfig(sources=[source], classes=str(tmp_path / "classes.json"))
    (opened,) = data.loader.open_sources(config)
    assert [opened.pick(opened.shards[0].read(n)).label for n in range(4)] == [0, 0, 2, 2]
    assert data.class_numbers(config) == NUMBERS
    assert data.class_numbers(DataConfig(sources=[source])) == {"bird": 0, "dog": 1}


@pytest.mark.parametrize(
    ("other", "said"),
    [({"bird": 0, "dog": 1}, "class 1 is dog in"), ({"cat": 3}, "cat is class 3 in"), ({"bird": 0, "eel": 9}, None)],
)
def test_a_run_keeps_its_numbers_and_refuses_others(tmp_path, other, said):
    """Of data.val, and of tokens that a resumed run would train on."""
    first, second = write_tokens(tmp_path / "first"), write_tokens(tmp_path / "second")
    (first / "classes.json").write_text(json.dumps(NUMBERS))
    (second / "classes.json").write_text(json.dumps(other))
    config = GeneratorRun(run=str(tmp_path / "run"))
    config.model.vocabulary, config.model.grid, config.loss.label_dropout = 256, [8, 8], 0.1
    config.data.train = str(first)
    check_inputs(config, Source())
    with RunFolder(tmp_path / "run", world=None) as folder:
        open_folder(folder, config, StartPlan(0, None, {}, False, False, []), None)
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == NUMBERS
    for key, source in (("val", Source()), ("train", Source(tmp_path / "run"))):
        setattr(config.data, key, str(second))
        config.run = str(source.checkpoint or tmp_path / "another")
        if said is None:
            check_inputs(config, source)
        else:
            assert said in refusal(DataError, check_inputs, config, source)
        config.data.val, config.data.train = None, str(first)
    config.data.val, config.loss.label_dropout = str(second), 1  # no class is learned
    config.run = str(tmp_path / "another")
    check_inputs(config, Source())


def test_numbers_beside_remote_tars_are_read(tmp_path, caplog):
    """Of servers without classes.json, some deny access to what is not there."""
    classes = {"/set/classes.json": json.dumps(NUMBERS).encode()}
    with Server(classes) as server:
        server.fault("/denied/classes.json", status=403)
        urls = [server.url(path) for path in ("/set/0.tar?key=hunter2", "/set/1.tar?key=2", "/other/0.tar")]
        assert classes_beside(urls) == [(server.url("/set/classes.json?…"), NUMBERS)]
        assert next(one.target for one in server.requests if one.path in classes) == "/set/classes.json?key=hunter2"
        assert server.asked("/set/classes.json") == 2 and not caplog.messages  # its size, and its content
        assert classes_beside([server.url("/denied/0.tar")]) == []
        (said,) = caplog.messages
        assert f"{server.url('/denied/classes.json')} may not be read (HTTP 403)" in said

        val = write_tokens(tmp_path / "val")
        (val / "classes.json").write_text('{"bird": 0, "dog": 1}')
        config = DataConfig(train=server.url("/set/{0..1}.tar"), content="tokens")
        assert data.class_numbers(config) == NUMBERS
        config.val = str(val)
        said = refusal(DataError, data.class_numbers, config)
        assert said.startswith(f"class 1 is dog in {val}/classes.json, and cat in {server.url('/set/classes.json')}: ")


def test_a_picture_without_a_class_is_used(tmp_path):
    """-1 and nothing mean: no class. What is no class at all is named by `check` as by training."""
    path = write_tar_without_classes(tmp_path / "a.tar")
    images = data.evaluation_images(path, image_size=16)
    assert [(image.key, image.label) for image in images] == [("s0", None), ("s1", None), ("s2", None), ("s3", 7)]
    assert [skipped.key for skipped in images.skipped] == ["s4"]
    assert [(one.kind, one.key) for one in check_shard(path, layout=Layout()).problems] == [("bad class", "s4")]


def test_pictures_without_a_class_are_packed(tmp_path):
    data.pack(write_folder_without_classes(tmp_path / "photos"), tmp_path / "tars")
    images = data.evaluation_images(str(tmp_path / "tars"), image_size=16)
    assert {image.key: image.label for image in images} == {"s0": None, "s1": None, "s2": None, "s3": 7}
