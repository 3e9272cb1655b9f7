"""What is in files beside a picture reaches tars and token shards, or is named."""

import json
import unicodedata
from pathlib import Path

import pytest
from comparing import refusal
from field.encodings import CAPTION, READABLE, UNREADABLE, write_captions, write_fields
from model_checks import tokenizer_of
from samples import Steps, members, picture, pictured, write_tar
from support import write_tokenizer_run

from data import DataConfig, DataError, FilterConfig, SourceConfig, pack
from data.prep.check import check_shard
from data.prep.stats import count
from data.sources import open_source
from data.tar_reader import TarShard, scan
from trainer.jobs.tokenize import tokenize


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_tokenizer_run(tmp_path_factory.mktemp("run") / "run", tokenizer_of())


def texts_of(tar: str | Path) -> dict[str, str]:
    return {name: content.decode() for name, content in members(tar).items() if name.endswith((".txt", ".cls"))}


EXPECTED = {f"{name}.txt": CAPTION for name in READABLE} | {f"{name}.cls": "7" for name in READABLE}


def test_captions_of_known_encodings_become_utf8(run, tmp_path):
    images = write_captions(tmp_path / "images", READABLE)
    (packed,) = pack(images, tmp_path / "packed").shards
    assert texts_of(packed) == EXPECTED
    done = tokenize(run, images=str(images), out=tmp_path / "tokens", device="cpu")
    assert texts_of(done.out / "tokens-000000.tar") == EXPECTED and not done.skipped
    delivered = Steps(DataConfig(train=str(images), image_size=32, workers=0), batch=4).delivered(1)
    assert {(info.caption, info.label) for info in delivered} == {(CAPTION, 7)}


def test_a_caption_of_another_encoding_is_named_where_it_would_be_written(run, tmp_path):
    images = write_captions(tmp_path / "images", {**READABLE, **UNREADABLE})
    done = tokenize(run, images=str(images), out=tmp_path / "tokens", device="cpu")
    assert texts_of(done.out / "tokens-000000.tar") == EXPECTED
    assert len(done.skipped) == len(UNREADABLE)
    assert any("latin.png: its caption is not in UTF-8 (b'Caf\\xe9 na\\xefve'): save it" in one for one in done.skipped)
    assert check_shard(str(images)).counts == {"bad caption": len(UNREADABLE)}
    assert count(open_source(SourceConfig(root=str(images)))).unusable_samples == len(UNREADABLE)
    said = refusal(DataError, pack, images, tmp_path / "packed")
    assert ".txt is not in UTF-8: save it as UTF-8 (`ibq shards check" in said and not (tmp_path / "packed").exists()


def test_pictures_with_such_a_caption_are_trained_on(tmp_path):
    images = write_captions(tmp_path / "images", {**READABLE, **UNREADABLE})
    config = DataConfig(train=str(images), image_size=32, workers=0)
    (batch,) = (next(stream) for stream in Steps(config, batch=len(READABLE) + len(UNREADABLE)).streams)
    captions = {Path(info.key).stem: info.caption for info in batch.infos}
    assert captions == dict.fromkeys(READABLE, CAPTION) | dict.fromkeys(UNREADABLE) and not batch.skipped


def test_a_caption_in_json_that_has_no_utf8_is_named(run, tmp_path):
    contents = {"good": b'{"top_caption": "caf\\u00e9"}', "half": b'{"top_caption": "a \\ud83d"}'}
    samples = [sample | {"json": contents[sample["__key__"]]} for sample in pictured(contents)]
    tar = write_tar(tmp_path / "a.tar", samples)
    done = tokenize(run, images=tar, out=tmp_path / "tokens", device="cpu", source="laion-coco")
    assert texts_of(done.out / "tokens-000000.tar") == {"good.txt": "café"}
    assert "half: its caption is not in UTF-8" in done.skipped[0]


def test_a_list_of_keys_to_leave_out_that_is_written_otherwise_is_refused(tmp_path):
    """Keys of a folder are paths, and those of the tars made of it have no suffix."""
    images = write_captions(tmp_path / "images", READABLE)
    pack(images, tmp_path / "packed")
    listed = tmp_path / "listed.txt"
    for root, right, wrong in ((images, "bom.png", "bom"), (tmp_path / "packed", "bom", "bom.png")):
        source = SourceConfig(root=str(root), filters=FilterConfig(not_keys=str(listed)))
        listed.write_text(f"{wrong}\nelsewhere\n")
        said = refusal(DataError, open_source, source)
        assert f"none of the keys in {listed} is there, but {right} is where the list says {wrong}: keys of" in said
        for content in (f"{right}\nelsewhere\n", f"{right}\n{wrong}\n", "elsewhere\n"):  # the last: of another source
            listed.write_text(content)
            open_source(source)


@pytest.mark.parametrize(
    ("key", "listed"),
    [
        ("caf\u00e9.png", "cafe\u0301.png"),
        ("caf\u00e9.png", "cafe\u0301"),
        ("a.png", "a.png "),
        ("a.png", "./a.png"),
        ("sub/a.png", "sub\\a.png"),
        ("A.PNG", "a.png"),
    ],
)
def test_a_list_of_keys_in_another_spelling_is_refused(tmp_path, key, listed):
    (tmp_path / "images/sub").mkdir(parents=True)
    picture(1).save(tmp_path / "images/other.png")
    picture(0).save(tmp_path / "images" / key, "PNG")
    tar = write_tar(tmp_path / "a.tar", pictured([key.removesuffix(".png").removesuffix(".PNG").lower(), "other"]))
    path = tmp_path / "listed.txt"
    for lines in (f"{listed}\n", f"{listed}\r\nelsewhere.png\r\n\r\n..\r\n/\r\n.\r\n"):
        path.write_bytes(lines.encode())
        for root in (str(tmp_path / "images"), tar):
            source = SourceConfig(root=root, filters=FilterConfig(not_keys=str(path)))
            said = refusal(DataError, open_source, source)
            assert "none of the keys in" in said and "matched exactly" in said
            if unicodedata.normalize("NFC", listed) == key and root != tar:
                assert "'caf\\xe9.png' is where the list says 'cafe\\u0301.png'" in said  # they look alike


