"""Evaluation recipes, and the published results that a measurement is compared with."""

from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml
from omegaconf import MISSING

from trainer import TrainerError
from trainer.recipes import EVALUATION, find_recipe, read_as
from trainer.reports.measures import MEASURES, Measure

DEFAULT_RECIPE = "eval_imagenet"  # without --recipe, results are compared with its published ones


@dataclass
class EvaluationRecipe:
    """The conditions of published results.

    dataset: its name. published: name of the rows in model_zoo/published.yaml. expected_images: size of the published
    set. size: pixels of the crop, or ``original``. resize, metrics: as the options of the command.
    """

    dataset: str = MISSING
    published: str | None = None
    expected_images: int | None = None
    size: Any = 256
    resize: str = "cv2_bilinear"
    metrics: str = "all"


def load_evaluation_recipe(name: str) -> EvaluationRecipe:
    """Reads the recipe of that name, or that YAML file. Raises TrainerError, one line."""
    return read_as(EvaluationRecipe, find_recipe(name, [EVALUATION]))


def reference_rows(name: str | None) -> list[dict]:
    """Models and their published results, by the name of a table in model_zoo/published.yaml; empty for None."""
    if name is None:
        return []
    tables = yaml.safe_load((resources.files("model_zoo") / "published.yaml").read_text(encoding="utf-8"))
    if name not in tables:
        raise TrainerError(f"published: {name} is unknown: choose one of {', '.join(tables)}")
    return tables[name]


def comparison_table(
    report: dict, references: list[dict], measures: dict[str, Measure] = MEASURES, name: str = "measured here"
) -> list[list[str]]:
    """Headings, the measured values, and the reference rows, for all measures that any reference row has.

    report: values by key of ``measures``. name: of the row of measured values.
    """
    shown = {key: measure for key, measure in measures.items() if any(key in row for row in references)}
    table = [["model", *(measure.title for measure in shown.values())]]
    table.append([name, *(measure.format_measured(report.get(key)) for key, measure in shown.items())])
    for row in references:
        table.append([row["model"], *(measure.format_published(row.get(key)) for key, measure in shown.items())])
    return table


def differences(recipe: EvaluationRecipe, provenance: dict, image_count: int) -> list[str]:
    """The conditions under which a measurement differs from the published ones."""
    found = []
    if provenance["recipe"] is None:
        found.append(f"images: {provenance['images']}, published: {recipe.dataset}")
    if recipe.expected_images not in (None, image_count):
        found.append(f"number of images: {image_count:,}, published: {recipe.expected_images:,}")
    for key, name in (("image_size", "size"), ("resize", "resize")):
        ignored = key == "resize" and provenance["image_size"] == "original"
        if provenance[key] != getattr(recipe, name) and not ignored:
            found.append(f"{name}: {provenance[key]}, published: {getattr(recipe, name)}")
    if provenance["weights"] != "ema":
        found.append(f"weights: {provenance['weights']}, published: ema")
    return found
