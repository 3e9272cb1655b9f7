"""`ibq tokenize`: codes of the views are correct for any number of processes and after any number of restarts."""

import json
import os
import re
import shutil
import signal
import tarfile
import zipfile
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from comparing import refusal
from model_checks import tokenizer_of, write_run
from omegaconf import OmegaConf
from PIL import Image
from samples import Steps, encoded, members
from serving import Server
from webdataset.writer import TarWriter

import model_zoo
from data import (
    DataConfig,
    DataError,
    TokenHeader,
    TokenSpec,
    check,
    decode,
    evaluation_tokens,
    expand,
    token_header,
    unpack_codes,
)
from data.buckets import parse_size, sizes_of
from data.index import Index, write_index
from data.locks import WriterLock, folder_lock
from data.prep.check import check_shards
from data.prep.pack import pack
from data.tar_reader import TarShard, scan
from data.transforms import Size, pixels_chw, resize_and_center_crop, resize_named
from tools import cli
from trainer import TrainerError
from trainer.jobs import tokenize as module
from trainer.jobs.tokenize import tokenize
from trainer.jobs.views import Views

pytestmark = pytest.mark.usefixtures("alone")

SIDE = 32
MODEL = dict(codebook_size=300, channel_multipliers=[1, 1])


@pytest.fixture(scope="module", autouse=True)
def one_core():
    """Shards are checked in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.jobs.token_folder.cores", lambda: 1)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an untrained tokenizer of 8x8 patches; its EMA weights differ."""
    models = {"tokenizer": tokenizer_of(0, **MODEL), "tokenizer_ema": tokenizer_of(1, **MODEL)}
    config = {"task": "tokenizer", "model": models["tokenizer"].config, "data": {"image_size": SIDE}}
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", config, **models)


