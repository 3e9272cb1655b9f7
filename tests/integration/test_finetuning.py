"""Runs that start from another run's weights, with all of them or a part frozen, under every kind of engine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from comparing import assert_refused, copy_until, difference, differences, read_metrics
from ranks import settings

from model_zoo import load_tokenizer
from model_zoo.io.sharded_tensors import ShardedTensors

STEPS = 4
CHECKPOINT = f"checkpoints/step_{STEPS:08d}"
TOLERANCE = 1e-5  # of all weights together
MOMENT_TOLERANCE = 1e-3  # of Adam's moments, in which rounding is a larger part
FROZEN = {
    None: (),
    "encoder": ("encoder.", "quant_conv.", "quantize."),
    "decoder": ("decoder.", "post_quant_conv."),
}
ENGINES = {
    "ddp": {"engine.kind": "ddp"},
    **{name: {"engine.kind": "deepspeed", "engine.config": name} for name in ("zero0", "zero1", "zero2", "zero3")},
    "fsdp2": {"engine.kind": "fsdp2"},
}
# Weight decay and clipping are on, so that whatever moved what is frozen would be seen.
CHANGES = {
    # With this seed no token ties between two codes on the processors tried so far. Few tokens rarely tie on others.
    "seed": 4,
    "data.image_size": 16,
    "data.val_image_size": 32,  # as in the source
    "trainer.max_steps": STEPS,
    "trainer.checkpoint_every_steps": 2,
    "optimizer.weight_decay": 0.1,
    "optimizer.lr": 1e-3,
    "trainer.gradient_clip_norm": 1.0,
}


class Cell(NamedTuple):
    """So many processes under an engine; what is frozen; other changes."""

    processes: int
    engine: str
    freeze: str | None
    codebook_parallel: int = 1
    adaptive: bool = False

    @property
    def name(self) -> str:
        return "_".join(map(str, self))

    def settings(self, source: Path) -> dict:
        return {
            **CHANGES,
            **ENGINES[self.engine],
            "init_from.source": source,
            "init_from.freeze": self.freeze or "null",
            "codebook_parallel": self.codebook_parallel,
            "loss.generator.adaptive": str(self.adaptive).lower(),
        }


TRUTHS = [
    *(Cell(1, "ddp", freeze) for freeze in FROZEN),
    *(pytest.param(Cell(1, "ddp", freeze, 1, True), marks=pytest.mark.full) for freeze in FROZEN),
]
# Each part frozen under two engines, and nothing frozen under ZeRO 2, under which a run with a frozen encoder resumes.
CELLS = [
    *(Cell(2, engine, "encoder", 2, True) for engine in ("ddp", "zero3")),
    *(Cell(2, "fsdp2", "decoder", 2, True), Cell(2, "zero1", "decoder"), Cell(2, "zero2", None, 2)),
]
OTHER_CELLS = [
    *(Cell(2, engine, "encoder", 2, True) for engine in ("zero2", "fsdp2")),
    *(Cell(2, engine, "encoder") for engine in ("zero0", "zero1")),
    *(Cell(2, engine, None, 2) for engine in ("ddp", "zero3")),
    *(Cell(2, engine, "encoder") for engine in ("ddp", "zero2", "zero3", "fsdp2")),
    *(Cell(2, engine, "decoder", 2, True) for engine in ("ddp", "zero2")),
    *(Cell(2, "zero3", "decoder"), Cell(2, "fsdp2", None, 2)),
]
CELLS += [pytest.param(cell, marks=pytest.mark.full) for cell in OTHER_CELLS]


@pytest.fixture(scope="module")
def tuned(trained, runs) -> Callable[[Cell], Path]:
    """`tuned(cell)`: the folder of its run."""
    return lambda cell: trained("debug", cell.processes, cell.settings(runs("one")))


@pytest.fixture(scope="module")
def source(runs) -> dict[str, torch.Tensor]:
    """The weights that all cells start from."""
    return ShardedTensors(runs("one") / "checkpoints/step_00000020").tensors("tokenizer_ema/")


@pytest.mark.parametrize("cell", [*TRUTHS, *CELLS], ids=Cell.name.fget)
def test_what_is_frozen_stays_bit_for_bit_and_the_rest_learns(tuned, source, cell):
    files = ShardedTensors(tuned(cell) / CHECKPOINT)
    for weights in ("tokenizer/", "tokenizer_ema/"):
        found = files.tensors(weights)
        assert found.keys() == source.keys()
        for name, tensor in found.items():
            if name.startswith(FROZEN[cell.freeze]):
                assert torch.equal(tensor, source[name]), name
            elif not name.endswith(".k.bias"):  # of attention: it shifts all logits of a query alike
                assert not torch.equal(tensor, source[name]), name
    moments = {name.split("/")[1] for name in files.names("tokenizer.exp_avg/")}
    assert moments == {name for name in source if not name.startswith(FROZEN[cell.freeze])}


@pytest.mark.parametrize("cell", CELLS, ids=Cell.name.fget)
def test_a_cell_equals_one_process(tuned, cell):
    truth = Cell(1, "ddp", cell.freeze, 1, cell.adaptive)
    for model, found in differences(tuned(truth) / CHECKPOINT, tuned(cell) / CHECKPOINT).items():
        assert found.whole < (MOMENT_TOLERANCE if ".exp_avg" in model else TOLERANCE), model
    lines, expected = read_metrics(tuned(cell)), read_metrics(tuned(truth))
    assert [line["step"] for line in lines] == [0, *range(1, STEPS + 1), STEPS]
    for line, true_line in zip(lines, expected, strict=True):
        assert line == pytest.approx(true_line, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("freeze", [None, "encoder"])
def test_held_out_photographs_come_back_better_than_at_the_start(tuned, runs, freeze):
    validated = [line for line in read_metrics(tuned(Cell(1, "ddp", freeze))) if "val/psnr" in line]
    before = [line for line in read_metrics(runs("one")) if "val/psnr" in line][-1]
    start, now = validated
    # What the source run found of its averages at its end is what the new run finds before its first step.
    assert {**start, "step": 20} == pytest.approx(before, rel=1e-6)
    assert now["val/psnr"] > start["val/psnr"] + 0.1 and now["val/l1"] < start["val/l1"]
    if freeze == "encoder":
        assert now["val/usage"] == start["val/usage"]


def test_the_fingerprint_stays_with_a_frozen_encoder_and_only_then(tuned, runs):
    before = load_tokenizer(runs("one")).fingerprint()
    for freeze in FROZEN:
        run = tuned(Cell(1, "ddp", freeze))
        assert json.loads((run / "init_from.json").read_text())["fingerprint"] == before
        for weights in ("ema", "raw"):
            assert (load_tokenizer(run, weights).fingerprint() == before) == (freeze == "encoder")


@pytest.mark.parametrize("freeze", [pytest.param(None, marks=pytest.mark.full), "encoder"])
def test_resumed_equals_unbroken_under_another_engine_without_the_source(tuned, runs, ranks, tmp_path, freeze):
    """One process's run, stopped at step 2, goes on as two of ZeRO 2, though its source is gone."""
    cell = Cell(1, "ddp", freeze)
    run = copy_until(tuned(cell), 2, tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(runs("one")), str(tmp_path / "gone")))
    engine = "engine.kind=deepspeed", "engine.config=zero2", f"codebook_parallel={1 if freeze else 2}"
    finished = ranks.resume(2, run, *engine).succeeded()
    assert "steps 3 to 4" in finished.err
    for model, found in differences(tuned(cell) / CHECKPOINT, run / CHECKPOINT).items():
        assert found.whole < (MOMENT_TOLERANCE if ".exp_avg" in model else TOLERANCE), model
    for line, true_line in zip(read_metrics(run), read_metrics(tuned(cell)), strict=True):
        assert line == pytest.approx(true_line, rel=1e-4, abs=1e-6)


