import math

import pytest

from trainer.config import OptimizerConfig, ScheduleConfig
from trainer.schedules import learning_rate_factor, ramp, weight_decay

every_kind = pytest.mark.parametrize("kind", ["constant", "multistep", "cosine", "linear"])
QUARTER = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))  # of the way along a cosine from 1 to 0.1


def factors(steps, max_steps=100, **settings):
    config = ScheduleConfig(**settings)
    return [learning_rate_factor(config, step, max_steps) for step in steps]


@every_kind
def test_warm_up_grows_linearly_from_zero_to_the_peak(kind):
    assert factors(range(6), kind=kind, warmup_steps=5) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])


@every_kind
def test_without_warm_up_the_first_step_takes_the_peak(kind):
    assert factors([0], kind=kind) == [1.0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(kind="constant"), {0: 1.0, 50: 1.0, 99: 1.0, 1000: 1.0}),
        # Multistep drops at its milestones, which it counts from the start of training.
        (dict(kind="multistep", milestones=[50, 80], factor=0.1), {49: 1.0, 50: 0.1, 79: 0.1, 80: 0.01, 99: 0.01}),
        (dict(kind="multistep", milestones=[50, 80], factor=0.5), {50: 0.5}),
        (dict(kind="multistep", milestones=[10], warmup_steps=5), {5: 1.0, 9: 1.0, 10: 0.1}),
        # The others go from the peak behind warm-up to their final ratio, and stay there beyond the last step.
        (dict(kind="cosine", warmup_steps=20, final_ratio=0.1), {20: 1.0, 40: QUARTER, 60: 0.55, 100: 0.1}),
        (dict(kind="linear", warmup_steps=20, final_ratio=0.1), {20: 1.0, 40: 0.775, 60: 0.55, 100: 0.1}),
        (dict(kind="cosine", final_ratio=0.2), {100: 0.2, 150: 0.2}),
        (dict(kind="linear", final_ratio=0.2), {100: 0.2, 150: 0.2}),
        (dict(kind="cosine"), {0: 1.0, 100: 0.0}),
        (dict(kind="linear"), {0: 1.0, 100: 0.0}),
    ],
)
def test_each_kind_of_schedule_by_hand(settings, expected):
    assert factors(expected, **settings) == pytest.approx(list(expected.values()))


@every_kind
def test_warm_up_as_long_as_training_is_possible(kind):
    assert factors([0, 5, 9, 10], max_steps=10, kind=kind, warmup_steps=10)[:3] == pytest.approx([0.0, 0.5, 0.9])


@pytest.mark.parametrize(
    ("start_step", "ramp_steps", "expected"),
    [
        (10, 4, {0: 0.0, 9: 0.0, 10: 0.25, 11: 0.5, 12: 0.75, 13: 1.0, 14: 1.0, 99: 1.0}),
        (10, 0, {9: 0.0, 10: 1.0, 11: 1.0}),
        (10, 1, {9: 0.0, 10: 1.0, 11: 1.0}),
        (0, 0, {0: 1.0}),
        (0, 2, {0: 0.5}),
    ],
)
def test_ramp_is_zero_before_its_start_and_full_from_its_last_step_on(start_step, ramp_steps, expected):
    assert {step: ramp(step, start_step, ramp_steps) for step in expected} == expected


def test_the_published_generators_schedule():
    """Warm-up from 0.005, the peak for 5% of the rest, then linearly to 0.1."""
    settings = dict(kind="linear", warmup_steps=100, warmup_from=0.005, hold=0.05, final_ratio=0.1)
    assert factors([0, 50, 100, 1000], max_steps=1000, **settings) == pytest.approx([0.005, 0.5025, 1.0, 0.1])
    # Of 900 steps behind warm-up 45 are held; half of the other 855 are over at step 572.5.
    assert factors([145, 146, 572, 573], max_steps=1000, **settings) == pytest.approx(
        [1.0, 1 - 0.9 / 855, 0.55 + 0.45 / 855, 0.55 - 0.45 / 855]
    )


def test_weight_decay_goes_along_a_cosine():
    config = OptimizerConfig(weight_decay=0.05, final_weight_decay=0.08)
    assert [weight_decay(config, step, 100) for step in (0, 50, 100)] == pytest.approx([0.05, 0.065, 0.08])
    assert weight_decay(OptimizerConfig(weight_decay=0.05), 70, 100) == 0.05
