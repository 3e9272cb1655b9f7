"""`ibq shards check` and `ibq shards stats`: what they print, write and return."""

import gzip
import json
import os
import pty
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from comparing import assert_refused
from PIL import Image
from safetensors.torch import save_file
from samples import encoded, picture, write_tar
from serving import Server
from tokens import FINGERPRINT, write_tokens

from data import DataConfig, TrainStream
from data.index import Index
from data.locks import WriterLock, file_lock, folder_lock
from data.prep.stats import Histogram
from tools import shards_text


@pytest.fixture
def shards(ibq):
    """`ibq shards ARGUMENTS`, in this process and, unless they hold another --jobs, without others."""
    return lambda command, *arguments: ibq("shards", command, "--jobs", 1, *arguments)


def image(number: int) -> bytes:
    return encoded(picture(number, (64 + 8 * (number % 7), 64)))


def write(path: Path, shard: int, keys=range(6), **more: bytes) -> None:
    write_tar(path, [{"__key__": f"{shard}-{n}", "jpg": image(10 * shard + n), **more} for n in keys])


@pytest.fixture
def folder(tmp_path):
    """Four whole tars of six samples with captions and classes."""
    (tmp_path / "tars").mkdir()
    for shard in range(4):
        write(tmp_path / f"tars/train-{shard:06d}.tar", shard, txt=b"a caption", cls=str(shard % 2).encode())
    return tmp_path / "tars"


@pytest.fixture
def damaged(folder):
    """Twelve tars: four whole ones, six broken in six ways, one with a doubled key and one with a bad image."""
    for shard in range(4, 12):
        write(folder / f"train-{shard:06d}.tar", shard, txt=b"a caption")

    def change(shard, how):
        path = folder / f"train-{shard:06d}.tar"
        content = path.read_bytes()
        path.write_bytes(how(content, content.index(f"{shard}-3.jpg".encode())))

    change(4, lambda content, at: content[:at])
    change(5, lambda content, at: content[: at + 700])
    change(6, lambda content, at: content[:at] + bytes(512) + content[at + 512 :])
    change(7, lambda content, at: content + b"garbage")
    change(8, lambda content, at: gzip.compress(content))
    change(9, lambda content, at: b"")
    write(folder / "train-000010.tar", 0, keys=[2], txt=b"the same key as another")
    change(11, lambda content, at: content[: at + 512] + b"no image" + content[at + 520 :])
    return folder


BROKEN = {4: "truncated", 5: "truncated", 6: "corrupt", 7: "corrupt", 8: "corrupt", 9: "empty"}


# --------------------------------------------------------------------------------------------------------------- check


def test_twelve_tars_with_eight_damages(shards, damaged, tmp_path):
    (status,), (out,), (err,) = shards("check", damaged, "--decode", "--json", tmp_path / "found.json")
    assert status == 1 and err == ""
    lines = out.splitlines()
    for shard, kind in BROKEN.items():
        assert [line for line in lines if line.startswith(f"broken  train-{shard:06d}.tar  {kind}: ")], kind
    first = damaged / "train-000000.tar"
    assert f"flawed  train-000010.tar  duplicate key: sample 0: 0-2 is also the key of sample 2 of {first}" in lines
    assert "flawed  train-000011.tar  undecodable: sample 3: 11-3: no JPEG, PNG or WebP image" in lines
    assert len(lines) == 8 + 2
    assert lines[-2].startswith("12 tars, ") and lines[-2].endswith(": 4 ok, 2 flawed, 6 broken")
    broken = ",".join(f"train-{shard:06d}.tar" for shard in BROKEN)
    assert lines[-1] == f"to train without the broken ones: 'data.quarantine=[{broken}]'"
    records = [json.loads(line) for line in (tmp_path / "found.json").read_text().splitlines()]
    assert [record["shard"] for record in records] == [f"{damaged}/train-{n:06d}.tar" for n in range(12)]
    assert [record["status"] for record in records] == ["ok"] * 4 + ["broken"] * 6 + ["flawed"] * 2
    kinds = [problem["kind"] for record in records for problem in record["problems"]]
    assert Counter(kinds) == {**Counter(BROKEN.values()), "duplicate key": 1, "undecodable": 1}
    for record in records:
        assert set(record) == {"shard", "status", "samples", "bytes", "sha256", "counts", "problems"}
        assert record["bytes"] == os.path.getsize(record["shard"]) and len(record["sha256"]) == 64


def test_the_quarantine_that_is_printed_is_one_that_trains(shards, damaged):
    quarantine = shards("check", damaged).out.splitlines()[-1].split("[")[1].split("]")[0].split(",")
    config = DataConfig(train=str(damaged), quarantine=quarantine, image_size=32, workers=0, max_bad_in_a_row=1)
    options = {"global_batch_size": 5, "micro_batch_size": 5, "rank": 0, "world_size": 1, "seed": 0}
    assert len(next(TrainStream(config, **options)).infos) == 5