def png(number: int, size=(50, 40)) -> bytes:
    colors = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return encoded(Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC), "PNG")


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Tars of 7, 3 and 5 images with captions and classes, one of which is broken."""
    folder = tmp_path_factory.mktemp("images") / "tars"
    folder.mkdir()
    for shard, samples in enumerate((7, 3, 5)):
        with TarWriter(str(folder / f"{shard}.tar"), encoder=False, mtime=0) as writer:
            for n in range(samples):
                content = b"no picture" if (shard, n) == (0, 4) else png(10 * shard + n)
                writer.write({"__key__": f"{shard}-{n}", "png": content, "cls": b"%d" % n, "txt": "ein Bär".encode()})
    return folder


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.name != "index.safetensors"}


def go(run, tars, out, **options):
    return tokenize(run, images=str(tars), out=out, **{"samples_per_shard": 3, "device": "cpu", **options})


def samples(out: Path):
    for path in sorted(out.glob("*.tar")):
        shard = TarShard(str(path), scan(str(path)))
        yield from (shard.read(n) for n in range(len(shard)))


@pytest.fixture(scope="module")
def flipped(run, tars, tmp_path_factory):
    """Tokens of the tars, of both views."""
    out = tmp_path_factory.mktemp("tokens") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        return go(run, tars, out, views="flip")


# --------------------------------------------------------------------------------------------------------------- codes


def test_codes_are_those_of_the_image_and_its_mirror_image(run, tars, flipped):
    tokenizer = model_zoo.load_tokenizer(run)
    # Units of at most three: 3 + 3 + 1, 3, 3 + 2; one image is broken.
    assert (flipped.shards, flipped.samples, flipped.made) == (6, 14, 14)
    assert flipped.skipped == [f"{tars}/0.tar, 0-4: no JPEG, PNG or WebP image"]
    found = list(samples(flipped.out))
    assert [sample.key for sample in found] == [
        f"{shard}-{n}" for shard, count in enumerate((7, 3, 5)) for n in range(count) if (shard, n) != (0, 4)
    ]
    for sample in found:
        shard, n = map(int, sample.key.split("-"))
        assert sample.members["cls"] == b"%d" % n and sample.members["txt"].decode() == "ein Bär"
        header, index_vhw = unpack_codes(sample.members["codes"])
        assert header == TokenHeader(tokenizer.fingerprint(), 300, 2, (4, 4))
        image = resize_and_center_crop(decode(png(10 * shard + n)), SIDE, resize_named("pil_antialias"))
        for view_hw, picture in zip(index_vhw, (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), strict=True):
            images_bchw = (torch.from_numpy(pixels_chw(picture))[None].double() / 127.5 - 1).float()
            assert np.array_equal(view_hw, tokenizer.tokenize(images_bchw)[0])
    assert len(np.unique([unpack_codes(sample.members["codes"])[1] for sample in found])) > 10


def test_what_it_writes_is_what_training_opens(flipped):
    assert sorted(path.name for path in flipped.out.iterdir()) == [
        "index.safetensors", "skipped.jsonl", *(f"tokens-{n:06d}.tar" for n in range(6)), "tokens.json"
    ]  # fmt: skip
    index = Index(flipped.out / "index.safetensors")
    assert len(index) == 6 and index.first[-1] == 14
    spec = TokenSpec(flipped.tokenizer, 300, ((4, 4),))
    config = DataConfig(train=str(flipped.out), val=str(flipped.out), content="tokens", workers=0)
    assert token_header(config).views == 2
    check(config, tokens=spec)
    assert len(list(evaluation_tokens(str(flipped.out), spec))) == 14
    record = json.loads((flipped.out / "skipped.jsonl").read_text())
    assert record["key"] == "0-4" and record["shard"] == 1


def test_views_of_an_image():
    content, resize = png(1, (80, 60)), resize_named("pil_antialias")
    square = np.asarray(resize_and_center_crop(decode(content), 35, resize)).transpose(2, 0, 1)
    ten, original, flip = (
        Views(kind, [Size(SIDE, SIDE)], "pil_antialias")(content) for kind in ("ten-crop", "original", "flip")
    )
    assert ten.shape == (10, 3, SIDE, SIDE)
    for view, (left, top) in zip(ten[:5], [(2, 2), (0, 0), (3, 0), (0, 3), (3, 3)], strict=True):
        assert np.array_equal(view, square[:, top : top + SIDE, left : left + SIDE])
    assert np.array_equal(ten[5:], ten[:5, ..., ::-1])
    assert len(original) == 1 and np.array_equal(flip[0], original[0])
    assert np.array_equal(flip[1], original[0][..., ::-1])


def test_a_folder_of_classes(run, tmp_path):
    for name, number in (("cat/a.png", 0), ("cat/a.b.png", 1), ("dog/a.png", 2)):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png(number))
    done = go(run, tmp_path / "images", tmp_path / "out", source="imagenet")
    assert done.samples == 3
    found = {sample.key: sample.members for sample in samples(done.out)}
    assert {key: members["cls"] for key, members in found.items()} == {"cat_a": b"0", "cat_a_b": b"0", "dog_a": b"1"}
    assert json.loads((done.out / "classes.json").read_text()) == {"cat": 0, "dog": 1}


def test_tars_without_the_classes_that_a_source_has_by_folders_are_refused(run, tmp_path):
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "a.png").write_bytes(png(number))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "images", "")
    said = refusal(TrainerError, go, run, tmp_path / "a.tar", tmp_path / "out", source="imagenet")
    assert "--source imagenet has its classes by folders, which tars have as cls files, and the first 2 samples" in said
    assert not (tmp_path / "out").exists()
    assert go(run, tmp_path / "a.tar", tmp_path / "without").samples == 2
    pack(tmp_path / "images", tmp_path / "packed", layout="imagenet")
    packed = go(run, tmp_path / "packed", tmp_path / "out", source="imagenet").out
    assert {sample.members["cls"] for sample in samples(packed)} == {b"0", b"1"}


def test_class_folders_are_numbered_as_in_another_split(run, tmp_path):
    (tmp_path / "images" / "dog").mkdir(parents=True)
    (tmp_path / "images" / "dog" / "a.png").write_bytes(png(0))
    numbers = {"cat": 0, "dog": 1}
    (tmp_path / "classes.json").write_text(json.dumps(numbers))
    options = {"source": "imagenet", "classes": tmp_path / "classes.json"}
    done = go(run, tmp_path / "images", tmp_path / "out", **options)
    assert [sample.members["cls"] for sample in samples(done.out)] == [b"1"]
    assert json.loads((done.out / "classes.json").read_text()) == numbers
    assert go(run, tmp_path / "images", tmp_path / "out", **options).made == 0
    said = refusal(TrainerError, go, run, tmp_path / "images", tmp_path / "out", source="imagenet")
    assert f"{done.out} holds tokens whose classes were numbered by another file: give --classes" in said
    options["classes"] = re.search("--classes (.*) to continue", said)[1]
    assert go(run, tmp_path / "images", tmp_path / "out", **options).made == 0
    go(run, tmp_path / "images", tmp_path / "without", source="imagenet")
    said = refusal(TrainerError, go, run, tmp_path / "images", tmp_path / "without", **options)
    assert "without holds tokens made without --classes: leave it out to continue, or name another path" in said


def test_a_zip_file_a_pattern_and_a_server(run, tars, flipped, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        for number, name in enumerate(("cat/a.png", "dog/a.png")):
            file.writestr(name, png(number))
    done = go(run, tmp_path / "images.zip", tmp_path / "zip")
    assert {sample.key for sample in samples(done.out)} == {"cat_a", "dog_a"}
    done = go(run, tars / "{0..2}.tar", tmp_path / "pattern", views="flip")
    for tar in flipped.out.glob("*.tar"):
        assert tar.read_bytes() == (done.out / tar.name).read_bytes()
    assert len(list(done.out.glob("*.tar"))) == flipped.shards
    with Server(folder=tars) as server:  # without an index, a shard for a shard
        done = go(run, server.url("/{0..2}.tar"), tmp_path / "remote", views="flip")
    assert (done.shards, done.samples) == (3, 14)
    assert [sample.key for sample in samples(done.out)] == [sample.key for sample in samples(flipped.out)]


def test_the_fingerprint_is_of_what_makes_codes():
    tokenizer = tokenizer_of(**MODEL)
    fingerprint = tokenizer.fingerprint()
    assert len(fingerprint) == 16 and int(fingerprint, 16) >= 0
    with torch.no_grad():
        tokenizer.decoder.conv_in.weight += 1
        tokenizer.post_quant_conv.weight += 1
        assert tokenizer.fingerprint() == fingerprint
        others = {fingerprint}
        for parameter in (
            tokenizer.quantize.embedding.weight,
            tokenizer.quant_conv.bias,
            next(tokenizer.encoder.parameters()),
        ):
            parameter.view(-1)[0] += 1e-3
            others.add(tokenizer.fingerprint())
        assert len(others) == 4


def test_doubles_that_only_a_broken_image_parts_stay_two_samples(run, tmp_path):
    with TarWriter(str(tmp_path / "doubles.tar"), encoder=False, mtime=0) as tar:
        for number, key in enumerate(["a", "b", "a", "a-2", "c", "a"]):
            tar.write({"__key__": key, "png": b"broken" if key == "b" else png(number), "cls": b"%d" % number})
    done = go(run, tmp_path / "doubles.tar", tmp_path / "out", samples_per_shard=6)
    found = [(sample.key, sample.members["cls"]) for sample in samples(done.out)]
    assert found == [("a", b"0"), ("a-2", b"2"), ("a-2-2", b"3"), ("c", b"4"), ("a", b"5")]
    spec = TokenSpec(done.tokenizer, 300, ((4, 4),))
    assert len(list(evaluation_tokens(str(done.out), spec))) == done.samples == done.made == 5


# ------------------------------------------------------------------------------------------------------------ going on


def test_a_folder_has_one_writer_which_removes_what_a_killed_job_left(run, tars, flipped, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    left = out / ".tokens-000001.tar.node-7-17.unfinished"
    left.write_bytes(b"half of a tar")
    with WriterLock(folder_lock(out), out) as other:
        other.take()
        said = refusal(TrainerError, go, run, tars, out, views="flip")
        assert said.startswith(f"{out} is being written by process {os.getpid()} on ") and left.exists()
    go(run, tars, out, views="flip")
    assert files(out) == files(flipped.out) and not left.exists()


def test_it_goes_on_where_it_was_stopped(run, tars, flipped, tmp_path, monkeypatch):
    out = tmp_path / "out"
    encode = Mock(wraps=module._encode, side_effect=[DEFAULT, DEFAULT, DEFAULT, KeyboardInterrupt])
    monkeypatch.setattr(module, "_encode", encode)
    with pytest.raises(KeyboardInterrupt):
        go(run, tars, out, views="flip")
    monkeypatch.undo()
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert sorted(there) == [f"tokens-{n:06d}.tar" for n in range(3)] and not list(out.glob("*.unfinished"))
    done = go(run, tars, out, views="flip")
    assert (done.samples, done.made, done.skipped) == (14, 14 - 6, flipped.skipped)
    assert files(out) == files(flipped.out)
    assert all((out / name).stat().st_mtime_ns == time for name, time in there.items())
    index = (out / "index.safetensors").stat().st_mtime_ns
    assert go(run, tars, out, views="flip").made == 0  # with nothing left to do
    assert files(out) == files(flipped.out) and (out / "index.safetensors").stat().st_mtime_ns == index


@pytest.mark.parametrize("earlier", [False, True])
def test_a_folder_that_is_not_finished_is_not_read(run, tars, flipped, tmp_path, monkeypatch, earlier, capsys):
    """earlier: a folder of a version that recorded no end."""
    out, spec = tmp_path / "out", TokenSpec(flipped.tokenizer, 300, ((4, 4),))
    monkeypatch.setattr(
        module, "_encode", Mock(wraps=module._encode, side_effect=[DEFAULT, DEFAULT, KeyboardInterrupt])
    )
    with pytest.raises(KeyboardInterrupt):
        go(run, tars, out, views="flip")
    monkeypatch.undo()
    forget(out, "finished", of=earlier)
    whole = str(flipped.out)
    said = f"{out} is not finished: run the same `ibq tokenize` again, or wait until it ends; to use only what is there"
    for root in (str(out), f"{out}/*.tar", [whole, str(out)]):
        for settings in (DataConfig(train=root), DataConfig(train=whole, val=root)):
            settings.content, settings.workers = "tokens", 0
            assert refusal(DataError, check, settings, tokens=spec).startswith(said)
    with pytest.raises(SystemExit) as ended:
        cli.main(["shards", "check", str(out), "--write-index"])
    assert ended.value.code == 2 and said in capsys.readouterr().err.replace("\n", " ")
    there = f"{out}/tokens-{{000000..000001}}.tar"
    assert f"name '{there}'" in refusal(DataError, expand, str(out))
    check(DataConfig(train=there, content="tokens", workers=0), tokens=spec)
    go(run, tars, out, views="flip")
    forget(out, "finished", of=earlier)
    check(DataConfig(train=str(out), val=str(out), content="tokens", workers=0), tokens=spec)


def test_an_index_does_not_finish_a_folder_and_its_loss_does_not_undo_one(flipped, tmp_path):
    out = shutil.copytree(flipped.out, tmp_path / "out")
    (out / "index.safetensors").unlink()
    assert len(expand(str(out))) == 6
    record = json.loads((out / "tokens.json").read_text())
    (out / "tokens.json").write_text(json.dumps({**record, "finished": False}))
    shutil.copy(flipped.out / "index.safetensors", out)
    assert "is not finished" in refusal(DataError, expand, str(out))
    (out / "tokens.json").write_text('["of another program"]')
    assert len(expand(str(out))) == 6


def test_a_lost_shard_is_written_again(run, tars, flipped, tmp_path):
    out = shutil.copytree(flipped.out, tmp_path / "out")
    (out / "tokens-000004.tar").unlink()
    assert go(run, tars, out, views="flip").made == 3
    assert files(out) == files(flipped.out) and len(Index(out / "index.safetensors")) == 6


def test_a_complete_folder_is_checked_again(run, tars, flipped, tmp_path):
    out = shutil.copytree(flipped.out, tmp_path / "out")
    tar = out / "tokens-000003.tar"
    shard = TarShard(str(tar), scan(str(tar)))
    content, codes = tar.read_bytes(), shard.read(0).members["codes"]
    code = content.index(codes) + len(codes) - 2  # the last one, of two bytes
    for at, bit, said in (
        (0, 1, "header at byte 0"),
        (code, 1, "not as in the index"),
        (code + 1, 128, "lies outside"),
    ):
        tar.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        line = refusal(TrainerError, go, run, tars, out, views="flip")
        assert line.startswith(f"{tar} is damaged (") and said in line
        assert line.endswith("): remove it and run the command again")
    tar.unlink()
    assert go(run, tars, out, views="flip").made == 3
    assert files(out) == files(flipped.out)


def forget(out: Path, *names: str, of: bool = True) -> None:
    """Makes the folder one of an earlier version, which did not record these. of: whether it is one."""
    record = json.loads((out / "tokens.json").read_text())
    assert all(name in record for name in names)
    kept = {name: value for name, value in record.items() if not of or name not in names}
    (out / "tokens.json").write_text(json.dumps(kept))


def labelled(folder: Path, time: int = 1_700_000_000) -> Path:
    """Two images with classes in a folder."""
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.png").write_bytes(png(number))
        (folder / f"{number}.CLS").write_text("1")
    for path in folder.iterdir():
        os.utime(path, (time, time))
    return folder


@pytest.mark.parametrize("name, content", [("0.CLS", b"7"), ("1.txt", b"new"), ("1.png", png(9)), ("1.json", b"{}")])
def test_a_folder_that_was_changed_is_refused(run, tmp_path, name, content):
    images, out = labelled(tmp_path / "images"), tmp_path / "out"
    go(run, images, out, samples_per_shard=1)
    (out / "tokens-000001.tar").unlink()
    before = files(out)
    (images / name).write_bytes(content)
    said = refusal(TrainerError, go, run, images, out, samples_per_shard=1)
    assert "before they, or the .cls, .txt or .json files beside them, were changed: remove" in said
    assert files(out) == before
    (out / "tokens-000000.tar").unlink()
    assert go(run, images, out, samples_per_shard=1).made == 2


def test_a_folder_that_was_copied_or_has_other_files_is_not_refused(run, tmp_path):
    images = labelled(tmp_path / "images")
    out = go(run, images, tmp_path / "out").out
    copy = shutil.copytree(images, tmp_path / "copy" / "images")
    (copy / "README.txt").write_text("of no image")
    assert go(run, copy, out).made == 0


def test_a_folder_of_an_earlier_version_continues_and_gets_a_record(run, tmp_path):
    images = labelled(tmp_path / "images")
    out = go(run, images, tmp_path / "out").out
    forget(out, "state", "finished")
    (images / "0.CLS").write_text("7")
    assert go(run, images, out).made == 0
    (images / "0.CLS").write_text("12")
    assert "were changed" in refusal(TrainerError, go, run, images, out)


def test_a_zip_file_that_was_changed_is_refused(run, tmp_path):
    def write(classes: bytes, date=(2020, 1, 1, 0, 0, 0)) -> Path:
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
            for name, content in (("a.png", png(0)), ("a.cls", classes)):
                file.writestr(zipfile.ZipInfo(name, date), content)
        return tmp_path / "images.zip"

    out = go(run, write(b"1"), tmp_path / "out").out
    assert go(run, write(b"1", (2024, 5, 5, 0, 0, 0)), out).made == 0  # packed again
    assert "were changed" in refusal(TrainerError, go, run, write(b"7"), out)


def relabelled(path: Path) -> None:
    """Adds 5 to all classes of a tar; keys and places stay."""
    content = members(path)
    with TarWriter(str(path), encoder=False, mtime=0) as tar:
        for name, value in content.items():
            key, suffix = name.rsplit(".", 1)
            tar.write({"__key__": key, suffix: b"%d" % (int(value) + 5) if suffix == "cls" else value})


@pytest.mark.parametrize("is_complete", [True, False])
def test_tars_whose_content_was_changed_are_refused(run, tars, tmp_path, is_complete):
    images, out = shutil.copytree(tars, tmp_path / "images"), tmp_path / "out"
    go(run, images, out)
    assert go(run, shutil.copytree(images, tmp_path / "copy"), out).made == 0
    if not is_complete:
        (out / "tokens-000004.tar").unlink()
    before, size = files(out), (images / "1.tar").stat().st_size
    relabelled(images / "1.tar")
    os.utime(images / "1.tar", (1_700_000_000, 1_700_000_000))
    assert (images / "1.tar").stat().st_size == size
    said = refusal(TrainerError, go, run, images, out)
    assert "before they, or the .cls, .txt or .json files beside them, were changed: remove" in said
    assert files(out) == before
    for path in out.glob("tokens-*.tar"):
        path.unlink()
    assert go(run, images, out).made == 14
    assert {sample.key: sample.members["cls"] for sample in samples(out)}["1-2"] == b"7"


def test_tars_of_a_server_that_were_changed_are_refused(run, tars, tmp_path):
    images, out = shutil.copytree(tars, tmp_path / "images"), tmp_path / "out"
    with Server(folder=images) as server:
        url = server.url("/{0..2}.tar")
        go(run, url, out)
        assert go(run, url, out).made == 0
        relabelled(images / "1.tar")
        os.utime(images / "1.tar", (1_700_000_000, 1_700_000_000))
        assert "were changed: remove" in refusal(TrainerError, go, run, url, out)


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_images_that_change_while_they_are_read_are_an_error(run, tars, tmp_path, kind, monkeypatch):
    images = labelled(tmp_path / "images") if kind == "folder" else shutil.copytree(tars, tmp_path / "images")
    real = module._encode

    def encode(*inputs):
        path = min(images.iterdir())
        os.utime(path, (1_600_000_000, 1_600_000_000))
        return real(*inputs)

    monkeypatch.setattr(module, "_encode", encode)
    out = tmp_path / "out"
    said = refusal(TrainerError, go, run, images, out)
    assert f"--images were changed while they were read, so that {out} may hold tokens of both: remove" in said
    assert "were changed: remove" in refusal(TrainerError, go, run, images, out)
    for path in out.glob("tokens-*.tar"):
        path.unlink()
    assert go(run, images, out).made == (2 if kind == "folder" else 14)


def test_skipped_images_of_a_shard_that_is_made_again_are_listed_anew(run, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("0.png", "1.png"):
        (images / name).write_bytes(b"no picture")
    for number in range(2, 8):
        (images / f"{number}.png").write_bytes(png(number))
    done = go(run, images, tmp_path / "out")
    listed = (done.out / "skipped.jsonl").read_text().splitlines()
    assert len(done.skipped) == len(listed) == 2
    for line in map(json.loads, listed):  # one after the other
        (images / line["key"]).write_bytes(png(0))
        (done.out / f"tokens-{line['shard']:06d}.tar").unlink(missing_ok=True)
        forget(done.out, "state", "finished")
        done = go(run, images, done.out)
    assert (done.samples, done.skipped) == (8, [])
    assert not (done.out / "skipped.jsonl").exists() and not list(done.out.glob(".skipped-*"))


def test_a_shard_that_is_made_again_of_other_pictures_gets_a_new_entry_in_the_index(run, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.png").write_bytes(png(number))
    out = go(run, images, tmp_path / "out").out
    (out / "tokens-000000.tar").unlink()
    (images / "1.png").write_bytes(b"no picture")
    (images / "2.png").write_bytes(png(7))
    forget(out, "state", "finished")
    assert go(run, images, out).samples == 2
    (checked,) = check_shards([str(out / "tokens-000000.tar")], index=Index(out / "index.safetensors"))
    assert checked.status == "ok" and checked.samples == 2


def test_progress_counts_what_was_there(run, tars, flipped, tmp_path):
    out, told = shutil.copytree(flipped.out, tmp_path / "out"), []
    for number in (1, 4):
        (out / f"tokens-{number:06d}.tar").unlink()
    go(run, tars, out, views="flip", on_progress=lambda *numbers: told.append(numbers))
    assert told[0] == (12, 15) and told[-1] == (15, 15)


def test_two_processes_write_the_same_files_as_one(run, tars, flipped, tmp_path, ranks):
    arguments = run, "--images", tars, "--out", tmp_path / "out", "--views", "flip", "--samples-per-shard", 3
    finished = ranks.command(2, cli.main, ["tokenize", *map(str, arguments), "--device", "cpu"])
    assert finished.status == 0, finished.err
    assert f"14 samples of tokenizer {flipped.tokenizer} in 6 tars in {tmp_path / 'out'}" in finished.out
    assert finished.out.count("1 image skipped") == 1
    assert files(tmp_path / "out") == files(flipped.out)


def test_a_mistake_ends_all_processes_with_a_line(run, tars, tmp_path, ranks):
    arguments = run, "--images", tmp_path / "none", "--out", tmp_path / "out", "--device", "cpu"
    finished = ranks.command(2, cli.main, ["tokenize", *map(str, arguments)])
    assert finished.statuses == [2, 2] and len(finished.error_lines) == 2
    assert "no such tar or folder" in finished.error_lines[0]
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": "flip"}, 'other settings (views "original", now "flip"): give --views original again to continue'),
        ({"weights": "raw"}, "other settings (tokenizer "),
        ({"image_size": 40}, "other settings (grid [4, 4], now [5, 5]): give --size 32 again"),
        ({"samples_per_shard": 4}, "other settings (samples_per_shard 3, now 4): give --samples-per-shard 3 again"),
        ({"images": "bundled:val"}, "other settings (other input"),
    ],
)
def test_other_settings_are_not_mixed(run, tars, tmp_path, options, message):
    go(run, tars, tmp_path / "out")
    before = files(tmp_path / "out")
    settings = {"images": str(tars), "out": tmp_path / "out", "samples_per_shard": 3, "device": "cpu", **options}
    assert message.split(" (other")[0] in refusal(TrainerError, tokenize, run, **settings)
    assert files(tmp_path / "out") == before


def test_bad_input_gets_one_line(refused_by_ibq, run, tars, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    (tmp_path / "file").write_text("")
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "photos" / "sub" / "a.png").write_bytes(png(0))
    (tmp_path / "numbered").mkdir()
    (tmp_path / "numbered" / "classes.json").write_text('{"zebra": 0}')
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "tokens.json").write_text("{}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "tokens.json").write_text("[")
    out = tmp_path / "out"
    for changes, message in [
        ({"run": tmp_path / "empty"}, "is not a run folder"),
        ({"size": 30}, "--size 30 is not a multiple of the tokenizer's factor 8: take 32"),
        ({"size": 0}, "--size 0 must be at least 1"),
        ({"size": -8}, "--size -8 must be at least 1"),
        ({"views": "twice"}, "--views twice is unknown: choose one of original, flip, ten-crop"),
        ({"weights": "old"}, "weights must be 'ema' or 'raw'"),
        ({"device": "tpu"}, "--device tpu is unknown"),
        ({"batch-size": 0}, "--batch-size 0 must be at least 1"),
        ({"samples-per-shard": 0}, "--samples-per-shard 0 must be at least 1"),
        ({"workers": 0}, "--workers 0 must be at least 1"),
        ({"source": "nothing"}, "--source nothing is unknown: choose one of"),
        ({"images": tmp_path / "empty"}, "neither jpg, jpeg, png, webp, jfif, jpe nor tars under"),
        ({"images": tmp_path / "bad"}, "none of the 1 images in"),
        ({"out": tmp_path / "file"}, "is a file: name a folder with --out"),
        ({"out": tmp_path / "damaged"}, "tokens.json is damaged"),
        ({"out": tmp_path / "theirs"}, "tokens.json is damaged, or `ibq tokenize` did not write it"),
        ({"out": "/dev/null/out"}, "cannot write /dev/null/out"),
        ({"out": tars}, "holds tars that `ibq tokenize` did not write"),
        ({"images": tmp_path / "photos", "out": tmp_path / "photos"}, "photos holds images: name another folder"),
        ({"out": tmp_path / "photos"}, "photos holds images: name another folder"),
        ({"out": tmp_path / "numbered"}, "numbered holds a classes.json already: remove it, or name another folder"),
    ]:
        given = {"run": run, "images": tars, "out": out, "device": "cpu", **changes}
        options = [word for name, value in given.items() if name != "run" for word in (f"--{name}", value)]
        assert message in refused_by_ibq("tokenize", given["run"], *options), changes
        shutil.rmtree(out, ignore_errors=True)


def test_more_codes_than_token_shards_hold_are_refused_at_the_start(tars, tmp_path):
    huge = tokenizer_of(**{**MODEL, "quantizer": "bsq", "codebook_size": 2**25, "code_dim": 25})
    run = write_run(tmp_path / "run", {"task": "tokenizer", "model": huge.config}, tokenizer_ema=huge)
    line = refusal(TrainerError, go, run, tars, tmp_path / "out")
    assert "33,554,432 codes" in line and "at most 16,777,216 (2^24): use a tokenizer of fewer codes" in line
    assert not (tmp_path / "out").exists()


def test_a_mistake_does_not_bind_the_folder(run, tars, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    assert "none of the 1 images" in refusal(TrainerError, go, run, tmp_path / "bad", tmp_path / "out", views="flip")
    done = go(run, tars, tmp_path / "out")
    assert done.samples == 14 and len(done.skipped) == 1 and "0-4" in done.skipped[0]


def test_classes_of_a_job_without_shards_do_not_stay(run, tars, tmp_path):
    (tmp_path / "bad" / "cat").mkdir(parents=True)
    (tmp_path / "bad" / "cat" / "a.png").write_bytes(b"no picture")
    said = refusal(TrainerError, go, run, tmp_path / "bad", tmp_path / "out", source="imagenet")
    assert "none of the 1 images" in said and (tmp_path / "out" / "classes.json").exists()
    go(run, tars, tmp_path / "out")
    assert not (tmp_path / "out" / "classes.json").exists()


def test_tokens_are_not_tokenized(run, flipped, tmp_path):
    with pytest.raises(TrainerError, match=r"--images .* holds tokens already: name images"):
        go(run, flipped.out, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_run_is_named(refused_by_ibq, run, tars, tmp_path):
    other = write_run(tmp_path / "run", OmegaConf.load(run / "config.yaml"), generator=torch.nn.Linear(2, 2))
    said = refused_by_ibq("tokenize", other, "--images", tars, "--out", tmp_path / "out", "--weights", "raw")
    assert "is from a generator run: give a tokenizer run" in said


def test_damage_in_a_later_shard_leaves_the_finished_ones(run, tars, tmp_path, monkeypatch):
    images = shutil.copytree(tars, tmp_path / "images")
    found = list(check_shards([str(path) for path in sorted(images.glob("*.tar"))]))
    write_index(images / "index.safetensors", *zip(*((one.url, one.table, one.sha256) for one in found), strict=True))
    (images / "1.tar").write_bytes((images / "1.tar").read_bytes()[:-1024])
    with pytest.raises(TrainerError, match=r"1\.tar has .* bytes, but its index says"):
        go(run, images, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("tokens-*.tar"))) == 3 and not list((tmp_path / "out").glob("*unfinished"))


def tokenize_until_killed(arguments: list[str]) -> None:
    """`ibq tokenize`, ended by SIGKILL in its third batch."""
    real, calls = module._encode, []

    def killed(*inputs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*inputs)

    module._encode = killed
    cli.main(["tokenize", *arguments])


def test_a_killed_job_continues(run, tars, flipped, tmp_path, ranks):
    """SIGKILL while a shard is written: incomplete shards are written again."""
    arguments = [run, "--images", tars, "--out", tmp_path / "out", "--views", "flip", "--samples-per-shard", 3]
    ended = ranks.command(1, tokenize_until_killed, [*map(str, arguments), "--device", "cpu"])
    assert ended.statuses == [-signal.SIGKILL], ended.err
    assert len(list((tmp_path / "out").glob("tokens-*.tar"))) == 2
    done = go(run, tars, tmp_path / "out", views="flip")
    assert done.made == 14 - 5 and files(tmp_path / "out") == files(flipped.out)


# ------------------------------------------------------------------------------------------------------- several sizes

SIZES = "40x40,32x64,64x32"
# Width and height of pictures, and their size as height x width; None: too small.
SHAPES = {(50, 50): "40x40", (80, 42): "32x64", (42, 80): "64x32", (70, 36): "32x64", (30, 60): None}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A tar of 17 pictures of five shapes."""
    path = tmp_path_factory.mktemp("shapes") / "shapes.tar"
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for number in range(17):
            size = [*SHAPES][number % len(SHAPES)]
            writer.write({"__key__": f"{number:02d}", "png": png(number, size), "cls": b"%d" % number})
    return path


