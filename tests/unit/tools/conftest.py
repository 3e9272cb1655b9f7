"""`ibq` in this process."""

from collections.abc import Callable

import pytest

from tools import cli


@pytest.fixture
def ibq(capsys) -> Callable[..., tuple[int, str, str]]:
    """`ibq(*arguments)`: exit status, stdout and stderr of `ibq ARGUMENTS`."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            cli.main([*map(str, arguments)])
        return exited.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def refusal(ibq) -> Callable[..., str]:
    """`refusal(*arguments)`: the line with which `ibq ARGUMENTS` ends, and status 2."""

    def run(*arguments) -> str:
        status, out, err = ibq(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith("ibq: error: ") and err.count("\n") == 1
        return err

    return run
