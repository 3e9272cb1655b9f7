"""`ibq bench sample` and `train-ar`: what rows measure, the tables, the reference's checkout, mistakes."""

import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from comparing import printed_rows, table_rows
from model_checks import random_transformer
from torch import nn

from model_zoo.config import Sampling, TransformerConfig
from model_zoo.sampler import Sampler
from model_zoo.transformer import Transformer, flops_per_token
from tools.bench import common, generator, generator_rows
from tools.bench.measure import load_reference

TINY = TransformerConfig(vocabulary=40, classes=5, grid=[4, 4], depth=2, heads=2, head_dim=8)
# A clone of TencentARC/SEED-Voken: if it is given, the rows of the reference are tested with it.
CHECKOUT = os.environ.get("IBQ_TEST_SEED_VOKEN")
# The interface of the published generator, and a stand-in's few lines.
STAND_IN = """
import time
import torch
from torch import nn

class GPT(nn.Module):
    def __init__(self, vocab_size, block_size, n_layer, n_head, n_embd, cond_dim, resid_dropout_p, ffn_dropout_p,
                 token_drop, class_num, alng):
        super().__init__()
        assert cond_dim == n_embd and resid_dropout_p == ffn_dropout_p == token_drop
        self.config = type("Config", (), dict(block_size=block_size))
        self.codes, self.classes = nn.Embedding(vocab_size, n_embd), nn.Embedding(class_num + 1, n_embd)
        self.class_emb = type("Classes", (), dict(num_classes=class_num))
        self.head = nn.Linear(n_embd, vocab_size)

    def forward(self, inputs):
        codes, classes = inputs
        return self.head(torch.cat([self.classes(classes), self.codes(codes)], dim=1)), None

def sample_IBQ(x, model, steps, top_k, top_p, cfg_scale):
    time.sleep(0.02)
    asked.append((x.flatten().tolist(), steps, top_k, top_p, cfg_scale))
    return torch.zeros(len(x) // 2, steps)

asked = []
"""


@pytest.fixture
def published(checkout):
    """A checkout of the reference that holds STAND_IN."""
    return checkout(generator.REFERENCE_FILE, STAND_IN)


def measured(seconds, mebibytes, rate=1e12):
    return generator_rows.Measured(seconds, seconds, mebibytes * 2**20, 2**30, rate)._asdict()


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_without_a_cache_the_same_codes_come_out(guidance):
    """So that both rows are of the same work. In fp64, in which no two codes lie within rounding."""
    transformer = random_transformer(TINY).double()
    class_b, settings = torch.tensor([1, 4, 2]), Sampling(guidance=guidance)
    codes_bt = generator_rows.sample_uncached(transformer, class_b, [5, 6, 7], settings, None)
    cached_bhw = Sampler(transformer, 3).sample(class_b, [5, 6, 7], settings)
    assert torch.equal(codes_bt, cached_bhw.flatten(1))
    assert len(codes_bt.unique()) > 10
    assert transformer(codes_bt[:, :-1], class_b).shape == (3, 16, 40)  # the head takes all positions again


def test_the_reference_samples_one_class_beside_none_and_all_codes(published):
    module = load_reference(str(published / generator.REFERENCE_FILE), *generator.REFERENCE_NAMES)
    gpt = generator_rows.published_generator(module.__file__, TINY)
    generator_rows.published_sampling(module, gpt, torch.tensor([3, 4]), 2.0)()
    generator_rows.published_sampling(module, gpt, torch.tensor([3, 4]), 1.0)()
    assert module.asked == [([3, 3, 5, 5], 16, 0, 1.0, 2.0), ([3, 3], 16, 0, 1.0, 1.0)]


def test_the_references_loss_is_of_all_codes(published):
    gpt = generator_rows.published_generator(str(published / generator.REFERENCE_FILE), TINY)
    nn.init.zeros_(gpt.head.weight)
    nn.init.zeros_(gpt.head.bias)
    loss = generator_rows.published_loss(gpt, torch.randint(40, (2, 16)), torch.tensor([0, 5]))
    torch.testing.assert_close(loss, torch.tensor(40.0).log())


def test_the_references_optimizer_is_its_own():
    optimizer = generator_rows.published_optimizer(list(nn.Linear(2, 3).parameters()))
    assert not optimizer.defaults["fused"]
    decays = [(group["params"][0].ndim, group["weight_decay"]) for group in optimizer.param_groups]
    assert decays == [(2, 0.05), (1, 0.0)]


@pytest.mark.process
@pytest.mark.full
def test_extra_memory_of_a_step_is_that_of_the_logits():
    """In fresh processes. A logits matrix is 64 MiB, and a dense loss holds several."""
    model = asdict(TransformerConfig(vocabulary=2**16, grid=[16, 16], depth=1, heads=1, head_dim=8))
    settings = dict(model=model, dtype="float32", micro_batch=1, device="cpu", threads=1, repeats=1, reference=None)
    dense, ibq = (common.run_job("generator_rows", "train", impl=impl, **settings) for impl in ("dense", "ibq"))
    assert dense["extra_bytes"] > 2 * 64 * 2**20 > ibq["extra_bytes"]


