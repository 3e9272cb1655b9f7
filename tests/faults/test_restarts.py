"""torchrun --max-restarts: processes started again go on from the newest checkpoint by themselves."""

import json
import re

import pytest
from faults.outcome import assert_whole, fault_settings, latest, loss_lines, newest_step
from ranks import INJECT, TORCHRUN

STEPS = 8


# The checkpoint of step 4 is finished at the latest when that of step 6 begins; that one may not be finished at step 7.
@pytest.mark.parametrize(("killed_at", "goes_on_after"), [(7, {4, 6}), (2, {0})], ids=["saved", "nothing saved yet"])
def test_a_killed_rank_is_started_again_and_the_run_ends_well(launch, unbroken, tmp_path, killed_at, goes_on_after):
    run = tmp_path / "run"
    fault = json.dumps({"kind": "kill_at_step", "rank": 1, "step": killed_at})
    torchrun = *TORCHRUN, 2, "--max-restarts", 1  # which must be enough
    arguments = "debug", f"run={run}", *fault_settings({"trainer.max_steps": STEPS})
    ended = launch.finish(launch.start_python(*torchrun, INJECT, fault, *arguments))
    assert ended.status == 0, ended.err
    first, *again = re.findall(rf"steps (\d+) to {STEPS}$", ended.err, re.MULTILINE)
    assert first == "1" and len(again) == 1 and int(again[0]) - 1 in goes_on_after
    assert newest_step(run) == STEPS
    assert_whole(latest(run))
    assert loss_lines(run) == loss_lines(unbroken)[:STEPS]
