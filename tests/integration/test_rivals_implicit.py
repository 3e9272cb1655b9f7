"""Rivals whose codes are given by a formula: training on 1 and on 2 ranks, resuming, exporting, and what is refused."""

import json

import pytest
import torch
from comparing import assert_refused, copy_until, differences, loss_lines

from model_zoo import load_tokenizer

STEPS = 4
WEIGHTS = {"loss.entropy.temperature": 0.5, "model.codebook_init": "features"}  # there is nothing to initialize
RIVALS = {
    "fsq": {"model.quantizer": "fsq", "model.levels": "[8,5,7]", "model.codebook_size": 280, "model.code_dim": 3},
    "ifsq": {
        **{"model.quantizer": "fsq", "model.levels": "[9,9,3]", "model.codebook_size": 243, "model.code_dim": 3},
        **{"model.bound": "ifsq", "trainer.micro_batch_size": 2},
    },
    "bsq": {"model.quantizer": "bsq", "model.codebook_size": 256, "model.code_dim": 8},
    "lfq_grouped": {
        **{"model.quantizer": "lfq", "model.groups": 4, "model.codebook_size": 2**32, "model.code_dim": 32},
        **{"loss.quantizer.form": "paper", "loss.entropy.weight": 0.025, "trainer.micro_batch_size": 2},
    },
}


def changes(name: str) -> dict:
    steps = {"trainer.max_steps": STEPS, "trainer.checkpoint_every_steps": 2, "trainer.validate_every_steps": STEPS}
    return {"seed": 3, **steps, **WEIGHTS, **RIVALS[name]}


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory):
    """`trained(name)`: a run on one rank."""
    folder, made = tmp_path_factory.mktemp("rivals"), {}

    def train(name: str):
        if name not in made:
            made[name] = folder / name
            ranks.train(1, "debug", made[name], changes(name)).succeeded()
        return made[name]

    return train


@pytest.mark.parametrize("name", RIVALS)
def test_two_ranks_equal_one(trained, ranks, name, tmp_path):
    ranks.train(2, "debug", tmp_path / "run", changes(name)).succeeded()
    expected, actual = loss_lines(trained(name)), loss_lines(tmp_path / "run")
    assert [line["step"] for line in actual] == list(range(1, STEPS + 1))
    for line, expected_line in zip(actual, expected, strict=True):
        losses, expected_losses = ({k: v for k, v in each.items() if "loss/" in k} for each in (line, expected_line))
        assert losses == pytest.approx(expected_losses, rel=1e-5, abs=1e-6)
        assert line == pytest.approx(expected_line, rel=1e-4, abs=1e-6)  # and norms of gradients
    assert ("loss/average_entropy" in actual[0]) == ("fsq" not in name)
    found = differences(*(run / f"checkpoints/step_{STEPS:08d}" for run in (trained(name), tmp_path / "run")))
    assert found["tokenizer"].whole < 1e-5


@pytest.mark.parametrize("name", RIVALS)
def test_resumed_equals_unbroken_bit_for_bit(trained, ranks, name, tmp_path):
    run = copy_until(trained(name), 2, tmp_path / "run")
    ranks.resume(1, run).succeeded()
    assert loss_lines(run) == loss_lines(trained(name))
    paths = [r / f"checkpoints/step_{STEPS:08d}/rank_00000.safetensors" for r in (run, trained(name))]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("name", RIVALS)
def test_a_run_and_its_export_make_the_same_codes_and_images(trained, ranks, name, tmp_path):
    ranks.ibq("checkpoint", "export", trained(name), "--out", tmp_path / "model").succeeded()
    of_run, exported = load_tokenizer(trained(name)), load_tokenizer(tmp_path / "model")
    assert of_run.fingerprint() == exported.fingerprint() and of_run.config == exported.config
    images_bchw = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    index_bhw = of_run.tokenize(images_bchw)
    assert len(index_bhw.unique()) > 8
    assert torch.equal(exported.tokenize(images_bchw), index_bhw)
    assert torch.equal(exported.detokenize(index_bhw), of_run.detokenize(index_bhw))


def test_usage_of_more_codes_than_can_be_counted_is_that_of_the_groups(trained, ranks, tmp_path):
    run = trained("lfq_grouped")
    line = loss_lines(run)[-1]
    assert 0.001 < line["codebook/group_usage"] <= 1 and "codebook/usage" not in line and "val/usage" not in line
    ranks.ibq("evaluate", "reconstruction", run, "--report", tmp_path / "report.json").succeeded()
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["codebook_size"], report["counted_codes"]) == (2**32, 2**17)
    assert 0.0001 < report["group_usage"] <= 1 and 1 < report["group_perplexity"] <= 2**17
    assert report["usage"] is report["perplexity"] is None


@pytest.mark.parametrize(
    "recipe", ["lfq_grouped", *(pytest.param(name, marks=pytest.mark.full) for name in ("fsq_64000", "bsq_262144"))]
)
def test_full_size_recipes_are_listed_and_tell_their_memory(ranks, recipe):
    assert recipe in ranks.ibq("recipes").succeeded().out
    ended = ranks.ibq("train", recipe, "--dry-run", "--processes", 8).succeeded()
    assert "GiB" in ended.out + ended.err or "GB" in ended.out + ended.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["model.quantizer=fsq"], "model.levels=[8,8,8,5,5,5] model.codebook_size=64000 model.code_dim=6"),
        (["model.quantizer=fsq", "model.levels=[8,5]"], "give model.codebook_size=40 model.code_dim=2"),
        (["model.quantizer=fsq", "model.levels=[8,1]"], "model.levels=[8, 1] must be at least 2"),
        (["model.quantizer=bsq"], "give model.codebook_size=256 model.code_dim=8"),
        (["model.quantizer=bsq", "model.code_dim=8", "model.normalize=true"], "set model.normalize=false"),
        (["model.quantizer=lfq", "model.code_dim=8", "model.groups=3"], "give one of 1, 2, 4, 8"),
        (["model.quantizer=lfq", "model.code_dim=8", "model.groups=0"], "model.groups=0 must be at least 1"),
    ],
)
def test_mistakes_end_in_one_line(ranks, change, said, tmp_path):
    ended = ranks.ibq("train", "debug", f"run={tmp_path / 'run'}", *change)
    assert_refused(ended, said)
