"""Whether `data.val` is called held out."""

import os

import pytest
from samples import picture, write_tars

import data.storage
from data.config import DataConfig, SourceConfig
from data.held_out import is_trained_on


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The working directory, with three tars (two in list.txt), a folder of images with two sub-folders, and links to
    both."""
    tars = write_tars(tmp_path / "tars", (1, 1, 1), "{}.tar")
    for name in ("images/a/0.png", "images/b/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        picture(0).save(tmp_path / name)
    (tmp_path / "list.txt").write_text("tars/0.tar\n# tars/2.tar\ntars/1.tar\n")
    for name in ("images", "tars"):
        (tmp_path / f"{name}_link").symlink_to(tmp_path / name)
    (tmp_path / "one.tar").symlink_to(tars / "1.tar")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refuse_to_list(*arguments):
    raise AssertionError("a bucket was listed")


TRAINED = [
    ("tars/{0..2}.tar", "tars/2.tar"),
    ("tars/*.tar", "tars/2.tar"),
    ("tars/[01].tar", "one.tar"),
    (["tars/0.tar", "tars/1.tar"], "tars/1.tar"),
    ("list.txt", "tars/1.tar"),
    ("tars", "tars/2.tar"),
    ("tars/2.tar", "tars"),
    ("tars_link", ["elsewhere.tar", "tars/{1..2}.tar"]),
    ("images", "images/a"),
    ("images/a", "images"),
    ("images_link/a", "images"),
    ("images", "images/a/0.png"),
    ("gone/{0..2}.tar", "gone/2.tar"),
    ("gone", "gone/a"),
    ("~/tars/{0..2}.tar", "tars/2.tar"),
    ("bundled:train", "bundled:train"),
    ("pipe:cat {0..2}.tar", "pipe:cat 2.tar"),
    ("s3://bucket/set", "s3://bucket/set/2.tar"),
    ("s3://bucket/set/2.tar", "s3://bucket/set/"),
    ("s3://bucket/set/{0..2}.tar", "s3://bucket/set/2.tar"),
    ("https://host/set/{0..2}.tar?key=a", "https://host/set/2.tar?key=b"),
]
HELD_OUT = [
    ("tars/{0..1}.tar", "tars/2.tar"),
    ("tars/[01].tar", "tars/2.tar"),
    ("list.txt", "tars/2.tar"),
    ("images/a", "images/b"),
    ("images/a", "tars"),
    ("gone/{0..1}.tar", "gone/2.tar"),
    ("gone", "gone_too"),
    ("bundled:train", "bundled:val"),
    ("s3://bucket/set", "s3://bucket/set/val/0.tar"),
    ("s3://bucket/set", "s3://bucket/set-val"),
    ("s3://bucket/set/{0..1}.tar", "s3://other/set/{0..1}.tar"),
]


@pytest.mark.parametrize(
    ("train", "val", "trained"), [(*one, True) for one in TRAINED] + [(*one, False) for one in HELD_OUT]
)
def test_what_training_reads_is_not_held_out(there, monkeypatch, train, val, trained):
    monkeypatch.setenv("HOME", str(there))
    monkeypatch.setattr(data.storage, "request_listing", refuse_to_list)
    assert is_trained_on(DataConfig(train=train, val=val)) is trained
    assert is_trained_on(DataConfig(sources=[SourceConfig("a", "x.tar"), SourceConfig("b", train)], val=val)) is trained


def test_tars_of_a_folder_in_data_root_are_found(there):
    os.rename("tars", "cc3m")
    settings = DataConfig(root=str(there), sources=[SourceConfig("cc3m"), SourceConfig("cc12m")], val="cc3m/2.tar")
    assert is_trained_on(settings)  # whether or not all sources are there
    settings.val = "images"
    assert not is_trained_on(settings)


def test_without_training_data_all_is_held_out():
    assert not is_trained_on(DataConfig(val="tars"))
