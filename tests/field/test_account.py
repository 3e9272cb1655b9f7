"""Inputs that people have: everything that is in them is used, or named with the reason."""

import itertools

import numpy as np
import pytest
from field.dots_in_names import NAMES, write_dotted_tar
from samples import Steps, encoded, picture, write_tar

import data
from data import DataConfig
from data.index import SampleTable, key_hash, write_index
from data.prep.check import check_shard


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


@pytest.mark.parametrize("image", [None, ["png", "jpg"]])
def test_two_pictures_of_one_name_are_named_unless_the_source_chooses(tmp_path, image):
    both = {"jpg": encoded(picture(1)), "png": encoded(picture(2), "PNG")}
    path = write_tar(tmp_path / "a.tar", [{"__key__": "a", **both}, {"__key__": "b", "jpg": encoded(picture(3))}])
    layout = data.sources.Layout(image=tuple(image or ()))
    checked = check_shard(path, layout=layout)
    config = DataConfig(sources=[data.SourceConfig(root=path, image=image)], image_size=32, workers=0)
    keys = {batch.keys[0] for batch in itertools.islice(Steps(config, batch=1).streams[0], 4)}
    if image:
        assert checked.status == "ok" and keys == {"a", "b"}
    else:
        assert checked.counts == {"several images": 1} and keys == {"b"}
