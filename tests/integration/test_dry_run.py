"""`--dry-run`: what it says a rank holds is theory within 2%, and what real processes hold to the byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model_zoo.discriminator import PatchDiscriminator
from model_zoo.tokenizer import Tokenizer
from model_zoo.transformer import Transformer
from trainer.recipes import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RANKS = 64
LPIPS_WEIGHTS = 14_714_688 + 1472  # VGG16's convolutions, LPIPS's heads

# Configuration of ibq_262144 -> what it stands for.
CONFIGURATIONS = {
    "zero1": ["engine.config=zero1"],
    "zero2, codebook 8": ["engine.config=zero2", "codebook_parallel=8"],
    "zero3, codebook 8": ["engine.config=zero3", "codebook_parallel=8"],
    "fsdp2": ["engine.kind=fsdp2"],
    "hybrid, codebook 8": ["engine.kind=fsdp2", "engine.shard_over=8", "codebook_parallel=8"],
}
# Of ar_xxl.
GENERATORS = {
    "zero3": ["engine.config=zero3"],
    "fsdp2": ["engine.kind=fsdp2"],
    "fsdp2, head 8": ["engine.kind=fsdp2", "vocabulary_parallel=8"],
}
# Of `debug` on two processes.
REAL = [
    ["codebook_parallel=2"],
    ["engine.kind=fsdp2"],
    ["engine.kind=deepspeed", "engine.config=zero1"],
    ["engine.kind=deepspeed", "engine.config=zero3"],
]
# One process for all of them, for imports take as long as the work; not pytest's, whose threads a fork could harm.
PLAN = """
import json, sys
from trainer.recipes import load_recipe
from trainer.dry_run import plan_ranks
recipe, processes, configurations = json.loads(sys.argv[1])
plans = [plan_ranks(load_recipe(recipe, overrides), processes) for overrides in configurations]
print(json.dumps([{plan.rank: plan.networks for plan in of_ranks} for of_ranks in plans]))
"""


def python(*arguments, cwd, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def plans(recipe: str, processes: int, configurations: list[list[str]], cwd: Path) -> list[dict[str, dict]]:
    finished = python("-c", PLAN, json.dumps([recipe, processes, configurations]), cwd=cwd)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> dict[str, dict]:
    """Name of a configuration -> rank -> network -> [parameters, gradients, optimizer, EMA], in bytes."""
    answers = plans("ibq_262144", RANKS, list(CONFIGURATIONS.values()), tmp_path_factory.mktemp("planned"))
    return dict(zip(CONFIGURATIONS, answers, strict=True))


@pytest.fixture(scope="module")
def generators_planned(tmp_path_factory) -> dict[str, dict]:
    """The same of `ar_xxl`."""
    batch = ["trainer.micro_batch_size=12"]
    configurations = [[*changes, *batch] for changes in GENERATORS.values()]
    answers = plans("ar_xxl", RANKS, configurations, tmp_path_factory.mktemp("generators_planned"))
    return dict(zip(GENERATORS, answers, strict=True))


@pytest.fixture(scope="module")
def shapes() -> tuple[list[int], int]:
    """(numbers of elements of the generator's parameters, of all of the discriminator)"""
    with torch.device("meta"):
        tokenizer = Tokenizer(load_recipe("ibq_262144", []).model)
        discriminator = PatchDiscriminator(channels=64, layers=3, norm="batch")
    generator = [p.numel() for name, p in tokenizer.named_parameters() if not name.startswith("quantize.")]
    return generator, sum(p.numel() for p in discriminator.parameters())


def generator_theory(name: str, numbers: list[int]) -> list[float]:
    """Bytes of fp32 on one of 64 ranks: parameters (with masters), gradients, Adam's two moments, EMA."""
    whole = 4 * sum(numbers)
    part = whole / RANKS
    # DeepSpeed leaves parameters of at most stage3_param_persistence_threshold elements whole.
    small = 4 * sum(number for number in numbers if number <= 10_000)
    return {
        "zero1": [whole + part, whole, 2 * part, part],
        "zero2": [whole + part, part, 2 * part, part],
        "zero3": [part + part + small, part, 2 * part, part],
        "fsdp2": [part, part, 2 * part, part],
        "hybrid": [whole / 8, whole / 8, 2 * whole / 8, whole / 8],
    }[name]


@pytest.mark.parametrize("rank", [0, RANKS - 1])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_bytes_are_theory(planned, shapes, name, rank):
    networks = planned[name][str(rank)]
    numbers, of_discriminator = shapes
    engine, _, sharded = name.partition(", ")
    codes = 4 * 262_144 * 256 / (8 if sharded else 1)
    assert networks["generator"] == pytest.approx(generator_theory(engine, numbers), rel=0.02)
    assert networks["codebook"] == pytest.approx([codes, codes, 2 * codes, codes], rel=0.02)
    discriminator = 4 * of_discriminator
    assert networks["discriminator"] == pytest.approx([discriminator, discriminator, 2 * discriminator, 0], rel=0.02)
    assert networks["LPIPS, frozen"] == [4 * LPIPS_WEIGHTS, 0, 0, 0]


@pytest.mark.parametrize("name", GENERATORS)
def test_bytes_of_the_largest_generator_are_theory(generators_planned, name):
    """2.1B parameters, of which no process ever had the values."""
    with torch.device("meta"):
        numbers = [p.numel() for p in Transformer(load_recipe("ar_xxl", []).model).parameters()]
    head = 16_384 * 1_920
    for rank in (0, RANKS - 1):
        networks = generators_planned[name][str(rank)]
        if name == "fsdp2, head 8":
            assert networks["head"] == pytest.approx([4 * head / 8, 4 * head / 8, 8 * head / 8, 0], rel=0.02)
            expected = generator_theory("fsdp2", [*numbers, -head])
        else:
            expected = generator_theory(name, numbers)
        assert networks["generator"] == pytest.approx([*expected[:3], 0], rel=0.02)


def test_two_real_processes_hold_what_was_said(tmp_path):
    (tmp_path / "recipes.json").write_text(json.dumps(REAL))
    launcher = "-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone"
    script = ROOT / "tests/integration/holding.py"
    finished = python(*launcher, script, tmp_path / "recipes.json", tmp_path / "real", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    real = [json.loads((tmp_path / f"real.{rank}").read_text()) for rank in range(2)]
    for number, planned in enumerate(plans("debug", 2, REAL, tmp_path)):
        assert planned == {str(rank): real[rank][number] for rank in range(2)}, REAL[number]


def test_what_is_printed(tmp_path):
    """By torchrun's number of processes; without data, weights of VGG16, or anything written."""
    arguments = "debug", "--dry-run", "data.train=null", "loss.perceptual.weight=1", "codebook_parallel=2"
    world = dict(WORLD_SIZE="8", TORCH_HOME=str(tmp_path / "torch"))
    finished = python("-m", "trainer", *arguments, cwd=tmp_path, RANK="0", **world)
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in finished.stdout.splitlines()]
    for line in (
        "codebook_size: 256",
        "processes 8 (which of them share a machine is for the launcher to say)",
        "batch 8 images a step = 8 processes x 1 micro-batch x 1 images",
        "codebook 2 shards x 4 replicas",
        "shards ranks 0-1 ... 6-7",
        "replicas ranks 0-6 by 2 and 1-7 by 2",
        "LPIPS, frozen 58.86 MB 0 0 0 58.86 MB",
    ):
        assert line in lines, finished.stdout
    silent = python("-m", "trainer", *arguments, cwd=tmp_path, RANK="1", **world)
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--processes", 63], "trainer.global_batch_size=256 must be a multiple of the 63 processes"),
        (["--processes", 64, "codebook_parallel=7"], "codebook_parallel=7 must divide the number of processes, 64"),
        (["--processes", 64, "engine.kind=fsdp2", "engine.shard_over=7"], "engine.shard_over=7 must divide"),
    ],
)
def test_mistakes_are_one_line(tmp_path, changes, said):
    finished = python("-m", "tools.cli", "train", "ibq_262144", "--dry-run", *changes, cwd=tmp_path)
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.startswith(f"ibq: error: {said}") and finished.stderr.count("\n") == 1
    assert finished.stdout == ""
    assert list(tmp_path.iterdir()) == []
