"""`ibq bench data`: what each scheme delivers and reads, the tables, the files, and mistakes in one line."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter

import data
from tools import cli
from tools.bench import command as bench
from tools.bench import data as bench_data

SAMPLES = 80  # in two tars


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Two tars of small pictures, without an index, as a folder."""
    folder = tmp_path_factory.mktemp("bench") / "tars"
    folder.mkdir()
    for tar in range(2):
        with TarWriter(str(folder / f"{tar}.tar"), encoder=False, mtime=0) as writer:
            for n in range(SAMPLES // 2):
                pixels_hwc = np.random.default_rng(n).integers(0, 256, (36, 48, 3), np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels_hwc).save(buffer, "JPEG")
                writer.write({"__key__": f"{tar}-{n:02d}", "jpg": buffer.getvalue(), "txt": b"noise"})
    return str(folder)


@pytest.fixture(autouse=True)
def unset_ranks(monkeypatch):
    """Jobs run in processes of their own elsewhere, and may set these."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


@pytest.fixture
def in_this_process(monkeypatch):
    """Spares a fresh process for each figure; what is said on stdout stays as it is."""

    def run(job, **arguments):
        data.tar_format._scan.cache_clear()
        try:
            return getattr(bench_data, job)(**arguments)
        except data.DataError as error:
            return {"failed": str(error)}

    monkeypatch.setattr(bench_data, "_run", run)


def run(*arguments):
    with pytest.raises(SystemExit) as exited:
        cli.main(["bench", "data", *map(str, arguments)])
    return exited.value.code


def fail(capsys, *arguments):
    """The one line on stderr of `ibq bench data ARGUMENTS`."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ibq: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("workers", [0, 2])
def test_the_bound_goes_over_all_samples(tars, workers):
    rate = bench_data.Rate(**bench_data.measure(tars, 16, "bound", workers, 2, 0.01))
    assert rate.images >= SAMPLES
    assert rate.images % (SAMPLES // max(1, workers)) == 0
    assert rate.processor_seconds > 0


@pytest.mark.parametrize(("scheme", "least"), [("ibq", SAMPLES), ("webdataset", SAMPLES), ("discard", SAMPLES // 2)])
def test_a_rate_is_of_whole_passes(tars, scheme, least):
    rate = bench_data.Rate(**bench_data.measure(tars, 16, scheme, 1, 2, 0.001))
    assert rate.images >= least
    assert rate.images_per_second > 0
    assert rate.processor_ms > 0


def test_bytes_of_an_epoch(tars):
    ibq, webdataset, discard = (
        bench_data.Bytes(**bench_data.count_bytes(tars, scheme, 2)) for scheme in ("ibq", "webdataset", "discard")
    )
    assert ibq.images == ibq.distinct == 64  # a step takes 64, and 80 are there
    assert ibq.by_storage == ibq.needed
    assert ibq.scanned > 0  # there is no index
    assert webdataset.images == webdataset.distinct == discard.images == SAMPLES
    assert discard.distinct <= SAMPLES
    assert webdataset.ratio == pytest.approx(1, abs=0.2)  # small tars are padded to 10 KiB
    assert discard.read == pytest.approx(2 * webdataset.read, rel=0.05)


def test_too_few_tars_or_samples_are_said(tars):
    with pytest.raises(data.DataError, match="fewer tars than 3 ranks x 1 worker"):
        bench_data.count_bytes(tars, "webdataset", 3)
    with pytest.raises(data.DataError, match="80 samples are fewer than 3 ranks x 32"):
        bench_data.count_bytes(tars, "ibq", 3)


def test_memory_of_each_worker(tars):
    memory = bench_data.Memory(**bench_data.watch_memory(tars, workers=2, batches=20))
    assert memory.batches_n == list(range(1, 21))
    assert np.shape(memory.resident_mib_nw) == np.shape(memory.proportional_mib_nw) == (20, 2)
    assert np.all(np.array(memory.resident_mib_nw) > np.array(memory.proportional_mib_nw))
    assert memory.tenths == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]


def test_a_slope_leaves_the_first_tenth_out():
    batches = [100 * n for n in range(1, 101)]
    growing = [500.0 if n <= 1000 else 300 + 0.002 * n for n in batches]
    memory = bench_data.Memory(batches, [[size, 7.0] for size in growing], [])
    assert memory.slopes == pytest.approx([2, 0])


def test_tars_that_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_data, "TARS", 2)
    monkeypatch.setattr(bench_data, "SAMPLES_OF_TAR", 3)
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
        bench_data.generate(str(tmp_path / name))
    source = bench_data._source(bench_data.Tars(str(tmp_path / "once"), 64))
    assert source.samples == 6
    assert (tmp_path / "once" / "index.safetensors").is_file()
    for shard in source.shards:
        path = Path(shard.url)
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        for n in range(3):
            sample = shard.read(n)
            assert min(Image.open(io.BytesIO(sample.image())).size) == 512
            assert sample.members["txt"].startswith(b"part of ")


def test_a_fresh_process_answers(tars):
    answer = bench._run("count_bytes", module="bench_data", root=tars, scheme="ibq", world=1)
    assert (answer["scheme"], answer["images"]) == ("ibq", 64)
    answer = bench._run("count_bytes", module="bench_data", root=tars + "/nowhere", scheme="ibq", world=1)
    assert answer == {"failed": f"no such tar or folder: {tars}/nowhere"}


# --------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # as many workers as there are cores, or more
def test_the_tables_and_the_files(tars, tmp_path, capsys, in_this_process):
    out = tmp_path / "table.md"
    arguments = ["--data", tars, "--workers", "0,3", "--world", 2, "--image-size", 16, "--seconds", 0.001]
    assert not run(*arguments, "--repeats", 2, "--memory-batches", 20, "--out", out)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line for line in lines if len(line) > 120] == []
    at = next(n for n, line in enumerate(lines) if line.startswith("scheme "))
    rows = [line.split() for line in lines[at + 1 : at + 9]]
    assert [row[:2] for row in rows] == [[scheme, n] for n in "03" for scheme in bench_data.SCHEMES]
    assert rows[0][3] == rows[0][5] == "100.0%"
    assert all(len(row) == 8 for row in rows[:6])  # two repeats
    for row in rows[6:]:
        assert " ".join(row[2:]) == "not measured: there are fewer tars than 1 rank x 3 workers"
    assert "measuring 1 of 16: bound, no workers" in captured.err
    assert "3 workers: ibq delivers " in captured.out
    assert "finding the samples of tars that have no index took " in captured.out
    assert "watching the memory of 3 workers over 20 batches" in captured.err

    text = out.read_text()
    assert f"`ibq bench data --data {tars} --workers 0,3" in text
    assert "| scheme | workers | images/s |" in text
    assert "| one epoch, W = 2 | images | distinct |" in text
    assert "| 100 % | 20 |" in text
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    record = json.loads(out.with_suffix(".json").read_text())
    assert len(record["rows"]) == 8
    assert [len(row["rates"]) for row in record["rows"]] == [2] * 6 + [0, 0]
    assert record["plan"]["world"] == 2
    assert record["bytes"][0]["by_storage"] == record["bytes"][0]["needed"]


def test_memory_may_be_left_out_and_what_fails_is_said(tars, tmp_path, capsys, in_this_process):
    out = tmp_path / "table.md"
    arguments = ["--data", tars, "--workers", 0, "--world", 3, "--image-size", 16, "--seconds", 0.001]
    assert not run(*arguments, "--repeats", 1, "--memory-batches", 0, "--out", out)
    said = capsys.readouterr().out
    assert "bytes of webdataset are not counted: there are fewer tars than 3 ranks x 1 worker" in said
    assert "bytes of ibq are not counted: 80 samples are fewer than 3 ranks x 32" in said
    assert "resident" not in said + out.read_text()
    assert json.loads(out.with_suffix(".json").read_text())["memories"] == []


def test_ratios_are_of_the_fastest_repeats():
    def row(scheme, *speeds):
        return bench_data.Row(2, scheme, [bench_data.Rate(1000, speed, 1000 / speed) for speed in speeds])

    plan = bench_data.Plan([2], 4, 256, 5.0, 2, 0)
    rows = [row("bound", 200, 90), row("ibq", 100, 190), row("webdataset", 95, 20), row("discard", 47.5)]
    report = bench_data.Report([], "", plan, rows, [], [], [])
    assert bench_data._speed_cells(rows[1], rows[0])[2:] == ["190.0", "95.0%", "5.26", "95.0%", "100 190"]
    assert bench_data._notes(report) == [
        "2 workers: ibq delivers 95.0% of the bound, 2.00 times the images of webdataset, "
        "4.00 times the images of discard"
    ]


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workers", "some"], "--workers: 'some' is no list of whole numbers from 0 on, as in 0,2,4"),
        (["--workers", "-1"], "--workers"),
        (["--world", "0"], "--world"),
        (["--image-size", "0"], "--image-size"),
        (["--seconds", "0"], "0.0 is no number above 0"),
        (["--seconds", "nan"], "is no number above 0"),
        (["--repeats", "0"], "--repeats"),
        (["--memory-batches", "5"], "20 at least, or 0 for none"),
        (["--memory-batches", "-5"], "20 at least, or 0 for none"),
        (["--out", "table.txt"], "does not end in .md"),
        (["--data", "nowhere"], "no such tar or folder: nowhere"),
        (["--data", "https://user:secret@store/a.tar"], "https://store/a.tar is no local tar: copy some tars here"),
        (["--data", "images.zip"], "images.zip is no local tar"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images.zip").touch()
    message = fail(capsys, *arguments)
    assert said in message
    assert "secret" not in message


@pytest.mark.parametrize("suffix", [".md", ".png", ".json"])
def test_nothing_is_overwritten(capsys, tmp_path, suffix):
    (tmp_path / f"table{suffix}").touch()
    assert "is there already" in fail(capsys, "--out", tmp_path / "table.md")


def test_tars_that_do_not_fit_into_memory(capsys, tmp_path):
    with (tmp_path / "large.tar").open("wb") as file:
        file.truncate(10**13)
    assert "name fewer of them" in fail(capsys, "--data", tmp_path)


def test_a_process_that_dies_is_a_reason(tars, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 3, stdout=""))
    assert not run("--data", tars, "--workers", 0, "--repeats", 1, "--memory-batches", 20)
    said = capsys.readouterr().out
    assert said.count("not measured: its process ended with status 3") == 4
    assert "memory is not watched: its process ended with status 3" in said


def test_a_damaged_tar_is_a_reason(tmp_path, capsys, in_this_process):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    assert not run("--data", tmp_path, "--workers", 0, "--repeats", 1, "--memory-batches", 0)
    assert "holds no image" in capsys.readouterr().out
