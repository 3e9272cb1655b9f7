import json
import os
import re
import shutil
import threading
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from comparing import refusal
from safetensors import SafetensorError

from model_zoo import ModelError
from model_zoo.io.manifest import check
from model_zoo.io.run_layout import checkpoint_step
from model_zoo.io.sharded_tensors import ShardedTensors, TensorShard, whole_tensor
from trainer import TrainerError, checkpoint
from trainer.checkpoint import CheckpointError, Checkpoints, checkpoint_folders, damage, find_checkpoint, load_state

STATE = {"data": [1, {"a": 2}], "task": "any"}
PART = "rank_00000.safetensors"
MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"weights": torch.arange(1000.0).view(10, 100) + step, "count": torch.tensor(step)}


def shards(step: int) -> list[TensorShard]:
    return [whole_tensor(name, tensor) for name, tensor in tensors(step).items()]


def save_and_finish(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, STATE, shards(step))
    checkpoints.finish()


def save(run, world, *steps: int, keep_last=3, **options) -> None:
    """Saves as a run does that resumes from the checkpoint that ``latest`` names."""
    latest = run / "checkpoints" / "latest"
    options.setdefault("continues", latest.with_name(latest.read_text()) if latest.exists() else None)
    save_and_finish(Checkpoints(run, world, keep_last=keep_last, **options), *steps)


def names(run) -> list[str]:
    """All files but the record of branches, which may name a checkpoint that could not be written."""
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name != "branches.json")


def folder_of(run, step: int):
    return run / "checkpoints" / f"step_{step:08d}"


def assert_in_force(run, world, step: int) -> None:
    """It is what `latest` names and what is gone on from, without a note, and its content is what was written."""
    assert (run / "checkpoints" / "latest").read_text() == f"step_{step:08d}"
    assert find_checkpoint(run, world) == (folder_of(run, step), [])
    assert damage(folder_of(run, step), world) is None
    assert load_state(folder_of(run, step)) == {**STATE, "step": step}
    files = ShardedTensors(folder_of(run, step))
    assert sorted(files.names()) == ["count", "weights"]
    for name, tensor in tensors(step).items():
        assert torch.equal(files.tensor(name), tensor)


refused = partial(refusal, TrainerError, find_checkpoint)


def test_a_world_of_one_runs_on_the_cpu(world):
    assert tuple(world) == (0, 1, torch.device("cpu")) and world.is_main


@MODES
def test_a_checkpoint_is_a_folder_that_latest_names(world, tmp_path, asynchronous):
    save(tmp_path, world, 1000, asynchronous=asynchronous)
    assert names(tmp_path) == ["latest", "step_00001000"]
    assert sorted(path.name for path in folder_of(tmp_path, 1000).iterdir()) == ["manifest.json", PART, "state.json"]
    assert_in_force(tmp_path, world, 1000)
    save(tmp_path, world, 2000, asynchronous=asynchronous)
    assert_in_force(tmp_path, world, 2000)
    assert checkpoint_folders(tmp_path) == [folder_of(tmp_path, 1000), folder_of(tmp_path, 2000)]
    assert checkpoint_step(folder_of(tmp_path, 2000)) == 2000


def test_the_manifest_names_every_file_with_its_size_and_hash(world, tmp_path):
    save(tmp_path, world, 10)
    files = json.loads((folder_of(tmp_path, 10) / "manifest.json").read_text())["files"]
    assert sorted(files) == [PART, "state.json"]
    for name, entry in files.items():
        assert entry["bytes"] == (folder_of(tmp_path, 10) / name).stat().st_size
        assert len(entry["sha256"]) == 64


def test_training_goes_on_while_it_is_written_and_does_not_change_it(world, tmp_path, monkeypatch):
    may_write, write_part = threading.Event(), checkpoint.write_part

    def slow(*arguments):
        assert may_write.wait(60)
        write_part(*arguments)

    monkeypatch.setattr(checkpoint, "write_part", slow)
    checkpoints = Checkpoints(tmp_path, world, keep_last=3, asynchronous=True)
    held = shards(10)
    checkpoints.save(10, STATE, held)
    for shard in held:
        shard.values.zero_()  # the next step
    for _ in range(3):
        checkpoints.poll()
        assert names(tmp_path) == ["step_00000010.unfinished"]  # nobody takes it for a checkpoint
    beats = []

    def beat():
        beats.append(None)
        if len(beats) == 3:
            may_write.set()

    checkpoints.beat = beat
    checkpoints.finish()
    assert len(beats) >= 3
    assert_in_force(tmp_path, world, 10)
    checkpoints.poll()  # there is nothing left to do
    checkpoints.finish()


