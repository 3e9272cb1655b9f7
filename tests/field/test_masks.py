"""Masks beside pictures are not validated on, evaluated or tokenized where training takes only the pictures."""

import json

import pytest
from comparing import refusal
from field.masks import write_masked_tars
from model_checks import tokenizer_of, write_run
from samples import write_tars
from support import tokenizer_run

from data import DataConfig, DataError, SourceConfig, check
from data.tar_reader import TarShard, scan
from trainer import TrainerError
from trainer.evaluation.evaluate_run import evaluate_run, write_reconstructions
from trainer.jobs.tokenize import tokenize


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    return write_masked_tars(tmp_path_factory.mktemp("masks") / "tars")


def config_of(tars, val, image=("jpg",), **changes) -> DataConfig:
    source = SourceConfig(name="m", root=str(tars), image=list(image) if image else None)
    return DataConfig(sources=[source], val=str(val), image_size=16, workers=0, **changes)


def run_on(tars, place, **changes):
    sources = [{"name": "m", "root": str(tars), "image": ["jpg"]}]
    config = tokenizer_run(data__sources=sources, data__image_size=16, data__val=str(tars), **changes)
    config.model = tokenizer_of().config
    return write_run(place, config, tokenizer_ema=tokenizer_of())


def test_validation_takes_what_training_takes(tars, tmp_path):
    assert check(config_of(tars, tars)).startswith("6 samples (")
    other = write_masked_tars(tmp_path / "other", 4)
    said = refusal(DataError, check, config_of(tars, other))
    assert (
        f"data.val {other} holds k00 and k00.mask as two pictures, and training takes only jpg of a key: name" in said
    )
    assert said.endswith("with data.val_image=[SUFFIX]")
    assert check(config_of(tars, other, val_image=["jpg"])).startswith("4 samples (")
    assert check(config_of(tars, other, image=None)).startswith("8 samples (")  # training takes them, too
    assert check(config_of(tars, write_tars(tmp_path / "plain", [5]))).startswith("5 samples (")


def test_evaluation_and_tokens_take_what_training_takes(tars, tmp_path):
    run = run_on(tars, tmp_path / "run")
    report = evaluate_run(run, report_path=tmp_path / "a.json", device="cpu").report
    assert [score.key for score in report.images] == [f"k{n:02d}" for n in range(6)]
    assert tokenize(run, images=str(tars), out=tmp_path / "tokens", device="cpu").samples == 6
    tar = str(tmp_path / "tokens" / "tokens-000000.tar")
    assert TarShard(tar, scan(tar)).read(1).key == "k01"
    other = str(write_masked_tars(tmp_path / "other", 4))
    said = f"--images {other} holds k00 and k00.mask as two pictures, and training takes only jpg"
    for command, out in ((evaluate_run, {"report_path": tmp_path / "b.json"}), (tokenize, {"out": tmp_path / "out"})):
        assert said in refusal((TrainerError, DataError), command, run, images=other, device="cpu", **out)
    assert tokenize(run, images=other, out=tmp_path / "out", image=["jpg"], device="cpu").samples == 4
    assert evaluate_run(run, images=other, image=["jpg"], device="cpu").report.image_count == 4


def test_the_option_of_the_commands(tars, tmp_path, ibq):
    run, other = run_on(tars, tmp_path / "run"), write_masked_tars(tmp_path / "other", 4)
    common = "--images", other, "--image", "jpg", "--device", "cpu"
    ibq("evaluate", "reconstruction", run, *common, "--report", tmp_path / "a.json").succeeded()
    assert json.loads((tmp_path / "a.json").read_text())["image_count"] == 4
    assert "4 samples" in ibq("tokenize", run, *common, "--out", tmp_path / "tokens").succeeded().out
    assert "4 images" in ibq("reconstruct", run, *common, "--out", tmp_path / "pictures").succeeded().out
    assert write_reconstructions(run, images=str(tars), out=tmp_path / "pictures", device="cpu").image_count == 6
