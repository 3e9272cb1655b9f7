import re

import pytest
import yaml
from comparing import refusal

from trainer import TrainerError
from trainer.evaluation.reference_results import (
    EvaluationRecipe,
    comparison_table,
    differences,
    load_evaluation_recipe,
    reference_rows,
)
from trainer.recipes import EVALUATION, load_recipe, recipe_paths
from trainer.reports.measures import MEASURES, describe_seconds, markdown_table

RECIPES = recipe_paths([EVALUATION])


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_reads_and_names_rows_and_measures_that_are_there(name):
    recipe = load_evaluation_recipe(name)
    assert recipe.expected_images in (5000, 50000)
    for row in reference_rows(recipe.published):
        assert set(row) - {"model"} <= MEASURES.keys()
    story = RECIPES[name].read_text().split("\n\n")[0]
    assert f"--recipe {name} --images" in story and "# Data: " in story and "# Expected score" in story


@pytest.mark.parametrize("name", RECIPES)
def test_training_by_it_is_refused_in_one_line(name):
    assert re.search(f"{name} trains nothing: .* --recipe {name}", refusal(TrainerError, load_recipe, name, []))


@pytest.mark.parametrize(
    "text, message",
    [
        ("dataset: mine\nsizes: 64\n", "unknown key sizes; did you mean size or resize?"),
        ("size: 64\n", "dataset must be given"),
        ("dataset: mine\nexpected_images: many\n", "expected_images"),
        ("- a list\n", "must map keys to values"),
    ],
)
def test_mistakes_in_a_file_are_named_in_one_line(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    assert message in refusal(TrainerError, load_evaluation_recipe, str(tmp_path / "mine.yaml"))


def test_rows_of_an_unknown_name_are_refused():
    with pytest.raises(TrainerError, match="published: imagenet_val is unknown: choose one of imagenet, "):
        reference_rows("imagenet_val")


def test_a_comparison_writes_figures_as_they_were_published():
    rows = [{"model": "A", "rfid": 1.0, "usage": 0.053}, {"model": "B", "rfid": 2.24, "lpips_vgg": 0.258}]
    table = comparison_table({"rfid": 3.14159, "lpips_vgg": None, "usage": 0.5, "psnr": 20.0}, rows)
    assert table == [
        ["model", "rFID", "LPIPS (VGG)", "codebook usage"],
        ["measured here", "3.14", "-", "50.0%"],
        ["A", "1.00", "-", "5.3%"],
        ["B", "2.24", "0.2580", "-"],
    ]
    assert markdown_table(table[:2]) == (
        "| model | rFID | LPIPS (VGG) | codebook usage |\n|---|---:|---:|---:|\n| measured here | 3.14 | - | 50.0% |"
    )


def test_differences_name_every_condition():
    recipe = EvaluationRecipe(dataset="ImageNet val", expected_images=50000)
    same = {"recipe": "mine", "images": "val", "image_size": 256, "resize": "cv2_bilinear", "weights": "ema"}
    assert differences(recipe, same, 50000) == []
    other = {**same, "recipe": None, "image_size": 64, "resize": "pil_antialias", "weights": "raw"}
    assert [line.split(":")[0] for line in differences(recipe, other, 10)] == [
        "images", "number of images", "size", "resize", "weights"
    ]  # fmt: skip
    original = {**same, "image_size": "original", "resize": "pil_antialias"}
    assert differences(recipe, original, 50000) == ["size: original, published: 256"]


def test_the_published_file_keeps_its_tables():
    tables = yaml.safe_load((RECIPES["eval_imagenet"].parents[2] / "published.yaml").read_text())
    assert {"imagenet", "coco_zero_shot", "imagenet_zero_shot", "imagenet_generation"} <= tables.keys()
    assert [row["rfid"] for row in tables["imagenet"]] == [2.24, 1.87, 1.37, 1.00, 3.98]


def test_seconds_are_listed_from_the_largest():
    assert describe_seconds({"decode": 1.0, "model": 5.25, "rest": 0.25, "total": 6.5}) == (
        "6.5 in total: model 5.2, decode 1.0, rest 0.2"
    )
