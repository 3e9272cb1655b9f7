"""The lower bounds of setup.py."""

import pytest
from ranks import TESTS


@pytest.mark.full
def test_training_works_with_the_lowest_versions(launch, tmp_path):
    """In a new environment, which pip and uv fill from the package index."""
    launch.finish(launch.start("bash", TESTS / "lower_bounds.sh", tmp_path), timeout_seconds=2400).succeeded()