@pytest.mark.parametrize("impl", ["ibq", "dense", "checkpointed", "selective"])
def test_each_impl_trains(monkeypatch, impl):
    monkeypatch.setattr(generator_rows, "matmul_rate", lambda *_: 1e12)  # seconds in bfloat16 on a CPU
    arguments = dict(micro_batch=2, device="cpu", threads=1, repeats=1, reference=None)
    found = generator_rows.train(impl=impl, model=asdict(TINY), dtype="bfloat16", **arguments)
    assert found.seconds > 0 and found.process_bytes > found.extra_bytes >= 0


# --------------------------------------------------------------------------------------------------------------- tables


def report(kind, **seconds):
    shape = generator.Shape("tiny", TINY, 8)
    rows = [
        generator.Row(impl.replace("_", "-"), shape, "float32", measured(value, 10 * value))
        for impl, value in seconds.items()
    ]
    return generator.Report(kind, ["a machine", "`a command`"], rows)


def test_ratios_are_quotients_of_the_speeds():
    sampling = report(generator.SAMPLE, reference=3, uncached=16, cached=2)
    assert [cells[-2:] for cells in map(sampling.cells, sampling.rows)] == [
        ["5.33", "1.00"],
        ["1.00", "0.19"],
        ["8.00", "1.50"],
    ]
    assert [cells[4] for cells in map(sampling.cells, sampling.rows)] == ["2.667", "0.500", "4.000"]
    assert sampling.notes() == [
        "tiny, V 40: cached samples 8.00 times the images of uncached per second, with 0.12 of its extra memory",
        "tiny, V 40: cached samples 1.50 times the images of reference per second, with 0.67 of its extra memory",
    ]
    training = report(generator.TRAIN, ibq=4, dense=2)
    assert training.notes() == [
        "tiny, V 40: ibq trains on 0.50 times the tokens of dense per second, with 2.00 times its extra memory"
    ]
    assert [cells[-1] for cells in map(training.cells, training.rows)] == ["-", "-"]


def test_mfu_is_three_forwards_at_the_rate_of_a_product():
    (row,) = report(generator.TRAIN, ibq=4).rows
    assert row.mfu == pytest.approx(3 * flops_per_token(TINY) * (8 / 4) / 1e12)


def test_columns_are_as_wide_as_their_values():
    shape = generator.Shape("recipe", replace(TINY, vocabulary=16_777_216), 8)
    for kind in (generator.SAMPLE, generator.TRAIN):
        row = generator.Row("cached", shape, "bfloat16", measured(2, 1))
        table = generator.Report(kind, [], [row], planned=(row,))
        for text, heading, width in zip(table.cells(row), table.headings, table.widths, strict=True):
            assert max(len(text), len(heading)) <= width, heading


def test_rows_of_other_shapes_are_no_base():
    sampling = report(generator.SAMPLE, uncached=16)
    other = generator.Shape("tiny", TransformerConfig(), 8)
    row = generator.Row("cached", other, "float32", measured(2, 1))
    assert sampling.times(row, "uncached") is None


def test_the_table_and_the_files(bench, jobs_here, published, tmp_path):
    arguments = ["--recipe", "ar_debug", "--impl", "cached,uncached,cached-eager", "--repeats", "1", "--threads", "1"]
    out = tmp_path / "table.md"
    bench("sample", *arguments, "--reference", published, "--device", "cpu", "--out", out).succeeded()
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    text = out.read_text()
    heading, *rows = table_rows(text)
    assert heading[4] == "images/s" and heading[-2:] == ["x uncached", "x reference"]
    assert [row[:4] for row in rows] == [
        [impl, "ar_debug", "256", "float32"] for impl in ("reference", "uncached", "cached-eager", "cached")
    ]
    assert rows[2][4] == "not measured: the same as cached on a CPU, which has no graphs"
    for row in (rows[0], rows[1], rows[3]):
        assert float(row[-2]) == pytest.approx(float(row[4]) / float(rows[1][4]), rel=0.02, abs=0.01)
        assert float(row[4]) * float(row[5]) == pytest.approx(4, rel=0.1)  # images of a batch
    assert "`ibq bench sample --recipe ar_debug --impl cached,uncached,cached-eager" in text
    assert "revision unknown" in text and "PyTorch " in text


def test_a_row_that_does_not_fit_is_reported_and_the_table_continues(bench, jobs_here):
    arguments = ["--recipe", "ar_debug", "--impl", "ibq,dense", "--vocabulary", "1000000000000000,40"]
    out = bench("train-ar", *arguments, "--repeats", "1", "--device", "cpu", "--threads", "1").succeeded().out
    rows = printed_rows(out, 4)
    assert [row[0] for row in rows] == 2 * ["dense", "ibq"]
    assert [" ".join(row[4:]) for row in rows[:2]] == 2 * ["not measured: out of memory"]
    assert rows[2][-2:] == ["1.00", "-"] and rows[2][5].endswith("%")


