"""Five steps on any number of processes, by any engine, with or without accumulation, are one process's five steps."""

import itertools

import pytest

STEPS = 5
CHECKPOINT = f"checkpoints/step_{STEPS:08d}"
TOLERANCE = 1e-5  # of all weights of a file together
# Biases start at 0 and are still tiny after five steps, so that rounding is a larger part of them.
TENSOR_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-4

OTHERS = [
    *("one, accumulating", "replicated", "zero0", "zero0, accumulating"),
    *("zero1", "zero1, one process", "zero2", "zero2, accumulating"),
    *("shards", "shards, replicas, accumulating", "zero2, shards"),
]
# (expected, actual): other recipes than the first one's.
PAIRS = [
    ("vq", "vq, shards"),
    ("clipped", "clipped, shards"),
    ("clipped", "clipped, zero0, shards"),
    ("clipped", "clipped, zero2, shards"),
]


@pytest.fixture(scope="module", autouse=True)
def all_started(runs):
    runs.start("one", "start", "adaptive", "zero2, adaptive", *OTHERS, *itertools.chain(*PAIRS))


@pytest.mark.parametrize("name", OTHERS)
def test_weights_equal_those_of_one_process(runs, differences, name):
    for file, difference in differences(runs["one"] / CHECKPOINT, runs[name] / CHECKPOINT).items():
        assert difference.whole < TOLERANCE, file
        assert difference.worst < TENSOR_TOLERANCE, file


@pytest.mark.parametrize("pair", PAIRS, ids=" = ".join)
def test_sharded_codebooks_equal_whole_ones_also_with_vq_and_clipping(runs, differences, read_metrics, pair):
    expected, actual = (runs[name] for name in pair)
    for file, difference in differences(expected / CHECKPOINT, actual / CHECKPOINT).items():
        assert difference.whole < TOLERANCE, file
    lines = [[line for line in read_metrics(run) if "loss/total" in line] for run in (expected, actual)]
    of_validation = [[line for line in read_metrics(run) if "val/psnr" in line] for run in (expected, actual)]
    assert of_validation[0] and all("val/usage" in line for line in of_validation[0])
    for line, true_line in zip(*of_validation, strict=True):
        assert line == pytest.approx(true_line, rel=LOSS_TOLERANCE)
    norms = [[line["grad_norm/generator"] for line in of_run] for of_run in lines]
    assert norms[1] == pytest.approx(norms[0], rel=LOSS_TOLERANCE)
    if "clipped" in pair:
        assert min(norms[0]) > 0.05  # so that every step was clipped


def test_the_adaptive_weight_is_that_of_all_processes(runs, differences, read_metrics):
    for difference in differences(runs["adaptive"] / CHECKPOINT, runs["zero2, adaptive"] / CHECKPOINT).values():
        assert difference.whole < TOLERANCE
    one, two = (
        [line["weight/generator"] for line in read_metrics(runs[name]) if "weight/generator" in line]
        for name in ("adaptive", "zero2, adaptive")
    )
    assert two == pytest.approx(one, rel=LOSS_TOLERANCE)
    assert all(weight != pytest.approx(0.1) for weight in one)  # the fixed weight


@pytest.mark.parametrize("name", OTHERS)
def test_scalars_equal_those_of_one_process(runs, read_metrics, name):
    expected, actual = (
        [line for line in read_metrics(run) if line["step"] <= STEPS and "loss/total" in line]
        for run in (runs["one"], runs[name])
    )
    assert [line["step"] for line in actual] == list(range(1, STEPS + 1))
    for line, true_line in zip(actual, expected, strict=True):
        assert line == pytest.approx(true_line, rel=LOSS_TOLERANCE, abs=1e-6)


@pytest.mark.parametrize("file", ["tokenizer", "tokenizer_ema", "discriminator"])
def test_training_moves_the_weights_by_far_more_than_the_tolerance(runs, differences, file):
    moved = differences(runs["start"] / "checkpoints/step_00000001", runs["one"] / CHECKPOINT)
    assert moved[file].whole > 1e-3 > 10 * TOLERANCE


def test_one_step_more_is_told_apart(runs, differences):
    """Equality above would be worth nothing if the comparison passed for runs that differ in a single step."""
    moved = differences(runs["zero1"] / CHECKPOINT, runs["zero1"] / "checkpoints/step_00000008")
    assert all(difference.whole > 10 * TOLERANCE for difference in moved.values())


def test_every_process_holds_its_own_part_of_the_optimizer(runs):
    for name in ("zero1", "zero2"):
        parts = sorted((runs[name] / CHECKPOINT / "generator/deepspeed").glob("*_optim_states.pt"))
        assert len(parts) == 2


def test_every_process_writes_its_own_codes(runs):
    for name in ("shards", "zero2, shards"):
        for folder, kinds in ((CHECKPOINT, ("tokenizer", "tokenizer_ema")), (f"{CHECKPOINT}/codebook", ("optimizer",))):
            for kind in kinds:
                files = sorted(path.name for path in (runs[name] / folder).glob(f"{kind}.codebook_*"))
                assert files == [
                    f"{kind}.codebook_000000000_000000128.safetensors",
                    f"{kind}.codebook_000000128_000000256.safetensors",
                ]


def test_accumulation_and_processes_are_really_there(runs):
    """The runs compared above are not by mistake one and the same."""
    said = {name: runs.started[name].result().err for name in OTHERS}
    assert "2 x cpu (replicated" in said["replicated"]
    assert "2 x cpu (deepspeed zero0" in said["zero0"]
    assert "2 x cpu (deepspeed zero1" in said["zero1"]
    assert "1 x cpu (deepspeed zero1" in said["zero1, one process"]
    assert "2 x 1 x 4 images a step" in said["zero2"]
    assert "2 x 2 x 2 images a step" in said["zero2, accumulating"]
    assert "1 x 4 x 2 images a step" in said["one, accumulating"]
    assert "4 x cpu (replicated, fp32, codebook over 2), 4 x 2 x 1 images" in said["shards, replicas, accumulating"]
    assert "2 x cpu (deepspeed zero2, fp32, codebook over 2)" in said["zero2, shards"]
