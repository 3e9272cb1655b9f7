"""`ibq bench cross-entropy`: what a row measures, the table, and mistakes in one line."""

import pytest

from tools import cli
from tools.bench import command as bench
from tools.bench import cross_entropy as bench_cross_entropy

SMALL = ["--tokens", "64", "--codes", "3000", "--dim", "8", "--device", "cpu", "--threads", "1"]


def run(*arguments):
    """The exit status of `ibq bench cross-entropy ARGUMENTS`."""
    with pytest.raises(SystemExit) as exited:
        cli.main(["bench", "cross-entropy", *arguments])
    return exited.value.code or 0


def test_the_table_and_the_ratio(capfd):
    assert run(*SMALL, "--impl", "dense,chunked,liger", "--dtype", "float32,bfloat16") == 0
    captured = capfd.readouterr()
    lines = captured.out.splitlines()
    heading = next(number for number, line in enumerate(lines) if line.startswith("impl "))
    rows = [line.split() for line in lines[heading + 1 : heading + 7]]
    assert [row[0] for row in rows] == 2 * ["dense", "chunked", "liger"]
    assert all(row[2:5] == ["64", "3000", "8"] for row in rows)
    for row in rows:
        if row[0] == "liger":
            assert " ".join(row[5:]) == "not measured: needs CUDA"
        else:
            assert float(row[7]) == pytest.approx(float(row[5]) + float(row[6]), abs=0.002)
            assert row[9].endswith("%")
    assert all(len(line) <= 120 for line in lines)
    notes = [line for line in lines if line.startswith("N 64, K 3,000, D 8, ")]
    assert [note.split(":")[0].split()[-1] for note in notes] == ["float32", "bfloat16"]
    assert all(": chunked takes " in note and " of dense's time" in note for note in notes)
    assert "measuring row 4 of 6: dense, N 64, K 3,000, D 8, bfloat16" in captured.err


def test_the_defaults_are_those_of_the_largest_vocabulary(monkeypatch, capsys):
    asked = []

    def answer(job, **arguments):
        asked.append((job, arguments))
        machine = dict(device="cpu", name="none", threads=2, torch="0", python="0")
        return machine if job == "machine" else {"failed": "too large for a test"}

    monkeypatch.setattr(bench, "_run", answer)
    assert run() == 0
    assert capsys.readouterr().out.count("not measured: too large for a test") == 2
    shape = dict(tokens=2048, codes=2**18, dim=1024, dtype="float32")
    settings = dict(module="bench_cross_entropy", device="cpu", threads=None, repeats=1)
    assert asked[1:] == [("measure", dict(impl=impl) | shape | settings) for impl in ("dense", "chunked")]


def test_extra_memory_is_that_of_the_logits():
    """In this process, whose peak may be higher already: at most, then. N x V is 16 MiB, and dense holds two."""
    measured = bench_cross_entropy.measure(impl="dense", dtype="float32", tokens=1024, codes=4096, dim=8, threads=1)
    assert measured.extra_bytes == 0 or measured.extra_bytes > 16 * 2**20
    assert measured.sweeps == 3 and measured.forward_seconds > 0 and measured.backward_seconds > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--impl", "triton"], "--impl: 'triton' is none of dense, chunked, liger"),
        (["--codes", "0"], "--codes: '0' is no list of whole numbers above 0"),
        (["--device", "tpu"], "--device: 'tpu' is none of auto, cpu, cuda"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, arguments, said):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("ibq: error: ") and said in captured.err
