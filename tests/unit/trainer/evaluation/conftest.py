from pathlib import Path

import pytest
from random_networks import SmallInception, accept, hashes_of, write_networks

from model_zoo.eval_nets.weights import WEIGHTS_FILES


@pytest.fixture(scope="session")
def _networks(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = write_networks(tmp_path_factory.mktemp("weights"))
    return folder, hashes_of(folder)


@pytest.fixture
def weights(_networks, monkeypatch) -> Path:
    """The folder of random Inception, VGG16 and AlexNet networks, which replace the published ones."""
    folder, hashes = _networks
    monkeypatch.setenv("IBQ_WEIGHTS", str(folder))
    for key, entry in WEIGHTS_FILES.items():
        monkeypatch.setitem(WEIGHTS_FILES, key, entry)  # restores it after the test
    accept(hashes)
    return folder


@pytest.fixture
def cache(weights, alone, tmp_path, monkeypatch) -> None:
    """The cache of features is empty, and this process is not one of several ranks."""
    monkeypatch.setenv("IBQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small_inception(weights, monkeypatch) -> None:
    """Features of generated images come from SmallInception."""
    monkeypatch.setattr("trainer.evaluation.features.Inception", SmallInception)
