import json
from pathlib import Path

import pytest

from trainer import TrainerError
from trainer.feed import read_audit, summary


def segment(run: Path, start: int, rank: int, steps: range, shard="a.tar") -> None:
    (run / "audit").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "samples": [["web", 0, shard, f"{rank}-{step}"]]}) for step in steps]
    (run / "audit" / f"from_{start:08d}_rank_{rank:05d}.jsonl").write_text("\n".join(lines) + "\n")


def test_steps_that_were_taken_again_count_once(tmp_path):
    for rank in range(2):
        segment(tmp_path, 0, rank, range(1, 8), "first")  # stopped in step 7; its newest checkpoint is of step 4
        segment(tmp_path, 4, rank, range(5, 11), "second")
    delivered = list(read_audit(tmp_path))
    assert sorted((one.step, one.rank) for one in delivered) == [
        (step, rank) for step in range(1, 11) for rank in (0, 1)
    ]
    assert {one.shard for one in delivered if one.step > 4} == {"second"}
    assert {one.shard for one in delivered if one.step <= 4} == {"first"}


def test_another_number_of_processes_after_a_resume(tmp_path):
    segment(tmp_path, 0, 0, range(1, 6))
    for rank in range(3):
        segment(tmp_path, 3, rank, range(4, 6))
    steps = sorted(one.step for one in read_audit(tmp_path))
    assert steps == [1, 2, 3, 4, 4, 4, 5, 5, 5]


def test_a_run_without_an_audit_is_named(tmp_path):
    with pytest.raises(TrainerError, match="holds no audit"):
        list(read_audit(tmp_path))


def test_a_line_that_a_kill_cut_off_is_not_in_the_way(tmp_path):
    segment(tmp_path, 0, 0, range(1, 4))
    with next((tmp_path / "audit").iterdir()).open("a") as file:
        file.write('{"step": 4, "samp')
    segment(tmp_path, 2, 0, range(3, 5))
    assert [one.step for one in read_audit(tmp_path)] == [1, 2, 3, 4]


def test_summary_tells_each_source():
    scalars = {"loss/total": 1.0}
    scalars |= {"data/delivered/a": 1200.0, "data/skipped/a": 3.0, "data/filtered/a": 40.0}
    assert summary(scalars) == ["data a: 1,200 images, 3 skipped as unusable, 40 filtered out"]
