import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import refusal
from omegaconf import OmegaConf
from samples import encoded, picture, write_tars

from data import (
    DataConfig,
    DataError,
    SourceConfig,
    check,
    decode,
    evaluation_images,
    pack,
)
from data.folder_reader import open_files
from data.loader import class_from_folder, class_numbers, train_batches, validation_options
from data.sources import open_source


def test_config_is_a_structured_config():
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), {"train": ["a", "b"], "lanes": 64})
    assert OmegaConf.to_object(merged) == DataConfig(train=["a", "b"], lanes=64)


def test_folder_in_a_fixed_order_with_bad_images_listed(tmp_path):
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    for n, name in enumerate(("c.png", "b/a.png", "a.jpg", "d.webp")):
        picture(n).save(folder / name)
    (folder / "aa.jpg").write_text("no image")
    images = evaluation_images(str(folder), image_size=16)
    in_order = [("a.jpg", 0), ("b/a.png", 2), ("c.png", 3), ("d.webp", 4)]
    for _ in range(2):
        found = list(images)
        assert [(image.key, image.index) for image in found] == in_order
        assert [os.path.basename(skipped.source) for skipped in images.skipped] == ["aa.jpg"]
    assert len(images) == 5
    assert found[0].image_chw.shape == (3, 16, 16) and found[0].image_chw.dtype == torch.uint8
    whole = next(iter(evaluation_images(str(folder / "c.png"), image_size=None)))
    assert np.array_equal(whole.image_chw.permute(1, 2, 0).numpy(), np.asarray(picture(0)))


