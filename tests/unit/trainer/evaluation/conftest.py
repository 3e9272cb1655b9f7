from collections.abc import Iterator
from pathlib import Path

import pytest
from random_networks import SmallInception, accepted, write_networks


@pytest.fixture(scope="session")
def _networks(tmp_path_factory) -> Path:
    return write_networks(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def weights(_networks, monkeypatch) -> Iterator[Path]:
    """The folder of random Inception, VGG16 and AlexNet networks, which replace the published ones."""
    monkeypatch.setenv("IBQ_WEIGHTS", str(_networks))
    with accepted(_networks):
        yield _networks


@pytest.fixture
def cache(weights, alone, tmp_path, monkeypatch) -> None:
    """The cache of features is empty, and this process is not one of several ranks."""
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_inception(weights, monkeypatch) -> None:
    """Features of generated images come from SmallInception."""
    monkeypatch.setattr("trainer.evaluation.features.Inception", SmallInception)
