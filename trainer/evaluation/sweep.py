"""Evaluates a generator at several sampling settings; running it again continues where it stopped."""

import itertools
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from data.locks import folder_lock
from model_zoo.config import Sampling
from model_zoo.errors import ModelError
from trainer import TrainerError
from trainer.evaluation.generation import check_generation, evaluate_generation
from trainer.evaluation.generation_report import MEASURES, GenerationReport
from trainer.files import ReportFiles, has_keys, json_text, write_files
from trainer.jobs.sample import sample
from trainer.jobs.sample_output import NOT_FOLDERS
from trainer.jobs.setup import job_world, one_writer
from trainer.parallel import run_on_main
from trainer.reports.measures import markdown_table, plain_markdown

X_AXIS = "guidance"  # of the chart, if it is swept
MARK = "# Sampling settings: "  # of sweep.md
TABLE = "sweep.json"
FILES = (*NOT_FOLDERS, ".npz", ".png", ".json", ".md")  # suffixes of files


class EvaluatedSetting(NamedTuple):
    """settings: values of the swept fields."""

    settings: dict
    report: GenerationReport


class Sweep(NamedTuple):
    """evaluated: those of former sweeps in the folder, then those of the grid. table: rows of text, the first one
    headings."""

    evaluated: list[EvaluatedSetting]
    table: list[list[str]]
    json_path: Path
    markdown_path: Path
    chart_path: Path


