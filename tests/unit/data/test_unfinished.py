import errno
import os

import numpy as np
import pytest

from data.index import write_index
from data.unfinished import complete_file, remove_dead, unfinished


def other_process(monkeypatch, number: int) -> None:
    """Names of temporary files are those of another process. A lock of this one is like one of any other: flock(2)
    belongs to an opened file."""
    monkeypatch.setattr("os.getpid", lambda: number)


def no_flock(*_) -> None:
    raise OSError(errno.ENOLCK, "no locks")


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with complete_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a"]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), complete_file(path) as temporary:
        temporary.write_text("half")
        raise OSError("full")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_files_of_dead_processes_are_removed_and_those_of_live_ones_stay(tmp_path, monkeypatch):
    path = tmp_path / "a"
    with complete_file(path) as live:
        other_process(monkeypatch, -1)
        dead = unfinished(path)
        dead.write_text("half")
        others = unfinished(tmp_path / "b")
        others.write_text("half")
        remove_dead(tmp_path, "a")
        assert live.exists() and not dead.exists() and others.exists()


def test_two_processes_of_one_name_do_not_write_into_one_file(tmp_path):
    """As in two containers of one host name."""
    with complete_file(tmp_path / "a") as temporary:
        temporary.write_text("mine")
        with pytest.raises(BlockingIOError), complete_file(tmp_path / "a"):
            pass
        assert temporary.read_text() == "mine"
    assert (tmp_path / "a").read_text() == "mine"


def test_without_flock_files_are_written_and_none_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", no_flock)
    left = tmp_path / ".a.node-7.unfinished"
    left.write_text("half")
    remove_dead(tmp_path, "a")
    with complete_file(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert left.exists() and (tmp_path / "a").read_text() == "new"


def test_what_was_left_of_an_index_is_removed_by_the_next(tmp_path):
    left = tmp_path / ".index.safetensors.node-7.unfinished"
    left.write_text("half")
    write_index(tmp_path / "index.safetensors", [], [], [])
    assert os.listdir(tmp_path) == ["index.safetensors"] and np.memmap(tmp_path / "index.safetensors").size
