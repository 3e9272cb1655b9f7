"""Whole runs of a generator on token shards: engines, numbers of processes, resuming, learning, mistakes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from comparing import assert_refused, copy_until, differences, loss_lines, read_metrics
from ranks import settings
from tokens import FINGERPRINT, write_tokens

STEPS = 6
CHECKPOINT = f"checkpoints/step_{STEPS:08d}"
TOLERANCE = 1e-5
MOMENT_TOLERANCE = 1e-3
# Weight decay that changes, clipping in every step, warm-up, EMA: all that depends on the step, not on the rank. What
# is random on each rank (dropout, dropped classes) is off.
RECIPE = {
    "trainer.max_steps": STEPS,
    "trainer.checkpoint_every_steps": STEPS // 2,
    "trainer.validate_every_steps": STEPS,
    "trainer.gradient_clip_norm": 0.2,
    "optimizer.weight_decay": 0.05,
    "optimizer.final_weight_decay": 0.5,
    "schedule.warmup_steps": 3,
    "schedule.warmup_from": 0.5,
    "loss.label_dropout": 0,
    "loss.z_weight": 1e-3,
    "ema.decay": 0.9,
}
DEEPSPEED = {"engine.kind": "deepspeed"}
RUNS = {
    "one": (1, {}),
    "one, cut": (1, {"trainer.micro_batch_size": 2, "trainer.activation_checkpointing": "true"}),
    "one, selective": (1, {"trainer.activation_checkpointing": "selective", "loss.impl": "dense"}),
    "one, compiled": (1, {"trainer.compile": "true"}),
    "two": (2, {}),
    "two, head": (2, {"vocabulary_parallel": 2}),
    "zero2": (2, {**DEEPSPEED, "engine.config": "zero2"}),
    "zero2, head": (2, {**DEEPSPEED, "engine.config": "zero2", "vocabulary_parallel": 2}),
    "zero3": (2, {**DEEPSPEED, "engine.config": "zero3"}),
    "zero3, cut": (
        2,
        {
            **DEEPSPEED,
            "engine.config": "zero3",
            "trainer.micro_batch_size": 2,
            "trainer.activation_checkpointing": "true",
        },
    ),
    "fsdp2": (2, {"engine.kind": "fsdp2"}),
    "fsdp2, head": (2, {"engine.kind": "fsdp2", "vocabulary_parallel": 2}),
}
# Of each pair of runs of one engine, the simpler one; and the one that needs a compiler for a minute.
FULL = ("one, compiled", "two", "zero2", "zero3", "fsdp2")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("shards") / "tokens")


@pytest.fixture(scope="module")
def generators(trained, shards) -> Callable[[str], Path]:
    """`generators(name)`: the folder of one of RUNS."""
    recipe = {**RECIPE, "data.train": shards, "data.val": shards}
    return lambda name: trained("ar_debug", RUNS[name][0], {**recipe, **RUNS[name][1]})


def assert_equal(expected: Path, actual: Path) -> None:
    found = differences(expected / CHECKPOINT, actual / CHECKPOINT)
    assert {"generator", "generator_ema", "generator.exp_avg", "generator.exp_avg_sq"} == found.keys()
    for model, difference in found.items():
        assert difference.whole < (MOMENT_TOLERANCE if ".exp" in model else TOLERANCE), model


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name in FULL)) for name in RUNS if name != "one"]
)
def test_every_engine_gives_what_one_process_gives(generators, name):
    expected, actual = generators("one"), generators(name)
    assert_equal(expected, actual)
    lines = read_metrics(actual)
    assert len(lines) == STEPS + 1  # and a validation
    for line, true_line in zip(lines, read_metrics(expected), strict=True):
        assert line == pytest.approx(true_line, rel=1e-4, abs=1e-6)


def test_clipping_decay_and_learning_are_there(generators):
    lines = read_metrics(generators("one"))
    steps = loss_lines(generators("one"))
    assert min(line["grad_norm/generator"] for line in steps) > 0.2  # clipped throughout
    assert steps[-1]["loss/cross_entropy"] < steps[0]["loss/cross_entropy"]
    assert steps[0]["loss/total"] == pytest.approx(steps[0]["loss/cross_entropy"] + 1e-3 * steps[0]["loss/z"])
    assert "val/unigram_entropy" in lines[-1] and lines[-1]["val/loss"] > 0


@pytest.mark.parametrize(("source", "engine"), [("two, head", "fsdp2"), ("zero3, cut", "one")])
def test_any_engine_goes_on_from_any_other(generators, ranks, shards, tmp_path, source, engine):
    """From the middle of one run, under another engine on another number of processes, to the same end."""
    processes, changes = RUNS[engine]
    run = copy_until(generators(source), STEPS // 2, tmp_path / "resumed")
    overrides = {"engine.kind": "ddp", "vocabulary_parallel": 1, **changes}
    arguments = [f"{key}={value}" for key, value in overrides.items()]
    ranks.resume(processes, run, *arguments).succeeded()
    assert_equal(generators("one"), run)


def test_a_run_with_dropout_goes_on_as_if_it_had_never_stopped(ranks, shards, tmp_path):
    changes = {
        **{"data.train": shards, "model.dropout": 0.1, "loss.label_dropout": 0.3, "trainer.max_steps": 6},
        **{"trainer.checkpoint_every_steps": 3, "trainer.keep_last": 4},
    }
    ranks.train(1, "ar_debug", tmp_path / "whole", changes).succeeded()
    changes["trainer.max_steps"] = 3
    ranks.train(1, "ar_debug", tmp_path / "cut", changes).succeeded()
    ranks.resume(1, tmp_path / "cut", "trainer.max_steps=6").succeeded()
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")


def test_it_learns_what_the_frequencies_of_codes_do_not_tell(ranks, tmp_path):
    shards = write_tokens(tmp_path / "tokens", count=256, per_shard=64)
    held_out = write_tokens(tmp_path / "held_out", count=32, seed=1)
    changes = {
        **{"data.train": shards, "data.val": held_out, "trainer.max_steps": 70, "trainer.log_every_steps": 35},
        **{"trainer.validate_every_steps": 70, "trainer.validation_images": 32, "trainer.checkpoint_every_steps": 70},
        **{"optimizer.epsilon": 1e-8, "optimizer.lr": 3e-3, "trainer.global_batch_size": 16},
    }
    ranks.train(1, "ar_debug", tmp_path / "run", changes).succeeded()
    last = read_metrics(tmp_path / "run")[-1]
    assert last["val/unigram_entropy"] > 5.3  # of 5.545, that of even frequencies
    assert last["val/loss"] < 0.6 * last["val/unigram_entropy"]


@pytest.mark.parametrize(
    ("made", "changes", "said"),
    [
        ({}, {"tokenizer.fingerprint": "f" * 16}, [FINGERPRINT, "f" * 16]),
        ({"vocabulary": 128}, {}, ["128 codes", "256 codes"]),
        ({"grid": (4, 4)}, {}, ["4 x 4", "8 x 8"]),
        ({"classes": 12}, {}, ["has class 1", "model.classes=10"]),
        ({"labels": False}, {}, ["has no class", "loss.label_dropout=1"]),
        ({}, {"data.content": "images"}, ["tokenizer.source=RUN"]),
        ({}, {"model.embedding": "codebook"}, ["model.embedding", "tokenizer.source=RUN"]),
    ],
)
def test_mistakes_are_one_line(ibq_here, tmp_path, made, changes, said):
    shards = write_tokens(tmp_path / "tokens", **made)
    run = tmp_path / "run"
    finished = ibq_here("train", "ar_debug", f"run={run}", *settings({"data.train": shards, **changes}))
    assert_refused(finished, *said)
    assert not run.exists()


def test_empty_shards_and_images_are_refused(ibq_here, tmp_path):
    (tmp_path / "empty").mkdir()
    finished = ibq_here("train", "ar_debug", *settings({"data.train": tmp_path / "empty"}))
    assert_refused(finished, "empty")
    finished = ibq_here("train", "ar_debug", *settings({"data.train": "bundled:train"}))
    assert_refused(finished, "holds images, not tokens", "ibq tokenize")
