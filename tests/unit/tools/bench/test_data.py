"""`ibq bench data`: what each scheme delivers and reads, the tables, the files, and mistakes."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from comparing import printed_rows, refusal
from PIL import Image
from samples import write_tars

from data.config import DataConfig
from data.errors import DataError
from tools.bench import data as data_bench
from tools.bench import data_rows
from tools.bench.data import Bytes, Memory, Rate

SAMPLES = 80  # in two tars


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Two tars of small pictures, without an index, as a folder."""
    folder = tmp_path_factory.mktemp("bench") / "tars"
    return str(write_tars(folder, [SAMPLES // 2] * 2, txt=b"noise"))


@pytest.fixture(autouse=True)
def unset_ranks(monkeypatch):
    """Jobs set these, usually in fresh processes."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


# -------------------------------------------------------------------------------------------------------------- figures


# A number of workers, in this process or with real worker processes.
here = pytest.param(0, id="no workers")


def workers(number: int):
    return pytest.param(number, id=f"{number} workers", marks=[pytest.mark.process, pytest.mark.full])


@pytest.mark.parametrize("count", [here, workers(2)])
def test_the_bound_goes_over_all_samples(tars, count):
    rate = data_rows.measure(tars, 16, "bound", count, 2, 0.01)
    assert rate.images >= SAMPLES
    assert rate.images % (SAMPLES // max(1, count)) == 0
    assert rate.processor_seconds > 0


@pytest.mark.parametrize("count", [here, workers(1)])
@pytest.mark.parametrize(("scheme", "least"), [("ibq", SAMPLES), ("webdataset", SAMPLES), ("discard", SAMPLES // 2)])
def test_a_rate_is_of_whole_passes(tars, scheme, least, count):
    rate = data_rows.measure(tars, 16, scheme, count, 2, 0.001)
    assert rate.images >= least
    assert rate.images_per_second > 0
    assert rate.processor_ms > 0


def test_bytes_of_an_epoch(tars):
    ibq, webdataset, discard = (data_rows.count_bytes(tars, scheme, 2) for scheme in ("ibq", "webdataset", "discard"))
    assert ibq.images == ibq.distinct == 64  # a step takes 64, and 80 are there
    assert ibq.by_storage == ibq.needed
    assert ibq.scanned > 0  # there is no index
    assert webdataset.images == webdataset.distinct == discard.images == SAMPLES
    assert discard.distinct <= SAMPLES
    assert webdataset.ratio == pytest.approx(1, abs=0.2)  # small tars are padded to 10 KiB
    assert discard.read == pytest.approx(2 * webdataset.read, rel=0.05)


def test_too_few_tars_or_samples_are_said(tars):
    for scheme, said in (
        ("webdataset", "fewer tars than 3 ranks x 1 worker"),
        ("ibq", "80 samples are fewer than 3 ranks x 32"),
    ):
        assert said in refusal(DataError, data_rows.count_bytes, tars, scheme, 3)


@pytest.mark.process
@pytest.mark.full
def test_memory_of_each_worker(tars):
    memory = data_rows.watch_memory(tars, workers=2, batches=20)
    assert memory.batches_n == list(range(1, 21))
    assert np.shape(memory.resident_mib_nw) == np.shape(memory.proportional_mib_nw) == (20, 2)
    assert np.all(np.array(memory.resident_mib_nw) > np.array(memory.proportional_mib_nw))
    assert memory.tenths == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]


def test_a_slope_leaves_the_first_tenth_out():
    batches = [100 * n for n in range(1, 101)]
    growing = [500.0 if n <= 1000 else 300 + 0.002 * n for n in batches]
    memory = Memory(batches, [[size, 7.0] for size in growing], [])
    assert memory.slopes == pytest.approx([2, 0])


def test_tars_that_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(data_rows, "TARS", 2)
    monkeypatch.setattr(data_rows, "SAMPLES_OF_TAR", 3)
    monkeypatch.setattr(data_rows, "cores", lambda: 1)  # in this process
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
        data_rows.generate(str(tmp_path / name))
    source = data_rows._source(DataConfig(train=str(tmp_path / "once")))
    assert source.samples == 6
    assert (tmp_path / "once" / "index.safetensors").is_file()
    for shard in source.shards:
        path = Path(shard.url)
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        for n in range(3):
            sample = shard.read(n)
            assert min(Image.open(io.BytesIO(sample.image())).size) == 512
            assert sample.members["txt"].startswith(b"part of ")


# --------------------------------------------------------------------------------------------------------------- tables


def test_the_tables_and_the_files(tars, tmp_path, bench, answers):
    def answer(job, arguments):
        if job == "measure":
            if arguments["scheme"] != "bound" and arguments["workers"] == 3:
                return {"failed": "there are fewer tars than 1 rank x 3 workers"}
            return Rate(80, 400.0, 0.2)._asdict()
        if job == "count_bytes":
            return Bytes(arguments["scheme"], 64, 64, 110, 100, 100, 2)._asdict()
        return Memory(list(range(1, 21)), [[3.0, 2.0, 1.0]] * 20, [[1.0] * 3] * 20)._asdict()

    asked, out = answers(answer), tmp_path / "table.md"
    arguments = ["--data", tars, "--workers", "0,3", "--world", 2, "--image-size", 16, "--seconds", 0.001]
    _, (said,), (err,) = bench("data", *arguments, "--repeats", 2, "--memory-batches", 20, "--out", out).succeeded()
    assert ("data_rows.watch_memory", dict(root=tars, workers=3, batches=20)) in asked
    rows = printed_rows(said, 8, "scheme ")
    assert [row[:2] for row in rows] == [[scheme, n] for n in "03" for scheme in data_bench.SCHEMES]
    assert rows[0][3] == rows[0][5] == "100.0%"
    assert all(len(row) == 8 for row in rows[:5])  # two repeats
    for row in rows[5:]:
        assert " ".join(row[2:]) == "not measured: there are fewer tars than 1 rank x 3 workers"
    assert "measuring 1 of 16: bound, no workers" in err
    assert "no workers: ibq delivers 100.0% of the bound, 1.00 times the images of webdataset" in said
    assert "ibq reads 1.100 of the bytes it needs; 1.000 by its own count" in said
    assert "scanning tars without an index read 0.0 MB more" in said
    assert "the workers' memory is flat: " in said
    assert "watching the memory of 3 workers over 20 batches" in err

    text = out.read_text()
    assert f"`ibq bench data --data {tars} --workers 0,3" in text
    assert "| scheme | workers | images/s |" in text
    assert "| one epoch, W = 2 | images | distinct |" in text
    assert "| 100 % | 20 |" in text
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    record = json.loads(out.with_suffix(".json").read_text())
    assert [len(row["rates"]) for row in record["rows"]] == [2] * 5 + [0] * 3
    assert record["plan"]["world"] == 2
    assert record["bytes"][0]["by_storage"] == record["bytes"][0]["needed"]


def test_memory_may_be_skipped_and_failures_are_reported(tars, tmp_path, bench, jobs_here):
    out = tmp_path / "table.md"
    arguments = ["--data", tars, "--workers", 0, "--world", 3, "--image-size", 16, "--seconds", 0.001]
    said = bench("data", *arguments, "--repeats", 1, "--memory-batches", 0, "--out", out).succeeded().out
    assert "bytes of webdataset were not counted: there are fewer tars than 3 ranks x 1 worker" in said
    assert "bytes of ibq were not counted: 80 samples are fewer than 3 ranks x 32" in said
    assert "resident" not in said + out.read_text()
    assert json.loads(out.with_suffix(".json").read_text())["memories"] == []


@pytest.mark.process
@pytest.mark.full
def test_every_figure_comes_from_a_fresh_process(tars, bench):
    arguments = ["--data", tars, "--workers", 1, "--world", 2, "--image-size", 16, "--seconds", 0.001]
    said = bench("data", *arguments, "--repeats", 1, "--memory-batches", 20).succeeded().out
    assert "not measured" not in said
    assert "1 worker: ibq delivers " in said and "the workers' memory is " in said
    assert "memory was not watched" not in said and "were not counted" not in said


def test_ratios_are_of_the_fastest_repeats():
    def row(scheme, *speeds):
        return data_bench.Row(2, scheme, [Rate(1000, speed, 1000 / speed) for speed in speeds])

    plan = data_bench.Plan([2], 4, 256, False, 5.0, 2, 0)
    rows = [row("bound", 200, 90), row("ibq", 100, 190), row("webdataset", 95, 20), row("discard", 47.5)]
    report = data_bench.Report([], "", plan, rows, [], [], [])
    assert report.speed_cells(rows[1])[2:] == ["190.0", "95.0%", "5.26", "95.0%", "100 190"]
    assert report.notes() == [
        "2 workers: ibq delivers 95.0% of the bound, 2.00 times the images of webdataset, "
        "4.00 times the images of discard"
    ]


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workers", "some"], "--workers: 'some' is not a list of integers >= 0, such as 0,2,4"),
        (["--workers", "-1"], "--workers"),
        (["--world", "0"], "--world"),
        (["--image-size", "0"], "--image-size"),
        (["--seconds", "0"], "0.0 is not a finite number above 0"),
        (["--seconds", "nan"], "is not a finite number above 0"),
        (["--repeats", "0"], "--repeats"),
        (["--memory-batches", "5"], "use at least 20, or 0 for none"),
        (["--memory-batches", "-5"], "use at least 20, or 0 for none"),
        (["--out", "table.txt"], "does not end in .md"),
        (["--data", "nowhere"], "no such tar or folder: nowhere"),
        (
            ["--data", "https://user:secret@store/a.tar"],
            "https://store/a.tar is not a local tar: copy some tars to this machine",
        ),
        (["--data", "images.zip"], "images.zip is not a local tar"),
    ],
)
def test_mistakes_are_one_line(refused_by_ibq, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images.zip").touch()
    line = refused_by_ibq("bench", "data", *arguments)
    assert said in line and "secret" not in line


def test_tars_that_do_not_fit_into_memory(refused_by_ibq, tmp_path):
    with (tmp_path / "large.tar").open("wb") as file:
        file.truncate(10**13)
    assert "use fewer tars" in refused_by_ibq("bench", "data", "--data", tmp_path)


def test_a_process_that_dies_is_a_reason(tars, bench, answers):
    answers(lambda *_: {"failed": "its process ended with status 3"})
    said = bench("data", "--data", tars, "--workers", 0, "--repeats", 1, "--memory-batches", 20).succeeded().out
    assert said.count("not measured: its process ended with status 3") == 4
    assert "memory was not watched: its process ended with status 3" in said


def test_a_damaged_tar_is_a_reason(tmp_path, bench, jobs_here):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    said = bench("data", "--data", tmp_path, "--workers", 0, "--repeats", 1, "--memory-batches", 0).succeeded().out
    assert "holds no image" in said