def test_polling_seals_what_is_written(world, tmp_path):
    checkpoints = Checkpoints(tmp_path, world, keep_last=3, asynchronous=True)
    checkpoints.save(10, STATE, shards(10))
    checkpoints.writing.join(60)
    checkpoints.poll()
    assert checkpoints.writing is None
    assert_in_force(tmp_path, world, 10)


def half_written(file, shards):
    file.write_bytes(b"half of")
    raise OSError(28, "No space left on device")


STAGES = ["_make_folder", "write_part", "_write_manifest", "_rename", "_point", "_sync"]


@MODES
@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_at_any_moment_leaves_the_former_checkpoint_in_force(
    world, tmp_path, monkeypatch, stage, asynchronous
):
    save(tmp_path, world, 10)
    checkpoints = Checkpoints(tmp_path, world, keep_last=3, asynchronous=asynchronous)
    failing = half_written if stage == "write_part" else Mock(side_effect=OSError(28, "No space left on device"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, stage, failing)
        message = refusal(CheckpointError, save_and_finish, checkpoints, 20)
    assert "cannot write checkpoint step_00000020 (" in message and "No space left on device" in message
    assert f"`ibq resume {tmp_path}`" in message
    assert_in_force(tmp_path, world, 10)
    assert not [name for name in names(tmp_path) if name.endswith(".unfinished") and name.startswith("step")]
    # The same writer goes on: what was in the way is gone.
    save_and_finish(checkpoints, 20)
    assert names(tmp_path) == ["latest", "step_00000010", "step_00000020"]
    assert_in_force(tmp_path, world, 20)


@MODES
def test_what_safetensors_refuses_to_write_is_a_checkpoint_error_too(world, tmp_path, monkeypatch, asynchronous):
    save(tmp_path, world, 10)
    full = SafetensorError("I/O error: No space left on device")
    monkeypatch.setattr(checkpoint, "write_part", Mock(side_effect=full))
    with pytest.raises(CheckpointError, match=r"rank 0: I/O error: No space left on device"):
        save(tmp_path, world, 20, asynchronous=asynchronous)
    assert_in_force(tmp_path, world, 10)


@MODES
@pytest.mark.parametrize("stage", ["_write_manifest", "_rename", "_point"])
def test_a_kill_at_any_moment_leaves_the_former_checkpoint_in_force(world, tmp_path, monkeypatch, stage, asynchronous):
    """Nothing is tidied up after it; the next run's first save does that."""
    save(tmp_path, world, 10)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, stage, Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, world, 20, asynchronous=asynchronous)
    assert_in_force(tmp_path, world, 10)
    assert names(tmp_path) != ["latest", "step_00000010"]
    save(tmp_path, world, 30, asynchronous=asynchronous)
    assert not [name for name in names(tmp_path) if name.endswith(".unfinished")]
    assert_in_force(tmp_path, world, 30)