def test_json_on_stdout_is_alone_there(shards, damaged):
    (status,), (out,), (err,) = shards("check", damaged, "--json", "-")
    assert status == 1
    assert len([json.loads(line) for line in out.splitlines()]) == 12
    assert "4 ok, 2 flawed" not in err and "6 broken" in err  # without --decode, one is not noticed


def test_whole_tars_are_ok_and_an_index_is_written_and_compared(shards, folder):
    out = shards("check", folder).succeeded().out
    assert len(out.splitlines()) == 1 and ": 4 ok\n" in out
    out = shards("check", folder, "--write-index").succeeded().out
    place = folder / "index.safetensors"
    assert f"wrote {place}: 4 tars, 24 samples\n" in out
    assert len(Index(place)) == 4
    shards("check", folder).succeeded()
    path = folder / "train-000002.tar"
    content, times = path.read_bytes(), path.stat()
    at = content.index(b"\xff\xd9") - 50
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # neither its size nor its time tells
    (status,), (out,), _ = shards("check", folder)
    assert status == 1
    assert out.startswith(f"flawed  train-000002.tar  index: not as in the index {place}: other content (SHA-256)\n")
    os.remove(folder / "train-000003.tar")
    assert f"broken  train-000003.tar  missing: in the index {place}, but not there\n" in shards("check", folder).out
    shards("check", folder, "--write-index").succeeded()  # written again, it is of what is there
    shards("check", folder).succeeded()


@pytest.mark.parametrize("option", ["beside the tars", "elsewhere"])
def test_an_index_has_one_writer(shards, folder, tmp_path, option):
    elsewhere = tmp_path / "mine.safetensors"
    beside = option == "beside the tars"
    arguments = () if beside else ("--index", elsewhere)
    path = folder_lock(folder) if beside else file_lock(elsewhere)
    with WriterLock(path, "other") as other:
        other.take()
        refused = shards("check", folder, "--write-index", *arguments)
        assert_refused(refused, f"{folder if beside else elsewhere} is being written by process ")
    assert shards("check", folder, "--write-index", *arguments).status == 0 and not path.exists()


def test_no_index_is_written_over_broken_tars_unless_they_are_left_out(shards, damaged, tmp_path):
    (status,), (out,), _ = shards("check", damaged, "--write-index")
    assert status == 1
    assert "wrote no index: move the broken tars elsewhere, or leave them out with --skip-broken" in out
    assert not (damaged / "index.safetensors").exists()
    index = "--index", tmp_path / "i.safetensors"
    (status,), (out,), _ = shards("check", damaged, "--write-index", "--skip-broken", *index)
    assert status == 1 and f"wrote {tmp_path / 'i.safetensors'}: 6 tars, 31 samples" in out
    numbers = [n for n in range(12) if n not in BROKEN]
    assert Index(tmp_path / "i.safetensors").names == [f"train-{n:06d}.tar" for n in numbers]
    (status,), (out,), _ = shards("check", damaged, *index)
    assert status == 1 and "  index: " not in out  # which are not in it for a reason
    for shard in BROKEN:
        os.remove(damaged / f"train-{shard:06d}.tar")
    (damaged / "train-000010.tar").unlink()
    shards("check", damaged, "--write-index").succeeded()