def test_images_of_a_folder_have_the_classes_that_training_gives_them(tmp_path):
    folder = tmp_path / "images"
    for n, name in enumerate(("cat/a.png", "cat/more/b.png", "ant/c.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(n).save(folder / name)
    (folder / "ant/c.cls").write_text("7")

    def labels(**options) -> dict[str, int | None]:
        return {image.key: image.label for image in evaluation_images(str(folder), image_size=8, **options)}

    assert labels(class_from_folder=True) == {"ant/c.png": 0, "cat/a.png": 1, "cat/more/b.png": 1}
    assert labels() == {"ant/c.png": 7, "cat/a.png": None, "cat/more/b.png": None}  # from the file beside
    source = open_source(SourceConfig(name="mine", root=str(folder), class_from="folder"))
    samples = [source.shards[0].read(number) for number in range(3)]
    assert {sample.key: source.pick(sample).label for sample in samples} == labels(class_from_folder=True)
    assert class_from_folder(DataConfig(sources=[SourceConfig(name="imagenet", root="x")]))
    assert not class_from_folder(DataConfig(train="x"))
    # A validation set that lacks a class would number the others otherwise: refused, unless a file numbers them.
    (tmp_path / "val/cat").mkdir(parents=True)
    picture(5).save(tmp_path / "val/cat/d.png")
    mine = SourceConfig(name="mine", root=str(folder), class_from="folder")
    config = DataConfig(sources=[mine], val=str(tmp_path / "val"))
    assert "class 0 is cat in" in refusal(DataError, class_numbers, config)
    (tmp_path / "classes.json").write_text('{"ant": 0, "cat": 1}')
    config.classes = str(tmp_path / "classes.json")
    assert class_numbers(config) == {"ant": 0, "cat": 1}
    (image,) = evaluation_images(config.val, **validation_options(config))
    assert image.label == 1
    picture(9).save(folder / "loose.png")  # as in ImageNet's validation set, which has no folders
    assert labels(class_from_folder=True)["cat/a.png"] is None


def test_one_rule_says_which_files_are_hidden(tmp_path):
    names = ["a.png", "d/b.png", ".c.png", ".d/e.png", "__MACOSX/f.png", "d/__MACOSX/g.png", "__MACOSX_h/i.png"]
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(tmp_path / "images" / name)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        for name in names:
            file.write(tmp_path / "images" / name, name)
    shown = ["__MACOSX_h/i.png", "a.png", "d/b.png"]
    for source in ("images", "images.zip"):
        assert [path.as_posix() for path in open_files(tmp_path / source).listing().images] == shown
        assert pack(tmp_path / source, tmp_path / f"{source} packed").samples == 3


def test_files_beside_an_image_are_found_whatever_was_asked_before(tmp_path):
    """Also those in capitals, which need a listing; and a single image has the class that its folder gives it."""
    for name, content in (("a.png", encoded(picture(0))), ("a.CLS", b"5"), ("a.tar", b"no tar"), ("b.CLS", b"6")):
        (tmp_path / "one" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "one" / name).write_bytes(content)
    (image,) = evaluation_images(str(tmp_path / "one" / "a.png"), image_size=8)
    assert (image.key, image.label) == ("a.png", 5)
    (tmp_path / "one" / "a.tar").unlink()
    assert open_files(tmp_path / "one").beside(Path("a.png"), "cls") == b"5"
    (image,) = evaluation_images(str(tmp_path / "one"), image_size=8)
    assert (image.key, image.label) == ("a.png", 5)


def test_tars_give_the_same_images_over_all_shards(tars):
    whole = list(evaluation_images(str(tars), image_size=16))
    assert [image.index for image in whole] == list(range(20)) and whole[7].key == "1-0"
    parts = [list(evaluation_images(str(tars / "*.tar"), image_size=16, shard=(rank, 3))) for rank in range(3)]
    assert [len(part) for part in parts] == [7, 7, 6]
    together = sorted((image for part in parts for image in part), key=lambda image: image.index)
    assert all(torch.equal(a.image_chw, b.image_chw) and a.key == b.key for a, b in zip(whole, together, strict=True))


def test_resize_protocols_differ(tars):
    pytest.importorskip("cv2")
    pil, cv2 = (
        next(iter(evaluation_images(str(tars), image_size=8, resize=resize)))
        for resize in ("pil_antialias", "cv2_bilinear")
    )
    assert pil.image_chw.shape == cv2.image_chw.shape and not torch.equal(pil.image_chw, cv2.image_chw)


def test_evaluation_never_decodes_at_reduced_scale(tmp_path):
    content = encoded(picture(0, (320, 320)))
    (tmp_path / "a.jpg").write_bytes(content)
    image = next(iter(evaluation_images(str(tmp_path / "a.jpg"), image_size=16))).image_chw
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(decode(content).resize((16, 16), 2)))


def test_mistakes_are_named(tmp_path, tars):
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, message in [
        (empty, "neither jpg, jpeg, png, webp, jfif, jpe nor tars under"),
        (tmp_path / "nowhere", "no such tar or folder"),
    ]:
        assert message in refusal(DataError, evaluation_images, str(path), image_size=16)
    assert "at least 1 pixel" in refusal(DataError, evaluation_images, str(tars), image_size=0)
    (tars / "a.jpg").write_bytes(encoded(picture(0)))
    assert "holds images and tars" in refusal(DataError, evaluation_images, str(tars), image_size=16)


def test_check_names_mistakes_before_a_run_begins(tars, tmp_path):
    check(DataConfig(train=str(tars), val=str(tars)))
    for wrong, message in [
        ({"train": None}, "no data named"),
        ({"val": str(tmp_path / "none")}, "no such tar"),
        ({"crop": "x"}, "data.crop"),
        ({"resize": "x"}, "unknown resize"),
    ]:
        assert message in refusal(DataError, check, DataConfig(**{"train": str(tars), **wrong}))


def test_a_stream_that_is_still_open_does_not_keep_the_process(launch, tars):
    script = f"""
import sys, data
options = dict(global_batch_size=4, micro_batch_size=4, rank=0, world_size=1, seed=0)
stream = data.train_batches(data.DataConfig(train={str(tars)!r}, image_size=8, workers=2), **options)
next(stream)
sys.modules["kept"] = stream
"""
    assert launch.python("-c", script) == ([0], [""], [""])


@pytest.mark.parametrize("scanned", [True, False])
def test_ranks_may_have_other_paths_of_tars_whose_samples_are_known(tmp_path, monkeypatch, scanned):
    """Where samples are neither scanned nor indexed, only the addresses can be compared."""
    if not scanned:
        monkeypatch.setattr("data.sources.MOST_SCANNED", 0)

    def seen(root: Path) -> str:
        config = DataConfig(train=str(root), image_size=16, workers=0)
        sizes = dict(global_batch_size=1, micro_batch_size=1, rank=0, world_size=1, seed=0)
        return train_batches(config, **sizes).seen()

    one, other = (write_tars(tmp_path / name, [2, 2]) for name in ("one", "other"))
    assert seen(one) == seen(one) and (seen(one) == seen(other)) == scanned
