"""torch.compile on machines where it does not work: one line before the first step."""

import pytest
import torch
from comparing import refusal

from trainer import TrainerError
from trainer.compiler import check_compiler

CPU = torch.device("cpu")


@pytest.fixture
def compiled(monkeypatch):
    """Compilers are other processes."""
    monkeypatch.setattr("shutil.which", lambda command: f"/usr/bin/{command}")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    check_compiler(CPU, "trainer.compile=true")


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    message = refusal(TrainerError, check_compiler, CPU, "--compile")
    assert "--compile needs a C++ compiler, and /nowhere/g++ is not on PATH" in message
    assert message.endswith("`ibq doctor` says more, or leave out --compile")


def test_a_compiler_that_fails(compiled, monkeypatch):
    """Without Python's headers, without room in TMPDIR: a page of errors becomes one line."""

    def fail(function):
        raise RuntimeError("\nCppCompileError: C++ compile error\n\nCommand: g++ ...\n" + "x\n" * 50)

    monkeypatch.setattr(torch, "compile", fail)
    message = refusal(TrainerError, check_compiler, CPU, "trainer.compile=true")
    assert "does not work here (RuntimeError: CppCompileError: C++ compile error)" in message


def test_training_and_sampling_look_before_they_begin(monkeypatch, tmp_path, refused_by_ibq):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    run = tmp_path / "run"
    message = refused_by_ibq("train", "debug", f"run={run}", "trainer.device=cpu", "trainer.compile=true")
    assert "trainer.compile=true needs a C++ compiler" in message and not run.exists()
    message = refused_by_ibq("sample", run, "--compile", "--device", "cpu")
    assert "--compile needs a C++ compiler" in message