def sweep(
    run: str | Path,
    reference: str | Path,
    options: list[str],
    *,
    count: int,
    out: str | Path,
    sampling: dict,
    scoring: dict,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Sweep | None:
    """Samples each setting into OUT/NAME_VALUE....npz and evaluates it; after each, OUT/sweep.json, sweep.md and
    sweep.png show the results so far, those of former sweeps into OUT included. All processes of torchrun call it;
    returns None on all ranks but 0.

    options: NAME=VALUE,VALUE ... with names of fields of `Sampling`; every combination is evaluated. sampling, scoring:
    further options of `trainer.jobs.sample.sample` and `evaluate_generation`. on_progress: as for the latter. Raises
    TrainerError or ModelError, one line.
    """
    grid, out = settings_grid(options), Path(out)
    if out.is_file() or out.suffix.lower() in FILES:
        raise TrainerError(f"--out {out}: name a folder, not a file")
    check_generation(reference, count, **{name: value for name, value in scoring.items() if name != "cache"})
    with ExitStack() as held:
        with job_world(scoring.get("device", "auto")) as world:
            run_on_main(world, _files(out).check)
            held.enter_context(one_writer(world, folder_lock(out), out))
        return _evaluate(run, reference, grid, count, out, sampling, scoring, on_progress)


def _files(out: Path) -> ReportFiles:
    """The files of a sweep beside those of its settings."""
    return ReportFiles(out / TABLE, _is_sweep, out / "sweep.md", MARK, [out / "sweep.png"])


def _is_sweep(content: object) -> bool:
    return isinstance(content, list) and all(map(has_keys("settings", "gfid"), content))


def _evaluate(
    run: str | Path,
    reference: str | Path,
    grid: list[dict],
    count: int,
    out: Path,
    sampling: dict,
    scoring: dict,
    on_progress: Callable[[int, int, str], None],
) -> Sweep | None:
    """`sweep` of the settings of a grid."""
    former = _read_former(out, grid, count, reference)
    evaluated = [one for one in former if one.settings not in grid]
    swept = None
    for number, settings in enumerate(grid, 1):
        where = f"{describe_settings(settings)} ({number} of {len(grid)})"
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
        result = evaluate_generation(
            file,
            reference,
            on_progress=lambda done, total, what, where=where: on_progress(done, total, f"{what}, {where}"),
            **scoring,
        )
        if result is not None:  # on rank 0
            evaluated.append(EvaluatedSetting(settings, result.report))
            _check_alike(evaluated, out)
            swept = _write(evaluated, out)
    return swept


def _read_former(out: Path, grid: list[dict], count: int, reference: str | Path) -> list[EvaluatedSetting]:
    """The results in OUT/sweep.json. Raises TrainerError, before anything is sampled, where those of the grid could not
    stand in one table with them."""
    path = out / TABLE
    try:
        rows = json.loads(path.read_bytes()) if path.exists() else []
        former = [EvaluatedSetting(row["settings"], GenerationReport.from_json(row)) for row in rows]
        before = [_asked(one) for one in former]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainerError(f"{path} is damaged or of another version: name another folder with --out") from error
    now = {"--sweep": ", ".join(grid[0]), "--count": count, "--reference": str(reference)}
    for one in before:
        _compare(one, now, out)
    return former


def _asked(one: EvaluatedSetting) -> dict:
    """The options that are known before sampling and must be equal in a table."""
    reference = one.report.provenance["reference"]["path"]
    return {"--sweep": ", ".join(one.settings), "--count": one.report.sample_count, "--reference": reference}


def _check_alike(evaluated: list[EvaluatedSetting], out: Path) -> None:
    """Raises TrainerError where the latest result was not obtained as the former ones were."""
    now = _conditions(evaluated[-1])
    for one in evaluated[:-1]:
        _compare(_conditions(one), now, out)


def _conditions(one: EvaluatedSetting) -> dict:
    """What must be equal in a table, apart from the swept settings and `_asked`."""
    provenance = one.report.provenance
    sampling = provenance["samples"]["sampling"] or {}
    not_compared = {*one.settings, "source", "checkpoint", "batch_size"}  # the generator's hash says which it is
    return {
        **{name: value for name, value in sampling.items() if name not in not_compared},
        "reference's content": provenance["reference"].get("sha256"),
        "--seed": provenance["seed"],
    }


def _compare(before: dict, now: dict, out: Path) -> None:
    """Raises TrainerError for a value that differs; None and what one of them lacks are not known."""
    for name, value in before.items():
        if None not in (value, now.get(name)) and value != now[name]:
            raise TrainerError(
                f"{out / TABLE} shows results of another {name} ({value}, now {now[name]}), which this sweep would be "
                "mixed with: name another folder with --out"
            )


def settings_grid(options: list[str]) -> list[dict]:
    """Every combination of the values of ``NAME=VALUE,VALUE`` options. Raises TrainerError."""
    kinds = {field.name: type(field.default) for field in fields(Sampling)}
    values: dict[str, list] = {}
    for text in options:
        name, equals, listed = text.partition("=")
        if name not in kinds or not equals:
            raise TrainerError(f"--sweep {text}: write NAME=VALUE,VALUE with a name of {', '.join(kinds)}")
        if name in values:
            raise TrainerError(f"--sweep {text}: {name} is given twice; list all its values in one option")
        try:
            values[name] = [kinds[name](value) for value in listed.split(",")]
        except ValueError as error:
            raise TrainerError(f"--sweep {text}: {error}") from error
        if len(set(values[name])) < len(values[name]):
            raise TrainerError(f"--sweep {text}: a value is given twice")
    grid = [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
    for settings in grid:
        try:
            Sampling(**settings)
        except ModelError as error:
            raise TrainerError(f"--sweep: {error}") from error
    return grid


def describe_settings(settings: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _write(evaluated: list[EvaluatedSetting], out: Path) -> Sweep:
    table = [[*evaluated[0].settings, *(measure.title for measure in MEASURES.values())]]
    for settings, report in evaluated:
        table.append([*map(str, settings.values()), *report.formatted()])
    swept = Sweep(evaluated, table, out / TABLE, out / "sweep.md", out / "sweep.png")
    rows = [{"settings": settings, **report.to_json()} for settings, report in evaluated]
    warnings = dict.fromkeys(
        f"- Warning: {plain_markdown(warning)}." for one in evaluated for warning in one.report.warnings
    )
    title = f"{MARK}{evaluated[0].report.sample_count:,} samples each"
    text = "\n\n".join([title, markdown_table(table), *["\n".join(warnings)] * bool(warnings), "![sweep](sweep.png)"])
    contents = {
        swept.chart_path: lambda path: draw(evaluated, path),
        swept.markdown_path: text + "\n",
        swept.json_path: json_text(rows),
    }
    write_files(contents)
    return swept


def draw(evaluated: list[EvaluatedSetting], path: Path) -> None:
    """Plots gFID and Inception score, or the other measures without these, over guidance, or over the first swept
    setting; one line per combination of the other settings."""
    from matplotlib.figure import Figure

    names = list(evaluated[0].settings)
    x_axis = X_AXIS if X_AXIS in names else names[0]
    lines: dict[str, list[EvaluatedSetting]] = {}
    for one in evaluated:
        rest = {name: value for name, value in one.settings.items() if name != x_axis}
        lines.setdefault(describe_settings(rest), []).append(one)
    measured = [name for name in MEASURES if any(getattr(one.report, name) is not None for one in evaluated)]
    shown = [name for name in measured if name in ("gfid", "inception_score")] or measured
    figure = Figure((5.2 * len(shown), 4), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, name in zip(axes, shown, strict=True):
        for label, ones in lines.items():
            known = [one for one in ones if getattr(one.report, name) is not None]
            points = sorted((one.settings[x_axis], getattr(one.report, name)) for one in known)
            axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label)
        axis.set_xlabel(x_axis)
        better = "lower" if name == "gfid" else "higher"
        axis.set_title(f"{MEASURES[name].title} ({better} is better)", loc="left", fontsize=10, fontweight="bold")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{evaluated[0].report.sample_count:,} samples per setting", fontsize=11)
    figure.savefig(path, dpi=110, format="png")
