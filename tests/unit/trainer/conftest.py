import pytest
from support import single_process, single_world


@pytest.fixture
def alone():
    """This process is not one of several ranks."""
    with single_process():
        yield


@pytest.fixture
def world():
    """A process group of this process alone."""
    with single_world() as world:
        yield world