def test_keys_of_a_list_that_no_source_has_are_counted_at_the_start(tmp_path):
    images, listed, wanted = tmp_path / "images", tmp_path / "listed.txt", tmp_path / "wanted.txt"
    images.mkdir()
    for name in ("a", "b", "c\x85d", "e\u2028f"):
        picture(0).save(images / f"{name}.png")
    tar = write_tar(tmp_path / "a.tar", pictured(["k", "l", "m"]))
    held = FilterConfig(not_keys=str(listed))
    sources = [
        SourceConfig("one", str(images), filters=held),
        SourceConfig("two", tar, filters=held),
        SourceConfig("three", tar, filters=FilterConfig(keys=str(wanted))),
    ]
    wanted.write_text("l\nm\n")
    settings = DataConfig(sources=sources, image_size=16, workers=0)

    def said(lines: str) -> list[str]:
        listed.write_text(lines)
        (stream,) = Steps(settings, batch=4).streams
        return [line for line in stream.describe(1).splitlines() if line.startswith("filters.")]

    count = "keys occur in no source that names the list, first"
    assert said("a.png\nk\n") == [] and said("") == []
    assert said("c\x85d.png\ne\u2028f.png\n") == []
    assert said("a.png\nb\nx.png\n/imgs/a.png\n") == [f"filters.not_keys={listed}: 3 of 4 {count} '/imgs/a.png'"]
    wanted.write_text("m\nn\n")
    assert said("a.png\n") == [f"filters.keys={wanted}: 1 of 2 {count} 'n'"]
    assert said("k\n") == [f"filters.keys={wanted}: 1 of 2 {count} 'n'"]
    sources[1].root = "https://127.0.0.1:9/{0..300}.tar"  # they are not looked at before they are read
    compared = "not compared with the samples: too many, or tars without an index"
    assert said("a.png\n") == [f"filters.not_keys={listed}: {compared}", f"filters.keys={wanted}: 1 of 2 {count} 'n'"]


FIELDS = {
    "high": {"aesthetic": 6.5, "note": "\ud83d", "width": 1},
    "low": {"aesthetic": 3, "tags": ["猫", None]},
    "none": {},
}


@pytest.mark.parametrize("layout", ["folder", "coco"])
def test_fields_beside_a_picture_are_packed(tmp_path, layout):
    images, options = write_fields(tmp_path / "images", FIELDS), {}
    if layout == "coco":
        notes = {"images": [{"id": 1, "file_name": "low.png"}], "annotations": [{"image_id": 1, "caption": "low"}]}
        (tmp_path / "captions.json").write_text(json.dumps(notes))
        options = {"layout": "coco", "annotations": tmp_path / "captions.json"}
    (tar,) = pack(images, tmp_path / "packed", **options).shards
    found = {key: json.loads(members(tar)[f"{key}.json"].decode()) for key in FIELDS}
    for key, fields in FIELDS.items():
        own = {"key": key, "width": 48, "height": 40, "source": f"{key}.png"}
        more = {"image_id": 1, "captions": ["low"]} if layout == "coco" and key == "low" else {}
        assert found[key] == {**fields, **own, **more}
    assert len(scan(tar)) == len(TarShard(tar, scan(tar))) == 3


def test_filters_pass_the_same_pictures_of_a_folder_and_of_its_tars(tmp_path):
    images = write_fields(tmp_path / "images", FIELDS)
    pack(images, tmp_path / "packed")
    filters = FilterConfig(min_aesthetic=5.0)
    for root in (images, tmp_path / "packed"):
        source = SourceConfig(root=str(root), fields={"aesthetic": "aesthetic"}, filters=filters)
        delivered = Steps(DataConfig(sources=[source], image_size=32, workers=0), batch=2).delivered(1)
        assert {Path(info.key).stem for info in delivered} == {"high"}


@pytest.mark.parametrize("content, reason", [("[1]", "its json is no mapping"), ("{", "its json is damaged: ")])
def test_fields_that_cannot_be_packed_are_refused(tmp_path, content, reason):
    images = write_fields(tmp_path / "images", FIELDS)
    (images / "low.json").write_text(content)
    said = refusal(DataError, pack, images, tmp_path / "packed")
    assert f"{images}/low.json cannot be kept ({reason}" in said and said.endswith("): repair or remove it")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("content", ["[1]", "{bad"])
def test_a_json_that_holds_no_fields_is_found_by_check(tmp_path, content):
    """Sources with filters by score skip the sample; others use it."""
    images = write_fields(tmp_path / "images", FIELDS)
    (images / "low.json").write_text(content)
    samples = [{"__key__": key, **{suffix: (images / f"{key}.{suffix}").read_bytes() for suffix in ("png", "json")}}
               for key in FIELDS]  # fmt: skip
    for place in (images, write_tar(tmp_path / "a.tar", samples)):
        found = check_shard(str(place))
        assert found.status == "flawed" and found.counts == {"bad json": 1} and found.problems[0].key.startswith("low")
