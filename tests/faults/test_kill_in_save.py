"""kill -9 of a rank at every moment of a save: the former checkpoint stays in force until the new one is whole."""

import signal

import pytest
from comparing import loss_lines
from faults.outcome import assert_resumed, assert_whole, latest, newest_step

STEPS = 6
SAVED, KILLED = 2, 4  # the checkpoint that is there, and the one in whose writing the kill comes

# Of each phase: which checkpoint is in force after a kill of rank 0, and of rank 1. Rank 0 publishes, alone: where rank
# 1 has written its part and dies, rank 0 comes to the end of it.
PHASES = {
    "before the part": (SAVED, SAVED),
    "half of the part": (SAVED, SAVED),
    "after the part": (SAVED, SAVED),
    "before the manifest": (SAVED, KILLED),
    "after the manifest": (SAVED, KILLED),
    "after the rename": (SAVED, KILLED),
    "after latest": (KILLED, KILLED),
    "half of the pruning": (KILLED, KILLED),
}


# Rank 1 writes its part and no more. Where training waits for the save, what differs is who writes the part and what
# the other rank does meanwhile.
CASES = [(phase, 0, "async") for phase in PHASES]
CASES += [
    (phase, 1, "async") for phase in ("half of the part", "after the part", "before the manifest", "after latest")
]
CASES += [("half of the part", 0, "sync"), ("after the part", 1, "sync")]
# The rest are only in `make test-full`: test_checkpoint.py fails each operation of a save in one process.
REPRESENTATIVE = [
    *[("half of the part", 0, "async"), ("after the rename", 0, "async")],
    *[("before the manifest", 1, "async"), ("half of the part", 0, "sync")],
]


@pytest.mark.parametrize(
    ("phase", "rank", "kind"),
    [case if case in REPRESENTATIVE else pytest.param(*case, marks=pytest.mark.full) for case in CASES],
)
def test_the_checkpoint_in_force_is_whole_and_the_run_goes_on(two_ranks, unbroken, tmp_path, phase, rank, kind):
    run = tmp_path / "run"
    changes = {"trainer.keep_last": 1, "trainer.async_checkpoints": kind == "async"}
    fault = {"kind": "kill_in_save", "rank": rank, "step": KILLED, "phase": phase}
    killed = two_ranks.train(run, changes, fault)
    assert killed.statuses[rank] == -signal.SIGKILL, killed.err
    assert killed.statuses[1 - rank] == 1, killed.err  # by itself, once its peer does not answer

    in_force = PHASES[phase][rank]
    assert newest_step(run) == in_force
    assert_whole(latest(run))

    assert_resumed(two_ranks.resume(run), run, after=in_force, last=STEPS)
    assert loss_lines(run) == loss_lines(unbroken)[:STEPS]


def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_one_that_was_resumed_from(
    two_ranks, unbroken, copy_of_unbroken
):
    """A run that resumes from an earlier step replaces the later checkpoints one by one."""
    run = copy_of_unbroken
    fault = {"kind": "kill_in_save", "rank": 0, "step": 6, "phase": "before the rename"}
    killed = two_ranks.resume(
        run / "checkpoints/step_00000004", "trainer.keep_last=1", "trainer.max_steps=8", fault=fault
    )
    assert killed.statuses[0] == -signal.SIGKILL, killed.err
    resumed = two_ranks.resume(run)
    assert "step_00000006 is passed over: step_00000006 does not exist" in resumed.errs[0]
    assert_resumed(resumed, run, after=4, last=8)
    assert loss_lines(run) == loss_lines(unbroken)[:8]
