"""One writer for each output: who may take a lock, and when."""

import os

import pytest
from comparing import refusal
from field.owners import ENDED, OTHER_MACHINE, REUSED_NUMBER, lock_of, no_flock
from support import single_world

from data.errors import DataError
from data.locks import WriterLock, file_lock
from trainer.run_folder import RunFolder


def test_a_lock_is_refused_while_its_owner_lives_and_free_afterwards(tmp_path, caplog):
    path = tmp_path / ".lock"
    with WriterLock(path, "runs/mine") as first:
        first.take()
        first.take()
        said = refusal(DataError, WriterLock(path, "runs/mine").take)
        assert said.startswith(f"runs/mine is being written by process {os.getpid()} on ") and " since 20" in said
        assert said.endswith("wait until it ends, or end it")
    assert not path.exists() and not caplog.messages
    with WriterLock(path, "runs/mine") as second:
        second.take()


def test_the_lock_of_a_dead_owner_is_taken_over_with_a_message(tmp_path, caplog):
    path = lock_of(tmp_path / ".lock", host="node-7", process=17, since="2026-11-29 12:00:00 UTC")
    with WriterLock(path, "runs/mine") as lock:
        lock.take()
    (said,) = caplog.messages
    owner = "process 17 on node-7 since 2026-11-29 12:00:00 UTC"
    assert said == f"the lock of runs/mine is taken over: {owner} has ended without giving it up"


def test_a_lock_of_a_folder_that_was_moved_is_removed_there_and_leaves_that_of_the_folder_that_is_here_now(tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    run.mkdir()
    with WriterLock(run / ".lock", run) as first:
        first.take()
        run.rename(moved)
        run.mkdir()
        second = WriterLock(run / ".lock", run)
        second.take()
        assert "is being written" in refusal(DataError, WriterLock(moved / ".lock", moved).take)
    assert not (moved / ".lock").exists()
    assert "is being written" in refusal(DataError, WriterLock(run / ".lock", run).take)
    second.release()


def test_a_lock_file_that_is_deleted_is_made_again_unless_another_process_has_taken_the_lock(tmp_path):
    path = tmp_path / ".lock"
    with WriterLock(path, "runs/mine") as first, WriterLock(path, "runs/mine") as second:
        first.take()
        path.unlink()
        assert first.hold() and "is being written" in refusal(DataError, second.take)
        path.unlink()
        second.take()
        assert not first.hold() and second.hold()
        first.release()
        assert path.exists()


def test_a_run_whose_lock_another_process_has_taken_gets_another_folder(tmp_path):
    (tmp_path / "run").mkdir()
    with single_world() as world, RunFolder(tmp_path / "run", world) as folder:
        folder.take()
        (tmp_path / "run/.lock").unlink()
        assert not folder.is_gone() and (tmp_path / "run/.lock").exists()
        (tmp_path / "run/.lock").unlink()
        with WriterLock(tmp_path / "run/.lock", "run") as other:
            other.take()
            assert folder.is_gone()


@pytest.mark.parametrize("owner", [ENDED, REUSED_NUMBER], ids=["ended", "number in use again"])
def test_without_flock_an_owner_on_this_machine_that_has_ended_loses_the_lock(tmp_path, monkeypatch, owner):
    monkeypatch.setattr("data.locks.SETTLE_SECONDS", 0)
    path = lock_of(tmp_path / ".lock", **owner)
    with WriterLock(path, "runs/mine", no_flock) as lock:
        lock.take()
        # Even where flock works now: that process could not hold the lock by it.
        assert "is being written" in refusal(DataError, WriterLock(path, "runs/mine").take)
        assert "is being written" in refusal(DataError, WriterLock(path, "runs/mine", no_flock).take)
    assert not path.exists()


def test_without_flock_an_owner_on_another_machine_keeps_the_lock_until_the_file_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr("data.locks.SETTLE_SECONDS", 0)
    path = lock_of(tmp_path / ".lock", **OTHER_MACHINE)
    said = refusal(DataError, WriterLock(path, "runs/mine", no_flock).take)
    assert " on node-7 since " in said and said.endswith(f"if it has ended, delete {path}")
    path.unlink()
    with WriterLock(path, "runs/mine", no_flock) as lock:
        lock.take()


def test_without_flock_the_last_of_several_takers_has_the_lock(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    monkeypatch.setattr("data.locks.time.sleep", lambda seconds: lock_of(path, process=1, started=None, place="x"))
    assert "process 1 on" in refusal(DataError, WriterLock(path, "runs/mine", no_flock).take)


def test_a_damaged_lock_file_is_taken_over(tmp_path, caplog):
    path = tmp_path / ".lock"
    path.write_text("[1")
    with WriterLock(path, "runs/mine") as lock:
        lock.take()
    assert "is taken over: another process has ended" in caplog.text


def test_a_file_whose_name_has_255_bytes_has_a_lock(tmp_path):
    path = file_lock(tmp_path / ("a" * 251 + ".npz"))
    with WriterLock(path, "samples") as lock:
        lock.take()
        assert path.exists()
