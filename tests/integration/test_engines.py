"""Ten steps under every engine, on 1, 2 and 4 processes, are one process's ten steps.

Each cell of the support matrix (docs/scaling.md) is a whole run of `debug`; cells with the same number of processes run
one after another in the same processes. `IBQ_TEST_EVERY_CELL=1` runs all combinations of engine, adaptive weight, EMA
and sharded codebook on 1, 2 and 4 processes; without it the MAIN engines have every pair of these on 2 processes, and
the others each of them once.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from comparing import differences, read_metrics
from launching import Finished, Launch, settings

STEPS = 10
CHECKPOINT = f"checkpoints/step_{STEPS:08d}"
TOLERANCE = 1e-5  # of all weights of a model together
MOMENT_TOLERANCE = 1e-3  # of Adam's moments: ten gradients, in which rounding is a larger part than in weights
# Biases start at 0 and are still tiny after ten steps, so that rounding is a larger part of them.
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
# All combinations of these three columns, and half of them: each two settings of two columns together.
EVERY = [
    (truth, {**ema, **sharded}) for truth, ema, sharded in product(("fixed", "adaptive"), ({}, NO_EMA), ({}, SHARDED))
]
PAIRS = [("fixed", {}), ("adaptive", SHARDED), ("adaptive", NO_EMA), ("fixed", {**NO_EMA, **SHARDED})]
CUT = {"trainer.micro_batch_size": 2, "trainer.activation_checkpointing": "true"}
# Each with a seed for which rounding decides nothing: no token ties between codes, no logit is on a kink (docs/LOG.md).
TRUTHS = {
    "fixed": {"seed": 5},
    "adaptive": {"seed": 3, **ADAPTIVE},
    "clipped": {"seed": 7, **CLIPPED},
    "vq": {"seed": 7, "model.quantizer": "vq"},
    "bf16": {"seed": 3, "trainer.precision": "bf16"},
    "fp16": {"seed": 3, "trainer.precision": "fp16"},
}


class Cell(NamedTuple):
    """A run: so many processes under an engine, with changes; what it must equal is the truth of that name."""

    processes: int
    engine: str
    truth: str
    changes: dict

    @property
    def name(self) -> str:
        changes = "_".join(f"{key.rsplit('.', 1)[-1]}-{value}" for key, value in self.changes.items())
        return f"{self.processes}_{self.engine.replace(' ', '-')}_{self.truth}_{changes}"

    def arguments(self, folder: Path) -> list[str]:
        changes = {
            **{"trainer.max_steps": STEPS, "trainer.checkpoint_every_steps": STEPS},
            **ENGINES[self.engine],
            **TRUTHS[self.truth],
            **self.changes,
        }
        if self.engine == "fsdp2 hybrid":
            changes["engine.shard_over"] = self.processes // 2
        return ["debug", f"run={folder / self.name}", *settings(changes)]


def cells_of(processes: int) -> list[Cell]:
    """Every cell on so many processes."""
    every = os.environ.get("IBQ_TEST_EVERY_CELL") == "1"
    cells = []
    for engine in ENGINES:
        if processes == 1:
            whole, default = [("fixed", {}), ("adaptive", NO_EMA)], [("adaptive", NO_EMA)]
            if engine == "fsdp2 hybrid":
                continue
        else:
            whole, default = EVERY, [("adaptive", SHARDED)]
        if processes == 2:
            whole = [*EVERY, ("clipped", CUT), ("bf16", {})]
            default = [*PAIRS, *whole[-2:]] if engine in MAIN else [*default, ("fixed", NO_EMA)]
        if processes == 4 and engine not in (*MAIN, "fsdp2 hybrid"):
            default = []
        of_engine = whole if every else default
        cells += [Cell(processes, engine, *cell) for cell in of_engine]
    if processes == 2:
        cells += [Cell(2, engine, "fp16", {}) for engine in ("ddp", "zero1", "zero3", "fsdp2")]
        cells += [Cell(2, engine, "vq", SHARDED) for engine in ("ddp", "zero2", "fsdp2")]
    if processes == 4:
        cut = {**SHARDED, "trainer.micro_batch_size": 1}
        cells += [Cell(4, engine, "clipped", cut) for engine in ("ddp", "zero3", "fsdp2 hybrid")]
    return cells


ALL_CELLS = [cell for processes in (1, 2, 4) for cell in cells_of(processes)]


class Matrix:
    """Trains all cells, those of one number of processes in one launch."""

    def __init__(self, launch: Launch, folder: Path):
        self.launch, self.folder = launch, folder
        self.pool = ThreadPoolExecutor(1)
        truths = [Cell(1, "ddp", name, {"trainer.keep_last": 1}) for name in TRUTHS]
        self.truths = {cell.truth: cell for cell in truths}
        self.finished: dict[int, Future] = {}
        for processes in (1, 2, 4):
            cells = cells_of(processes) + (truths if processes == 1 else [])
            self.finished[processes] = self.pool.submit(self._train, processes, cells)

    def _train(self, processes: int, cells: list[Cell]) -> Finished:
        runs, file = [cell.arguments(self.folder) for cell in cells], self.folder / f"cells_of_{processes}.json"
        return self.launch.several(runs, file, processes=processes, timeout_seconds=1500)

    def __getitem__(self, cell: Cell) -> Path:
        """The run's folder."""
        finished = self.finished[cell.processes].result()
        assert f"{self.folder / cell.name} ended with status 0" in finished.out, finished.err[-5000:]
        return self.folder / cell.name

    def truth(self, cell: Cell) -> Path:
        return self[self.truths[cell.truth]]


