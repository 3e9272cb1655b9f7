"""What tests compare: tensors of checkpoints, lines of metrics.jsonl, files, tables, and messages of refusal."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from ranks import Ended
from torch import Tensor

from model_zoo.io.sharded_tensors import ShardedTensors

MODELS = ("tokenizer", "tokenizer_ema", "discriminator", "semantic_head", "lecam", "generator", "generator_ema")
OF_SPEED = ("images_per_second", "tokens_per_second", "mfu", "training_seconds")


class Difference(NamedTuple):
    """|a - b| / |a| of two checkpoints' weights: of all tensors of a model together, and of the worst tensor."""

    whole: float
    worst: float


def difference(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> Difference:
    """Of tensors by name, which must be the same names."""
    assert actual.keys() == expected.keys()
    differences = {name: float((actual[name].double() - value.double()).norm()) for name, value in expected.items()}
    norms = {name: float(value.double().norm()) for name, value in expected.items()}
    whole = math.hypot(*differences.values()) / (math.hypot(*norms.values()) or 1.0)
    different = [name for name, difference in differences.items() if difference]
    # A tensor that is zero in one of them alone, as a bias before its first step, is infinitely different.
    worst = max((differences[name] / norms[name] if norms[name] else math.inf for name in different), default=0.0)
    return Difference(whole, worst)


def differences(expected: Path, actual: Path) -> dict[str, Difference]:
    """Of two checkpoint folders, for each model that the expected one holds, and for Adam's moments."""
    files = ShardedTensors(expected), ShardedTensors(actual)
    models = {name.split("/")[0] for name in files[0].names() if name.split(".")[0].split("/")[0] in MODELS}
    return {model: difference(*(of.tensors(f"{model}/") for of in files)) for model in sorted(models)}


def read_metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, without the speed, which is never the same twice."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in OF_SPEED} for line in lines]


def loss_lines(run: Path) -> list[dict]:
    """The lines of metrics.jsonl that hold a step's losses."""
    return [line for line in read_metrics(run) if "loss/total" in line]


def copy_until(run: Path, step: int, copy: Path) -> Path:
    """Copies a run as if it had been killed after the checkpoint of that step; returns the copy."""
    shutil.copytree(run, copy)
    for later in (copy / "checkpoints").glob("step_*"):
        if later.name > f"step_{step:08d}":
            shutil.rmtree(later)
    (copy / "checkpoints/latest").write_text(f"step_{step:08d}")
    return copy


def fingerprint(folder: Path) -> dict[str, str]:
    """Every path under it, hidden ones too, with the hash of a file's content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Fails the test if anything in them is not as it was."""
    before = [fingerprint(folder) for folder in folders]
    yield
    assert [fingerprint(folder) for folder in folders] == before


def assert_refused(ended: Ended, *said: str) -> None:
    """A mistake of the user ends in one line, exit status 2 and no traceback."""
    assert ended.status == 2, ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert ended.error_lines, ended.err
    for text in said:
        assert text in ended.err


def refusal(errors: type[Exception] | tuple[type[Exception], ...], function: Callable, *arguments, **options) -> str:
    """The message, of one line, with which a call is refused."""
    with pytest.raises(errors) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def printed_rows(out: str, count: int, heading: str = "impl ") -> list[list[str]]:
    """The words of a printed table's first rows, below the line that begins with ``heading``. No line is too wide for a
    terminal."""
    lines = out.splitlines()
    assert all(len(line) <= 120 for line in lines)
    at = next(number for number, line in enumerate(lines, start=1) if line.startswith(heading))
    return [line.split() for line in lines[at : at + count]]


def table_rows(text: str) -> list[list[str]]:
    """The cells of a Markdown file's first table, headings first."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
