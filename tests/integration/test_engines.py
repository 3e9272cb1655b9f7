"""Four steps under every engine, on 1, 2 and 4 processes, equal one process's four steps.

Each cell of the support matrix (docs/scaling.md) is a run of `debug` on warm ranks. The default tier has each engine
with an adaptive weight, an EMA and a sharded codebook on 2 processes. It also has the MAIN engines without EMA and with
a whole codebook, with accumulation and clipping, in half precision, and on 1 and 4 processes. The full tier has all
combinations.
"""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from comparing import differences, loss_lines, read_metrics

STEPS = 4
BATCH = 8  # images a step
CHECKPOINT = f"checkpoints/step_{STEPS:08d}"
TOLERANCE = 1e-5  # of all weights of a model together
MOMENT_TOLERANCE = 1e-3  # of Adam's moments: four gradients, in which rounding is a larger part than in weights
# Biases start at 0 and are still tiny after four steps, so that rounding is a larger part of them.
TENSOR_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-4
# bf16 has 8 bits of mantissa, fp16 11: other numbers of processes round otherwise, and FSDP2 rounds gathered weights.
HALF_TOLERANCE = 2e-3

ENGINES = {
    "ddp": {"engine.kind": "ddp"},
    **{
        name: {"engine.kind": "deepspeed", "engine.config": name}
        for name in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
    },
    "fsdp2": {"engine.kind": "fsdp2"},
    "fsdp2 kept": {"engine.kind": "fsdp2", "engine.reshard": "false"},
    "fsdp2 offload": {"engine.kind": "fsdp2", "engine.offload": "true"},
    "fsdp2 hybrid": {"engine.kind": "fsdp2"},  # and engine.shard_over
}
MAIN = ("ddp", "zero1", "zero3", "fsdp2")
# A setting of the matrix's other columns -> what it changes.
ADAPTIVE = {"loss.generator.adaptive": "true"}
NO_EMA = {"ema.decay": 0}
SHARDED = {"codebook_parallel": 2}
CLIPPED = {"trainer.gradient_clip_norm": 0.05}  # so low that every step is clipped
CUT = {"trainer.micro_batch_size": 2, "trainer.activation_checkpointing": "true"}
# Each with a seed for which rounding decides nothing: no token ties between codes, no logit is on a kink (docs/LOG.md).
REFERENCES = {
    "fixed": {"seed": 5},
    "adaptive": {"seed": 3, **ADAPTIVE},
    "clipped": {"seed": 7, **CLIPPED},
    "vq": {"seed": 7, "model.quantizer": "vq"},
    "bf16": {"seed": 3, "trainer.precision": "bf16"},
    "fp16": {"seed": 3, "trainer.precision": "fp16"},
}