def test_everything_is_on_the_disk_before_it_is_renamed(world, tmp_path, monkeypatch):
    """After a crash a disk may have kept a rename but not the files, unless they were flushed before."""
    happened = []

    def record(owner, name, describe):
        function = getattr(owner, name)

        def recording(*arguments):
            happened.append(describe(*arguments))
            return function(*arguments)

        monkeypatch.setattr(owner, name, recording)

    record(os, "fsync", lambda descriptor: f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
    record(Path, "rename", lambda path, target: f"rename {path.name} to {target.name}")
    record(Path, "replace", lambda path, target: f"rename {path.name} to {target.name}")
    save(tmp_path, world, 10)
    assert happened == [
        f"sync {PART}",
        "sync state.json",
        "sync manifest.json",
        "sync step_00000010.unfinished",
        "sync branches.json.unfinished",
        "rename branches.json.unfinished to branches.json",
        "sync checkpoints",
        "rename step_00000010.unfinished to step_00000010",
        "sync checkpoints",
        "sync latest.unfinished",
        "rename latest.unfinished to latest",
        "sync checkpoints",
    ]


def test_a_part_that_arrives_short_is_not_sealed(world, tmp_path, monkeypatch):
    """As where another node's file is not yet here, or a file system loses the end of it."""
    entry = checkpoint.entry_of
    monkeypatch.setattr(checkpoint, "entry_of", lambda file: {**entry(file), "bytes": entry(file)["bytes"] + 1})
    with pytest.raises(CheckpointError, match=rf"{PART} has \d+ bytes instead of \d+"):
        save(tmp_path, world, 10)
    assert names(tmp_path) == []


def test_any_ones_left_overs_are_gone_the_next_time(world, tmp_path):
    left_over = tmp_path / "checkpoints" / "step_00000099.unfinished"
    left_over.mkdir(parents=True)
    (left_over / PART).write_bytes(b"half of")
    save(tmp_path, world, 10)
    assert names(tmp_path) == ["latest", "step_00000010"]


@MODES
def test_the_newest_checkpoints_are_kept(world, tmp_path, asynchronous):
    save(tmp_path, world, 5, 10, 100, 20_000, keep_last=2, asynchronous=asynchronous)
    assert names(tmp_path) == ["latest", "step_00000100", "step_00020000"]
    assert_in_force(tmp_path, world, 20_000)
    save(tmp_path, world, 30_000, keep_last=1, asynchronous=asynchronous)
    assert names(tmp_path) == ["latest", "step_00030000"]
    assert_in_force(tmp_path, world, 30_000)


def test_those_of_every_so_many_steps_are_kept_for_good(world, tmp_path):
    save(tmp_path, world, *range(5, 50, 5), keep_last=2, keep_every_steps=20)
    assert [checkpoint_step(folder) for folder in checkpoint_folders(tmp_path)] == [20, 40, 45]
    save(tmp_path, world, 50, 55, keep_last=1, keep_every_steps=20)
    assert [checkpoint_step(folder) for folder in checkpoint_folders(tmp_path)] == [20, 40, 55]


def test_the_same_step_is_written_over(world, tmp_path):
    save(tmp_path, world, 10)
    (folder_of(tmp_path, 10) / PART).write_bytes(b"old")
    (folder_of(tmp_path, 10) / "only in the old one").touch()
    save(tmp_path, world, 10)
    assert_in_force(tmp_path, world, 10)
    assert not (folder_of(tmp_path, 10) / "only in the old one").exists()
    assert names(tmp_path) == ["latest", "step_00000010"]


def cut_short(folder):
    os.truncate(folder / PART, (folder / PART).stat().st_size - 1)


def flip_a_bit(folder, name=PART):
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)


def lose(folder, name=PART):
    (folder / name).unlink()


def put_a_folder_in_its_place(folder):
    lose(folder)
    (folder / PART).mkdir()


def manifest(content):
    return lambda folder: (folder / "manifest.json").write_text(content)


DAMAGES = pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (cut_short, rf"{PART} has 4\d+ bytes instead of 4\d+"),
        (flip_a_bit, rf"{PART} is not what was written \(its sha256 differs\)"),
        (partial(flip_a_bit, name="state.json"), r"state\.json is not what was written \(its sha256 differs\)"),
        (lose, rf"{PART} is missing"),
        (put_a_folder_in_its_place, rf"{PART} cannot be read \(Is a directory\)"),
        (
            partial(lose, name="manifest.json"),
            r"manifest\.json is missing \(it was never finished, or an older version of ibq wrote it\)",
        ),
        (manifest('{"files": {"rank_00'), r"manifest\.json is damaged"),
        (manifest("[]"), r"manifest\.json is damaged"),
        (manifest('{"files": []}'), r"manifest\.json is damaged"),
        (manifest('{"files": {"state.json": 7}}'), r"manifest\.json is damaged"),
        (manifest('{"files": {"state.json": {"bytes": "many", "sha256": "0"}}}'), r"manifest\.json is damaged"),
    ],
)