def test_nothing_but_broken_tars_give_no_index(shards, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    (status,), (out,), _ = shards("check", tmp_path, "--write-index", "--skip-broken")
    assert status == 1 and "wrote no index" in out


def test_patterns_lists_doubled_names_and_remote_tars(shards, folder, tmp_path):
    (tmp_path / "list.txt").write_text(f"# mine\n{folder}/train-000000.tar\n")
    out = shards("check", f"{folder}/train-{{000000..000001}}.tar", tmp_path / "list.txt").succeeded().out
    assert out.startswith("2 tars, 12 samples, ")
    with Server(folder=folder) as server:
        urls = server.url("/train-{000000..000003}.tar?token=secret")
        assert_refused(shards("check", urls, "--write-index"), "choose a place with --index FILE")
        place = tmp_path / "remote.safetensors"
        written = shards("check", urls, "--write-index", "--index", place, "--json", "-").succeeded()
        assert "4 tars, 24 samples" in written.err and "secret" not in written.out + written.err
        shards("check", urls, "--index", place).succeeded()
    shards("check", folder, "--index", place).succeeded()  # local copies of what was indexed in the store


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check"], "Missing argument 'PATH'"),
        (["check", "nowhere"], "no such tar or folder: nowhere"),
        (
            ["check", "{tars}", "--write-index", "i.safetensors"],
            "i.safetensors is not a tar; to use an index, write --index",
        ),
        (["check", "{tars}", "--skip-broken"], "--skip-broken needs --write-index"),
        (["check", "{tars}", "--index", "none.safetensors"], "cannot read the index none.safetensors"),
        (["check", "{tars}", "--json", "nowhere/found.json"], "cannot write nowhere/found.json"),
        (
            ["check", "{tars}", "--write-index", "--index", "nowhere/i.safetensors"],
            "cannot write nowhere/i.safetensors",
        ),
        (["check", "{tars}", "--jobs", "0"], "--jobs"),
        (["check", "pipe:cat a.tar"], "pipe: runs a shell command"),
        (["stats", "nowhere"], "no such tar or folder: nowhere"),
        (["stats", "{tars}", "--source", "cats"], "data/sources.yaml has no cats: choose one of bundled"),
        (["stats", "{tars}", "--picture", "found.pdf"], "found.pdf does not end in .png"),
        (["stats", "{tars}", "--picture", "nowhere/found.png"], "cannot write nowhere/found.png"),
        (["stats", "{tars}", "--samples", "0"], "--samples"),
    ],
)
def test_mistakes_are_one_line_and_status_2(refused_by_ibq, folder, monkeypatch, arguments, said):
    monkeypatch.chdir(folder.parent)
    assert said in refused_by_ibq("shards", *(argument.format(tars=folder) for argument in arguments))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["tars"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "--json", "{file}"],
        ["check", "--write-index", "--index", "{file}"],
        ["stats", "--json", "{file}"],
        ["stats", "--picture", "{file}"],
    ],
    ids=["check-json", "check-index", "stats-json", "stats-picture"],
)
def test_files_of_others_are_not_replaced(shards, refused_by_ibq, folder, tmp_path, arguments):
    """Only files of earlier calls of the same command are, and empty ones."""
    file = tmp_path / ("x.png" if "--picture" in arguments else "x.json")
    command = [argument.format(file=file) for argument in arguments]
    file.touch()
    for _ in range(2):
        shards(command[0], folder, *command[1:]).succeeded()
        assert file.stat().st_size
    model, picture = tmp_path / "model.safetensors", tmp_path / "other.png"
    save_file({"weight": torch.zeros(3)}, model)
    Image.new("RGB", (8, 8)).save(picture)
    for content in (b"[1, 2]\n", b'{"shard": 1}\n', b"\xff\0", model.read_bytes(), picture.read_bytes()):
        file.write_bytes(content)
        said = refused_by_ibq("shards", command[0], folder, *command[1:])
        assert f"{file} already exists and is of no earlier call: choose another file, or remove it" in said
        assert file.read_bytes() == content


def test_an_index_beside_the_tars_is_written_anew_whatever_it_holds(shards, folder):
    (folder / "index.safetensors").write_bytes(b"damaged")
    shards("check", folder, "--write-index").succeeded()
    shards("check", folder).succeeded()


def test_a_bar_is_drawn_on_a_terminal(shards, monkeypatch, damaged):
    (status,), (plain,), (err,) = shards("check", damaged)
    assert (status, err) == (1, "") and "\x1b" not in plain and "6 broken" in plain
    leader, follower = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(follower, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        (status,), (out,), _ = shards("check", damaged)
        drawn = os.read(leader, 1 << 16)
    os.close(leader)
    assert (status, out) == (1, plain)
    assert b"checking" in drawn and b"/12" in drawn


@pytest.mark.process
def test_several_processes_find_the_same(shards, damaged):
    assert shards("check", damaged, "--jobs", 2) == shards("check", damaged)


# --------------------------------------------------------------------------------------------------------------- stats


def test_stats_in_words_bars_json_and_a_picture(shards, folder, tmp_path):
    shown = tmp_path / "photos.png"
    ended = shards("stats", folder, "--picture", shown, "--json", tmp_path / "found.json").succeeded()
    assert ended.err == ""
    lines = ended.out.splitlines()
    assert lines[0] == f"{folder}: 4 shards, 24 samples"
    assert lines[1].endswith(": 24 JPEG")
    assert lines[2:4] == ["  captions: all", "  classes: all in 2 classes of 12 to 12"]
    assert "shorter side, pixels: 64 to 64, median 64" in lines
    assert f"  64 to 127 {'█' * 40}  100%          24" in lines
    assert all(len(line) <= 80 for line in lines[1:-1])
    assert lines[-1] == f"drew {shown}"
    with Image.open(shown) as picture:
        assert picture.width > 500 and picture.height > 300
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["shards"], found["samples_in_all"], found["samples"]) == (4, 24, 24)
    shapes = Counter(
        ("1:1", "1:1", "4:3", "4:3", "3:2", "3:2", "16:9")[(10 * shard + n) % 7] for shard in range(4) for n in range(6)
    )
    assert found["histograms"]["shape"] == shapes
    assert found["captions"] == {"missing": 0, "characters": {"min": 9, "median": 9, "max": 9}}
    assert found["classes"] == {"count": 2, "missing": 0, "images": {"min": 12, "median": 12, "max": 12}}


