import pytest
import torch

from trainer import TrainerError, checkpoint
from trainer.checkpoint import latest_checkpoint, load_state, save_checkpoint


@pytest.fixture
def save(world, tmp_path):
    def save(step: int, content: str | None = None, keep: int = 3):
        def write(folder):
            (folder / "part").mkdir()
            (folder / "part" / "weights").write_text(content or f"weights of {step}")

        return save_checkpoint(tmp_path, step, {"step": step, "data": [1, {"a": 2}]}, write, world, keep)

    return save


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_loadable(run, step, content=None):
    folder = latest_checkpoint(run)
    assert folder.name == f"step_{step:08d}"
    assert load_state(folder) == {"step": step, "data": [1, {"a": 2}]}
    assert (folder / "part" / "weights").read_text() == (content or f"weights of {step}")


def test_a_world_of_one_runs_on_the_cpu(world):
    assert tuple(world) == (0, 1, torch.device("cpu")) and world.is_main


def test_a_checkpoint_is_a_folder_that_latest_names(save, tmp_path):
    assert save(1000) == tmp_path / "checkpoints" / "step_00001000"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00001000"
    assert names(tmp_path) == ["latest", "step_00001000"]
    assert_loadable(tmp_path, 1000)
    save(2000)
    assert_loadable(tmp_path, 2000)


def test_a_write_that_fails_in_the_middle_leaves_the_former_checkpoint_in_force(save, world, tmp_path):
    save(10)

    def write(folder):
        (folder / "weights").write_text("half of")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path, 20, {"step": 20}, write, world, 3)
    assert "step_00000020" not in names(tmp_path)
    assert_loadable(tmp_path, 10)


@pytest.mark.parametrize("broken", ["_sync", "json.dumps", "Path.rename", "Path.replace"])
def test_a_failure_at_any_later_moment_leaves_the_former_checkpoint_in_force(save, tmp_path, monkeypatch, broken):
    save(10)

    def fail(*_):
        raise OSError("killed")

    owner, _, name = broken.rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(checkpoint, owner) if owner else checkpoint, name, fail)
        with pytest.raises(OSError, match="killed"):
            save(20)
    assert_loadable(tmp_path, 10)
    save(20)
    assert_loadable(tmp_path, 20)


def test_left_overs_of_a_failed_write_are_gone_the_next_time(save, world, tmp_path):
    def write(folder):
        (folder / "left over").write_text("half of")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path, 20, {"step": 20}, write, world, 3)
    assert names(tmp_path) == ["step_00000020.unfinished"]
    folder = save(20)
    assert names(tmp_path) == ["latest", "step_00000020"]
    assert sorted(path.name for path in folder.iterdir()) == ["part", "state.json"]
    assert_loadable(tmp_path, 20)


def test_the_newest_checkpoints_are_kept(save, tmp_path):
    for step in (5, 10, 100, 20_000):
        save(step, keep=2)
    assert names(tmp_path) == ["latest", "step_00000100", "step_00020000"]
    assert_loadable(tmp_path, 20_000)
    save(30_000, keep=1)
    assert names(tmp_path) == ["latest", "step_00030000"]
    assert_loadable(tmp_path, 30_000)


def test_unfinished_left_overs_do_not_count_as_kept(save, tmp_path):
    (tmp_path / "checkpoints" / "step_00000099.unfinished").mkdir(parents=True)
    for step in (10, 20, 30):
        save(step, keep=2)
    assert {"step_00000020", "step_00000030"} < set(names(tmp_path))
    assert "step_00000010" not in names(tmp_path)


def test_the_same_step_is_written_over(save, tmp_path):
    save(10, "old")
    (tmp_path / "checkpoints" / "step_00000010" / "only in the old one").touch()
    folder = save(10, "new")
    assert_loadable(tmp_path, 10, "new")
    assert not (folder / "only in the old one").exists()
    assert names(tmp_path) == ["latest", "step_00000010"]


def refused(run) -> str:
    with pytest.raises(TrainerError) as error:
        latest_checkpoint(run)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_checkpoint_yet_is_said(tmp_path):
    assert "no finished checkpoint" in refused(tmp_path)
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    assert "no finished checkpoint" in refused(tmp_path)


@pytest.mark.parametrize("text", ["step_00000099", "", "..", "step_00000020"])
def test_latest_that_names_no_finished_checkpoint_is_refused(save, tmp_path, text):
    save(10)
    (tmp_path / "checkpoints" / "step_00000020").mkdir()  # a folder, but without state
    (tmp_path / "checkpoints" / "latest").write_text(text)
    message = refused(tmp_path)
    assert str(tmp_path / "checkpoints" / "latest") in message and "no finished checkpoint" in message


def test_latest_may_be_edited_by_hand(save, tmp_path):
    save(10)
    save(20)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000010\n")
    assert_loadable(tmp_path, 10)


def test_going_on_from_an_earlier_checkpoint_keeps_what_is_written_then(save, tmp_path):
    for step in (10, 20, 30):
        save(step)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000010")
    save(12, keep=1)
    assert_loadable(tmp_path, 12)
    assert "step_00000010" not in names(tmp_path)