@DAMAGES
def test_damage_is_found_and_the_newest_whole_one_before_it_stands_in(world, tmp_path, break_it, said):
    save(tmp_path, world, 10, 20, 30)
    break_it(folder_of(tmp_path, 30))
    assert_says(damage(folder_of(tmp_path, 30), world), said)
    found, notes = find_checkpoint(tmp_path, world)
    assert found == folder_of(tmp_path, 20)
    assert len(notes) == 1
    assert_says(notes[0], rf"step_00000030 is passed over: {said}")


def assert_says(text, said) -> None:
    assert text is not None and re.fullmatch(said, text), text


@DAMAGES
def test_none_stands_in_for_one_that_was_named(world, tmp_path, break_it, said):
    save(tmp_path, world, 10, 20)
    break_it(folder_of(tmp_path, 20))
    message = refused(folder_of(tmp_path, 20), world)
    assert_says(message, rf".*step_00000020 cannot be resumed from: {said}; `ibq resume .*` uses another")
    assert f"`ibq resume {tmp_path}`" in message
    assert find_checkpoint(folder_of(tmp_path, 10), world) == (folder_of(tmp_path, 10), [])


def test_one_that_was_named_and_does_not_exist_is_refused(world, tmp_path):
    save(tmp_path, world, 10)
    assert "step_00000099 does not exist" in refused(folder_of(tmp_path, 99), world)


def test_every_one_that_is_passed_over_is_told_and_where_none_is_whole_that_too(world, tmp_path):
    save(tmp_path, world, 10, 20, 30)
    lose(folder_of(tmp_path, 30))
    flip_a_bit(folder_of(tmp_path, 20))
    found, notes = find_checkpoint(tmp_path, world)
    assert found == folder_of(tmp_path, 10) and [note[:13] for note in notes] == ["step_00000030", "step_00000020"]
    lose(folder_of(tmp_path, 10), "manifest.json")
    message = refused(tmp_path, world)
    assert "has no complete checkpoint" in message
    assert message.index("step_00000030") < message.index("step_00000020") < message.index("step_00000010")


def test_no_checkpoint_yet_is_said(world, tmp_path):
    assert "has no finished checkpoint" in refused(tmp_path, world)
    (tmp_path / "checkpoints" / "step_00000010.unfinished").mkdir(parents=True)
    assert "has no finished checkpoint" in refused(tmp_path, world)
    (tmp_path / "checkpoints" / "step_00000010").mkdir()
    said = "has no complete checkpoint: step_00000010 is passed over: manifest.json is missing"
    assert said in refused(tmp_path, world)


def test_a_run_in_a_folder_named_checkpoints_is_a_run(world, tmp_path):
    run = tmp_path / "checkpoints" / "first_try"
    run.mkdir(parents=True)
    save(run, world, 10, 20)
    assert_in_force(run, world, 20)


def test_latest_may_be_edited_by_hand(world, tmp_path):
    save(tmp_path, world, 10, 20, 30)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000020\n")
    assert find_checkpoint(tmp_path, world) == (folder_of(tmp_path, 20), [])
    # Where that one is not whole, one before it stands in, none after it.
    lose(folder_of(tmp_path, 20))
    found, (note,) = find_checkpoint(tmp_path, world)
    assert found == folder_of(tmp_path, 10) and note == f"step_00000020 is passed over: {PART} is missing"


@pytest.mark.parametrize(
    ("text", "found", "notes"),
    [
        ("step_00000025", 20, ["step_00000025 is passed over: step_00000025 does not exist"]),
        ("step_00000099", 30, ["step_00000099 is passed over: step_00000099 does not exist"]),
        ("", 30, []),
        ("..", 30, []),
        ("\0\xff", 30, []),
    ],
)
def test_latest_that_names_none_of_them(world, tmp_path, text, found, notes):
    save(tmp_path, world, 10, 20, 30)
    (tmp_path / "checkpoints" / "latest").write_text(text, encoding="latin-1")
    assert find_checkpoint(tmp_path, world) == (folder_of(tmp_path, found), notes)


