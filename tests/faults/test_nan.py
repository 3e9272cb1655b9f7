"""NaN losses: all ranks skip the step, and too many skipped steps in a row end the run."""

import json
import math
import re
from pathlib import Path

import pytest
from comparing import loss_lines
from faults.outcome import assert_resumed, latest, newest_step

from model_zoo.io.sharded_tensors import ShardedTensors

ENGINES = {
    "ddp": {},
    "zero2": {"engine.kind": "deepspeed", "engine.config": "zero2"},
    "zero3": {"engine.kind": "deepspeed", "engine.config": "zero3"},
    "fsdp2": {"engine.kind": "fsdp2"},
}
BAD_STEP = 3


def assert_finite(run: Path, step: int) -> None:
    for name, tensor in ShardedTensors(run / f"checkpoints/step_{step:08d}").tensors("").items():
        assert tensor.isfinite().all(), name


def skipped(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "skipped_steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("engine", ["ddp", pytest.param("zero2", marks=pytest.mark.full), "zero3", "fsdp2"])
def test_nan_of_one_rank_skips_the_step_on_all_ranks(two_ranks, unbroken, tmp_path, engine):
    run = tmp_path / "run"
    changes = {**ENGINES[engine], "trainer.checkpoint_every_steps": 1, "trainer.keep_last": 6}
    ended = two_ranks.train(run, changes, {"kind": "nan", "rank": 1, "step": BAD_STEP})
    assert ended.statuses == [0, 0], ended.err
    assert f"step {BAD_STEP} is skipped: loss or gradient of the tokenizer is not finite" in ended.errs[0]

    (line,) = skipped(run)
    assert line["step"] == BAD_STEP and line["not_finite"] == ["tokenizer"]
    assert [len(keys) for keys in line["keys_of_ranks"]] == [4, 4]  # a rank's share of 8 images

    # Parameters that are not sharded are equal on all ranks after every step.
    hashes = [re.findall(r"^step (\d+) hashes (\w+) (\w+) (\w+)$", err, re.MULTILINE) for err in ended.errs]
    assert [[int(line[0]) for line in of_rank] for of_rank in hashes] == [[1, 2, 3, 4, 5, 6]] * 2
    assert [line[1] for line in hashes[0]] == [line[1] for line in hashes[1]]
    # The skipped step leaves the tokenizer's weights, their average and the optimizer's state unchanged, and the next
    # step changes them again. The discriminator, whose loss was finite, is updated.
    for of_rank in hashes:
        _, _, tokenizer, rest = zip(*of_rank, strict=True)
        assert tokenizer[BAD_STEP - 2] == tokenizer[BAD_STEP - 1]
        assert len(set(tokenizer)) == 5 and len(set(rest)) == 6
    updates = json.loads((latest(run) / "state.json").read_text())["task"]["updates"]
    assert updates == {"tokenizer": 5, "codebook": 5, "discriminator": 6}
    # The checkpoint that was due is written after the next good step.
    saved = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert saved == [f"step_{step:08d}" for step in (1, 2, 4, 5, 6)]
    for step in (1, 2, 4, 5, 6):
        assert_finite(run, step)

    # The steps before are those of a run without a fault. The skipped step's loss is logged as null: JSON has no NaN.
    lines = loss_lines(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line, true_line in zip(lines[: BAD_STEP - 1], loss_lines(unbroken), strict=False):
        assert line == pytest.approx(true_line, rel=1e-4, abs=1e-6)
    assert [line["step"] for line in lines if line["loss/total"] is None] == [BAD_STEP]
    assert all(math.isfinite(line["grad_norm/tokenizer"]) for line in lines if line["step"] != BAD_STEP)

    # A resume from the step after it gives the losses of the run itself.
    assert_resumed(two_ranks.resume(run / f"checkpoints/step_{BAD_STEP + 1:08d}"), run, after=BAD_STEP + 1, last=6)
    again = loss_lines(run)
    del again[BAD_STEP - 1], lines[BAD_STEP - 1]  # its nulls cannot be compared
    for line, true_line in zip(again, lines, strict=True):
        assert line == (true_line if engine == "ddp" else pytest.approx(true_line, rel=1e-6, abs=1e-9))


def test_nan_from_a_step_on_ends_the_run_with_the_keys(two_ranks, tmp_path):
    run = tmp_path / "run"
    fault = {"kind": "nan", "rank": 0, "step": BAD_STEP, "last": 1000}
    ended = two_ranks.train(run, {"trainer.max_skipped_steps": 2, "trainer.max_steps": 8}, fault)
    assert ended.statuses == [2, 2], ended.err
    assert [line["step"] for line in skipped(run)] == [3, 4, 5]
    for err in ended.errs:
        (line,) = [line for line in err.splitlines() if line.startswith("ibq: error:")]
        assert "not finite at step 5, number 3 in a row (trainer.max_skipped_steps=2)" in line
        assert all(key in line for keys in skipped(run)[-1]["keys_of_ranks"] for key in keys)
        assert "Traceback" not in err
    newest = newest_step(run)
    assert newest == 2  # a checkpoint due at a skipped step waits for a good one
    assert_finite(run, newest)
    assert_resumed(two_ranks.resume(run), run, after=newest, last=8)
    assert_finite(run, 8)
