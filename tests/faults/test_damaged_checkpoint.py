"""A damaged checkpoint is never resumed from: the run falls back to the newest complete one. Every kind of damage is
tested on one process in tests/unit/trainer/test_checkpoint.py."""

from pathlib import Path

import pytest
from comparing import loss_lines
from faults.outcome import assert_resumed

NEWEST, BEFORE = 6, 4
PART = "rank_00001.safetensors"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def flip_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# (file, how it is damaged, what the message says)
DAMAGES = {
    "part cut": (PART, cut, "bytes instead of"),
    "bit flipped": (PART, flip_one_bit, "is not what was written (its sha256 differs)"),
    "part missing": (PART, Path.unlink, "is missing"),
    "state's bit flipped": ("state.json", flip_one_bit, "is not what was written (its sha256 differs)"),
    "manifest cut": ("manifest.json", lambda file: file.write_bytes(file.read_bytes()[:-10]), "is damaged"),
    "manifest missing": ("manifest.json", Path.unlink, "is missing"),
}


IN_FULL = {"part cut", "part missing", "state's bit flipped", "manifest missing"}


@pytest.mark.parametrize("damage", [pytest.param(d, marks=pytest.mark.full) if d in IN_FULL else d for d in DAMAGES])
def test_the_newest_whole_checkpoint_is_resumed_from(two_ranks, unbroken, copy_of_unbroken, damage):
    run = copy_of_unbroken
    file, break_it, said = DAMAGES[damage]
    newest = run / f"checkpoints/step_{NEWEST:08d}"
    break_it(newest / file)

    named = two_ranks.resume(newest, "trainer.max_steps=8")
    assert named.statuses == [2, 2], named.err
    for err in named.errs:
        assert err.count("\n") == 1 and err.startswith(f"ibq: error: {newest} cannot be resumed from: {file} ")
        assert said in err and f"`ibq resume {run}` uses another" in err

    resumed = two_ranks.resume(run, "trainer.max_steps=8")
    (note,) = [line for line in resumed.err.splitlines() if "passed over" in line]
    assert note.startswith(f"{newest.name} is passed over: {file} ") and said in note
    assert_resumed(resumed, run, after=BEFORE, last=8)
    assert loss_lines(run) == loss_lines(unbroken)[:8]


def test_none_of_a_branch_that_was_left_stands_in(two_ranks, unbroken, copy_of_unbroken):
    """The run goes back to step 2, whose branch has a checkpoint of step 5. That of step 4 is of the former branch."""
    run = copy_of_unbroken
    changes = "trainer.max_steps=5", "trainer.checkpoint_every_steps=5"
    two_ranks.resume(run / "checkpoints/step_00000002", *changes).succeeded()
    cut(run / "checkpoints/step_00000005" / PART)
    assert (run / "checkpoints/step_00000004").is_dir()
    resumed = two_ranks.resume(run, "trainer.max_steps=8")
    assert_resumed(resumed, run, after=2, last=8)
    assert loss_lines(run) == loss_lines(unbroken)[:8]


def test_where_none_is_whole_each_is_named_in_one_line(two_ranks, copy_of_unbroken):
    run = copy_of_unbroken
    folders = sorted((run / "checkpoints").glob("step_*"))
    for folder in folders:
        (folder / PART).unlink()
    refused = two_ranks.resume(run, "trainer.max_steps=8")
    assert refused.statuses == [2, 2], refused.err
    for err in refused.errs:
        assert err.count("\n") == 1 and err.startswith(f"ibq: error: {run} has no complete checkpoint: ")
        assert all(f"{folder.name} is passed over: {PART} is missing" in err for folder in folders)
