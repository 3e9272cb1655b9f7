"""What the benchmarks share: fresh processes, failures, and tables."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from ranks import ROOT

from model_zoo import ModelError
from tools.bench import common, generator, quantizer
from tools.bench.measure import failure


@pytest.mark.parametrize(
    ("status", "said", "answer"),
    [
        (-signal.SIGKILL, "", {"failed": "killed, probably out of memory"}),
        (-signal.SIGSEGV, "", {"failed": "ended by SIGSEGV"}),
        (3, "", {"failed": "its process ended with status 3"}),
        (0, 'a library that talks on stdout\n{"sweeps": 6}\n', {"sweeps": 6}),
    ],
)
def test_the_answer_is_why_a_process_died_or_its_last_line(monkeypatch, status, said, answer):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], status, stdout=said))
    assert common.run_job("quantizer_rows", "measure") == answer


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of GPU memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (ModelError("at most 512 dimensions"), "at most 512 dimensions"),
        (ZeroDivisionError("first line\nsecond"), "ZeroDivisionError: first line"),
    ],
)
def test_why_a_row_has_no_numbers(capsys, error, said):
    assert failure(error) == said
    assert ("Error" in capsys.readouterr().err) == isinstance(error, ZeroDivisionError)


def test_a_short_row_is_filled_and_bars_are_replaced():
    table = common.Table(["impl", "a", "b"], [["dense", "1", "2"], ["triton", "not measured: a|b"]])
    assert common.markdown_table(table).splitlines()[2:] == ["| dense | 1 | 2 |", "| triton | not measured: a/b | - |"]


@pytest.mark.parametrize(
    ("command", "file", "lacked"),
    [
        ("quantizer", quantizer.REFERENCE_FILE, "IndexPropagationQuantize"),
        ("sample", generator.REFERENCE_FILE, "sample_IBQ"),
    ],
)
def test_a_reference_that_cannot_be_loaded_is_one_line(refused_by_ibq, jobs_here, checkout, command, file, lacked):
    for text, said in (
        ("import a_package_that_nobody_has\n", "needs the package a_package_that_nobody_has; install it"),
        ("GPT = None\n", f"has no {lacked}; check out TencentARC/SEED-Voken's main branch"),
    ):
        assert said in refused_by_ibq("bench", command, "--reference", checkout(file, text))


@pytest.mark.parametrize(
    ("command", "suffix"), [("quantizer", ".png"), ("data", ".md"), ("data", ".png"), ("data", ".json")]
)
def test_nothing_is_overwritten(refused_by_ibq, tmp_path, command, suffix):
    (tmp_path / f"table{suffix}").touch()
    assert "already exists" in refused_by_ibq("bench", command, "--out", tmp_path / "table.md")


@pytest.mark.process
@pytest.mark.full
def test_rows_are_measured_in_fresh_processes(tmp_path):
    """A command like an installed one, in a folder whose own `tools` is another package."""
    (tmp_path / "ibq").write_text("from tools.cli import main\nmain()\n")
    (tmp_path / "work" / "tools").mkdir(parents=True)
    (tmp_path / "work" / "tools" / "__init__.py").write_text("raise SystemExit('the wrong package')\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, tmp_path / "ibq", "bench", *arguments, "--device", "cpu", "--repeats", "1"]
        done = subprocess.run(command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    done = run("quantizer", "--tokens", "32", "--codes", "48,1000000000000", "--dim", "8", "--impl", "dense,chunked")
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("dense ", "chunked "))]
    assert [(row[0], row[3]) for row in rows] == [
        (impl, k) for k in ("48", "1000000000000") for impl in ("dense", "chunked")
    ]
    assert all(float(row[7]) >= 0 for row in rows[:2])
    assert all(" ".join(row[5:]) == "not measured: out of memory" for row in rows[2:])
    assert done.stderr.splitlines()[0] == "measuring row 1 of 4: dense, N 32, K 48, D 8, float32"
    done = run("cross-entropy", "--tokens", "64", "--codes", "3000", "--dim", "8")
    assert "N 64, K 3,000, D 8, float32: chunked takes " in done.stdout
    done = run("sample", "--recipe", "ar_debug")
    assert "ar_debug, V 256: cached samples " in done.stdout
    done = run("train-ar", "--recipe", "ar_debug", "--vocabulary", "40", "--impl", "ibq,dense")
    assert "ar_debug, V 40: ibq trains on " in done.stdout


@pytest.mark.process
@pytest.mark.full
@pytest.mark.parametrize(("job", "tokens", "codes"), [("measure", 256, 2**14), ("cross_entropy", 4096, 2**15)])
def test_extra_memory_is_what_dense_holds(job, tokens, codes):
    """dense holds several matrices of logits, chunked none: the cross entropy works on 256 MiB of logits at a time."""
    settings = dict(tokens=tokens, codes=codes, dim=8, dtype="float32", device="cpu", threads=1)
    dense, chunked = (common.run_job("quantizer_rows", job, impl=impl, **settings) for impl in ("dense", "chunked"))
    logits_bytes = 4 * tokens * codes
    assert 2 * logits_bytes < dense["extra_bytes"] < 12 * logits_bytes
    assert chunked["extra_bytes"] < logits_bytes
