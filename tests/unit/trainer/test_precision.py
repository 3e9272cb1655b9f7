import math

import pytest
import torch

from trainer.precision import LossScale, autocast_dtype


def test_precisions_name_what_a_forward_computes_in():
    assert [autocast_dtype(name) for name in ("fp32", "bf16", "fp16")] == [None, torch.bfloat16, torch.float16]


def test_where_it_is_not_needed_it_is_one_and_takes_no_blame():
    scale = LossScale(needed=False)
    for finite in (True, False) * 2 * LossScale.GROWTH_STEPS:
        assert scale.update(finite) is False
        assert scale.value == 1.0


def test_overflow_halves_it_and_is_its_doing_until_it_is_one():
    scale = LossScale(needed=True)
    assert scale.value == LossScale.FIRST == 2.0**16
    for halvings in range(1, 17):
        assert scale.update(finite=False) is True
        assert scale.value == 2.0 ** (16 - halvings)
    for _ in range(3):
        assert scale.update(finite=False) is False  # the loss itself is not finite
        assert scale.value == 1.0


def test_it_doubles_after_so_many_good_steps_in_a_row_and_not_before(monkeypatch):
    monkeypatch.setattr(LossScale, "GROWTH_STEPS", 3)
    scale = LossScale(needed=True)
    values = []
    for finite in (True, True, False, True, True, True, True, True, True):
        assert scale.update(finite) is not finite
        values.append(scale.value / LossScale.FIRST)
    assert values == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 2]


def test_it_stays_within_what_a_float_holds(monkeypatch):
    monkeypatch.setattr(LossScale, "GROWTH_STEPS", 1)
    scale = LossScale(needed=True)
    for _ in range(100):
        scale.update(finite=True)
    assert scale.value == LossScale.LARGEST == 2.0**24


def test_a_resumed_run_goes_on_with_its_scale_and_count(monkeypatch):
    monkeypatch.setattr(LossScale, "GROWTH_STEPS", 3)
    scale = LossScale(needed=True)
    for finite in (False, True, True):
        scale.update(finite)
    resumed = LossScale(needed=True)
    resumed.load_state_dict(scale.state_dict())
    assert resumed.value == 2.0**15
    resumed.update(finite=True)  # the third good one in a row
    assert resumed.value == 2.0**16


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_from_a_run_without_a_scale_it_starts_with_the_first(value):
    scale = LossScale(needed=True)
    scale.load_state_dict({"value": value, "good_steps": 5})
    assert (scale.value, scale.good_steps) == (LossScale.FIRST, 0)


def test_another_precision_ignores_the_scale_of_an_fp16_run():
    scale = LossScale(needed=False)
    scale.load_state_dict(LossScale(needed=True).state_dict())
    assert scale.value == 1.0