@pytest.fixture(scope="module")
def of_sizes(run, shapes, tmp_path_factory):
    """Tokens of the pictures of five shapes, at three sizes."""
    out = tmp_path_factory.mktemp("tokens") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        return go(run, shapes, out, image_size=SIZES, views="flip", samples_per_shard=6, batch_size=4)


def test_each_picture_has_the_codes_of_its_crop(run, shapes, of_sizes):
    tokenizer, expected = model_zoo.load_tokenizer(run), {}
    for number in range(17):
        shape = [*SHAPES][number % len(SHAPES)]
        if SHAPES[shape] is not None:
            size = parse_size(SHAPES[shape])
            image = resize_and_center_crop(decode(png(number, shape)), size, resize_named("pil_antialias"))
            pixels_bchw = torch.from_numpy(pixels_chw(image))[None]
            views_bchw = torch.cat([pixels_bchw, pixels_bchw.flip(-1)])
            index_vhw = torch.cat([tokenizer.tokenize((one[None].double() / 127.5 - 1).float()) for one in views_bchw])
            expected[f"{number:02d}"] = index_vhw.numpy()
    found = {sample.key: unpack_codes(sample.members["codes"])[1] for sample in samples(of_sizes.out)}
    assert list(found) == list(expected)  # in the order of the input
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    assert of_sizes.grids == {"5x5": 4, "4x8": 7, "8x4": 3}
    reason = "60 x 30 pixels are smaller than its size 64x32"
    assert of_sizes.skipped == [f"{shapes}, {number:02d}: {reason}" for number in (4, 9, 14)]


