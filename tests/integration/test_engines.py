"""Ten steps under every engine, on 1, 2 and 4 processes, are one process's ten steps.

Each cell of the support matrix (docs/scaling.md) is a whole run of `debug`; cells with the same number of processes run
one after another in the same processes. `IBQ_TEST_EVERY_CELL=1` runs all combinations of adaptive weight, EMA and
sharded codebook on 2 and 4 processes; without it every pair of these is tested, which is half of them.
"""

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
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
    "replicated": {"engine.kind": "replicated"},
    **{
        name: {"engine.kind": "deepspeed", "engine.config": name}
        for name in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
    },
    "fsdp2": {"engine.kind": "fsdp2"},
    "fsdp2 kept": {"engine.kind": "fsdp2", "engine.reshard": "false"},
    "fsdp2 offload": {"engine.kind": "fsdp2", "engine.offload": "true"},
    "fsdp2 hybrid": {"engine.kind": "fsdp2"},  # and engine.shard_over
}
# A setting of the matrix's other columns -> what it changes.
ADAPTIVE = {"loss.generator.adaptive": "true"}
NO_EMA = {"ema.decay": 0}
SHARDED = {"codebook_parallel": 2}
CLIPPED = {"trainer.gradient_clip_norm": 0.05}  # so low that every step is clipped
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
        if processes == 1 and engine == "fsdp2 hybrid":
            continue
        of_engine = [("fixed", {}), ("adaptive", SHARDED)]
        if processes == 2 or every:
            of_engine += [("adaptive", NO_EMA), ("fixed", {**NO_EMA, **SHARDED})]
        if every:
            of_engine += [("adaptive", {}), ("fixed", SHARDED), ("fixed", NO_EMA)]
            of_engine += [("adaptive", {**NO_EMA, **SHARDED})]
        if processes == 1:
            of_engine = [("fixed", {}), ("adaptive", NO_EMA)]
        if processes == 2:
            of_engine += [("clipped", CUT), ("bf16", {})]
        cells += [Cell(processes, engine, *cell) for cell in of_engine]
    if processes == 2:
        cells += [Cell(2, engine, "fp16", {}) for engine in ("replicated", "zero1", "zero3", "fsdp2")]
        cells += [Cell(2, engine, "vq", SHARDED) for engine in ("replicated", "zero2", "fsdp2")]
    if processes == 4:
        cut = {**SHARDED, "trainer.micro_batch_size": 1}
        cells += [Cell(4, engine, "clipped", cut) for engine in ("replicated", "zero3", "fsdp2 hybrid")]
    return cells


ALL_CELLS = [cell for processes in (1, 2, 4) for cell in cells_of(processes)]


class Matrix:
    """Trains all cells, those of one number of processes in one launch."""

    def __init__(self, launch: Launch, folder: Path):
        self.launch, self.folder = launch, folder
        self.pool = ThreadPoolExecutor(1)
        truths = [Cell(1, "replicated", name, {"trainer.keep_last": 1}) for name in TRUTHS]
        self.truths = {cell.truth: cell for cell in truths}
        self.finished: dict[int, Future] = {}
        for processes in (1, 2, 4):
            cells = cells_of(processes) + (truths if processes == 1 else [])
            self.finished[processes] = self.pool.submit(self._train, processes, cells)

    def _train(self, processes: int, cells: list[Cell]) -> Finished:
        arguments = self.folder / f"cells_of_{processes}.json"
        arguments.write_text(json.dumps([cell.arguments(self.folder) for cell in cells]))
        several = Path(__file__).with_name("several.py")
        launcher = "-m", "torch.distributed.run", "--nproc-per-node", processes, "--standalone", several, arguments
        process = self.launch.start_python(*launcher, PYTHONPATH=str(several.parents[2]))
        return self.launch.finish(process, timeout_seconds=1500)

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


@pytest.mark.parametrize("engine", ["replicated", "zero3", "fsdp2"])
def test_codes_among_the_features_begin_where_one_process_has_them(launch, tmp_path, engine):
    """A step at a rate of 0 shows the start: of two processes, a spread codebook, and batches in parts."""
    changes = {"trainer.max_steps": 1, "trainer.checkpoint_every_steps": 1, "optimizer.lr": 0}
    changes["model.codebook_init"] = "features"
    one, two, normal = (tmp_path / name for name in ("one", "two", "normal"))
    spread = {**changes, **ENGINES[engine], **SHARDED, "trainer.micro_batch_size": 2}
    for finished in (
        launch.ibq("train", "debug", f"run={one}", *settings(changes)),
        launch.ibq("train", "debug", f"run={normal}", *settings({**changes, "model.codebook_init": "normal"})),
        launch.torchrun("debug", f"run={two}", *settings(spread)),
    ):
        assert finished.status == 0, finished.err
    found, moved = (
        differences(one / "checkpoints/step_00000001", r / "checkpoints/step_00000001") for r in (two, normal)
    )
    for model in ("tokenizer", "tokenizer_ema"):
        assert found[model].whole < 1e-6, model
        assert moved[model].whole > 0.01, model
