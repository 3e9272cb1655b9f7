"""`--dry-run`: the memory that it prints is the theory's within 2%, and equals that of real processes to the byte."""

from functools import cache

import pytest
import torch
from comparing import assert_refused

from model_zoo.discriminator import PatchDiscriminator
from model_zoo.tokenizer import Tokenizer
from model_zoo.transformer import Transformer
from trainer.dry_run import measure_ranks, networks_held
from trainer.parallel import World
from trainer.recipes import load_recipe
from trainer.start_plan import plan_batch
from trainer.tasks.tokenizer import TokenizerTask

RANKS = 64
LPIPS_WEIGHTS = 14_714_688 + 1472 + 6  # VGG16's convolutions, LPIPS's heads, mean and deviation of the pixels

# Fewer layers than the recipes have: the theory is the same, and the time to build them is not.
SHALLOW = {
    "ibq_262144": ["model.num_res_blocks=1", "model.channel_multipliers=[1,4]", "model.attention_factors=[2]"],
    "ar_xxl": ["model.depth=6"],
}
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


def plans(recipe: str, processes: int, configurations: list[list[str]]) -> list[dict[int, dict]]:
    """For each configuration: rank -> network -> [parameters, gradients, optimizer, EMA], in bytes."""
    of_configurations = [measure_ranks(load_recipe(recipe, overrides), processes) for overrides in configurations]
    return [
        {plan.rank: {name: list(of_network) for name, of_network in plan.networks.items()} for plan in of_ranks}
        for of_ranks in of_configurations
    ]


def held(configurations: list[list[str]]) -> list[dict[str, list[int]]]:
    """The same of this rank, from tasks that are built; without DeepSpeed, gradients are those of a real backward."""
    world = World(torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.device("cpu"))
    answers = []
    for overrides in configurations:
        config = load_recipe("debug", overrides)
        task = TokenizerTask(config, world, *plan_batch(config, world))
        networks = {name: list(of_network) for name, of_network in networks_held(task).items()}
        if config.engine.kind != "deepspeed":
            side, count = config.data.image_size, task.main_engine.micro_batch_size
            gradients = real_gradients(task, [torch.zeros(count, 3, side, side, dtype=torch.uint8)])
            for name, number in gradients.items():
                networks[name][1] = number
        answers.append(networks)
    return answers


def real_gradients(task: TokenizerTask, images: list[torch.Tensor]) -> dict[str, int]:
    """Bytes of the gradients that the parameters have when the optimizer's step begins."""
    seen = {}
    for name, (engine, *_) in task.state.trained.items():

        def step(*arguments, name=name, engine=engine, inner=engine.step):
            seen[name] = sum(gradient.nbytes for gradient in engine._gradients())
            inner(*arguments)

        engine.step = step
    task.step(images, 0)
    return seen


@pytest.fixture(scope="module")
def planned(ranks):
    """`planned(recipe, *overrides)`: `plans` of one configuration on RANKS processes, in a warm rank, since forks of
    pytest's threads could deadlock."""

    @cache
    def plan(recipe: str, *overrides: str) -> dict[int, dict]:
        ((networks_of_ranks,),) = ranks.call(1, plans, recipe, RANKS, [[*SHALLOW[recipe], *overrides]], join=False)
        return networks_of_ranks

    return plan


def in_full(names, *full: str) -> list:
    """Parameters, some of them for the full tier."""
    return [pytest.param(name, marks=[pytest.mark.full] * (name in full)) for name in names]


@pytest.fixture(scope="module")
def shapes() -> tuple[list[int], int]:
    """(numbers of elements of the generator's parameters, of all of the discriminator)"""
    with torch.device("meta"):
        tokenizer = Tokenizer(load_recipe("ibq_262144", SHALLOW["ibq_262144"]).model)
        discriminator = PatchDiscriminator(channels=64, layers=3, norm="batch")
    generator = [p.numel() for name, p in tokenizer.named_parameters() if not name.startswith("quantize.")]
    return generator, sum(p.numel() for p in discriminator.parameters())


