import json

from comparing import refusal
from field.disks import full_disk

from trainer import TrainerError
from trainer.skipped_steps import SkippedSteps


def keys(*numbers) -> list[str]:
    return [f"shard-{number}" for number in numbers]


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "skipped_steps.jsonl").read_text().splitlines()]


def test_a_good_step_writes_and_says_nothing(world, tmp_path):
    assert SkippedSteps(tmp_path, world, limit=0).update(1, [], keys(1, 2)) is None
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_left_out_is_said_and_its_samples_are_kept(world, tmp_path):
    skips = SkippedSteps(tmp_path, world, limit=10)
    said = skips.update(7, ["discriminator", "generator"], keys(1, 2))
    assert said == (
        "step 7 is skipped: loss or gradient of the discriminator and generator is not finite; "
        "the keys of its samples are in skipped_steps.jsonl"
    )
    assert "gradient of the generator is not finite" in skips.update(8, ["generator"], keys(3))
    assert lines(tmp_path) == [
        {"step": 7, "not_finite": ["discriminator", "generator"], "keys_of_ranks": [["shard-1", "shard-2"]]},
        {"step": 8, "not_finite": ["generator"], "keys_of_ranks": [["shard-3"]]},
    ]


def test_what_was_written_before_a_resume_stays(world, tmp_path):
    for step in (1, 2):
        SkippedSteps(tmp_path, world, limit=10).update(step, ["generator"], keys(step))
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_more_than_the_limit_in_a_row_end_the_run_with_the_keys(world, tmp_path):
    skips = SkippedSteps(tmp_path, world, limit=2)
    for step in (1, 2):
        assert skips.update(step, ["generator"], keys(step))
    assert refusal(TrainerError, skips.update, 3, ["generator"], keys(30, 31)).startswith(
        "loss or gradient of the generator is not finite at step 3, number 3 in a row (trainer.max_skipped_steps=2); "
        "its samples: shard-30, shard-31. Checkpoints hold finite weights"
    )
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]  # those of the last one too


def test_a_good_step_between_begins_the_count_anew(world, tmp_path):
    skips = SkippedSteps(tmp_path, world, limit=2)
    for step, skipped in enumerate([["generator"], ["generator"], [], ["generator"], ["discriminator"]]):
        assert (skips.update(step, skipped, keys(step)) is None) == (not skipped)
    assert "at step 5, number 3 in a row" in refusal(TrainerError, skips.update, 5, ["generator"], keys(5))


def test_with_a_limit_of_none_the_first_one_ends_the_run(world, tmp_path):
    skips = SkippedSteps(tmp_path, world, limit=0)
    said = refusal(TrainerError, skips.update, 1, ["generator"], keys(1))
    assert "number 1 in a row (trainer.max_skipped_steps=0); its samples: shard-1." in said


def test_of_many_keys_the_line_shows_the_first_and_the_file_all(world, tmp_path):
    skips = SkippedSteps(tmp_path, world, limit=0)
    message = refusal(TrainerError, skips.update, 1, ["generator"], keys(*range(20)))
    expected = f"its samples: {', '.join(keys(*range(8)))} and 12 more, see {tmp_path / 'skipped_steps.jsonl'}. "
    assert expected in message and "shard-8" not in message
    assert lines(tmp_path)[0]["keys_of_ranks"] == [keys(*range(20))]


def test_a_file_that_cannot_be_written_is_said_by_the_step_that_ends_the_run_too(world, tmp_path, caplog):
    path = tmp_path / "skipped_steps.jsonl"
    alarm = f"ALARM: cannot write {path} (File too large): its lines wait until it can be written again"
    skips = SkippedSteps(tmp_path, world, limit=1)
    assert skips.update(1, ["generator"], keys(1))
    with full_disk(path.stat().st_size):
        message = refusal(TrainerError, skips.update, 2, ["generator"], keys(*range(20)))
    assert caplog.messages == [alarm]
    assert f" and 12 more (1 line of {path} lost: it cannot be written). Checkpoints" in message
    assert skips.update(3, [], keys(3)) is None
    assert caplog.messages == [alarm, f"{path} can be written again: 1 line that waited is in it"]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
