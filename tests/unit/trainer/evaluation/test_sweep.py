import json
from pathlib import Path

import numpy as np
import pytest
from comparing import refusal
from model_checks import tokenizer_of
from PIL import Image
from random_networks import main_with_small_inception, one_thread
from support import generator_of, write_generator_run, write_tokenizer_run

import trainer.evaluation.features
import trainer.jobs.sample_output
from data import DataError
from data.locks import WriterLock, folder_lock
from model_zoo import ModelError
from trainer import TrainerError
from trainer.evaluation.sweep import settings_grid, sweep

pytestmark = pytest.mark.usefixtures("cache", "small_inception")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A generator's run, of random weights. Tests only read it."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = write_tokenizer_run(folder / "tokenizer", tokenizer_of())
    return write_generator_run(folder / "generator", generator_of(), tokenizer)


@pytest.fixture
def reference(tmp_path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 12, 3), np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    return tmp_path / "reference.npz"


def swept(run, reference, out, asked=("guidance=1,2.5", "temperature=1,1.1"), count=10):
    return sweep(
        run, reference, list(asked), count=count, out=out,
        sampling={"batch_size": 5, "device": "cpu"},
        scoring={"metrics": "is,pr", "batch_size": 5, "device": "cpu"},
    )  # fmt: skip


SETTINGS = [{"guidance": guidance, "temperature": heat} for guidance in (1.0, 2.5) for heat in (1.0, 1.1)]
NAMES = [f"guidance_{setting['guidance']}_temperature_{setting['temperature']}" for setting in SETTINGS]