def generator_theory(name: str, numbers: list[int]) -> list[float]:
    """Bytes of fp32 on one of RANKS ranks: parameters (with masters), gradients, Adam's two moments, EMA."""
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
@pytest.mark.parametrize("name", in_full(CONFIGURATIONS, "zero1", "zero2, codebook 8", "fsdp2"))
def test_bytes_are_theory(planned, shapes, name, rank):
    networks = planned("ibq_262144", *CONFIGURATIONS[name])[rank]
    numbers, of_discriminator = shapes
    engine, _, sharded = name.partition(", ")
    codes = 4 * 262_144 * 256 / (8 if sharded else 1)
    assert networks["tokenizer"] == pytest.approx(generator_theory(engine, numbers), rel=0.02)
    assert networks["codebook"] == pytest.approx([codes, codes, 2 * codes, codes], rel=0.02)
    discriminator = 4 * of_discriminator
    assert networks["discriminator"] == pytest.approx([discriminator, discriminator, 2 * discriminator, 0], rel=0.02)
    assert networks["LPIPS, frozen"] == [4 * LPIPS_WEIGHTS, 0, 0, 0]


@pytest.mark.parametrize("name", in_full(GENERATORS, "zero3", "fsdp2"))
def test_bytes_of_the_largest_generator_are_theory(planned, name):
    """Wide enough that no process could hold the optimizer's state of the whole."""
    with torch.device("meta"):
        numbers = [p.numel() for p in Transformer(load_recipe("ar_xxl", SHALLOW["ar_xxl"]).model).parameters()]
    head = 16_384 * 1_920
    for rank in (0, RANKS - 1):
        networks = planned("ar_xxl", *GENERATORS[name], "trainer.micro_batch_size=12")[rank]
        if name == "fsdp2, head 8":
            assert networks["head"] == pytest.approx([4 * head / 8, 4 * head / 8, 8 * head / 8, 0], rel=0.02)
            expected = generator_theory("fsdp2", [*numbers, -head])
        else:
            expected = generator_theory(name, numbers)
        assert networks["generator"] == pytest.approx([*expected[:3], 0], rel=0.02)


def test_two_real_processes_hold_what_was_planned(ranks):
    real = ranks.call(2, held, REAL)
    (planned,) = ranks.call(1, plans, "debug", 2, REAL, join=False)
    for number, of_ranks in enumerate(planned):
        assert of_ranks == {rank: real[rank][number] for rank in range(2)}, REAL[number]


def test_what_is_printed(ranks, tmp_path):
    """By torchrun's number of processes; without data, weights of VGG16, or anything written."""
    arguments = "debug", "--dry-run", "data.train=null", "loss.perceptual.weight=1", "codebook_parallel=2"
    world = {"WORLD_SIZE": "8", "TORCH_HOME": str(tmp_path / "torch")}
    first, second = (
        ranks.start(1, *arguments, cwd=tmp_path, environment={**world, "RANK": rank}).wait() for rank in ("0", "1")
    )
    assert (first.status, first.err) == (0, "")
    lines = [" ".join(line.split()) for line in first.out.splitlines()]
    for line in (
        "codebook_size: 256",
        "processes 8 (the launcher decides which of them share a machine)",
        "batch 8 images per step = 8 processes x 1 micro-batch x 1 images",
        "codebook 2 shards x 4 replicas",
        "shards ranks 0-1 ... 6-7",
        "replicas ranks 0-6 by 2 and 1-7 by 2",
        "LPIPS, frozen 58.86 MB 0 0 0 58.86 MB",
    ):
        assert line in lines, first.out
    assert (second.status, second.out, second.err) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--processes", 63], "trainer.global_batch_size=256 must be a multiple of the 63 processes"),
        (["--processes", 64, "codebook_parallel=7"], "codebook_parallel=7 must divide the number of processes, 64"),
        (["--processes", 64, "engine.kind=fsdp2", "engine.shard_over=7"], "engine.shard_over=7 must divide"),
    ],
)
def test_mistakes_are_one_line(ranks, tmp_path, changes, said):
    ended = ranks.ibq("train", "ibq_262144", "--dry-run", *changes, cwd=tmp_path)
    assert_refused(ended, f"ibq: error: {said}")
    assert ended.out == ""
    assert list(tmp_path.iterdir()) == []
