"""Recipes of evaluations, and the published figures that a measurement is set beside."""

import math
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer import TrainerError
from trainer.recipes import EVALUATION, explain, find_recipe, read_recipe

if TYPE_CHECKING:
    from trainer.evaluation.reconstruction import ReconstructionReport
    from trainer.evaluation.run import EvaluatedRun

YARDSTICK = "eval_imagenet"  # whose published figures stand beside those of an evaluation without a recipe


@dataclass
class EvaluationRecipe:
    """The conditions of published figures, to be measured under again.

    dataset: in words. published: name of the rows in model_zoo/published.yaml. expected_images: of the published set.
    size: pixels of the crop, or ``original``. resize, metrics: as of the command's options.
    """

    dataset: str = MISSING
    published: str | None = None
    expected_images: int | None = None
    size: Any = 256
    resize: str = "cv2_bilinear"
    metrics: str = "all"


class Measure(NamedTuple):
    """How a figure is called and written, measured and published."""

    title: str
    measured: str = ".2f"
    published: str = ".2f"


# Key of report.json and of published.yaml.
MEASURES = {
    "rfid": Measure("rFID"),
    "lpips_vgg": Measure("LPIPS (VGG)", ".4f", ".4f"),
    "lpips_alex": Measure("LPIPS (AlexNet)", ".4f", ".4f"),
    "psnr": Measure("PSNR (dB)"),
    "ssim": Measure("SSIM", ".4f"),
    "usage": Measure("codebook usage", ".1%", ".3g%"),
    "usage_65536": Measure("usage in 65,536 tokens", ".1%", ".3g%"),
    "perplexity": Measure("perplexity", ",.1f"),
    "l1": Measure("L1 on [-1, 1]", ".4f"),
}


def load_evaluation_recipe(name: str) -> EvaluationRecipe:
    """The recipe of that name, or in that YAML file. Raises TrainerError, one line."""
    path, schema = find_recipe(name, [EVALUATION]), OmegaConf.structured(EvaluationRecipe)
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema, read_recipe(path)))
    except OmegaConfBaseException as error:
        raise TrainerError(f"{path}: {explain(error, schema)}") from error


def published_rows(name: str | None) -> list[dict]:
    """Models and their published figures, by the name of a protocol in model_zoo/published.yaml; none for None."""
    if name is None:
        return []
    tables = yaml.safe_load((resources.files("model_zoo") / "published.yaml").read_text(encoding="utf-8"))
    if name not in tables:
        raise TrainerError(f"published: {name} is unknown: choose one of {', '.join(tables)}")
    return tables[name]


def format_measured(measure: str, value: float | None) -> str:
    """A figure of report.json; ``-`` where there is none. Its null for an infinite PSNR is not meant here."""
    return "-" if value is None else format(value, MEASURES[measure].measured)


def comparison(report: dict, rows: list[dict]) -> list[list[str]]:
    """A table in words: headings, what was measured, and the published rows; of the measures that any of these has.

    report: figures by key of MEASURES.
    """
    shown = [key for key in MEASURES if any(key in row for row in rows)]
    table = [["model", *(MEASURES[key].title for key in shown)]]
    table.append(["measured here", *(format_measured(key, report.get(key)) for key in shown)])
    return table + [[row["model"], *(_published(key, row.get(key)) for key in shown)] for row in rows]


def _published(measure: str, value: float | None) -> str:
    if value is None:
        return "-"
    style = MEASURES[measure].published
    return f"{100 * value:{style[:-1]}}%" if style.endswith("%") else format(value, style)


def differences(recipe: EvaluationRecipe, manifest: dict, image_count: int) -> list[str]:
    """What a measurement was not made under as the published figures were, in words."""
    found = []
    if manifest["recipe"] is None:
        found.append(f"pictures: {manifest['images']}, published: {recipe.dataset}")
    if recipe.expected_images not in (None, image_count):
        found.append(f"number of pictures: {image_count:,}, published: {recipe.expected_images:,}")
    for key, name in (("image_size", "size"), ("resize", "resize")):
        if manifest[key] != getattr(recipe, name) and not (key == "resize" and manifest["image_size"] == "original"):
            found.append(f"{name}: {manifest[key]}, published: {getattr(recipe, name)}")
    if manifest["weights"] != "ema":
        found.append(f"weights: {manifest['weights']}, published: ema")
    return found


def markdown_table(table: list[list[str]]) -> str:
    """Rows of text, the first of them headings; all but the first column to the right."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|---|" + "---:|" * (len(table[0]) - 1))
    return "\n".join(lines)


def figure_rows(report: "ReconstructionReport") -> list[list[str]]:
    """What was measured beside the baselines, in words: headings first."""
    decibels = report.psnr, report.baseline_palette_psnr, report.baseline_mean_color_psnr
    rows = [["", "tokenizer", "palette", "mean colour"]]
    for key, measure in MEASURES.items():
        if key == "psnr":
            rows.append([measure.title, *("exact" if math.isinf(value) else f"{value:.2f}" for value in decibels)])
        elif (value := getattr(report, key)) is not None:
            rows.append([measure.title, format_measured(key, value), "", ""])
    return rows


def markdown(evaluated: "EvaluatedRun") -> str:
    """The report as Markdown: figures beside the baselines, beside published ones, and what was measured how."""
    report, manifest = evaluated.report, evaluated.manifest
    parts = [
        f"# Reconstruction of {report.image_count:,} pictures, {crop_of(manifest)}",
        markdown_table(figure_rows(report)),
    ]
    notes = [f"Warning: {warning}." for warning in evaluated.warnings]
    notes += [f"{MEASURES[key].title} was not measured: {reason}." for key, reason in report.not_measured.items()]
    if report.infinite_psnr_count:
        notes.append(f"{report.infinite_psnr_count} pictures came back exact and left out of PSNR.")
    if report.skipped:
        notes.append(f"{len(report.skipped)} pictures were left out, the first: {report.skipped[0]}.")
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    if len(evaluated.comparison) > 2:
        parts += ["## Beside published figures", markdown_table(evaluated.comparison)]
        unlike = [f"- {difference}" for difference in evaluated.differences]
        parts.append("\n".join(["Measured otherwise than published:", "", *unlike]) if unlike else "Same conditions.")
    facts = {
        "protocol": f"{report.protocol} (means over pictures)",
        "tokenizer": f"{manifest['checkpoint_path']}, {manifest['weights']} weights, {manifest['fingerprint']}",
        "pictures": f"{manifest['images']}, list {manifest['image_list'][:16]}",
        "tokens": f"{report.token_count:,} of {report.codebook_size:,} codes",
        "machine": f"{manifest['environment']['device']}, {manifest['processes']} processes",
        "seconds": seconds_line(manifest["seconds"]),
    }
    parts += ["## How", "\n".join(f"- {name}: {fact}" for name, fact in facts.items())]
    for name, path in evaluated.pictures.items():
        parts.append(f"![{name}]({path.name})")
    return "\n\n".join(parts) + "\n"


def crop_of(manifest: dict) -> str:
    """Size and resize of an evaluation in words."""
    size = manifest["image_size"]
    return "original size" if size == "original" else f"{size} x {size} ({manifest['resize']})"


def seconds_line(seconds: dict[str, float]) -> str:
    """Where the time went, the largest part first."""
    parts = sorted(((name, value) for name, value in seconds.items() if name != "total"), key=lambda part: -part[1])
    return f"{seconds['total']:.1f} in all: " + ", ".join(f"{name} {value:.1f}" for name, value in parts)