@pytest.fixture(scope="module")
def matrix(launch, tmp_path_factory):
    matrix = Matrix(launch, tmp_path_factory.mktemp("cells"))
    yield matrix
    matrix.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("cell", ALL_CELLS, ids=lambda cell: cell.name)
def test_a_cell_equals_one_process(matrix, cell):
    expected, actual = matrix.truth(cell), matrix[cell]
    half = cell.truth in ("bf16", "fp16")
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
    lines = [[line for line in read_metrics(run) if "loss/total" in line] for run in (expected, actual)]
    assert [line["step"] for line in lines[1]] == list(range(1, STEPS + 1))
    for line, true_line in zip(*reversed(lines), strict=True):
        if half:
            assert line["loss/total"] == pytest.approx(true_line["loss/total"], rel=10 * HALF_TOLERANCE)
        else:
            assert line == pytest.approx(true_line, rel=LOSS_TOLERANCE, abs=1e-6)
    validated, truly = ([line for line in read_metrics(run) if "val/psnr" in line] for run in (actual, expected))
    assert len(validated) == len(truly) == 1
    if "tokenizer_ema" in found:  # validation is by the EMA where there is one
        tolerance = 10 * HALF_TOLERANCE if half else LOSS_TOLERANCE
        assert validated[0]["val/psnr"] == pytest.approx(truly[0]["val/psnr"], rel=tolerance)


def test_clipping_and_the_adaptive_weight_are_really_there(matrix):
    """The truths that cells are compared with are not by mistake one and the same."""
    of = {
        name: [line for line in read_metrics(matrix[cell]) if "loss/total" in line]
        for name, cell in matrix.truths.items()
    }
    assert min(line["grad_norm/generator"] for line in of["clipped"]) > 0.05
    assert all(line["weight/generator"] == pytest.approx(0.1) for line in of["fixed"])
    assert all(line["weight/generator"] != pytest.approx(0.1) for line in of["adaptive"])
    assert all("loss/average_entropy" not in line for line in of["vq"])
    assert all(line["loss_scale/generator"] >= 2 for line in of["fp16"])
    ends = {name: lines[-1]["loss/total"] for name, lines in of.items()}
    assert len(set(ends.values())) == len(ends)


def test_cells_are_what_they_are_called(matrix):
    said = "".join(finished.result().err for finished in matrix.finished.values())
    for text in (
        *("1 x cpu (deepspeed zero3, fp32)", "2 x cpu (deepspeed zero2_offload, fp32)", "2 x cpu (fsdp2, bf16)"),
        *(
            "codebook over 2), 4 x cpu (deepspeed zero1, fp32)",
            "4 x cpu (fsdp2 over 2, fp32)",
            "2 x cpu (fsdp2 offload",
        ),
        *("2 x 2 x 2 images a step", "4 x 2 x 1 images a step"),
    ):
        assert text in said, text


def test_training_moves_the_weights_by_far_more_than_the_tolerance(matrix, launch, tmp_path):
    start = tmp_path / "start"
    changes = {**TRUTHS["fixed"], "trainer.max_steps": 1, "trainer.checkpoint_every_steps": 1, "optimizer.lr": 0}
    finished = launch.ibq("train", "debug", f"run={start}", *settings(changes))
    assert finished.status == 0, finished.err
    trained = matrix[matrix.truths["fixed"]] / CHECKPOINT
    for model, difference in differences(start / "checkpoints/step_00000001", trained).items():
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


@pytest.fixture(scope="module")
def starts(launch, tmp_path_factory) -> Path:
    """A folder of runs whose only step has a rate of 0, so that their checkpoints are their starts. Codes begin among
    the features; of two processes with a spread codebook and batches in parts; and beside each one process's."""
    folder = tmp_path_factory.mktemp("starts")
    base = {"trainer.max_steps": 1, "trainer.checkpoint_every_steps": 1, "optimizer.lr": 0}
    base["model.codebook_init"] = "features"
    ones, twos = [], []
    for engine, changes in STARTING.items():
        two = {**base, **ENGINES[engine], **SHARDED, "trainer.micro_batch_size": 2, **changes}
        twos.append(["debug", f"run={folder / engine}", *settings(two)])
        one = {key: value for key, value in changes.items() if key != "codebook_parallel"}
        ones.append(["debug", f"run={folder / engine}, one", *settings({**base, **one})])
    ones.append(["debug", f"run={folder / 'normal'}", *settings({**base, "model.codebook_init": "normal"})])
    for processes, runs in ((1, ones), (2, twos)):
        finished = launch.several(runs, folder / f"{processes}.json", processes=processes, timeout_seconds=600)
        assert finished.status == 0 and finished.out.count("ended with status 0") == len(runs), finished.err
    return folder


@pytest.mark.parametrize("engine", STARTING)
def test_codes_among_the_features_begin_where_one_process_has_them(starts, engine):
    one, two, normal = (starts / name / "checkpoints/step_00000001" for name in (f"{engine}, one", engine, "normal"))
    found, moved = differences(one, two), differences(one, normal)
    tolerance = HALF_TOLERANCE if "trainer.precision" in STARTING[engine] else 1e-6
    for model in ("tokenizer", "tokenizer_ema"):
        assert found[model].whole < tolerance, model
        assert moved[model].whole > 0.01, model
