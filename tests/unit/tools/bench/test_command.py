"""`ibq bench quantizer`: what a row measures, the table, the reference's checkout, and mistakes in one line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model_zoo import ModelError
from tools import cli
from tools.bench import command as bench
from tools.bench import common as measuring
from tools.bench import quantizer as bench_quantizer

ROOT = Path(__file__).resolve().parents[4]
# The interface of the published quantizer, and a stand-in's few lines.
STAND_IN = """
import torch
from torch import nn

class IndexPropagationQuantize(nn.Module):
    def __init__(self, n_e, e_dim, beta=0.25, use_entropy_loss=False, entropy_temperature=0.01):
        super().__init__()
        self.embedding = nn.Embedding(n_e, e_dim)
        self.use_entropy_loss = use_entropy_loss

    def forward(self, z):
        print("a library that talks on stdout")
        logits = torch.einsum("bdhw,kd->bkhw", z, self.embedding.weight)
        quantized = torch.einsum("bkhw,kd->bdhw", logits.softmax(dim=1), self.embedding.weight)
        loss = (quantized - z).square().mean()
        return quantized, (loss, loss, loss, loss) if self.use_entropy_loss else loss, (None, None, None)
"""


def checkout(folder, text=STAND_IN):
    """A folder like a checkout of the reference."""
    path = folder / bench.REFERENCE_FILE
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return folder


def fail(capsys, *arguments):
    """The one line on stderr of `ibq bench quantizer ARGUMENTS`."""
    with pytest.raises(SystemExit) as exited:
        cli.main(["bench", "quantizer", *map(str, arguments)])
    captured = capsys.readouterr()
    assert exited.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("ibq: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of the command like an installed one, in a folder whose own `tools` is not ours."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "bin").mkdir()
    (folder / "bin" / "ibq").write_text("from tools.cli import main\nmain()\n")
    (folder / "work" / "tools").mkdir(parents=True)
    (folder / "work" / "tools" / "__init__.py").write_text("raise SystemExit('the wrong package')\n")
    checkout(folder / "published")
    command = [sys.executable, folder / "bin" / "ibq", "bench", "quantizer"]
    command += ["--tokens", "32", "--codes", "48", "--dim", "8", "--impl", "dense,chunked,triton,attention"]
    command += ["--repeats", "1", "--device", "cpu", "--reference", "../published", "--out", "table.md"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=folder / "work", env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run, folder / "work"


def test_the_table_has_a_row_for_each_impl(finished):
    run, _ = finished
    lines = run.stdout.splitlines()
    heading = lines.index(next(line for line in lines if line.startswith("impl ")))
    rows = [line.split() for line in lines[heading + 1 : heading + 6]]
    assert [row[0] for row in rows] == ["reference", "dense", "chunked", "triton", "attention"]
    assert all(row[1:5] == ["float32", "32", "48", "8"] for row in rows)
    assert [" ".join(row[5:]) for row in rows[3:]] == ["not measured: needs CUDA"] * 2
    for row in rows[:3]:
        assert float(row[7]) == pytest.approx(float(row[5]) + float(row[6]), abs=0.002)
    assert all(len(line) <= 120 for line in lines)
    assert "reference: ../published (revision unknown)" in lines
    assert "N 32, K 48, D 8, float32: chunked takes " in run.stdout


def test_progress_goes_to_stderr(finished):
    run, _ = finished
    assert run.stderr.splitlines() == [
        f"measuring row {number} of 5: {impl}, N 32, K 48, D 8, float32"
        for number, impl in ((1, "reference"), (2, "dense"), (3, "chunked"))
    ]


def test_the_files_hold_the_full_table_and_bars(finished):
    run, folder = finished
    assert run.stdout.endswith("\ntable: table.md\npicture: table.png\n")
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5
    assert {len(row) for row in rows} == {len(bench.SHAPE_COLUMNS + bench.COLUMNS)}
    assert {"floor, s", "matmul, GFLOP/s", "process in all, MiB", "processor, s"} <= set(rows[0])
    assert rows[-1][:7] == ["attention", "float32", "32", "48", "8", "not measured: needs CUDA", "-"]
    assert "`ibq bench quantizer --tokens 32 --codes 48 --dim 8 --impl dense,chunked,triton,attention" in text
    assert str(Path.home()) not in text


def test_a_row_that_does_not_fit_says_so_and_the_table_goes_on(capsys):
    arguments = "--tokens 32 --dim 8 --codes 1000000000000,48 --impl chunked --repeats 1 --device cpu --temperature 0"
    with pytest.raises(SystemExit) as exited:
        cli.main(["bench", "quantizer", *arguments.split()])
    assert not exited.value.code
    out = capsys.readouterr().out
    assert "1000000000000  8  not measured: out of memory\n" in out
    assert out.count("chunked ") == 2


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (-signal.SIGKILL, "killed, most likely for want of memory"),
        (-signal.SIGSEGV, "ended by SIGSEGV"),
        (3, "its process ended with status 3"),
    ],
)
def test_a_process_that_dies_is_a_reason(monkeypatch, status, said):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], status, stdout=""))
    assert bench._run("measure") == {"failed": said}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of GPU memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (ModelError("at most 512 dimensions"), "at most 512 dimensions"),
        (ZeroDivisionError("first line\nsecond"), "ZeroDivisionError: first line"),
    ],
)
def test_what_a_row_says_of_errors(capsys, error, said):
    assert measuring.failure(error) == said
    assert ("Error" in capsys.readouterr().err) == isinstance(error, ZeroDivisionError)


def test_sweeps_are_those_really_made():
    tiny = dict(dtype="float32", tokens=16, codes=64, dim=8, tile=[16, 32])
    assert bench_quantizer.measure(impl="dense", **tiny).sweeps == 6
    entropies = bench_quantizer.measure(impl="chunked", skip=False, **tiny)
    assert (entropies.sweeps, entropies.skip_soft, entropies.skip_entropy) == (12, 0, 0)
    plain = bench_quantizer.measure(impl="chunked", skip=False, temperature=None, **tiny)
    assert (plain.sweeps, plain.skip_entropy) == (6, None)
    assert bench_quantizer.measure(impl="chunked", scale=30.0, **tiny).sweeps < 12


def test_extra_memory_is_what_dense_holds():
    """In a process of its own, and several N x K matrices of 16 MiB."""
    rows = {
        impl: bench._run("measure", impl=impl, dtype="float32", tokens=256, codes=2**14, dim=8, device="cpu", threads=1)
        for impl in ("dense", "chunked")
    }
    assert 4 * 16 < rows["dense"]["extra_bytes"] / 2**20 < 12 * 16
    assert rows["chunked"]["extra_bytes"] / 2**20 < 16


def test_attention_over_the_codebook_is_the_softmax():
    z_nd, codebook_kd, grad_nd = torch.randn(5, 8, requires_grad=True), torch.randn(7, 8), torch.randn(5, 8)
    loss = bench_quantizer.attention_loss(z_nd, grad_nd, torch.nn.Parameter(codebook_kd)).of(None)
    torch.testing.assert_close(loss, ((z_nd @ codebook_kd.T).softmax(dim=1) @ codebook_kd * grad_nd).sum())


@pytest.mark.parametrize("temperature", [None, 0.01])
def test_the_reference_gets_our_codebook_and_all_its_losses_count(tmp_path, temperature):
    path = checkout(tmp_path) / bench.REFERENCE_FILE
    quantizer = bench_quantizer.reference_class(str(path))
    z_bdhw = torch.randn(bench_quantizer.reference_shape(6, 4), requires_grad=True)
    codebook_kd = torch.nn.Parameter(torch.randn(9, 4))
    loss = bench_quantizer.reference_loss(quantizer, z_bdhw, torch.zeros_like(z_bdhw), codebook_kd, temperature)
    value = loss.of(None)
    value.backward()
    z_nd = z_bdhw.detach().flatten(2).transpose(1, 2)[0]
    soft = ((z_nd @ codebook_kd.T).softmax(dim=1) @ codebook_kd - z_nd).square().mean()
    torch.testing.assert_close(value, soft if temperature is None else 2 * soft)
    assert codebook_kd.grad.shape == (9, 4)


def test_the_reference_sees_pictures():
    assert bench_quantizer.reference_shape(512, 8) == (2, 8, 16, 16)
    assert bench_quantizer.reference_shape(300, 8) == (1, 8, 1, 300)


def test_a_reference_that_lacks_a_package_names_it(tmp_path):
    path = checkout(tmp_path, "import a_package_that_nobody_has\n") / bench.REFERENCE_FILE
    with pytest.raises(ModelError, match="needs the package a_package_that_nobody_has: install it here"):
        bench_quantizer.reference_class(str(path))


def test_a_reference_without_the_class_is_one_line(capsys, tmp_path):
    said = fail(capsys, "--reference", checkout(tmp_path, "pass\n"))
    assert "has no class IndexPropagationQuantize" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "many"], "--tokens: 'many'"),
        (["--codes", "16,0"], "--codes: '16,0'"),
        (["--dim", "-1"], "--dim: '-1'"),
        (["--dtype", "float64"], "'float64' is none of float32, bfloat16, float16"),
        (["--impl", "dense,fast"], "'fast' is none of dense, chunked, triton, attention"),
        (["--tile", "16"], "as in 1024,256"),
        (["--device", "tpu"], "'tpu' is none of auto, cpu, cuda"),
        (["--temperature", "-1"], "is no number from 0 on"),
        (["--temperature", "nan"], "is no number from 0 on"),
        (["--scale", "0"], "is no number above 0"),
        (["--scale", "inf"], "is no number above 0"),
        (["--repeats", "0"], "--repeats"),
        (["--reference", "nowhere"], "git clone https://github.com/TencentARC/SEED-Voken"),
        (["--out", "table.txt"], "does not end in .md"),
        (["--out", "nowhere/table.md"], "nowhere is no folder"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in fail(capsys, *arguments)


def test_nothing_is_overwritten(capsys, tmp_path):
    (tmp_path / "table.png").touch()
    assert "is there already" in fail(capsys, "--out", tmp_path / "table.md")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_one_line(capsys):
    assert "finds no CUDA device" in fail(capsys, "--device", "cuda")


def test_ratios_are_to_every_base_that_was_measured():
    def row(impl, seconds, mebibytes):
        measured = {"forward_seconds": seconds, "backward_seconds": 0, "extra_bytes": mebibytes * 2**20, "kernel": None}
        return bench.Row(impl, bench.Shape(1024, 2**18, 256, "float32"), measured)

    rows = [row("reference", 40, 9000), row("dense", 20, 8140), row("chunked", 4.2, 20)]
    assert bench._notes(rows) == [
        "N 1,024, K 262,144, D 256, float32: chunked takes 0.21 of dense's time, 1/407 of its extra memory",
        "N 1,024, K 262,144, D 256, float32: chunked takes 0.11 of reference's time, 1/450 of its extra memory",
    ]
    assert bench._notes(rows[:2]) == []
