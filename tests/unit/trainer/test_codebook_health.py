"""Codebook usage over a sliding window, the alarm, and the distance between features and codes."""

from functools import partial

import numpy as np
import pytest
import torch

from trainer.metrics.codebook import CodebookHealth, gaussian_distance, moments
from trainer.telemetry import RunTelemetry

health = partial(CodebookHealth, [10], 40)  # 16 x 10 tokens: a window of 4 steps


def test_the_window_sees_sixteen_tokens_a_code():
    assert health().window_steps == 4
    assert CodebookHealth([2**18], 256 * 256).window_steps == 64
    assert CodebookHealth([10], 10**6).window_steps == 1


def test_a_token_counts_in_each_group_of_a_codebook_that_is_too_large_to_count():
    assert CodebookHealth([2**16, 2**16], 256 * 256).window_steps == 16  # not 32, as for 2^17 codes
    assert CodebookHealth([2**10, 2**9], 2**10).window_steps == 16  # of the largest group
    watched = CodebookHealth([4, 4], 64)
    watched.update(torch.tensor([[0, 4], [0, 5]]), 0)  # two tokens
    assert watched.read(0)["usage"] == 3 / 8 and watched.alarm is None
    watched.update(torch.tensor([[0, 4]]), 1)
    watched.read(1)
    watched.update(torch.tensor([[0]]), 2)
    watched.read(2)
    assert watched.alarm.startswith("usage of groups is 12.5%")


def test_usage_is_that_of_the_window_and_since_the_start():
    watched = health()
    random = np.random.default_rng(0)
    chosen = [random.integers(0, 10, size=2) for _ in range(12)]
    for step, codes in enumerate(chosen):
        watched.update(torch.tensor(codes).view(1, 2), step)
        if step % 3 == 2:  # read now and then, as the log does
            read = watched.read(step)
            window = np.unique(chosen[max(0, step - 3) : step + 1])
            assert read["usage"] == len(window) / 10
            assert read["dead_codes"] == 10 - len(window)
            assert read["usage_since_start"] == len(np.unique(chosen[: step + 1])) / 10
            _, counts = np.unique(chosen[step - 2 : step + 1], return_counts=True)
            share = counts / counts.sum()
            assert read["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_the_alarm_comes_when_usage_falls_below_half_its_best_and_goes_when_it_is_back():
    watched, alarms = health(), []
    for step in range(20):
        codes = torch.arange(8) if step < 6 or step > 13 else torch.arange(3)
        watched.update(codes, step)
        watched.read(step)
        alarms.append(watched.alarm)
    # The last 8 codes leave at step 9.
    assert [bool(alarm) for alarm in alarms] == [False] * 9 + [True] * 5 + [False] * 6
    assert "usage is 30.0% (best so far 80.0%) over the last 4 steps" in alarms[9]
    assert "optimizer.lr" in alarms[9] and "\n" not in alarms[9]


def test_no_alarm_before_the_window_is_full_but_then_for_a_codebook_that_never_came_into_use():
    watched = CodebookHealth([40], 160)
    for step in range(4):
        watched.update(torch.tensor([7, 7, 9]), step)
        watched.read(step)
        assert bool(watched.alarm) == (step == 3)


def test_codes_that_start_at_one_place_have_time_to_come_into_use():
    def alarms(usages: list[int], start_steps: int) -> list[bool]:
        watched, found = CodebookHealth([40], 640, start_steps=start_steps), []  # a window of 1 step
        for step, used in enumerate(usages):
            watched.update(torch.arange(used), step)
            watched.read(step)
            found.append(bool(watched.alarm))
        return found

    assert alarms([1, 2, 1, 8, 20], 10) == [False] * 5
    assert alarms([1, 2, 1, 8, 20], 0) == [True] * 3 + [False] * 2
    assert alarms([1] * 5, 3) == [False] * 3 + [True] * 2  # they never came into use
    assert alarms([1, 8, 3, 20], 10) == [False, False, True, False]  # they did, and collapsed within the time


def test_a_resumed_run_goes_on_counting():
    straight, stopped = health(), health()
    for step in range(3):
        for one in (straight, stopped):
            one.update(torch.tensor([step, 5]), step)
            one.read(step)
    resumed = health()
    resumed.load_state_dict({name: value.clone() for name, value in stopped.state_dict().items()})
    for one in (straight, resumed):
        one.update(torch.tensor([9]), 5)
    assert straight.read(5) == resumed.read(5)
    assert straight.read(5)["usage"] == 0.3  # 2, 5 and 9; 0 and 1 have left the window


def test_distance_of_distributions_by_hand():
    random = np.random.default_rng(0)
    first, second = random.normal(1, 2, (500, 3)), random.normal([0, 1, 2], [1, 2, 3], (70, 3))
    expected = np.sqrt((np.square(first.mean(0) - second.mean(0)) + np.square(first.std(0) - second.std(0))).sum() / 3)
    parts = sum(moments(torch.tensor(part)) for part in np.split(first, [100, 101]))  # of micro-batches or ranks
    assert gaussian_distance(parts, moments(torch.tensor(second))) == pytest.approx(expected, rel=1e-9)
    assert gaussian_distance(parts, parts) == 0


def test_the_alarm_is_said_when_it_begins_and_when_it_ends(tmp_path, capsys):
    with RunTelemetry(tmp_path, 0, 10) as telemetry:
        for step, text in enumerate([None, "usage is 3%", "usage is 2%", None], start=1):
            telemetry.alarm(step, text)
            telemetry.log(step, {"codebook/usage": 0.03})
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if not line.startswith("step 1/") and "codes" not in line] == [
        "ALARM at step 2: usage is 3%",
        "step 4: codebook usage has recovered",
    ]


def test_the_terminal_tells_usage_of_groups_from_usage_of_codes(tmp_path, capsys):
    for name, said in (("usage", "codes 3%"), ("group_usage", "usage of groups 3%")):
        with RunTelemetry(tmp_path / name, 0, 1) as telemetry:
            telemetry.log(1, {f"codebook/{name}": 0.03})
        assert said in capsys.readouterr().err