class Cell(NamedTuple):
    """A run: so many processes under an engine, with changes; it must equal the reference run of that name."""

    processes: int
    engine: str
    reference: str
    changes: dict

    @property
    def name(self) -> str:
        changes = "_".join(f"{key.rsplit('.', 1)[-1]}-{value}" for key, value in self.changes.items())
        return f"{self.processes}_{self.engine.replace(' ', '-')}_{self.reference}_{changes}"

    @property
    def settings(self) -> dict:
        changes = {
            **{f"trainer.{key}": STEPS for key in ("max_steps", "checkpoint_every_steps", "validate_every_steps")},
            **ENGINES[self.engine],
            **REFERENCES[self.reference],
            **self.changes,
        }
        if self.engine == "fsdp2 hybrid":
            changes["engine.shard_over"] = self.processes // 2
        return changes

    @property
    def description(self) -> str:
        """What the run prints of itself."""
        settings = self.settings
        engine = settings["engine.kind"]
        if "engine.config" in settings:
            engine += f" {self.engine}"
        if self.engine == "fsdp2 hybrid":
            engine += f" over {self.processes // 2}"
        if self.engine == "fsdp2 offload":
            engine += " offload"
        sharded = "codebook over 2), " if "codebook_parallel" in settings else "), "
        micro = settings.get("trainer.micro_batch_size", BATCH // self.processes)
        images = f"{self.processes} x {BATCH // self.processes // micro} x {micro} images per step"
        return f"{sharded}{self.processes} x cpu ({engine}, {settings.get('trainer.precision', 'fp32')}), {images}"


def default_cells() -> list[Cell]:
    cells = [Cell(2, engine, "adaptive", SHARDED) for engine in ENGINES]
    for engine in MAIN:
        cells += [Cell(2, engine, "fixed", NO_EMA), Cell(2, engine, "clipped", CUT), Cell(2, engine, "bf16", {})]
        cells += [Cell(1, engine, "adaptive", NO_EMA)]
    cells += [Cell(4, engine, "adaptive", SHARDED) for engine in ("ddp", "zero3")]
    cells += [Cell(2, engine, "fp16", {}) for engine in ("ddp", "zero3", "fsdp2")]
    cells += [Cell(2, engine, "vq", SHARDED) for engine in ("ddp", "zero2")]
    return [*cells, Cell(4, "fsdp2 hybrid", "clipped", {**SHARDED, "trainer.micro_batch_size": 1})]


def all_cells() -> list[Cell]:
    cells = default_cells()
    for engine in ENGINES:
        for reference, ema, sharded in product(("fixed", "adaptive"), ({}, NO_EMA), ({}, SHARDED)):
            cells += [Cell(processes, engine, reference, {**ema, **sharded}) for processes in (2, 4)]
        cells += [Cell(2, engine, "clipped", CUT), Cell(2, engine, "bf16", {})]
        if engine != "fsdp2 hybrid":
            cells += [Cell(1, engine, "fixed", {}), Cell(1, engine, "adaptive", NO_EMA)]
    cells += [Cell(2, engine, "fp16", {}) for engine in MAIN]
    cells += [Cell(2, "fsdp2", "vq", SHARDED)]
    cut = {**SHARDED, "trainer.micro_batch_size": 1}
    return cells + [Cell(4, engine, "clipped", cut) for engine in ("ddp", "zero3")]


DEFAULT = {cell.name: cell for cell in default_cells()}
ALL_CELLS = [
    pytest.param(cell, id=name, marks=[pytest.mark.full] * (name not in DEFAULT))
    for name, cell in {cell.name: cell for cell in all_cells()}.items()
]


REFERENCE_CELLS = {name: Cell(1, "ddp", name, {"trainer.keep_last": 1}) for name in REFERENCES}


@pytest.fixture(scope="module")
def run_of(trained) -> Callable[[Cell], Path]:
    """`run_of(cell)`: the folder of its run."""

    def run(cell: Cell) -> Path:
        found = trained("debug", cell.processes, cell.settings)
        said = found.with_name("stderr").read_text()
        assert cell.description in said and "M parameters" in said and "0.00M" not in said
        return found

    return run


@pytest.mark.parametrize("cell", ALL_CELLS)
def test_a_cell_equals_one_process(run_of, cell):
    expected, actual = run_of(REFERENCE_CELLS[cell.reference]), run_of(cell)
    half = cell.reference in ("bf16", "fp16")
    found = differences(actual / CHECKPOINT, expected / CHECKPOINT)
    assert {"tokenizer", "tokenizer.exp_avg", "discriminator", "lecam"} <= found.keys()
    assert ("tokenizer_ema" in found) == ("ema.decay" not in cell.changes)
    for model, difference in found.items():
        if ".exp_avg" in model:
            assert half or difference.whole < MOMENT_TOLERANCE, model
        elif model == "lecam":
            assert half or difference.whole < TENSOR_TOLERANCE, model  # two means that are near 0
        else:
            assert difference.whole < (HALF_TOLERANCE if half else TOLERANCE), model
            assert half or difference.worst < TENSOR_TOLERANCE, model
    lines = loss_lines(actual)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, expected_line in zip(lines, loss_lines(expected), strict=True):
        if half:
            assert line["loss/total"] == pytest.approx(expected_line["loss/total"], rel=10 * HALF_TOLERANCE)
        else:
            assert line == pytest.approx(expected_line, rel=LOSS_TOLERANCE, abs=1e-6)
    validated, truly = ([line for line in read_metrics(run) if "val/psnr" in line] for run in (actual, expected))
    assert len(validated) == len(truly) == 1
    if "tokenizer_ema" in found:  # validation is by the EMA where there is one
        tolerance = 10 * HALF_TOLERANCE if half else LOSS_TOLERANCE
        assert validated[0]["val/psnr"] == pytest.approx(truly[0]["val/psnr"], rel=tolerance)


def test_clipping_and_the_adaptive_weight_are_really_there(run_of):
    """The references that cells are compared with are not by mistake one and the same."""
    of = {name: loss_lines(run_of(cell)) for name, cell in REFERENCE_CELLS.items()}
    assert min(line["grad_norm/tokenizer"] for line in of["clipped"]) > 0.05
    assert all(line["weight/generator"] == pytest.approx(0.1) for line in of["fixed"])
    assert all(line["weight/generator"] != pytest.approx(0.1) for line in of["adaptive"])
    assert all("loss/average_entropy" not in line for line in of["vq"])
    assert all(line["loss_scale/tokenizer"] >= 2 for line in of["fp16"])
    ends = {name: lines[-1]["loss/total"] for name, lines in of.items()}
    assert len(set(ends.values())) == len(ends)


def test_training_moves_the_weights_by_far_more_than_the_tolerance(run_of, start):
    trained = run_of(REFERENCE_CELLS["fixed"]) / CHECKPOINT
    for model, difference in differences(start(1, REFERENCES["fixed"]), trained).items():
        if model in ("tokenizer", "tokenizer_ema", "discriminator"):
            assert difference.whole > 50 * TOLERANCE, model


STARTING = {
    "ddp": {},
    "zero1": {},
    "zero2_offload": {"codebook_parallel": 1, "trainer.precision": "bf16"},
    "zero3": {},
    "fsdp2": {"model.quantizer": "vq"},
    "fsdp2 offload": {},
}
STARTING_DEFAULT = ("ddp", "zero2_offload", "zero3", "fsdp2")


@pytest.fixture(scope="module")
def start(trained):
    """`start(processes, changes)`: the checkpoint of a run whose only step has a rate of 0, so that it is the start."""
    base = {"trainer.max_steps": 1, "trainer.checkpoint_every_steps": 1, "optimizer.lr": 0, "data.val": "null"}
    return lambda processes, changes: trained("debug", processes, base | changes) / "checkpoints/step_00000001"


@pytest.mark.parametrize(
    "engine", [pytest.param(engine, marks=[pytest.mark.full] * (engine not in STARTING_DEFAULT)) for engine in STARTING]
)
def test_codes_among_the_features_begin_where_one_process_has_them(start, engine):
    """Of two processes with a sharded codebook and batches in parts, and of one process."""
    changes = {"model.codebook_init": "features", **STARTING[engine]}
    one = start(1, {key: value for key, value in changes.items() if key != "codebook_parallel"})
    two = start(2, {**ENGINES[engine], **SHARDED, "trainer.micro_batch_size": 2, **changes})
    normal = start(1, {"model.codebook_init": "normal"})
    found, moved = differences(one, two), differences(one, normal)
    tolerance = HALF_TOLERANCE if "trainer.precision" in STARTING[engine] else 1e-6
    for model in ("tokenizer", "tokenizer_ema"):
        assert found[model].whole < tolerance, model
        assert moved[model].whole > 0.01, model
