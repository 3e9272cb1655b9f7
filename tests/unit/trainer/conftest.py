import pytest
from support import single_process, single_world


@pytest.fixture
def alone():
    with single_process():
        yield


@pytest.fixture
def world():
    with single_world() as world:
        yield world
