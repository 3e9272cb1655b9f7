"""Generators of several grids as whole runs: from images to tokens, training under engines, resuming, sampling."""

import json

import pytest
from comparing import assert_refused, copy_until, differences, loss_lines, read_metrics
from PIL import Image
from ranks import settings
from samples import picture

from model_zoo import load_generator
from trainer.jobs.tokenize import tokenize

SIZES = {"32x32": (40, 40), "24x40": (60, 40), "40x24": (40, 60)}  # bucket -> width, height of its pictures
GRIDS = {"8x8", "6x10", "10x6"}
PICTURES = 24
STEPS = 6


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of pictures of three shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    shapes = list(SIZES.values())
    for number in range(PICTURES):
        picture(number, shapes[number % 3]).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def tokenizer(pictures, ranks, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "tokenizer"
    changes = {"data.buckets": f"[{','.join(SIZES)}]", "data.train": pictures, "trainer.max_steps": 2}
    ranks.train(1, "debug", run, changes).succeeded()
    return run


@pytest.fixture(scope="module")
def tokens(tokenizer, pictures, tmp_path_factory):
    """Token shards of all pictures, each at its own size."""
    out = tmp_path_factory.mktemp("tokens") / "tokens"
    tokenize(tokenizer, images=str(pictures), out=out, image_size=",".join(SIZES), views="flip", device="cpu")
    return out


@pytest.fixture(scope="module")
def recipe(tokenizer, tokens):
    return {
        **{"data.train": tokens, "data.val": tokens, "tokenizer.source": tokenizer, "model.grids": "[8x8,6x10,10x6]"},
        **{"trainer.max_steps": STEPS, "trainer.checkpoint_every_steps": STEPS // 2, "trainer.keep_last": 4},
        **{"trainer.validate_every_steps": STEPS, "trainer.validation_images": PICTURES, "loss.label_dropout": 1},
        **{"ema.decay": 0.9, "trainer.gradient_clip_norm": 0.2},
    }


RUNS = {
    "one": (1, {}),
    "two, head": (2, {"vocabulary_parallel": 2}),
    "fsdp2": (2, {"engine.kind": "fsdp2"}),
    "zero2": (2, {"engine.kind": "deepspeed", "engine.config": "zero2"}),
    "zero3": (2, {"engine.kind": "deepspeed", "engine.config": "zero3"}),
}


@pytest.fixture(scope="module")
def generators(trained, recipe):
    """`generators(name)`: the folder of one of RUNS."""
    return lambda name: trained("ar_debug", RUNS[name][0], {**recipe, **RUNS[name][1]})


def assert_equal(expected, actual, tolerance=1e-5):
    checkpoint = f"checkpoints/step_{STEPS:08d}"
    found = differences(expected / checkpoint, actual / checkpoint)
    assert {"generator", "generator_ema"} < found.keys()
    for model, difference in found.items():
        assert difference.whole <= (100 * tolerance if ".exp" in model else tolerance), model


def test_every_step_has_one_grid_and_validation_tells_all(generators):
    lines = read_metrics(generators("one"))
    of_steps = [name.rpartition("/")[2] for line in lines for name in line if name.startswith("loss/cross_entropy/")]
    assert len(of_steps) == STEPS and set(of_steps) == GRIDS
    validated = next(line for line in lines if "val/loss" in line)
    of_grids = {name.rpartition("/")[2]: value for name, value in validated.items() if name.startswith("val/loss/")}
    assert of_grids.keys() == GRIDS
    counts = {grid: 8 * rows * columns for grid in GRIDS for rows, columns in [map(int, grid.split("x"))]}
    mean = sum(of_grids[grid] * counts[grid] for grid in GRIDS) / sum(counts.values())
    assert validated["val/loss"] == pytest.approx(mean)


@pytest.mark.parametrize(
    "name", ["two, head", "fsdp2", *(pytest.param(name, marks=pytest.mark.full) for name in ("zero2", "zero3"))]
)
def test_every_engine_gives_what_one_process_gives(generators, name):
    assert_equal(generators("one"), generators(name))
    for one, other in zip(read_metrics(generators("one")), read_metrics(generators(name)), strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_resumed_equals_unbroken(generators, ranks, tmp_path):
    run = copy_until(generators("one"), STEPS // 2, tmp_path / "resumed")
    ranks.resume(1, run).succeeded()
    assert_equal(generators("one"), run, tolerance=0)
    assert loss_lines(run) == loss_lines(generators("one"))


def test_samples_of_a_size(generators, ibq_here, tmp_path):
    ibq_here("sample", generators("one"), "--count", "2", "--size", "24x40", "--out", tmp_path / "out").succeeded()
    assert {Image.open(path).size for path in (tmp_path / "out").glob("*.png")} == {(40, 24)}
    assert json.loads((tmp_path / "out/sample.json").read_text())["settings"]["size"] == "24x40"


def test_images_can_be_tokenized_during_training(tokenizer, pictures, recipe, generators, ranks, tmp_path):
    changes = {**recipe, "data.content": "images", "data.buckets": f"[{','.join(SIZES)}]", "trainer.max_steps": 3}
    changes |= {"data.train": pictures, "data.val": pictures, "data.crop": "center"}
    ranks.train(1, "ar_debug", tmp_path / "run", changes).succeeded()
    first = read_metrics(tmp_path / "run")[0]
    assert first["loss/cross_entropy"] == pytest.approx(read_metrics(generators("one"))[0]["loss/cross_entropy"])


def test_fine_tuning_from_a_square_generator(tokenizer, pictures, recipe, ibq_here, ranks, tmp_path):
    square = tmp_path / "square"
    ibq_here("tokenize", tokenizer, "--images", pictures, "--out", square, "--size", "32").succeeded()
    one_grid = {**recipe, "data.train": square, "data.val": square, "model.grids": "[]", "trainer.max_steps": 2}
    ranks.train(1, "ar_debug", tmp_path / "source", one_grid).succeeded()
    changes = {**recipe, "init_from.source": tmp_path / "source", "trainer.max_steps": 1, "optimizer.lr": 0}
    ranks.train(1, "ar_debug", tmp_path / "tuned", changes).succeeded()
    tuned, source = load_generator(tmp_path / "tuned"), load_generator(tmp_path / "source")
    states = tuned.state_dict(), source.state_dict()
    assert not states[0].pop("grid_emb.weight").any()
    assert all((states[0][name] == value).all() for name, value in states[1].items())


REFUSED = {
    "a grid that the generator does not know": (["model.grids=[8x8,6x10]"], ["10x6", "model.grids"]),
    "no grid of the tokens": (["model.grids=[]"], ["6x10", "model.grid"]),
    "grids without the default": (["model.grids=[6x10,10x6]"], ["model.grid=[8,8] is not among model.grids"]),
    "no grid": (["model.grids=[wide]"], ["'wide' must be ROWSxCOLUMNS"]),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_does_not_fit_is_refused(recipe, ibq_here, tmp_path, mistake):
    changes, said = REFUSED[mistake]
    given = {key: value for key, value in recipe.items() if not key.startswith("model.grids")}
    assert_refused(ibq_here("train", "ar_debug", *settings({**given, "run": tmp_path / "run"}), *changes), *said)


def test_a_size_that_the_generator_does_not_make_is_refused(generators, ibq_here, tmp_path):
    run = generators("one")
    ended = ibq_here("sample", run, "--count", "1", "--size", "48x48", "--out", tmp_path / "out")
    assert_refused(ended, "--size 48x48", "24x40")
    assert not (tmp_path / "out").exists()
