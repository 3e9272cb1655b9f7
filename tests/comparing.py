"""What tests of whole runs compare: the tensors of checkpoints and the lines of metrics.jsonl."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from model_zoo.io.sharded_tensors import ShardedTensors

MODELS = ("tokenizer", "tokenizer_ema", "discriminator", "lecam", "generator", "generator_ema")
OF_SPEED = ("images_per_second", "tokens_per_second", "mfu")


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
