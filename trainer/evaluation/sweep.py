"""Judges a generator at several settings of its sampling, and goes on where a former job ended."""

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

from model_zoo import ModelError, Sampling
from trainer import TrainerError
from trainer.evaluation.generation import MEASURES, GenerationReport, check_generation, evaluate_generation, in_words
from trainer.evaluation.reference_results import markdown_table
from trainer.jobs.resumable import writing
from trainer.jobs.sample import NO_FOLDERS, sample

ACROSS = "guidance"  # what the chart runs over where it is swept
FILES = (*NO_FOLDERS, ".npz", ".png", ".json", ".md")  # names of no folders


class Judged(NamedTuple):
    """One setting's report; settings: of those that are swept."""

    settings: dict
    report: GenerationReport


class Sweep(NamedTuple):
    """judged: in the order asked; table: in words, headings first."""

    judged: list[Judged]
    table: list[list[str]]
    json_path: Path
    markdown_path: Path
    chart_path: Path


def sweep(
    run: str | Path,
    reference: str | Path,
    asked: list[str],
    *,
    count: int,
    out: str | Path,
    sampling: dict,
    scoring: dict,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Sweep | None:
    """Samples each setting into OUT/NAME_VALUE....npz and judges it; after each, OUT/sweep.json, sweep.md and sweep.png
    show all so far. All processes of torchrun call it; None on all but the first.

    asked: NAME=VALUE,VALUE ... with names of fields of `Sampling`; every combination is tried. sampling, scoring: more
    options of `trainer.jobs.sample.sample` and `evaluate_generation`. on_progress: as of the latter. Raises
    TrainerError or ModelError, one line.
    """
    grid, out = settings_grid(asked), Path(out)
    if out.is_file() or out.suffix.lower() in FILES:
        raise TrainerError(f"--out {out}: name a folder, not a file")
    check_generation(reference, count, **{name: value for name, value in scoring.items() if name != "cache"})
    judged: list[Judged] = []
    swept = None
    for number, settings in enumerate(grid, 1):
        where = f"{in_one(settings)} ({number} of {len(grid)})"
        file = out / f"{'_'.join(f'{name}_{value}' for name, value in settings.items())}.npz"
        sample(
            run,
            count=count,
            out=file,
            sampling=settings,
            on_progress=lambda done, total, per_second, where=where: on_progress(
                done, total, f"sampling {where}, {per_second:,.2f} images/s"
            ),
            **sampling,
        )
        evaluated = evaluate_generation(
            file,
            reference,
            on_progress=lambda done, total, what, where=where: on_progress(done, total, f"{what}, {where}"),
            **scoring,
        )
        if evaluated is not None:  # on the first process
            judged.append(Judged(settings, evaluated.report))
            swept = _write(judged, out)
    return swept


def settings_grid(asked: list[str]) -> list[dict]:
    """Every combination of ``NAME=VALUE,VALUE``, each checked. Raises TrainerError."""
    kinds = {field.name: type(field.default) for field in fields(Sampling)}
    values: dict[str, list] = {}
    for text in asked:
        name, equals, listed = text.partition("=")
        if name not in kinds or not equals:
            raise TrainerError(f"--sweep {text}: write NAME=VALUE,VALUE with a name of {', '.join(kinds)}")
        if name in values:
            raise TrainerError(f"--sweep {text}: {name} is swept already; list all its values at once")
        try:
            values[name] = [kinds[name](value) for value in listed.split(",")]
        except ValueError as error:
            raise TrainerError(f"--sweep {text}: {error}") from error
        if len(set(values[name])) < len(values[name]):
            raise TrainerError(f"--sweep {text}: a value is there twice")
    grid = [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
    for settings in grid:
        try:
            Sampling(**settings)
        except ModelError as error:
            raise TrainerError(f"--sweep: {error}") from error
    return grid


def in_one(settings: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _write(judged: list[Judged], out: Path) -> Sweep:
    names = list(judged[0].settings)
    table = [[*names, *(measure.title for measure in MEASURES.values())]]
    for settings, report in judged:
        table.append([*map(str, settings.values()), *(in_words(report, measure) for measure in MEASURES)])
    swept = Sweep(judged, table, out / "sweep.json", out / "sweep.md", out / "sweep.png")
    rows = [{"settings": settings, **asdict(report)} for settings, report in judged]
    warnings = dict.fromkeys(f"- Warning: {warning}." for one in judged for warning in one.report.warnings)
    title = f"# Sampling settings: {judged[0].report.sample_count:,} samples each"
    text = "\n\n".join([title, markdown_table(table), *["\n".join(warnings)] * bool(warnings), "![sweep](sweep.png)"])
    writers = {
        swept.chart_path: lambda path: draw(judged, path),
        swept.markdown_path: lambda path: path.write_text(text + "\n", encoding="utf-8"),
        swept.json_path: lambda path: path.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n"),
    }
    for path, write in writers.items():
        with writing(path):
            unfinished = path.with_name(f".unfinished_{path.name}")
            write(unfinished)
            unfinished.replace(path)
    return swept


def draw(judged: list[Judged], path: Path) -> None:
    """gFID and Inception score, or without them what was measured, over the guidance, or what else was swept first; a
    line for each combination of the rest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(judged[0].settings)
    across = ACROSS if ACROSS in names else names[0]
    lines: dict[str, list[Judged]] = {}
    for one in judged:
        rest = {name: value for name, value in one.settings.items() if name != across}
        lines.setdefault(in_one(rest), []).append(one)
    measured = [name for name in MEASURES if getattr(judged[0].report, name) is not None]
    shown = [name for name in measured if name in ("gfid", "inception_score")] or measured
    figure, axes = pyplot.subplots(1, len(shown), figsize=(5.2 * len(shown), 4), layout="constrained", squeeze=False)
    for axis, name in zip(axes.flat, shown, strict=True):
        for label, ones in lines.items():
            points = sorted((one.settings[across], getattr(one.report, name)) for one in ones)
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set_xlabel(across)
        better = "lower" if name == "gfid" else "higher"
        axis.set_title(f"{MEASURES[name].title} ({better} is better)", loc="left", fontsize=10, fontweight="bold")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.flat[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{judged[0].report.sample_count:,} samples for each setting", fontsize=11)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
