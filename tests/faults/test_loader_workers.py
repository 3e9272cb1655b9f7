"""A data worker that dies, as by the kernel's out-of-memory killer, and shared memory that is too small."""

import signal

import pytest
import torch
from comparing import loss_lines, refusal
from faults.outcome import assert_resumed, assert_whole, latest, newest_step
from samples import write_tars

import data


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "was ended by signal SIGKILL, usually because memory ran out: use fewer data.workers"),
        pytest.param(signal.SIGBUS, "SIGBUS, usually because /dev/shm is full", marks=pytest.mark.full),
    ],
)
def test_all_ranks_stop_together_after_a_step_that_is_saved(two_ranks, unbroken, tmp_path, number, said):
    run = tmp_path / "run"
    fault = {"kind": "kill_worker", "rank": 1, "step": 2, "number": number}
    ended = two_ranks.train(run, {"data.workers": 1, "trainer.max_steps": 12}, fault)
    assert ended.statuses == [2, 2], ended.err
    assert len(set(ended.error_lines)) == 1 and said in ended.error_lines[0] and "Traceback" not in ended.err
    step = newest_step(run)
    assert step < 12 and f"step {step} is saved: resume with `ibq resume {run}`" in ended.error_lines[0]
    assert_whole(latest(run))
    assert_resumed(two_ranks.resume(run), run, after=step, last=12)
    assert loss_lines(run) == loss_lines(unbroken)  # nothing was lost or repeated


@pytest.fixture
def stream(tmp_path):
    tars = write_tars(tmp_path / "tars", [8])
    options = dict(global_batch_size=4, micro_batch_size=4, rank=0, world_size=1, seed=0)
    return lambda workers: data.train_batches(
        data.DataConfig(train=str(tars), image_size=8, workers=workers), **options
    )


@pytest.mark.parametrize("of", ["buffers", "locks"])
def test_too_little_shared_memory_is_said_before_the_first_step(stream, monkeypatch, of):
    """torch's buffers, and the locks of its queues."""

    def full(*_, **__):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch>: No space left on device (28)\n#0")

    def no_lock(*_, **__):
        raise OSError(28, "No space left on device")

    if of == "buffers":
        monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    else:
        monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", no_lock)
    message = refusal(data.DataError, stream, 2)
    assert "2 data.workers need 0 MB of shared memory (" in message and "No space left on device" in message
    assert "use `docker run --shm-size=8g`, fewer workers, or data.workers=0" in message
    monkeypatch.undo()
    assert len(next(stream(0)).infos) == 4  # the advice


def test_memory_that_runs_out_in_a_worker_is_said(stream, monkeypatch):
    """Here in the process that reads by itself, which runs the same code."""
    reads = stream(0)

    def read(*_):
        raise MemoryError

    monkeypatch.setattr(reads.parts[0].reader, "read", read)
    assert "no memory is left to read" in refusal(data.DataError, next, reads)
