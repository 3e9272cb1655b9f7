"""Training on pictures of many shapes: losses of each bucket, ranks, resuming, evaluation, and what is refused."""

import json

import pytest
import skimage.data
from comparing import assert_refused, differences, loss_lines, read_metrics, unchanged
from PIL import Image
from ranks import settings
from samples import picture

SHAPES = [(48, 48), (72, 40), (40, 72), (64, 48), (96, 96)]  # width, height
CHANGES = {"data.buckets": "[32x32,24x40,40x24,64x64]", "data.crop": "center", "data.workers": 0}
SIZES = {"32x32", "24x40", "40x24", "64x64"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 40 pictures of five shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(40):
        picture(number, SHAPES[number % len(SHAPES)]).save(folder / f"{number:02d}.png")
    return folder


def changes_on(pictures, **more):
    every = {"trainer.checkpoint_every_steps": 6, "trainer.validation_images": 40}
    return {**CHANGES, "data.train": pictures, "data.val": pictures, **every, **more}


@pytest.fixture(scope="module")
def trained_run(pictures, ranks, tmp_path_factory):
    """12 steps on one rank."""
    run = tmp_path_factory.mktemp("runs") / "run"
    ranks.train(1, "debug", run, changes_on(pictures, **{"trainer.max_steps": 12})).succeeded()
    return run


def test_losses_and_psnr_are_logged_by_bucket(trained_run):
    lines = read_metrics(trained_run)
    prefix = "loss/reconstruction/"
    of_bucket = {name.removeprefix(prefix) for line in lines for name in line if name.startswith(prefix)}
    assert of_bucket == SIZES
    for line in loss_lines(trained_run):
        (name,) = [name for name in line if name.startswith(prefix)]
        assert line[name] == line["loss/reconstruction"]
    validated = [line for line in lines if "val/psnr" in line][-1]
    assert {name.removeprefix("val/psnr/") for name in validated if name.startswith("val/psnr/")} == SIZES


def test_validation_on_squares_is_of_no_bucket(pictures, ranks, tmp_path):
    changes = changes_on(pictures, **{"trainer.max_steps": 1, "data.val_image_size": 40})
    ranks.train(1, "debug", tmp_path / "run", changes).succeeded()
    (validated,) = [line for line in read_metrics(tmp_path / "run") if "val/psnr" in line]
    assert not any(name.startswith("val/psnr/") for name in validated)


def test_two_ranks_train_as_one(trained_run, pictures, ranks, tmp_path):
    """The 64 x 64 bucket has 2 images in a step, one for each rank."""
    ranks.train(2, "debug", tmp_path / "two", changes_on(pictures, **{"trainer.max_steps": 12})).succeeded()
    for one, two in zip(loss_lines(trained_run), loss_lines(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        assert two["loss/total"] == pytest.approx(one["loss/total"], rel=1e-4)


def test_micro_batches_train_as_whole_batches(trained_run, pictures, ranks, tmp_path):
    changes = changes_on(pictures, **{"trainer.max_steps": 12, "trainer.micro_batch_size": 4})
    ranks.train(1, "debug", tmp_path / "run", changes).succeeded()
    for one, split in zip(loss_lines(trained_run), loss_lines(tmp_path / "run"), strict=True):
        assert split["loss/total"] == pytest.approx(one["loss/total"], rel=1e-4)


def test_resumed_equals_unbroken(trained_run, pictures, ranks, tmp_path):
    changes = changes_on(pictures, **{"trainer.max_steps": 6})
    ranks.train(1, "debug", tmp_path / "run", changes).succeeded()
    ranks.resume(1, tmp_path / "run", "trainer.max_steps=12").succeeded()
    checkpoints = [run / "checkpoints/step_00000012" for run in (trained_run, tmp_path / "run")]
    assert all(one.whole == 0 for one in differences(*checkpoints).values())


def test_evaluation_uses_the_buckets_of_the_run(trained_run, ibq_here, tmp_path):
    report = tmp_path / "report.json"
    ibq_here("evaluate", "reconstruction", trained_run, "--metrics", "psnr", "--report", report).succeeded()
    measured = json.loads(report.read_text())
    assert set(measured["manifest"]["image_size"].split(",")) == SIZES
    expected = [line for line in read_metrics(trained_run) if "val/psnr" in line][-1]["val/psnr"]
    # Evaluation truncates pixels to 8 bits, as published; validation does not.
    assert measured["psnr"] == pytest.approx(expected, abs=0.03)


def test_reconstructions_of_a_given_size(trained_run, pictures, ibq_here, tmp_path):
    ibq_here("reconstruct", trained_run, "--images", pictures, "--out", tmp_path / "out", "--size", "24x40").succeeded()
    pair = Image.open(next((tmp_path / "out").glob("00000_*.png")))  # both at the same whole multiple, with a margin
    assert pair.width > 3 * pair.height * 0.8


ASPECTS = [(1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16)]  # width, height


def cut_to(width: int, height: int, photograph: Image.Image) -> Image.Image:
    """The largest part of this shape from the middle, with a longer side of 128."""
    scale = min(photograph.width / width, photograph.height / height)
    left, top = (photograph.width - scale * width) / 2, (photograph.height - scale * height) / 2
    size = round(128 * width / max(width, height)), round(128 * height / max(width, height))
    return photograph.resize(size, box=(left, top, left + scale * width, top + scale * height))


@pytest.mark.full
def test_the_loss_of_photographs_falls_in_every_bucket(ranks, tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("coffee", "rocket", "moon", "astronaut", "chelsea"):
        photograph = Image.fromarray(getattr(skimage.data, name)())
        for number, (width, height) in enumerate(ASPECTS):
            cut_to(width, height, photograph.convert("RGB")).save(tmp_path / f"pictures/{name}_{number}.png")
    changes = {"data.pixels": "[32]", "data.train": tmp_path / "pictures", "data.val": tmp_path / "pictures"}
    changes |= {"data.val_image_size": "null", "trainer.max_steps": 120, "trainer.log_every_steps": 1}
    ranks.train(1, "quickstart", tmp_path / "run", changes).succeeded()
    lines = loss_lines(tmp_path / "run")
    for bucket in ("24x44", "28x36", "32x32", "36x28", "44x24"):
        losses = [line[name] for line in lines if (name := f"loss/reconstruction/{bucket}") in line]
        assert len(losses) >= 8, bucket
        assert sum(losses[-4:]) < 0.75 * sum(losses[:4]), bucket


REFUSED = {
    "bucket no multiple of the patch": (["data.buckets=[30x32]"], ["bucket 30x32 must be a multiple of 4"]),
    "two sizes, one no multiple": (["data.buckets=[32x32,32x46]"], ["bucket 32x46 must be a multiple of 4"]),
    "buckets that no picture covers": (["data.buckets=[512x512]"], ["none of its 40 pictures covers any bucket"]),
    "bucket of which no picture is nearest": (["data.buckets=[32x32,16x96]"], ["no picture belongs to 16x96"]),
    "no size": (["data.buckets=[large]"], ["'large' must be HEIGHTxWIDTH"]),
    "both ways": (["data.buckets=[32x32]", "data.pixels=[32]"], ["both given: leave one out"]),
    "a batch that does not divide": (
        ["data.buckets=[32x32,64x64]", "trainer.micro_batch_size=2"],
        ["bucket 64x64 has 2 images a step, which 1 processes x 4 micro-batches do not divide"],
    ),
    "less than no enlargement": (["data.max_enlargement=0.5"], ["data.max_enlargement=0.5 must be at least 1"]),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_impossible_buckets_are_refused(ibq_here, pictures, tmp_path, mistake):
    changes, said = REFUSED[mistake]
    arguments = settings({"data.train": pictures, "run": tmp_path / "run"})
    with unchanged(tmp_path):
        assert_refused(ibq_here("train", "debug", *arguments, *changes), *said)


def test_the_dry_run_refuses_batches_that_do_not_divide(ibq_here):
    said = "bucket 64x64 has 2 images a step, which 4 processes x 1 micro-batches do not divide"
    changes = ["data.buckets=[32x32,64x64]", "data.train=nowhere"]
    assert_refused(ibq_here("train", "debug", *changes, "--dry-run", "--processes", "4"), said)


def test_buckets_whose_grid_a_generator_does_not_know_are_refused(ibq_here, trained_run, pictures, tmp_path):
    changes = {"data.content": "images", "tokenizer.source": trained_run, "data.pixels": "[32]", "data.train": pictures}
    ended = ibq_here("train", "ar_debug", f"run={tmp_path / 'run'}", *settings(changes))
    assert_refused(ended, "the buckets give grids of 7x9, 9x7, 6x11, 11x6 codes", "set model.grids=[8x8,7x9,")
