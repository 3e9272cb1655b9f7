"""Cosine VQ, moving averages, the rotation trick and normalized IBQ: training on several processes, resuming, loading,
refusals."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from comparing import assert_refused, copy_until, differences, loss_lines

import model_zoo
from model_zoo.io.sharded_tensors import ShardedTensors

STEPS = 4
RIVALS = {
    "cosine": {"model.quantizer": "vq", "model.normalize": "true", "model.codebook_init_std": 0.354},
    # 2 tokens a step for each code; with codes among the features, as in the recipe.
    "vq_ema": {
        "model.quantizer": "vq_ema",
        "model.restart_below": 1.0,
        "model.codebook_decay": 0.5,  # restarts begin with the second step
        "model.codebook_init": "features",
    },
    "rotation": {"model.quantizer": "rotation_vq"},
    "normalized ibq": {"model.normalize": "true", "model.logit_scale": 10.0},
    "learned scale": {"model.normalize": "true", "model.logit_scale": 10.0, "model.learn_logit_scale": "true"},
}
SHARDS = ("cosine", "rotation", "normalized ibq", "learned scale")
LAST = f"checkpoints/step_{STEPS:08d}"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory) -> Callable[[str, int], Path]:
    """`trained(name, processes)`: the folder of a run of `debug`."""
    folder = tmp_path_factory.mktemp("rivals")

    @cache
    def train(name: str, processes: int) -> Path:
        run = folder / f"{name.replace(' ', '_')}_{processes}"
        changes = {"trainer.max_steps": STEPS, "trainer.checkpoint_every_steps": 2, "seed": 5, **RIVALS[name]}
        if processes > 1:
            changes |= {"trainer.micro_batch_size": 2}
            changes |= {"codebook_parallel": 2} if name in SHARDS else {}
        ranks.train(processes, "debug", run, changes).succeeded()
        return run

    return train


@pytest.mark.parametrize("name", RIVALS)
def test_two_processes_equal_one(trained, name):
    one, two = trained(name, 1), trained(name, 2)
    lines = [loss_lines(run) for run in (one, two)]
    assert [len(of_run) for of_run in lines] == [STEPS, STEPS]
    for line, expected in zip(lines[1], lines[0], strict=True):
        for key in ("loss/total", "loss/reconstruction", "loss/commitment"):
            assert line[key] == pytest.approx(expected[key], rel=TOLERANCE), key
        assert ("loss/codebook" in line) == (name != "vq_ema")
        assert ("loss/average_entropy" in line) == (name in ("normalized ibq", "learned scale"))
    for model, difference in differences(one / LAST, two / LAST).items():
        if model in ("tokenizer", "tokenizer_ema"):
            assert difference.whole < TOLERANCE, model


@pytest.mark.parametrize("name", RIVALS)
def test_a_run_resumes_with_the_same_bits(trained, ranks, tmp_path, name):
    straight = trained(name, 1)
    copy = copy_until(straight, 2, tmp_path / "copy")
    ranks.resume(1, copy).succeeded()
    expected, found = (ShardedTensors(run / LAST) for run in (straight, copy))
    assert set(found.names()) == set(expected.names())
    assert all(torch.equal(found.tensor(key), expected.tensor(key)) for key in expected.names())
    if name == "vq_ema":
        assert {f"quantizer/{key}" for key in ("usage", "sums", "updates")} <= set(found.names())
        assert int(found.tensor("quantizer/updates")) == STEPS


@pytest.mark.parametrize("name", RIVALS)
def test_the_model_tokenizes_and_detokenizes(trained, name):
    tokenizer = model_zoo.load_tokenizer(trained(name, 1))
    images_bchw = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    index_bhw = tokenizer.tokenize(images_bchw)
    assert index_bhw.shape == (2, 8, 8) and len(index_bhw.unique()) > 1
    assert tokenizer.detokenize(index_bhw).shape == images_bchw.shape
    assert torch.equal(tokenizer(images_bchw).quantized.index_bhw, index_bhw)
    other = model_zoo.load_tokenizer(trained(name, 1))
    assert other.fingerprint() == tokenizer.fingerprint()
    with torch.no_grad():
        other.quantize.embedding.weight[3, 0] += 1
    assert other.fingerprint() != tokenizer.fingerprint()


@pytest.mark.parametrize("name", RIVALS)
def test_an_export_is_the_same_model_and_the_published_layout_is_refused(trained, ibq_here, tmp_path, name):
    run = trained(name, 1)
    assert ibq_here("checkpoint", "export", run, "--out", tmp_path / "model").status == 0
    expected, found = model_zoo.load_tokenizer(run), model_zoo.load_tokenizer(tmp_path / "model")
    assert found.config == expected.config and found.fingerprint() == expected.fingerprint()
    published = tmp_path / "model.ckpt"
    ended = ibq_here("checkpoint", "export", run, "--layout", "published", "--out", published)
    setting = RIVALS[name].get("model.quantizer", "ibq")
    said = "model.normalize=true" if "model.normalize" in RIVALS[name] else f"model.quantizer={setting}"
    assert_refused(ended, f"does not support {said}")
    assert not published.exists()


def scale_of(run: Path, weights: str = "raw") -> float:
    return model_zoo.load_tokenizer(run, weights).quantize.logit_scale.item()


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (3, {"codebook_parallel": 3}),
        (2, {"engine.kind": "fsdp2"}),
        pytest.param(4, {"codebook_parallel": 2}, marks=pytest.mark.full),
        pytest.param(2, {"engine.kind": "deepspeed", "engine.config": "zero3"}, marks=pytest.mark.full),
    ],
)
def test_a_learned_scale_moves_alike_on_any_ranks(ranks, tmp_path, processes, changes):
    alone, together = tmp_path / "alone", tmp_path / "together"
    base = {"trainer.max_steps": STEPS, "trainer.checkpoint_every_steps": STEPS}
    base |= {"trainer.global_batch_size": 12, **RIVALS["learned scale"]}
    ranks.train(1, "debug", alone, base).succeeded()
    ranks.train(processes, "debug", together, {**base, **changes}).succeeded()
    expected, found = (scale_of(run) for run in (alone, together))
    # A step moves the logarithm by about 0.9 of the rate: because of Adam's epsilon, the share depends on the gradient.
    assert found == pytest.approx(expected, rel=1e-6) and abs(math.log(found / 10)) > 1e-4
    logged = [line["codebook/logit_scale"] for line in loss_lines(together)]
    assert len(logged) == STEPS and logged == pytest.approx(
        [line["codebook/logit_scale"] for line in loss_lines(alone)]
    )
    assert logged[-1] == pytest.approx(found, rel=1e-6)


def test_a_learned_scale_has_an_average_and_is_loaded(trained):
    run = trained("learned scale", 1)
    assert 10 != scale_of(run, "ema") != scale_of(run) != 10


def test_moving_averages_restarted_codes_and_moved_them(trained):
    files = [ShardedTensors(trained("vq_ema", 1) / f"checkpoints/step_{step:08d}") for step in (2, STEPS)]
    first, last = (file.tensor("tokenizer/quantize.embedding.weight") for file in files)
    assert ((last - first).norm(dim=1) > 1e-4).float().mean() > 0.5
    # The average of codes that are averages already is the codes.
    assert torch.equal(files[1].tensor("tokenizer_ema/quantize.embedding.weight"), last)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.quantizer": "vq_ema", "model.normalize": "true"}, "set model.normalize=false"),
        ({"model.quantizer": "vq_ema", "model.codebook_decay": 1}, "model.codebook_decay=1.0 must be below 1"),
        ({"model.quantizer": "vq_ema", "model.restart_below": -1}, "model.restart_below=-1.0 must be at least 0"),
        ({"model.quantizer": "rotation_vq", "trainer.quantizer_impl": "dense"}, "only for model.quantizer=ibq"),
        ({"model.learn_logit_scale": "true"}, "model.learn_logit_scale=true needs model.normalize=true"),
        (
            {"model.quantizer": "vq", "model.normalize": "true", "model.learn_logit_scale": "true"},
            "model.learn_logit_scale is for model.quantizer=ibq, not vq: leave it out",
        ),
    ],
)
def test_what_they_cannot_do_ends_in_a_line(ibq_here, tmp_path, changes, said):
    arguments = [f"{key}={value}" for key, value in changes.items()]
    assert_refused(ibq_here("train", "debug", f"run={tmp_path / 'run'}", "trainer.device=cpu", *arguments), said)
    assert not (tmp_path / "run").exists()


def test_moving_averages_refuse_a_sharded_codebook(ranks, tmp_path):
    changes = {"model.quantizer": "vq_ema", "codebook_parallel": 2}
    ended = ranks.train(2, "debug", tmp_path / "run", changes)
    assert ended.status == 2 and "Traceback" not in ended.err
    (line,) = set(ended.error_lines)
    assert line == "ibq: error: model.quantizer=vq_ema cannot shard its codes: set codebook_parallel=1"
    assert not (tmp_path / "run").exists()


ENGINES = {
    "zero1": {"engine.kind": "deepspeed", "engine.config": "zero1"},
    "zero3": {"engine.kind": "deepspeed", "engine.config": "zero3"},
    "fsdp2": {"engine.kind": "fsdp2"},
}


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=[pytest.mark.full] * (name != "fsdp2")) for name in ENGINES]
)
def test_moving_averages_under_other_engines_and_going_on_with_other_processes(trained, ranks, tmp_path, engine):
    run = tmp_path / "run"
    changes = {"trainer.max_steps": 2, "trainer.checkpoint_every_steps": 2, "seed": 5, **RIVALS["vq_ema"]}
    ranks.train(2, "debug", run, {**changes, **ENGINES[engine]}).succeeded()
    ranks.resume(1, run, f"trainer.max_steps={STEPS}", "engine.kind=ddp").succeeded()
    found = differences(trained("vq_ema", 1) / LAST, run / LAST)
    assert found["tokenizer"].whole < TOLERANCE and found["tokenizer_ema"].whole < TOLERANCE


def test_frozen_moving_averages_stay(trained, ranks, tmp_path):
    source = trained("vq_ema", 1)
    changes = {
        **RIVALS["vq_ema"],
        "trainer.max_steps": 2,
        "init_from.source": source,
        "init_from.freeze": "encoder",
    }
    ranks.train(1, "debug", tmp_path / "run", changes).succeeded()
    models = [model_zoo.load_tokenizer(run) for run in (source, tmp_path / "run")]
    assert models[0].fingerprint() == models[1].fingerprint()
