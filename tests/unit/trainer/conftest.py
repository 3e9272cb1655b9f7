import pytest

from trainer.parallel import start_world, stop_world


@pytest.fixture
def world(monkeypatch):
    """A process group of this process alone."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # start_world sets it; so it is taken back afterwards
    yield start_world("cpu")
    stop_world()
