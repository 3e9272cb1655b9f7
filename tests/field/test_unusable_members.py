"""All commands give the same account of a folder, a zip file and a tar with the same members: what is used, what is
not, and why."""

import itertools
import json
from pathlib import Path

import pytest
from field.unusable_members import Made, write_unusable_members
from model_checks import tokenizer_of
from samples import Steps
from support import write_tokenizer_run

import data
from data import DataConfig, SourceConfig
from data.prep.check import check_shard
from data.prep.stats import count
from data.sources import open_source
from trainer.evaluation.evaluate_run import evaluate_run
from trainer.jobs.tokenize import tokenize

USED = ["good0", "good1", "good2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return write_unusable_members(tmp_path_factory.mktemp("members") / "made")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_tokenizer_run(tmp_path_factory.mktemp("run") / "run", tokenizer_of())


def checked(place: Path, _run, _out) -> dict[str, str]:
    found = check_shard(str(place), decode_images=True)
    assert found.status == "flawed"
    return dict(problem.message.split(": ", 1) for problem in found.problems)


def counted(place: Path, _run, _out) -> dict[str, str]:
    found = count(open_source(SourceConfig(root=str(place))), decode_images=True)
    assert found.samples - len(found.unusable) in (len(USED), len(USED) - 2)  # GIF and TIFF are no samples of a folder
    assert found.unusable_samples == len(found.unusable) and found.formats.total() == len(USED)
    return {text.split(" in ")[0]: text.split(": ", 1)[1] for text in found.unusable}


def tokenized(place: Path, run: Path, out: Path) -> dict[str, str]:
    assert tokenize(run, images=str(place), out=out, device="cpu").samples == len(USED)
    lines = (out / "skipped.jsonl").read_text().splitlines()
    return {record["key"]: record["reason"] for record in map(json.loads, lines)}


def evaluated(place: Path, run: Path, out: Path) -> dict[str, str]:
    report = out.with_suffix(".json")
    evaluate_run(run, images=str(place), report_path=report, device="cpu")
    content = json.loads(report.read_text())
    assert sorted(Path(image["key"]).stem for image in content["images"]) == USED
    images = data.evaluation_images(str(place), image_size=32)
    assert len(list(images)) == len(USED) and len(content["skipped"]) == len(images.skipped)
    return {skipped.key: skipped.reason for skipped in images.skipped}


def trained(place: Path, _run, _out) -> dict[str, str]:
    config = DataConfig(train=str(place), image_size=32, workers=0, max_bad_fraction=1.0)
    batches = list(itertools.islice(Steps(config, batch=1).streams[0], 2 * len(USED)))
    assert sorted({Path(batch.keys[0]).stem for batch in batches}) == USED
    return {skipped.key: skipped.reason for batch in batches for skipped in batch.skipped}


@pytest.mark.parametrize("place", ["folder", "zip", "tar"])
@pytest.mark.parametrize("account", [checked, counted, tokenized, evaluated, trained])
def test_the_account_is_the_same(made, run, tmp_path, place, account):
    found = account(getattr(made, place), run, tmp_path / "out")
    expected = {name if place != "tar" else Path(name).stem: reason for name, reason in made.reasons.items()}
    assert found.keys() == expected.keys() and len(expected) == 12
    for key, reason in expected.items():
        assert reason in found[key], key


def test_the_command_names_them_too(made, ibq):
    (status,), (out,), _ = ibq(
        "shards", "check", made.folder, made.zip, made.tar, "--decode", "--jobs", 1, "--json", "-"
    )
    assert status == 1
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["status"] for line in lines] == ["flawed"] * 3
    assert [sum(line["counts"].values()) for line in lines] == [12] * 3
