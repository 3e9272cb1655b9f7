"""What is counted of a set, against what was put into it."""

import io
import itertools
import json
import re
import zipfile
from collections import Counter

import pytest
from comparing import refusal
from PIL import Image
from samples import encoded, picture, write_tar
from serving import Server

from data import DataError, SourceConfig
from data.index import write_index
from data.prep.check import check_shards
from data.prep.stats import Counted, Score, count, spread
from data.sources import open_source


def counted(root, name="images", index=None, **options) -> Counted:
    return count(open_source(SourceConfig(name=name, root=root, index=index), scan_all=True), **options)


def test_sizes_shapes_formats_captions_and_classes(tmp_path):
    sizes = [(300, 200), (200, 300), (256, 256), (1000, 255), (640, 360), (600, 450)]
    kinds = ["JPEG", "PNG", "WEBP", "JPEG", "JPEG", "JPEG"]
    captions = [b"four", "fünf!".encode(), b"  ", None, b"x" * 100, b"seven77\n"]
    classes = [b"3", b"3", b"0", None, b"17", b"3"]
    samples = []
    for n, (size, kind, caption, label) in enumerate(zip(sizes, kinds, captions, classes, strict=True)):
        suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
        members = {"txt": caption, "cls": label, suffix: encoded(picture(n, size), kind)}
        samples.append({"__key__": str(n), **{name: value for name, value in members.items() if value is not None}})
    found = counted(write_tar(tmp_path / "a.tar", samples))
    assert found.samples == 6 and found.unusable_samples == 0
    assert found.bytes == sum(len(value) for one in samples for name, value in one.items() if name != "__key__")
    assert found.formats == {"JPEG": 4, "PNG": 1, "WEBP": 1}
    assert found.sides == {200: 2, 256: 1, 255: 1, 360: 1, 450: 1}
    assert found.lengths == {4: 1, 5: 1, 100: 1, 7: 1} and found.missing_captions == 2
    assert found.classes == {3: 3, 0: 1, 17: 1} and found.missing_classes == 1
    record = json.loads(json.dumps(found.record()))
    histograms = record["histograms"]
    assert histograms["shorter_side"] == {"192 to 255": 3, "256 to 383": 2, "384 to 511": 1}
    assert histograms["shape"] == {"2:3": 1, "3:4": 0, "1:1": 1, "4:3": 1, "3:2": 1, "16:9": 1, "2:1 or wider": 1}
    assert histograms["captions"] == {"below 10": 3, "10 to 19": 0, "20 to 39": 0, "40 to 79": 0, "80 to 159": 1}
    assert histograms["classes"] == {"below 2": 2, "2 to 9": 1}
    assert record["shorter_side"] == {"min": 200, "median": 255, "max": 450}
    assert record["captions"] == {"missing": 2, "characters": {"min": 4, "median": 5, "max": 100}}
    assert record["classes"] == {"count": 3, "missing": 1, "images": {"min": 1, "median": 1, "max": 3}}
    assert record["mean_sample_bytes"] == found.bytes / 6


def test_only_headers_of_images_are_read_and_turned_as_they_are_displayed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = encoded(picture(0, (640, 360)), exif=exif)
    cut = encoded(picture(1, (640, 360)))[:2000]
    cut_png = encoded(picture(2, (640, 360)), "PNG")[:2000]
    samples = [{"__key__": str(n), "jpg": image} for n, image in enumerate((turned, cut, cut_png))]
    found = counted(write_tar(tmp_path / "a.tar", samples))
    assert found.unusable_samples == 0 and found.sides == {360: 3}
    shapes = found.record()["histograms"]["shape"]
    assert shapes == {"9:16": 1, "2:3": 0, "3:4": 0, "1:1": 0, "4:3": 0, "3:2": 0, "16:9": 2}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as data.transforms does, before pytest
def test_what_training_would_pass_over_is_named(tmp_path):
    image = encoded(picture(0))
    huge = io.BytesIO()
    Image.new("1", (20_000, 6_000)).save(huge, "PNG")
    samples = [
        {"__key__": "good", "jpg": image, "cls": b"1"},
        {"__key__": "none", "txt": b"a"},
        {"__key__": "fake", "jpg": b"no image"},
        {"__key__": "class", "jpg": image, "cls": b"cat"},
        {"__key__": "huge", "png": huge.getvalue()},
        {"__key__": "../up", "jpg": image},
    ]
    path = write_tar(tmp_path / "a.tar", samples)
    found = counted(path)
    assert (found.samples, found.unusable_samples, found.formats) == (6, 5, {"JPEG": 1})
    assert [text.split(":")[0] for text in found.unusable] == [
        f"{key} in {path}" for key in ("none", "fake", "class", "huge", "../up")
    ]
    for text, reason in zip(
        found.unusable, ("no image", "no JPEG, PNG", "'cat'", "20000 x 6000", "leads out"), strict=True
    ):
        assert reason in text