def test_the_record_and_the_index_tell_sizes_and_grids(of_sizes):
    record = json.loads((of_sizes.out / "tokens.json").read_text())
    assert (record["sizes"], record["grids"]) == (["40x40", "32x64", "64x32"], ["5x5", "4x8", "8x4"])
    assert record["max_enlargement"] == 1 and not {"grid", "image_size"} & record.keys()
    sizes_n2 = Index(of_sizes.out / "index.safetensors").tensors["sizes"]
    grids = [unpack_codes(sample.members["codes"])[0].grid for sample in samples(of_sizes.out)]
    assert list(map(tuple, sizes_n2.tolist())) == grids


def test_training_divides_what_it_writes(of_sizes):
    spec = TokenSpec(of_sizes.tokenizer, 300, ((4, 8), (8, 4), (5, 5)))
    config = DataConfig(train=str(of_sizes.out), content="tokens", workers=0, lanes=4)
    check(config, tokens=spec)
    steps = Steps(config, batch=4, tokens=spec)
    lengths = {len(codes) // 4 for step in steps.infos(6) for _, codes in step}
    assert lengths == {25, 32}


def test_pixels_are_a_list_of_sizes(run, shapes, tmp_path):
    made = [str(size) for size in sizes_of(64, 1.4)]
    assert made == ["72x56", "64x64", "56x72"]
    said = r"none of the 17 images .* can be used, the first: .*00: 50 x 50 pixels are smaller than its size .*: raise "
    with pytest.raises(TrainerError, match=said):
        go(run, shapes, tmp_path / "pixels", pixels="64", max_aspect=1.4)
    enlarged = go(run, shapes, tmp_path / "pixels", pixels="64", max_aspect=1.4, max_enlargement=3)
    same = go(run, shapes, tmp_path / "same", image_size=",".join(made), max_enlargement=3)
    assert enlarged.samples == 17 and files(enlarged.out) == files(same.out)
    assert go(run, shapes, enlarged.out, image_size=",".join(made), max_enlargement=3.0).made == 0


def test_a_tokenizer_of_buckets_makes_squares_and_names_the_way_to_keep_shapes(tars, tmp_path):
    model = tokenizer_of(0, **MODEL)
    data = {"image_size": SIDE, "buckets": ["32x64", "64x32"], "max_enlargement": 4}
    buckets = write_run(
        tmp_path / "buckets", {"task": "tokenizer", "model": model.config, "data": data}, tokenizer=model
    )
    said = []
    whole = go(buckets, tars, tmp_path / "squares", weights="raw", on_note=said.append)
    assert whole.grids.keys() == {f"{SIDE // 8}x{SIDE // 8}"}
    (line,) = said
    assert f"all images become squares of data.image_size={SIDE} pixels, but the tokenizer was trained on" in line
    size = line.rpartition("--size ")[2]
    shaped = go(buckets, tars, tmp_path / "shaped", weights="raw", image_size=size, on_note=said.append)
    assert shaped.grids.keys() == {"4x8"} and said == [line]


def test_views_of_a_rectangle():
    content, resize, size = png(1, (80, 60)), resize_named("pil_antialias"), Size(24, 40)
    larger = np.asarray(resize_and_center_crop(decode(content), Size(26, 44), resize)).transpose(2, 0, 1)
    ten = Views("ten-crop", [Size(16, 16), size], "pil_antialias", 1.0)(content)
    assert ten.shape == (10, 3, 24, 40)
    for view, (left, top) in zip(ten[:5], [(2, 1), (0, 0), (4, 0), (0, 2), (4, 2)], strict=True):
        assert np.array_equal(view, larger[:, top : top + 24, left : left + 40])
    assert np.array_equal(ten[5:], ten[:5, ..., ::-1])


def test_a_lost_shard_of_several_sizes_is_written_again(run, shapes, of_sizes, tmp_path):
    """A shard does not depend on the others, so it does not depend on the number of processes."""
    out = shutil.copytree(of_sizes.out, tmp_path / "out")
    (out / "tokens-000001.tar").unlink()
    again = go(run, shapes, out, image_size=SIZES, views="flip", samples_per_shard=6, batch_size=4)
    assert again.made == 5 and files(out) == files(of_sizes.out)


def test_batches_of_large_sizes_are_smaller():
    tokenizer = Mock()
    tokenizer.tokenize = Mock(side_effect=lambda images_bchw: images_bchw[:, 0, ::8, ::8].long())
    views = [np.full((2, 3, side, side), number, np.uint8) for number, side in enumerate((16, 32, 16, 32, 16))]
    codes = module._encode(tokenizer, views, 4 * 16 * 16, torch.device("cpu"))
    assert [one.shape for one in codes] == [(2, 2, 2), (2, 4, 4), (2, 2, 2), (2, 4, 4), (2, 2, 2)]
    batches = [call.args[0].shape[::3] for call in tokenizer.tokenize.call_args_list]
    assert batches == [(4, 16), (2, 16), (1, 32), (1, 32), (1, 32), (1, 32)]


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({"image_size": SIZES}, {}, "(grid null, now [4, 4]): give --size 40x40,32x64,64x32 again to continue"),
        ({}, {"image_size": SIZES}, "give --size 32 again to continue"),
        ({"image_size": SIZES}, {"image_size": "40x40"}, "give --size 40x40,32x64,64x32 again to continue"),
        (
            {"image_size": SIZES},
            {"image_size": SIZES, "max_enlargement": 2},
            "(max_enlargement 1.0, now 2.0): give --max-enlargement 1.0 again to continue",
        ),
    ],
)
def test_other_sizes_are_not_mixed(run, shapes, tmp_path, first, then, message):
    go(run, shapes, tmp_path / "out", **first)
    before = files(tmp_path / "out")
    assert message in refusal(TrainerError, go, run, shapes, tmp_path / "out", **then)
    assert files(tmp_path / "out") == before