def test_resumed_equals_unbroken_bit_for_bit(tuned, ranks, tmp_path):
    cell = Cell(1, "ddp", "encoder")
    run = copy_until(tuned(cell), 2, tmp_path / "run")
    ranks.resume(1, run).succeeded()
    file = f"{CHECKPOINT}/rank_00000.safetensors"
    assert (run / file).read_bytes() == (tuned(cell) / file).read_bytes()
    assert read_metrics(run) == read_metrics(tuned(cell))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("init_from.source=nowhere", "init_from.source=nowhere"),
        ("model.code_dim=8", "model.code_dim is 16 there and 8 here; use model.code_dim=16"),
    ],
)
def test_a_bad_start_ends_in_one_line_and_leaves_nothing(ibq_here, runs, tmp_path, change, said):
    source = [] if change.startswith("init_from.source") else [f"init_from.source={runs('one')}"]
    assert_refused(ibq_here("train", "debug", f"run={tmp_path / 'run'}", *settings(), *source, change), said)
    assert not (tmp_path / "run").exists()


def test_training_moves_weights_by_far_more_than_the_tolerance(tuned, source):
    trained = ShardedTensors(tuned(Cell(1, "ddp", None)) / CHECKPOINT).tensors("tokenizer/")
    assert difference(source, trained).whole > 50 * TOLERANCE
