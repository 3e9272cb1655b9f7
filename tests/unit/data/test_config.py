import math

import pytest
from comparing import refusal

from data.config import DataConfig, check_numbers
from data.errors import DataError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": -1}, "data.workers=-1 must be at least 0"),
        ({"lanes": 0}, "data.lanes=0 must be at least 1"),
        ({"shuffle_megabytes": 0.0}, "data.shuffle_megabytes=0.0 must be above 0 and finite"),
        ({"retry_seconds": math.inf}, "data.retry_seconds=inf must be above 0 and finite"),
        ({"request_seconds": math.nan}, "data.request_seconds=nan must be above 0 and finite"),
        ({"max_bad_fraction": 1.5}, "data.max_bad_fraction=1.5 must be at most 1 and finite"),
    ],
)
def test_numbers_out_of_bounds_are_refused(change, message):
    assert refusal(DataError, check_numbers, DataConfig(**change)) == message


def test_bounds_themselves_are_allowed():
    check_numbers(DataConfig(workers=0, lanes=1, shuffle_block=1, max_bad_fraction=1.0))
