"""`ibq bench quantizer` and `cross-entropy`: what a row measures, the table, the reference's checkout, mistakes."""

import pytest
import torch
from comparing import printed_rows, table_rows

from tools.bench import quantizer, quantizer_rows

SMALL = ["--repeats", "1", "--device", "cpu", "--threads", "1"]
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
        logits = torch.einsum("bdhw,kd->bkhw", z, self.embedding.weight)
        quantized = torch.einsum("bkhw,kd->bdhw", logits.softmax(dim=1), self.embedding.weight)
        loss = (quantized - z).square().mean()
        return quantized, (loss, loss, loss, loss) if self.use_entropy_loss else loss, (None, None, None)
"""


# ------------------------------------------------------------------------------------------------------------- figures


def test_sweeps_are_those_really_made():
    tiny = dict(dtype="float32", tokens=16, codes=64, dim=8, tile=[16, 32])
    assert quantizer_rows.measure(impl="dense", **tiny).sweeps == 6
    entropies = quantizer_rows.measure(impl="chunked", skip=False, **tiny)
    assert (entropies.sweeps, entropies.skip_soft, entropies.skip_entropy) == (12, 0, 0)
    plain = quantizer_rows.measure(impl="chunked", skip=False, temperature=None, **tiny)
    assert (plain.sweeps, plain.skip_entropy) == (6, None)
    assert quantizer_rows.measure(impl="chunked", scale=30.0, **tiny).sweeps < 12


def test_attention_over_the_codebook_is_the_softmax():
    z_nd, codebook_kd, grad_nd = torch.randn(5, 8, requires_grad=True), torch.randn(7, 8), torch.randn(5, 8)
    loss = quantizer_rows.attention_loss(z_nd, grad_nd, torch.nn.Parameter(codebook_kd)).of(None)
    torch.testing.assert_close(loss, ((z_nd @ codebook_kd.T).softmax(dim=1) @ codebook_kd * grad_nd).sum())


@pytest.mark.parametrize("temperature", [None, 0.01])
def test_the_reference_gets_our_codebook_and_all_its_losses_count(checkout, temperature):
    path = checkout(quantizer.REFERENCE_FILE, STAND_IN) / quantizer.REFERENCE_FILE
    z_bdhw = torch.randn(quantizer_rows.reference_shape(6, 4), requires_grad=True)
    codebook_kd = torch.nn.Parameter(torch.randn(9, 4))
    loss = quantizer_rows.reference_loss(str(path), z_bdhw, torch.zeros_like(z_bdhw), codebook_kd, temperature)
    value = loss.of(None)
    value.backward()
    z_nd = z_bdhw.detach().flatten(2).transpose(1, 2)[0]
    soft = ((z_nd @ codebook_kd.T).softmax(dim=1) @ codebook_kd - z_nd).square().mean()
    torch.testing.assert_close(value, soft if temperature is None else 2 * soft)
    assert codebook_kd.grad.shape == (9, 4)


def test_the_reference_sees_pictures():
    assert quantizer_rows.reference_shape(512, 8) == (2, 8, 16, 16)
    assert quantizer_rows.reference_shape(300, 8) == (1, 8, 1, 300)


def test_cross_entropy_computes_three_sweeps():
    for impl in ("dense", "chunked"):
        measured = quantizer_rows.cross_entropy(impl=impl, dtype="float32", tokens=16, codes=40, dim=8)
        assert measured.sweeps == 3 and measured.forward_seconds > 0 and measured.backward_seconds > 0


# -------------------------------------------------------------------------------------------------------------- tables


def test_the_table_and_the_files(bench, jobs_here, checkout, tmp_path, monkeypatch):
    published = checkout(quantizer.REFERENCE_FILE, STAND_IN)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    arguments = ["--tokens", "32", "--codes", "48", "--dim", "8", "--impl", "dense,chunked,triton,attention"]
    _, (out,), (err,) = bench(
        "quantizer", *arguments, *SMALL, "--reference", "../published", "--out", "table.md"
    ).succeeded()
    assert published.is_dir()
    rows = printed_rows(out, 5)
    assert [row[0] for row in rows] == ["reference", "dense", "chunked", "triton", "attention"]
    assert all(row[1:5] == ["float32", "32", "48", "8"] for row in rows)
    assert [" ".join(row[5:]) for row in rows[3:]] == ["not measured: needs CUDA"] * 2
    for row in rows[:3]:
        assert float(row[7]) == pytest.approx(float(row[5]) + float(row[6]), abs=0.002)
    assert "reference: ../published (revision unknown)" in out.splitlines()
    assert "N 32, K 48, D 8, float32: chunked takes " in out
    assert err.splitlines() == [
        f"measuring row {number} of 5: {impl}, N 32, K 48, D 8, float32"
        for number, impl in ((1, "reference"), (2, "dense"), (3, "chunked"))
    ]
    assert out.endswith("\ntable: table.md\npicture: table.png\n")
    assert (tmp_path / "work/table.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "work/table.md").read_text()
    rows = table_rows(text)
    assert len(rows) == 1 + 5
    assert {len(row) for row in rows} == {len(quantizer.SHAPE_COLUMNS + quantizer.COLUMNS)}
    assert {"floor, s", "matmul, GFLOP/s", "peak of the process, MiB", "processor, s"} <= set(rows[0])
    assert rows[-1][:7] == ["attention", "float32", "32", "48", "8", "not measured: needs CUDA", "-"]
    assert "`ibq bench quantizer --tokens 32 --codes 48 --dim 8 --impl dense,chunked,triton,attention" in text


def test_the_table_of_cross_entropies(bench, jobs_here):
    arguments = ["--tokens", "64", "--codes", "3000", "--dim", "8", "--impl", "dense,chunked,liger"]
    _, (out,), (err,) = bench("cross-entropy", *arguments, *SMALL, "--dtype", "float32,bfloat16").succeeded()
    rows = printed_rows(out, 6)
    assert [row[0] for row in rows] == 2 * ["dense", "chunked", "liger"]
    assert all(row[2:5] == ["64", "3000", "8"] for row in rows)
    for row in rows:
        if row[0] == "liger":
            assert " ".join(row[5:]) == "not measured: needs CUDA"
        else:
            assert float(row[7]) == pytest.approx(float(row[5]) + float(row[6]), abs=0.002)
            assert row[9].endswith("%")
    notes = [line for line in out.splitlines() if line.startswith("N 64, K 3,000, D 8, ")]
    assert [note.split(":")[0].split()[-1] for note in notes] == ["float32", "bfloat16"]
    assert all(": chunked takes " in note and " of dense's time" in note for note in notes)
    assert "measuring row 4 of 6: dense, N 64, K 3,000, D 8, bfloat16" in err


def test_a_row_that_does_not_fit_is_reported_and_the_table_continues(bench, jobs_here):
    arguments = ["--tokens", "32", "--dim", "8", "--codes", "1000000000000000,48", "--impl", "chunked"]
    out = bench("quantizer", *arguments, *SMALL, "--temperature", "0").succeeded().out
    assert "1000000000000000  8  not measured: out of memory\n" in out
    assert out.count("chunked ") == 2


def test_the_defaults_of_cross_entropy_are_those_of_the_largest_vocabulary(bench, answers):
    asked = answers(lambda *_: {"failed": "too large for a test"})
    out = bench("cross-entropy").succeeded().out
    assert out.count("not measured: too large for a test") == 2
    shape = dict(tokens=2048, codes=2**18, dim=1024, dtype="float32", device="cpu", threads=None, repeats=1)
    assert asked[1:] == [("quantizer_rows.cross_entropy", dict(impl=impl) | shape) for impl in ("dense", "chunked")]


def test_ratios_are_to_every_base_that_was_measured():
    def row(impl, seconds, mebibytes):
        measured = {"forward_seconds": seconds, "backward_seconds": 0, "extra_bytes": mebibytes * 2**20, "kernel": None}
        return quantizer.Row(impl, quantizer.Shape(1024, 2**18, 256, "float32"), measured)

    rows = [row("reference", 40, 9000), row("dense", 20, 8140), row("chunked", 4.2, 20)]
    report = quantizer.Report([], rows, quantizer.SHAPE_COLUMNS + quantizer.COLUMNS)
    report.rows = rows
    assert report.notes() == [
        "N 1,024, K 262,144, D 256, float32: chunked takes 0.21 of dense's time, 1/407 of its extra memory",
        "N 1,024, K 262,144, D 256, float32: chunked takes 0.11 of reference's time, 1/450 of its extra memory",
    ]
    report.rows = rows[:2]
    assert report.notes() == []


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantizer", "--tokens", "many"], "--tokens: 'many'"),
        (["quantizer", "--codes", "16,0"], "--codes: '16,0'"),
        (["quantizer", "--dim", "-1"], "--dim: '-1'"),
        (["quantizer", "--dtype", "float64"], "'float64' is not one of float32, bfloat16, float16"),
        (["quantizer", "--impl", "dense,fast"], "'fast' is not one of dense, chunked, triton, attention"),
        (["quantizer", "--tile", "16"], "as in 1024,256"),
        (["quantizer", "--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["quantizer", "--temperature", "-1"], "is not a finite number >= 0"),
        (["quantizer", "--temperature", "nan"], "is not a finite number >= 0"),
        (["quantizer", "--scale", "0"], "is not a number above 0"),
        (["quantizer", "--scale", "inf"], "is not a number above 0"),
        (["quantizer", "--repeats", "0"], "--repeats"),
        (["quantizer", "--reference", "nowhere"], "git clone https://github.com/TencentARC/SEED-Voken"),
        (["quantizer", "--out", "table.txt"], "does not end in .md"),
        (["quantizer", "--out", "nowhere/table.md"], "nowhere is not a writable folder"),
        (["cross-entropy", "--impl", "triton"], "--impl: 'triton' is not one of dense, chunked, liger"),
        (["cross-entropy", "--codes", "0"], "--codes: '0' is not a list of integers >= 1"),
        (["cross-entropy", "--device", "tpu"], "--device"),
    ],
)
def test_mistakes_are_one_line(refused_by_ibq, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in refused_by_ibq("bench", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_one_line(refused_by_ibq, jobs_here):
    assert "finds no CUDA device" in refused_by_ibq("bench", "quantizer", "--device", "cuda")