def test_without_latest_the_newest_is_taken(world, tmp_path):
    """As after a kill between the very first checkpoint's name and the pointer to it."""
    save(tmp_path, world, 10, 20)
    (tmp_path / "checkpoints" / "latest").unlink()
    assert find_checkpoint(tmp_path, world) == (folder_of(tmp_path, 20), [])


def test_without_latest_the_branch_that_was_written_last_is_taken(world, tmp_path):
    save(tmp_path, world, 10, 20, 40, keep_last=9)
    branch_off(tmp_path, world, 10, 20, 30, keep_last=9)
    pointer = tmp_path / "checkpoints" / "latest"
    pointer.unlink()
    note = f"{pointer} names no checkpoint: this is step_00000030, which was written last"
    assert find_checkpoint(tmp_path, world) == (folder_of(tmp_path, 30), [note])
    shutil.rmtree(folder_of(tmp_path, 30))
    note = f"{pointer} names no checkpoint: this is step_00000020, which was written last"
    assert find_checkpoint(tmp_path, world) == (folder_of(tmp_path, 20), [note])


def test_a_renamed_checkpoint_is_no_other_step(world, tmp_path):
    """Its state would continue from step 10, and the record would name it as what step 20 continues."""
    save(tmp_path, world, 10)
    shutil.copytree(folder_of(tmp_path, 10), folder_of(tmp_path, 5000))
    (tmp_path / "checkpoints" / "latest").write_text("step_00005000")
    said = "its state.json is of step 10: the folder was renamed"
    assert find_checkpoint(tmp_path, world) == (folder_of(tmp_path, 10), [f"step_00005000 is passed over: {said}"])
    with pytest.raises(TrainerError, match=said):
        find_checkpoint(folder_of(tmp_path, 5000), world)
    with pytest.raises(ModelError, match=f"{folder_of(tmp_path, 5000)} is damaged: {said}"):
        check(folder_of(tmp_path, 5000))
    shutil.copytree(folder_of(tmp_path, 10), tmp_path / "best")
    check(tmp_path / "best")  # a copy elsewhere may have any name


def test_going_on_from_an_earlier_checkpoint_keeps_what_is_written_then(world, tmp_path):
    save(tmp_path, world, 10, 20, 30)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000010")
    save(tmp_path, world, 12, keep_last=1)
    assert_in_force(tmp_path, world, 12)
    assert "step_00000010" not in names(tmp_path)


def steps_of(run) -> list[int]:
    return [checkpoint_step(folder) for folder in checkpoint_folders(run)]


def branch_off(run, world, origin: int, *steps: int, **options) -> None:
    """Saves as a run does that resumes from a checkpoint that the user named."""
    save(run, world, *steps, continues=folder_of(run, origin), **options)


def falls_back_to(run, world) -> list[int]:
    """The checkpoints that stand in for each other, found by damaging one after the other."""
    found = []
    with pytest.raises(TrainerError, match="has no complete checkpoint"):
        while True:
            folder, notes = find_checkpoint(run, world)
            assert len(notes) == len(found)
            found.append(checkpoint_step(folder))
            lose(folder)
    return found


@pytest.mark.parametrize("break_it", [flip_a_bit, partial(lose, name="state.json"), shutil.rmtree])
def test_none_of_a_branch_that_was_left_stands_in(world, tmp_path, break_it):
    """Not even if the newest one of the branch, which knows best what it continued, is gone."""
    save(tmp_path, world, 10, 15, 20, 30, keep_last=9)
    branch_off(tmp_path, world, 10, 20, keep_last=9)
    assert steps_of(tmp_path) == [10, 15, 20, 30]
    break_it(folder_of(tmp_path, 20))
    found, (note,) = find_checkpoint(tmp_path, world)
    assert found == folder_of(tmp_path, 10) and note.startswith("step_00000020 is passed over: ")


def test_where_the_whole_branch_is_damaged_another_one_is_named(world, tmp_path):
    save(tmp_path, world, 10, 20, 30)
    branch_off(tmp_path, world, 10, 25)
    lose(folder_of(tmp_path, 25))
    lose(folder_of(tmp_path, 10))
    message = refused(tmp_path, world)
    left = folder_of(tmp_path, 30)
    assert message.endswith(f"; {left} is of a branch that was left: `ibq resume {left}` continues that")
    assert find_checkpoint(left, world) == (left, [])


