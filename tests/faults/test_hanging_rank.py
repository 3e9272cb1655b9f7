"""A rank that makes no progress: every rank tells where it stands, and the run ends instead of idling."""

import json
import re
import time

from faults.outcome import assert_resumed, fault_settings, loss_lines, newest_step
from ranks import INJECT, TORCHRUN

TIMEOUT_SECONDS = 5
# Imports, the first steps, the watchdog's patience and the end of all processes, on a machine that is busy.
ENOUGH_SECONDS = 90


def test_every_rank_tells_where_it_stands(launch, two_ranks, unbroken, tmp_path):
    run = tmp_path / "run"
    # Rank 0 comes later to the step, and its watchdog later to its end: it must not lose its peer before it has told.
    fault = json.dumps({"kind": "fall_asleep", "rank": 1, "step": 5, "lag_seconds": 0.5})
    arguments = "debug", f"run={run}", *fault_settings({"trainer.timeout_seconds": TIMEOUT_SECONDS})
    began = time.monotonic()
    ended = launch.finish(launch.start_python(*TORCHRUN, 2, INJECT, fault, *arguments))
    assert time.monotonic() - began < ENOUGH_SECONDS
    assert ended.status != 0
    reports = re.findall(
        r"^ibq: error: rank (\d) of 2 \(.*made no progress for 5 s in step 5 ", ended.err, re.MULTILINE
    )
    assert sorted(reports) == ["0", "1"], ended.err
    assert "in sleeping_beauty" in ended.err  # the hanging rank, by its function
    assert "in sum_over_ranks" in ended.err or "in mean_over_ranks" in ended.err, ended.err  # and who waits for it
    assert re.search(r"exitcode\s*: 124", ended.err), ended.err

    newest = newest_step(run)
    assert newest in (2, 4)  # the latter may not have been finished
    assert_resumed(two_ranks.resume(run, "trainer.timeout_seconds=300"), run, after=newest, last=6)
    assert loss_lines(run) == loss_lines(unbroken)[:6]
