"""The results of a reconstruction evaluation, and the files that hold them."""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from data.unfinished import unfinished
from trainer import TrainerError
from trainer.files import ReportFiles, has_keys, json_text, write_files, writing
from trainer.reports.image_grid import Example, side_by_side
from trainer.reports.measures import MEASURES, describe_crop, describe_seconds, markdown_table, plain_markdown


class ImageScore(NamedTuple):
    """lpips_vgg, lpips_alex: None if not measured."""

    key: str
    psnr: float
    ssim: float
    l1: float
    palette_psnr: float
    lpips_vgg: float | None = None
    lpips_alex: float | None = None


@dataclass(frozen=True)
class ReconstructionReport:
    """Means over images, never over batches. PSNR is in dB; its mean is over images where it is finite.

    l1: mean |x - y| of images in [-1, 1]. usage: distinct codes over the whole set / codebook size; usage_65536: the
    same per window of 65,536 consecutive tokens, mean over the complete windows, None without one. perplexity: of the
    codes.
    group_usage, group_usage_65536, group_perplexity: the same of the values of groups of bits, of which there are
    counted_codes, for a codebook that is too large to count. Either these or the first three are None. rfid, lpips_vgg,
    lpips_alex: None if not_measured gives a reason.
    """

    psnr: float
    ssim: float
    l1: float
    usage: float | None
    perplexity: float | None
    group_usage: float | None
    group_perplexity: float | None
    baseline_mean_color_psnr: float
    baseline_palette_psnr: float
    rfid: float | None
    lpips_vgg: float | None
    lpips_alex: float | None
    usage_65536: float | None
    group_usage_65536: float | None
    image_count: int
    token_count: int
    infinite_psnr_count: int  # images reconstructed exactly; left out of psnr
    baseline_mean_color_infinite_count: int
    baseline_palette_infinite_count: int
    codebook_size: int
    counted_codes: int
    downsampling_factor: int
    protocol: str
    not_measured: dict[str, str]  # measure -> reason
    skipped: list[str]  # images left out, each with the reason
    images: list[ImageScore] = field(repr=False)
    examples: dict[str, list[Example]] = field(repr=False)  # by key of `trainer.reports.image_grid.ORDERS`

    def to_json(self) -> dict:
        """The content of report.json: without the example images, and null for infinity, which JSON does not have."""
        plain = {name: value for name, value in vars(self).items() if name != "examples"}
        plain["images"] = [{k: _null_if_infinite(v) for k, v in score._asdict().items()} for score in self.images]
        return {name: _null_if_infinite(value) for name, value in plain.items()}


def _null_if_infinite(value):
    return None if isinstance(value, float) and math.isinf(value) else value


class EvaluatedRun(NamedTuple):
    """What was measured and written. provenance: what report.json stores as ``manifest``. comparison: rows of text, the
    first one headings. differences: from the conditions of the published results in it. grids: image files by key of
    `trainer.reports.image_grid.ORDERS`."""

    report: ReconstructionReport
    provenance: dict
    warnings: list[str]
    comparison: list[list[str]]
    differences: list[str]
    json_path: Path
    markdown_path: Path
    grids: dict[str, Path]


MARK = "# Reconstruction of "  # of FILE.md


def report_files(json_path: Path, grids: Collection[Path]) -> ReportFiles:
    """The files of a report of reconstruction."""
    return ReportFiles(json_path, has_keys("psnr", "manifest"), json_path.with_suffix(".md"), MARK, grids)


def check_report(files: ReportFiles) -> None:
    """Creates the report's folder and checks that the report can be written there. Raises TrainerError."""
    json_path = files.json
    if json_path.suffix != ".json" or json_path.is_dir():
        raise TrainerError(f"--report {json_path}: name a file that ends in .json")
    with writing(json_path, "--report"):
        json_path.parent.mkdir(parents=True, exist_ok=True)
        trial = unfinished(json_path)
        trial.touch()
        trial.unlink()
    files.check("--report")


def write_evaluated_run(evaluated: EvaluatedRun) -> None:
    """Writes the image grids, FILE.md and, last, FILE.json."""
    report = evaluated.report
    # "manifest" is the key that former versions wrote and that users' scripts read.
    content = {**report.to_json(), "warnings": evaluated.warnings, "manifest": evaluated.provenance}
    grids = {name: side_by_side(examples) for name, examples in report.examples.items()}
    contents = {evaluated.grids[name]: lambda path, grid=grid: grid.save(path, "PNG") for name, grid in grids.items()}
    contents[evaluated.markdown_path] = to_markdown(evaluated)
    contents[evaluated.json_path] = json_text(content)
    write_files(contents, "--report")


def figure_rows(report: ReconstructionReport) -> list[list[str]]:
    """Measured values next to the baselines; the first row is the heading."""
    decibels = report.psnr, report.baseline_palette_psnr, report.baseline_mean_color_psnr
    rows = [["", "tokenizer", "palette", "mean colour"]]
    for key, measure in MEASURES.items():
        if key == "psnr":
            rows.append([measure.title, *("exact" if math.isinf(value) else f"{value:.2f}" for value in decibels)])
        elif (value := getattr(report, key)) is not None:
            rows.append([measure.title, measure.format_measured(value), "", ""])
    return rows


def to_markdown(evaluated: EvaluatedRun) -> str:
    """The report: measured values, baselines, published results, and how it was measured."""
    report, provenance = evaluated.report, evaluated.provenance
    parts = [
        f"{MARK}{report.image_count:,} images, {describe_crop(provenance)}",
        markdown_table(figure_rows(report)),
    ]
    notes = [f"Warning: {warning}." for warning in evaluated.warnings]
    notes += [f"{MEASURES[key].title} was not measured: {reason}." for key, reason in report.not_measured.items()]
    if report.infinite_psnr_count:
        notes.append(f"{report.infinite_psnr_count} images were reconstructed exactly and left out of PSNR.")
    if report.skipped:
        notes.append(f"{len(report.skipped)} images were skipped, the first: {report.skipped[0]}.")
    parts += ["\n".join(f"- {plain_markdown(note)}" for note in notes)] if notes else []
    if len(evaluated.comparison) > 2:
        parts += ["## Published results", markdown_table(evaluated.comparison)]
        listed = [f"- {plain_markdown(difference)}" for difference in evaluated.differences]
        parts.append("\n".join(["Different conditions:", "", *listed]) if listed else "Same conditions.")
    facts = {
        "protocol": f"{report.protocol} (means over images)",
        "tokenizer": f"{provenance['checkpoint_path']}, {provenance['weights']} weights, {provenance['fingerprint']}",
        "images": f"{provenance['images']}, list {provenance['image_list'][:16]}",
        "tokens": f"{report.token_count:,} of {report.codebook_size:,} codes",
        "machine": f"{provenance['environment']['device']}, {provenance['processes']} processes",
        "seconds": describe_seconds(provenance["seconds"]),
    }
    parts += ["## Provenance", "\n".join(f"- {name}: {plain_markdown(fact)}" for name, fact in facts.items())]
    parts += [f"![{name}]({quote(path.name)})" for name, path in evaluated.grids.items()]
    return "\n\n".join(parts) + "\n"