def test_a_missing_package_is_a_reason(bench, answers):
    def answer(job, arguments):
        return {"failed": "liger cannot be imported"} if arguments["impl"] == "ibq" else measured(2, 1)

    answers(answer, device="cuda")
    out = bench("train-ar", "--impl", "ibq,selective").succeeded().out
    assert out.count("not measured: liger cannot be imported") == 4  # of ar_xl and ar_xxl, with both vocabularies
    assert "ar_xxl  262144  bfloat16      2048" in out  # 16 x 256 tokens in 2 seconds
    assert "packages: " in out and "liger-kernel" in out


@pytest.mark.parametrize(
    ("device", "batch", "impls", "recipes", "dtype"),
    [
        ("cpu", 4, ["uncached", "cached"], ["6x6"], "float32"),
        ("cuda", 64, ["uncached", "cached-eager", "cached"], ["ar_b", "ar_l", "ar_xl", "ar_xxl"], "bfloat16"),
    ],
)
def test_the_defaults_suit_the_device(bench, answers, device, batch, impls, recipes, dtype):
    asked = answers(lambda *_: measured(1, 1), device)
    out = bench("sample").succeeded().out
    rows = [arguments for _, arguments in asked[1:]]
    assert [row["impl"] for row in rows] == impls * len(recipes)
    assert {(row["batch_size"], row["guidance"], row["dtype"]) for row in rows} == {(batch, 2.0, dtype)}
    assert [line.split()[1] for line in out.splitlines() if line.startswith("cached ")] == recipes


def test_a_size_by_numbers_is_b_with_other_numbers():
    assert generator._models("3x5") == {"3x5": TransformerConfig(depth=3, heads=5)}


def test_the_reference_is_sampled_in_fp32(bench, answers, published):
    asked = answers(lambda *_: measured(1, 1))
    arguments = ["--recipe", "ar_debug", "--impl", "cached", "--dtype", "bfloat16"]
    bench("sample", *arguments, "--reference", published).succeeded()
    rows = [(row["impl"], row["dtype"]) for _, row in asked[1:]]
    assert rows == [("reference", "float32"), ("cached", "bfloat16")]


@pytest.mark.skipif(CHECKOUT is None, reason="IBQ_TEST_SEED_VOKEN names no checkout of TencentARC/SEED-Voken")
@pytest.mark.parametrize(("command", "impl"), [("sample", "cached"), ("train-ar", "ibq")])
def test_the_published_code_runs(bench, jobs_here, command, impl):
    arguments = ["--recipe", "ar_debug", "--impl", impl, "--repeats", "1", "--device", "cpu", "--dtype", "bfloat16"]
    few = ["--vocabulary", "256"] if command == "train-ar" else []
    out = bench(command, *arguments, *few, "--reference", CHECKOUT).succeeded().out
    assert "not measured" not in out and f"ar_debug, V 256: {impl} " in out


@pytest.mark.skipif(CHECKOUT is None, reason="IBQ_TEST_SEED_VOKEN names no checkout of TencentARC/SEED-Voken")
def test_the_published_generator_has_our_sizes():
    path = str(Path(CHECKOUT) / generator.REFERENCE_FILE)
    theirs, ours = generator_rows.published_generator(path, TINY), Transformer(TINY)
    sizes = [sorted(tuple(p.shape) for p in model.parameters()) for model in (theirs, ours)]
    assert sizes[0] == sizes[1]


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("command", ["sample", "train-ar"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recipe", "ar_huge"], "unknown recipe 'ar_huge'"),
        (
            ["--recipe", "ibq_1024"],
            "--recipe: ibq_1024 is not a generator's recipe; use one of ar_b ... ar_xxl, or DEPTHxHEADS",
        ),
        (["--recipe", "0x4"], "unknown recipe '0x4'"),
        (["--impl", "fast"], "--impl: 'fast' is not one of "),
        (["--dtype", "float16"], "'float16' is not one of 'float32', 'bfloat16'"),
        (["--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["--repeats", "0"], "--repeats"),
        (["--reference", "nowhere"], "nowhere has no src/IBQ/modules/transformer/llama.py: git clone https://"),
        (["--out", "table.txt"], "does not end in .md"),
    ],
)
def test_mistakes_are_one_line(refused_by_ibq, answers, tmp_path, monkeypatch, command, arguments, said):
    monkeypatch.chdir(tmp_path)
    answers(lambda *_: measured(1, 1))
    assert said in refused_by_ibq("bench", command, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sample", "--guidance", "0.5"], "--guidance: 0.5 is not a finite number >= 1"),
        (["sample", "--guidance", "nan"], "--guidance: nan is not a finite number >= 1"),
        (["sample", "--batch-size", "0"], "--batch-size"),
        (["train-ar", "--vocabulary", "0"], "--vocabulary: '0' is not a list of integers >= 1"),
        (["train-ar", "--micro-batch", "0"], "--micro-batch"),
    ],
)
def test_mistakes_of_either_are_one_line(refused_by_ibq, arguments, said):
    assert said in refused_by_ibq("bench", *arguments)