def test_captions_and_scores_lie_where_the_catalogue_says(tmp_path):
    """laion-coco: top_caption, else txt; similarity, nsfw as punsafe, watermark as pwatermark."""
    metadata = [
        {"top_caption": "from json", "similarity": 0.25, "punsafe": 0.5, "original_width": 800},
        {"top_caption": None, "similarity": 0.35, "punsafe": "n/a", "original_width": 600},
        {"similarity": None, "punsafe": True, "original_width": 700},
        {"similarity": float("nan"), "punsafe": 0.1},
    ]
    samples = [
        {"__key__": str(n), "jpg": encoded(picture(n)), "txt": b"text", "json": json.dumps(one).encode()}
        for n, one in enumerate(metadata)
    ]
    path = write_tar(tmp_path / "a.tar", samples)
    found = counted(path, "laion-coco")
    assert found.lengths == {9: 1, 4: 3}
    record = found.record()["scores"]
    assert set(record) == {"width", "height", "nsfw", "watermark", "similarity"}
    assert record["similarity"] == {
        **{"numbers": 2, "missing": 1, "not_numeric": 1, "min": 0.25, "mean": pytest.approx(0.3), "max": 0.35}
    }
    assert record["nsfw"] == {
        **{"numbers": 2, "missing": 0, "not_numeric": 2, "min": 0.1, "mean": pytest.approx(0.3), "max": 0.5}
    }
    assert record["width"]["numbers"] == 3 and record["width"]["missing"] == 1
    empty = dict.fromkeys(("min", "mean", "max"))
    assert record["watermark"] == {"numbers": 0, "missing": 4, "not_numeric": 0, **empty}
    assert counted(path).scores == {} and counted(path).lengths == {4: 4}


def test_a_folder_and_a_zip_file_of_images(tmp_path):
    folder = tmp_path / "imagenet"
    for n in range(5):
        (folder / f"n{n % 2:08}").mkdir(parents=True, exist_ok=True)
        (folder / f"n{n % 2:08}" / f"{n}.JPEG").write_bytes(encoded(picture(n, (64 + n, 64))))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for path in folder.rglob("*.JPEG"):
            file.write(path, path.relative_to(folder))
    found, zipped = counted(str(folder), "imagenet"), counted(str(tmp_path / "a.zip"))
    assert found.classes == {0: 3, 1: 2}
    assert found.samples == zipped.samples == 5 and found.sides == zipped.sides == {64: 5}
    assert found.missing_captions == zipped.missing_captions == 5


@pytest.mark.process
def test_processes_count_what_one_counts(tars, monkeypatch):
    monkeypatch.setattr("data.prep.stats.SELECTION_SAMPLES", 3)
    calls = []
    one = counted(str(tars), jobs=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(n, 8) for n in range(1, 9)]  # 7, 9 and 4 samples by 3
    assert counted(str(tars), jobs=3) == one
    assert one.samples == 20


@pytest.mark.parametrize("most", [1, 2, 7, 19, 20, 1000])
def test_samples_are_spread_evenly_over_all(tmp_path, most):
    """The shorter side tells which sample it is."""
    for shard, first in enumerate((0, 7, 16)):
        last = (7, 16, 20)[shard]
        samples = [{"__key__": str(n), "jpg": encoded(picture(n, (60, 10 + n)))} for n in range(first, last)]
        write_tar(tmp_path / f"{shard}.tar", samples)
    found = counted(str(tmp_path), most_samples=most)
    numbers = sorted(side - 10 for side in found.sides)
    most = min(most, 20)
    assert found.samples == len(numbers) == most
    assert numbers[0] == 0 and 20 - numbers[-1] <= -(-20 // most)
    gaps = {b - a for a, b in itertools.pairwise(numbers)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert "at least 1" in refusal(DataError, counted, str(tmp_path), most_samples=0)


def test_remote_tars_with_and_without_an_index(tars, tmp_path):
    paths = sorted(str(path) for path in tars.glob("*.tar"))
    local = counted(str(tars))
    with Server(folder=tars) as server:
        urls = [server.url(f"/train-{n:06d}.tar") for n in range(3)]
        assert counted(urls) == local
        assert counted(urls, most_samples=6).samples == 6  # the first two of each
        found = list(check_shards(paths))
        digests = [checked.sha256 for checked in found]
        write_index(tmp_path / "i.safetensors", urls, [checked.table for checked in found], digests)
        index = str(tmp_path / "i.safetensors")
        assert counted(urls, index=index) == local
        before = len(server.requests)
        assert counted(urls, index=index, most_samples=2).samples == 2
        asked = [re.findall(r"\d+", request.range) for request in server.requests[before:]]
        asked_bytes = sum(int(stop) + 1 - int(start) for start, stop in asked)
        assert asked_bytes == sum(found[n].table.stops_n[0] - found[n].table.starts_n[0] + 1 for n in (0, 1))


def test_a_damaged_tar_ends_it(tars):
    path = tars / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    assert "train-000001" in refusal(DataError, counted, str(tars))


def test_spread_and_scores():
    assert spread(Counter()) is None
    assert spread(Counter({5: 1})) == (5, 5, 5)
    assert spread(Counter({1: 2, 2: 1, 100: 2})) == (1, 2, 100)
    assert spread(Counter({1: 3, 9: 3})) == (1, 1, 9)
    first, second = Score(), Score()
    for value in (1, 2.5, None, "3", False, float("inf"), [1]):
        first.count(value)
    second.add(first)
    second.add(Score())
    assert second == first == Score(numbers=2, missing=1, not_numeric=4, total=3.5, least=1, most=2.5)