def test_a_run_that_branches_twice(world, tmp_path):
    save(tmp_path, world, 10, 20, 30, 40, keep_last=9)
    branch_off(tmp_path, world, 20, 25, 35, keep_last=9)
    branch_off(tmp_path, world, 25, 28, keep_last=9)
    save(tmp_path, world, 38, keep_last=9)  # resumes without a name, from step 28
    assert steps_of(tmp_path) == [10, 20, 25, 28, 30, 35, 38, 40]
    assert falls_back_to(tmp_path, world) == [38, 28, 25, 20, 10]


def test_a_branch_that_was_left_can_be_gone_back_to(world, tmp_path):
    save(tmp_path, world, 10, 20, 30, keep_last=9)
    branch_off(tmp_path, world, 10, 15, 25, keep_last=9)
    branch_off(tmp_path, world, 30, 40, keep_last=9)
    assert falls_back_to(tmp_path, world) == [40, 30, 20, 10]


def test_a_checkpoint_that_is_written_over_leaves_its_former_branch(world, tmp_path):
    save(tmp_path, world, 10, 20, 30, 40, keep_last=9)
    branch_off(tmp_path, world, 10, 20, 30, keep_last=9)
    branch_off(tmp_path, world, 40, 50, keep_last=9)
    assert falls_back_to(tmp_path, world) == [50, 40, 10]


def test_retention_counts_the_checkpoints_of_the_branch(world, tmp_path):
    save(tmp_path, world, 10, 12, 14, 16, 50, keep_last=9)
    branch_off(tmp_path, world, 10, 15, keep_last=2)
    assert steps_of(tmp_path) == [10, 12, 14, 15, 16, 50]  # 12 and 14 do not push out 10
    save(tmp_path, world, 17, keep_last=2)
    assert steps_of(tmp_path) == [15, 16, 17, 50]  # what was left goes where it is passed
    save(tmp_path, world, 60, 70, keep_last=2)
    assert steps_of(tmp_path) == [60, 70]


def test_a_branch_is_known_after_its_beginning_was_removed(world, tmp_path):
    save(tmp_path, world, 10, 20, 30, 40, 90, keep_last=9)
    branch_off(tmp_path, world, 20, 25, 35, 45, 55, keep_last=2, keep_every_steps=10)
    assert steps_of(tmp_path) == [10, 20, 30, 40, 45, 55, 90]
    assert falls_back_to(tmp_path, world) == [55, 45, 20, 10]


def test_checkpoints_of_earlier_versions_are_taken_for_one_branch(world, tmp_path):
    save(tmp_path, world, 10, 20, 30, 40, keep_last=9)
    (tmp_path / "checkpoints" / "branches.json").unlink()
    assert find_checkpoint(tmp_path, world) == (folder_of(tmp_path, 40), [])
    branch_off(tmp_path, world, 20, 25, keep_last=9)
    branch_off(tmp_path, world, 40, 50, keep_last=9)
    assert falls_back_to(tmp_path, world) == [50, 40, 30, 20, 10]


@pytest.mark.parametrize("content", ["", "[]", '{"step_00000010": 7}', '{"step_00000010": "step_00000010"}', "\xff"])
def test_a_damaged_record_of_branches_is_told_and_written_anew(world, tmp_path, content):
    save(tmp_path, world, 10, 20)
    (tmp_path / "checkpoints" / "branches.json").write_text(content, encoding="latin-1")
    found, (note,) = find_checkpoint(tmp_path, world)
    assert found == folder_of(tmp_path, 20)
    assert note.endswith("branches.json cannot be read (it is damaged): all checkpoints are taken for one branch")
    save(tmp_path, world, 30)
    assert find_checkpoint(tmp_path, world) == (folder_of(tmp_path, 30), [])
    assert falls_back_to(tmp_path, world) == [30, 20, 10]


@pytest.mark.parametrize("content", ["", "{", "7", "[1]"])
def test_a_damaged_state_is_one_line(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    assert "state.json is damaged" in refusal(TrainerError, load_state, tmp_path)
