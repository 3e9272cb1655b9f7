import pytest
from support import single_process, single_world

from tools import cli


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


@pytest.fixture
def refused_by_ibq(capfd):
    """`refused_by_ibq(*arguments)`: the one line with which `ibq ARGUMENTS` refuses a mistake, with status 2."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as exited:
            cli.main([*map(str, arguments)])
        err = capfd.readouterr().err
        assert exited.value.code == 2 and err.count("\n") == 1 and err.startswith("ibq: error: "), err
        return err

    return run