def test_each_setting_is_sampled_and_judged(run, reference, tmp_path):
    done = swept(run, reference, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.npz")} == {f"{name}.npz" for name in NAMES}
    rows = json.loads(done.json_path.read_text())
    assert [row["settings"] for row in rows] == SETTINGS
    for name, row in zip(NAMES, rows, strict=True):
        alone = json.loads((tmp_path / "out" / f"{name}_generation.json").read_text())
        assert row["inception_score"] == alone["inception_score"] and row["sample_count"] == 10
        sampling = row["manifest"]["samples"]["sampling"]
        assert sampling["checkpoint"] == "step_00000003"
        assert {key: sampling[key] for key in row["settings"]} == row["settings"]
    assert len({row["manifest"]["samples"]["sha256"] for row in rows}) == 4
    text = done.markdown_path.read_text()
    assert text.count("\n| ") == 5 and f"| 2.5 | 1.1 | - | {rows[3]['inception_score']:.2f} |" in text
    with Image.open(done.chart_path) as chart:
        assert chart.format == "PNG" and np.array(chart).std() > 10


def test_a_sweep_that_was_cut_off_goes_on(run, reference, tmp_path, monkeypatch):
    asked = ["guidance=1,2.5"]
    whole_rows = json.loads(swept(run, reference, tmp_path / "whole", asked).json_path.read_text())

    calls, scored = [], []
    real = trainer.jobs.sample_output.SampleOutput.write

    def write(job, chunk, images):
        calls.append(chunk)
        if len(calls) == 4:  # in the middle of the second setting
            raise KeyboardInterrupt
        real(job, chunk, images)

    monkeypatch.setattr(trainer.jobs.sample_output.SampleOutput, "write", write)
    with pytest.raises(KeyboardInterrupt):
        swept(run, reference, tmp_path / "out", asked)
    assert len(json.loads((tmp_path / "out" / "sweep.json").read_text())) == 1
    features = trainer.evaluation.features
    monkeypatch.setattr(features.FeatureExtractor, "_own_features", lambda *arguments: scored.append(arguments))
    monkeypatch.setattr(features, "_gathered", lambda *_: pytest.fail("the features were there"))
    rows = json.loads(swept(run, reference, tmp_path / "out", asked).json_path.read_text())
    assert len(calls) == 4 + 1 and not scored  # the whole sweep has kept the same pictures' features
    figures = "settings", "inception_score", "precision", "recall"
    assert [[row[key] for key in figures] for row in rows] == [[row[key] for key in figures] for row in whole_rows]


def test_further_values_join_the_table(run, reference, tmp_path):
    out, asked = tmp_path / "out", ["guidance=1,2"]
    first = json.loads(swept(run, reference, out, asked).json_path.read_text())
    done = swept(run, reference, out, ["guidance=2,3"])
    rows = json.loads(done.json_path.read_text())
    assert [row["settings"]["guidance"] for row in rows] == [1.0, 2.0, 3.0] and rows[0] == first[0]
    assert done.markdown_path.read_text().count("\n| ") == 4 and len(done.table) == 4


def test_what_cannot_stand_in_one_table_is_refused(run, reference, tmp_path, monkeypatch):
    out = tmp_path / "out"
    swept(run, reference, out, ["guidance=1"])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = tmp_path / "other.npz"
    np.savez(other, arr_0=np.zeros((12, 8, 12, 3), np.uint8))

    def refused(said, asked="guidance=2", reference=reference, count=10, **sampling):
        with pytest.raises(TrainerError, match=said):
            sweep(
                run, reference, [asked], count=count, out=out,
                sampling={"batch_size": 5, "device": "cpu", **sampling},
                scoring={"metrics": "is,pr", "batch_size": 5, "device": "cpu"},
            )  # fmt: skip
        assert {name: (out / name).read_bytes() for name in before} == before

    refused("another classes .*: name another folder with --out", classes="1,2")
    refused(
        "another tokenizer", tokenizer=write_tokenizer_run(tmp_path / "tokenizer", tokenizer_of(1)), asked="guidance=3"
    )
    monkeypatch.setattr("trainer.evaluation.sweep.sample", lambda *_, **__: pytest.fail("it sampled"))
    refused("another --reference .*reference.npz, now .*other.npz", reference=other)
    refused("another --count .10, now 12.", count=12)
    refused("another --sweep .guidance, now temperature.", asked="temperature=1.1")
    (out / "sweep.json").write_text("[{}]")
    before.pop("sweep.json")
    refused("sweep.json already exists and is of no earlier report: choose another --out")


def test_two_processes_have_the_results_of_one(run, reference, tmp_path, weights, ranks):
    with one_thread():  # as each of the two
        alone = json.loads(swept(run, reference, tmp_path / "alone", ["guidance=1,2"]).json_path.read_text())
    options = "--count", 10, "--metrics", "is,pr", "--batch-size", 5, "--sample-batch-size", 5, "--device", "cpu"
    command = (
        "evaluate", "generation", "--generator", run, "--sweep", "guidance=1,2", "--reference", reference,
        "--out", tmp_path / "out", *options,
    )  # fmt: skip
    environment = {"IBQ_WEIGHTS": str(weights), "IBQ_CACHE": str(tmp_path / "another_cache")}
    finished = ranks.command(2, main_with_small_inception, [*map(str, command)], environment=environment)
    assert finished.status == 0, finished.err
    assert finished.out.count("10 samples for each setting") == 1
    together = json.loads((tmp_path / "out" / "sweep.json").read_text())
    for name in ("inception_score", "precision", "recall"):
        assert [row[name] for row in together] == pytest.approx([row[name] for row in alone], rel=1e-6)


def test_the_grid():
    assert settings_grid(["top_k=0,5", "guidance_schedule=linear"]) == [
        {"top_k": 0, "guidance_schedule": "linear"},
        {"top_k": 5, "guidance_schedule": "linear"},
    ]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["guidance"], "write NAME=VALUE,VALUE"),
        (["heat=1"], "with a name of temperature, guidance"),
        (["guidance=1,x"], "could not convert"),
        (["guidance=1,1.0"], "twice"),
        (["guidance=1", "guidance=2"], "given twice"),
        (["temperature=1,0"], "temperature 0.0 must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_sampled(asked, said, tmp_path):
    with pytest.raises(TrainerError, match=said):
        swept(tmp_path / "nothing", tmp_path / "nothing", tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_judged_is_refused_before_anything_is_sampled(run, reference, tmp_path, monkeypatch):
    def refused(said, reference=reference, out=tmp_path / "out", count=10, **scoring):
        with pytest.raises((TrainerError, ModelError, DataError), match=said):
            sweep(run, reference, ["guidance=1"], count=count, out=out, sampling={"device": "cpu"}, scoring=scoring)

    monkeypatch.setattr("trainer.evaluation.sweep.sample", lambda *_, **__: pytest.fail("it sampled"))
    refused("no such file or folder", reference=tmp_path / "nowhere.npz")
    refused("--metrics rfid is unknown", metrics="rfid")
    refused("--metrics is: 10 splits need at least 10 samples, not 9", metrics="is", count=9)
    refused("--count 1: at least 2 samples", count=1)
    refused("--batch-size 0", batch_size=0)
    for out in (reference, tmp_path / "out.npz", tmp_path / "out.JPG"):
        refused("name a folder, not a file", out=out)
    monkeypatch.setenv("IBQ_WEIGHTS", str(tmp_path))
    refused("weights-inception")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sweep.json", "sweep.md", "sweep.png"])
def test_a_sweep_replaces_no_file_of_others(run, reference, tmp_path, monkeypatch, name):
    monkeypatch.setattr("trainer.evaluation.sweep.sample", lambda *_, **__: pytest.fail("it sampled"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("[1]")
    said = refusal(TrainerError, swept, run, reference, tmp_path / "out")
    assert f"{name} already exists and is of no earlier report: choose another --out" in said
    assert (tmp_path / "out" / name).read_text() == "[1]"


def test_a_sweep_has_one_writer(run, reference, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.evaluation.sweep.sample", lambda *_, **__: pytest.fail("it sampled"))
    (tmp_path / "out").mkdir()
    with WriterLock(folder_lock(tmp_path / "out"), "out") as other:
        other.take()
        said = refusal(TrainerError, swept, run, reference, tmp_path / "out")
    assert said.startswith(f"{tmp_path / 'out'} is being written by process ")


def test_a_folder_may_have_a_dot_and_precision_alone_a_chart(run, reference, tmp_path):
    done = sweep(
        run, reference, ["guidance=1"], count=5, out=tmp_path / "sw1.5",
        sampling={"batch_size": 5, "device": "cpu"},
        scoring={"metrics": "pr", "batch_size": 5, "device": "cpu", "cache": "none"},
    )  # fmt: skip
    assert done.chart_path == tmp_path / "sw1.5" / "sweep.png" and done.chart_path.is_file()


def test_what_belongs_together_is_said(run, reference, refused_by_ibq):
    for arguments in (["--generator", run], ["--generator", run, "--sweep", "guidance=1"], []):
        assert "--sweep" in refused_by_ibq("evaluate", "generation", "--reference", reference, *arguments)
