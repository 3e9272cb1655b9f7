import json
from itertools import product
from pathlib import Path

from comparing import refusal

from trainer import TrainerError
from trainer.prefetch import _set_aside, read_audit, summary


def segment(run: Path, start: int, rank: int, steps: range, shard="a.tar") -> None:
    (run / "audit").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"samples_of_sources": {"web": 20}})]
    lines += [json.dumps({"step": step, "samples": [["web", 0, shard, f"{rank}-{step}"]]}) for step in steps]
    (run / "audit" / f"from_{start:08d}_rank_{rank:05d}.jsonl").write_text("\n".join(lines) + "\n")


def test_steps_that_were_taken_again_count_once(tmp_path):
    for rank in range(2):
        segment(tmp_path, 0, rank, range(1, 8), "first")  # stopped in step 7; its newest checkpoint is of step 4
        segment(tmp_path, 4, rank, range(5, 11), "second")
    delivered = list(read_audit(tmp_path).delivered)
    assert sorted((one.step, one.rank) for one in delivered) == [*product(range(1, 11), range(2))]
    assert {one.shard for one in delivered if one.step > 4} == {"second"}
    assert {one.shard for one in delivered if one.step <= 4} == {"first"}


def test_another_number_of_processes_after_a_resume(tmp_path):
    segment(tmp_path, 0, 0, range(1, 6))
    for rank in range(3):
        segment(tmp_path, 3, rank, range(4, 6))
    steps = sorted(one.step for one in read_audit(tmp_path).delivered)
    assert steps == [1, 2, 3, 4, 4, 4, 5, 5, 5]


def test_a_run_without_an_audit_is_named(tmp_path):
    assert "holds no audit" in refusal(TrainerError, read_audit, tmp_path)


def test_a_line_that_a_kill_cut_off_is_not_in_the_way(tmp_path):
    segment(tmp_path, 0, 0, range(1, 4))
    with next((tmp_path / "audit").iterdir()).open("a") as file:
        file.write('{"step": 4, "samp')
    segment(tmp_path, 2, 0, range(3, 5))
    assert [one.step for one in read_audit(tmp_path).delivered] == [1, 2, 3, 4]


def test_a_last_line_that_lacks_only_its_line_break_counts(tmp_path):
    segment(tmp_path, 0, 0, range(1, 4))
    file = next((tmp_path / "audit").iterdir())
    file.write_text(file.read_text().rstrip("\n"))
    assert [one.step for one in read_audit(tmp_path).delivered] == [1, 2, 3]


def test_summary_tells_each_source():
    scalars = {"loss/total": 1.0}
    scalars |= {"data/a/delivered": 1200.0, "data/a/skipped": 3.0, "data/a/filtered/nsfw": 40.0}
    assert summary(scalars) == ["data a: 1,200 images, 3 skipped as unusable, 40 filtered out (nsfw: 40)"]


def test_steps_without_an_audit_are_told(tmp_path):
    segment(tmp_path, 2, 0, range(3, 5))
    segment(tmp_path, 8, 0, range(9, 11))
    found = read_audit(tmp_path)
    assert found.missing_steps == [range(1, 3), range(5, 9)]
    assert found.samples_of_sources == {"web": 20}


def test_a_resume_sets_aside_what_was_written_of_later_steps(tmp_path):
    for start, steps in ((0, range(1, 11)), (10, range(11, 16)), (12, range(13, 16))):
        for rank in range(4):
            segment(tmp_path, start, rank, steps)
    _set_aside(tmp_path, 10)
    for rank in range(2):
        segment(tmp_path, 10, rank, range(11, 14))
    found = sorted((one.step, one.rank) for one in read_audit(tmp_path).delivered)
    assert found == [*product(range(1, 11), range(4)), *product(range(11, 14), range(2))]


def test_a_damaged_line_is_named(tmp_path):
    segment(tmp_path, 0, 0, range(1, 4))
    file = next((tmp_path / "audit").iterdir())
    file.write_text(file.read_text().replace('"step": 2', '"step": '))
    assert "is damaged in line 3" in refusal(TrainerError, read_audit, tmp_path)