def test_the_command_names_the_grids_for_training(run, shapes, tmp_path, capsys):
    arguments = run, "--images", shapes, "--out", tmp_path / "out", "--size", SIZES, "--device", "cpu"
    with pytest.raises(SystemExit) as ended:
        cli.main(["tokenize", *map(str, arguments)])
    assert not ended.value.code
    assert (
        "grids: 5x5 (4), 4x8 (7), 8x4 (3): train with 'model.grids=[5x5,4x8,8x4]' 'model.grid=[4,8]'"
        in capsys.readouterr().out
    )


def test_impossible_sizes_get_one_line(run, shapes, tmp_path):
    for options, message in [
        ({"image_size": "32x"}, "--size 32x: give pixels of a square, or sizes as HEIGHTxWIDTH of at most 8192"),
        ({"image_size": "32x40,9000x8"}, "--size 32x40,9000x8: give pixels of a square"),
        ({"image_size": "32x44"}, "--size 32x44 is not a multiple of the tokenizer's factor 8: take 32x48"),
        ({"image_size": "0"}, "--size 0 must be at least 1"),
        ({"image_size": "32", "pixels": "64"}, "--size and --pixels are both given: leave one out"),
        ({"pixels": "large"}, "--pixels large: give sides of squares in pixels, such as 512 or 256,512"),
        ({"pixels": "60"}, "--pixels: 60 must be a multiple of 8 of at most 8192"),
        ({"pixels": "32"}, "--pixels 32: sides such as those of 28x36 are no multiples of the tokenizer's factor 8"),
        ({"pixels": "64,128,192,256,320,384", "max_aspect": 8}, "sizes are more than 64: lower --max-aspect"),
        ({"image_size": SIZES, "max_aspect": 2}, "--max-aspect is for --pixels: leave it out"),
        ({"image_size": SIZES, "max_enlargement": 0.5}, "--max-enlargement 0.5 must be at least 1, and finite"),
        ({"image_size": 32, "max_enlargement": 2}, "--max-enlargement is for --pixels and for sizes such as"),
        ({"max_enlargement": 2}, "--max-enlargement is for --pixels and for sizes such as"),
    ]:
        assert message in refusal((TrainerError, DataError), go, run, shapes, tmp_path / "out", **options), options
        assert not (tmp_path / "out").exists()
    adm = write_run(
        tmp_path / "adm",
        {"task": "tokenizer", "model": tokenizer_of(1, **MODEL).config, "data": {"resize": "adm_center_crop"}},
        tokenizer_ema=tokenizer_of(1, **MODEL),
    )
    said = refusal(TrainerError, go, adm, shapes, tmp_path / "out", image_size=SIZES)
    assert "data.resize=adm_center_crop of the run is defined for squares only: give squares to --size" in said