def test_stats_of_some_samples_and_as_json_alone(shards, folder):
    ended = shards("stats", folder, "--samples", 5, "--json", "-").succeeded()
    assert ended.err.startswith(f"{folder}: 4 shards, 5 of 24 samples\n")
    found = json.loads(ended.out)
    assert (found["samples"], found["samples_in_all"]) == (5, 24)
    assert "unusable" in found and sum(found["histograms"]["shorter_side"].values()) == 5


def test_stats_report_what_is_missing(shards, tmp_path):
    samples = [{"__key__": "bad", "jpg": b"no image"}]
    for n, punsafe in enumerate((0.1, 0.3, "n/a", None)):
        metadata = json.dumps({"punsafe": punsafe, "similarity": 0.5}).encode()
        samples.append({"__key__": str(n), "jpg": image(n), "json": metadata, **({"txt": b"a"} if n else {})})
    write_tar(tmp_path / "a.tar", samples)
    out = shards("stats", tmp_path / "a.tar", "--source", "laion-coco").succeeded().out
    lines = out.splitlines()
    assert lines[2:4] == ["  captions: 3, missing in 1", "  classes: none"]
    assert "  nsfw (punsafe): 3, missing in 1, from 0.1 to 0.3, mean 0.2, no number in 1" in lines
    assert "  similarity (similarity): all, from 0.5 to 0.5, mean 0.5" in lines
    assert "  watermark (pwatermark): none" in lines
    assert lines[9:11] == ["  unusable: 1", f"    bad in {tmp_path}/a.tar: no JPEG, PNG or WebP image"]


def test_stats_of_nothing_that_can_be_used(shards, tmp_path):
    write_tar(tmp_path / "a.tar", [{"__key__": "bad", "jpg": b"no image"}])
    out = shards("stats", tmp_path / "a.tar", "--picture", tmp_path / "a.png").succeeded().out
    assert out.splitlines() == [
        f"{tmp_path}/a.tar: 1 shard, 1 sample",
        "  unusable: 1",
        f"    bad in {tmp_path}/a.tar: no JPEG, PNG or WebP image",
    ]
    assert not (tmp_path / "a.png").exists()


def test_stats_of_a_folder_of_images(shards, tmp_path):
    (tmp_path / "photos").mkdir()
    for n in range(3):
        (tmp_path / "photos" / f"{n}.jpg").write_bytes(image(n))
    out = shards("stats", tmp_path / "photos").succeeded().out
    assert out.startswith(f"{tmp_path}/photos: 1 shard, 3 samples\n")


def test_bars_of_any_share():
    bins = {"none": 0, "few": 1, "some": 5_000, "most": 999_999_999}
    rows = shards_text.histogram_lines(Histogram("n", "title", bins))
    assert rows[0] == "title" and len({len(row) for row in rows[1:]}) == 1 and len(rows[1]) <= 80
    bars = [row[7 : 7 + shards_text.BAR_CHARACTERS] for row in rows[1:]]
    assert bars[0].strip() == "" and bars[1].strip() == "▏" and bars[3] == "█" * shards_text.BAR_CHARACTERS
    assert [row[48:].split()[0] for row in rows[1:]] == ["0%", "<0.1%", "<0.1%", "100%"]


# -------------------------------------------------------------------------------------------------------------- tokens


def test_token_shards_are_checked_indexed_and_counted(shards, tmp_path):
    folder = write_tokens(tmp_path / "tokens", count=20, per_shard=8)
    _, (out,), (err,) = shards("check", folder, "--write-index").succeeded()
    assert err == "" and "3 tars, 20 samples" in out and (folder / "index.safetensors").is_file()
    out = shards("stats", folder, "--json", tmp_path / "stats.json").succeeded().out
    assert f"  tokens of tokenizer {FINGERPRINT}: 256 codes, 8 x 8, 1 view: 20" in out
    assert "a sample: 20 of tokens" in out and "  classes: all in 4 classes of 5 to 5" in out
    told = json.loads((tmp_path / "stats.json").read_text())["tokens"]
    assert told == [{"tokenizer": FINGERPRINT, "vocabulary": 256, "views": 1, "grid": [8, 8], "samples": 20}]
    path = folder / "tokens-000001.tar"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"codes":256', b'"codes":100', 1))
    (status,), (out,), _ = shards("check", path)
    assert status == 1 and "undecodable: sample 0: 000008: code " in out and "outside the 100 of" in out
