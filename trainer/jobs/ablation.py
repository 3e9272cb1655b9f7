"""`ibq ablate`: tables of a recipe trained in several variants and with several seeds, each evaluated in the same way,
with published results."""

import json
import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from model_zoo.errors import ModelError
from model_zoo.io.hashing import sha256_of
from model_zoo.io.load import find_checkpoint
from model_zoo.io.manifest import MANIFEST
from model_zoo.io.run_layout import checkpoint_step
from trainer import TrainerError
from trainer.changes import settings_of
from trainer.files import ReportFiles, has_keys, json_text, write_files, write_text
from trainer.jobs.setup import check_same_settings
from trainer.recipes import ABLATIONS, find_recipe, load_recipe, load_run_config, read_as, renamed
from trainer.reports.measures import plain_markdown
from trainer.telemetry import metric_lines

CURVES = {
    "codebook/usage": "codebook usage, training",
    "val/usage": "codebook usage, validation",
    "val/psnr": "PSNR, validation (dB)",
}
# In a report's manifest: what must be equal for figures to be comparable.
PROTOCOL = ("images", "image_list", "image_size", "resize", "weights")
# Next to a report: the options of its evaluation, and in the last line the checkpoint that was evaluated.
OPTIONS = "ablation.txt"
MARK = "Mean ± standard deviation over "  # of table.md
TABLE = "table.json"


@dataclass
class Row:
    """recipe: replaces the table's. set: the variant's changes to the recipe, ``key=value``. published: its published
    results."""

    recipe: str | None = None
    set: list[str] = field(default_factory=list)
    published: dict[str, float] = field(default_factory=dict)


@dataclass
class Ablation:
    """recipe: a name, or a file next to the table's, of the rows that name none. set: changes to the recipes in all
    rows. figures: the columns, which are keys of report.json. rows: by name."""

    recipe: str
    title: str
    figures: list[str] = field(default_factory=lambda: ["psnr", "usage"])
    set: list[str] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)


class Cell(NamedTuple):
    """One run: a row with a seed."""

    row: str
    seed: int
    recipe: str
    overrides: list[str]
    run: Path

    @property
    def report(self) -> Path:
        """A file that other evaluations of the run do not overwrite."""
        return self.run / "ablation.json"


def load_ablation(name: str) -> Ablation:
    """Reads the table of that name, or that YAML file. Raises TrainerError, one line."""
    path = find_recipe(name, [ABLATIONS])
    ablation = read_as(Ablation, path)
    if not ablation.rows:
        raise TrainerError(f"{path} has no rows")
    for table in (ablation, *ablation.rows.values()):
        table.set = list(map(renamed, table.set))
        if table.recipe and table.recipe.endswith((".yaml", ".yml")):
            table.recipe = str(path.parent / table.recipe)
    return ablation


def cells_of(
    ablation: Ablation, rows: list[str] | None, seeds: list[int], overrides: list[str], out: Path
) -> list[Cell]:
    """All runs of the rows (None: all rows). Overrides replace the table's settings. Raises TrainerError."""
    for row in rows or ():
        if row not in ablation.rows:
            raise TrainerError(f"the table has no row {row!r}: choose among {'; '.join(ablation.rows)}")
    for override in overrides:
        if override.partition("=")[0] in ("run", "seed"):
            raise TrainerError(f"{override} cannot be set: use --out and --seeds")
    for what, chosen in (("--seeds", seeds), ("--rows", rows or [])):
        if len(set(chosen)) < len(chosen):
            raise TrainerError(f"{what} contains a duplicate: {', '.join(map(str, chosen))}")
    folders = {row: re.sub(r"[^\w.]+", "_", row.lower()).strip("_.") for row in ablation.rows}
    if len(set(folders.values()) - {""}) < len(folders):
        raise TrainerError(f"two rows would have the same folder: rename one of {'; '.join(folders)}")
    cells = []
    for name in rows or ablation.rows:
        row = ablation.rows[name]
        chosen = {setting.partition("=")[0]: setting for setting in [*ablation.set, *row.set, *overrides]}
        for seed in seeds:
            run = out / folders[name] / f"seed_{seed}"
            settings = [*chosen.values(), f"seed={seed}", f"run={run}"]
            cells.append(Cell(name, seed, row.recipe or ablation.recipe, settings, run))
    return cells


def existing_seeds(out: Path) -> list[int]:
    """The seeds of all runs in the table's folder."""
    return sorted({int(run.name.removeprefix("seed_")) for run in out.glob("*/seed_*") if run.name[5:].isdecimal()})


def is_trained(cell: Cell) -> bool:
    """Whether the cell's run has finished. Raises TrainerError if the folder holds a run of other settings."""
    if not (cell.run / "config.yaml").is_file():
        return False
    config, former = load_recipe(cell.recipe, cell.overrides), load_run_config(cell.run, [])
    check_same_settings(
        cell.run, "a run", settings_of(former), settings_of(config), lambda key, values: f"{key}={values.get(key)}"
    )
    return _last_step(cell.run) == config.trainer.max_steps


def is_begun(cell: Cell) -> bool:
    """Whether there is a run to resume."""
    return (cell.run / "config.yaml").is_file()


def is_evaluated(cell: Cell, options: str) -> bool:
    """Whether its report exists and is one of its newest checkpoint, made with these options of `ibq evaluate
    reconstruction`."""
    return cell.report.is_file() and _mark(cell) == _evaluated_as(cell, options)


def is_outdated(cell: Cell, options: str) -> bool:
    """Whether its report exists, but was made with other options or of another checkpoint."""
    return cell.report.is_file() and _mark(cell) not in (None, _evaluated_as(cell, options))


def _mark(cell: Cell) -> str | None:
    path = cell.run / OPTIONS
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _evaluated_as(cell: Cell, options: str) -> str:
    """What marks a report of the newest checkpoint. The hash tells checkpoints of one step apart."""
    checkpoint = newest(cell.run)
    if checkpoint is None:
        return options
    manifest = checkpoint / MANIFEST
    return f"{options}\n{checkpoint.name} {sha256_of(manifest)[:16] if manifest.is_file() else '-'}"


def unmark_evaluated(cell: Cell) -> None:
    """Call before training or evaluating: a job that ends in the middle may leave another report."""
    (cell.run / OPTIONS).unlink(missing_ok=True)


def mark_evaluated(cell: Cell, options: str) -> None:
    """Records the options and the checkpoint of the cell's report."""
    write_text(cell.run / OPTIONS, _evaluated_as(cell, options))


def newest(run: Path) -> Path | None:
    """The run's newest checkpoint, or None."""
    try:
        return find_checkpoint(run)
    except ModelError:
        return None


def _last_step(run: Path) -> int:
    checkpoint = newest(run)
    return 0 if checkpoint is None else checkpoint_step(checkpoint)


def check_table(ablation: Ablation, out: Path) -> None:
    """Raises TrainerError where the folder holds files of these names that are of no table, or another table."""
    path = out / TABLE
    ReportFiles(path, has_keys("title", "rows"), out / "table.md", MARK, [out / "curves.png"]).check()
    rows = json.loads(path.read_bytes())["rows"] if path.is_file() else []
    if others := [row for row in rows if row not in ablation.rows]:
        raise TrainerError(
            f"{path} has rows that this table has not ({'; '.join(others)}): name another folder with --out, or remove "
            "the file"
        )


def check_others(cells: list[Cell], table_cells: list[Cell], options: str) -> None:
    """Raises TrainerError where rows would leave the table because their evaluation is outdated and not asked for."""
    others = [cell for cell in table_cells if cell not in cells and is_trained(cell) and is_outdated(cell, options)]
    if others:
        names = "; ".join(f"{cell.row} (seed {cell.seed})" for cell in others)
        raise TrainerError(
            f"{names}: evaluated with another --judge, or trained on since, and would leave the table: give the same "
            "--judge as before, or add these to --rows and --seeds, which evaluates them again"
        )


class Figure(NamedTuple):
    """A result over seeds. spread: the sample standard deviation, 0 for one seed."""

    mean: float
    spread: float
    count: int


def figures(ablation: Ablation, cells: list[Cell]) -> dict[str, dict[str, Figure]]:
    """Row -> key of report.json -> figure, over evaluated cells."""
    found: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        report = json.loads(cell.report.read_bytes())
        for name in ablation.figures:
            if isinstance(report.get(name), int | float):
                found.setdefault(cell.row, {}).setdefault(name, []).append(report[name])
    return {
        row: {
            name: Figure(statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0, len(v))
            for name, v in named.items()
        }
        for row, named in found.items()
    }


def check_same_protocol(cells: list[Cell]) -> None:
    """Raises TrainerError if evaluated cells were not evaluated on the same images in the same way."""
    found: dict[str, dict[str, list[Cell]]] = {}  # name of a condition -> its value -> cells
    for cell in cells:
        report = json.loads(cell.report.read_bytes())
        conditions = {name: report["manifest"][name] for name in PROTOCOL} | {"image_count": report["image_count"]}
        # This baseline depends on pixels, which image_list does not, and on no weights.
        baseline, factor = report["baseline_mean_color_psnr"], report["downsampling_factor"]
        conditions[f"baseline_mean_color_psnr at factor {factor}"] = None if baseline is None else round(baseline, 4)
        for name, value in conditions.items():
            found.setdefault(name, {}).setdefault(json.dumps(value), []).append(cell)
    for name, cells_by_value in found.items():
        if len(cells_by_value) > 1:
            ways = "; ".join(
                f"{value} for {', '.join(f'{cell.row} (seed {cell.seed})' for cell in alike)}"
                for value, alike in cells_by_value.items()
            )
            raise TrainerError(
                f"the rows were not evaluated alike ({name}: {ways}): remove ablation.json from each run that is to be "
                "evaluated again and repeat the command, or give a --judge that makes all rows alike"
            )


def write_table(ablation: Ablation, cells: list[Cell], out: Path) -> list[Path]:
    """Writes table.json, table.md and curves.png of evaluated cells; returns their paths. Raises TrainerError, also if
    the cells were not evaluated alike."""
    check_same_protocol(cells)
    measured = figures(ablation, cells)
    tree = {row: {name: figure._asdict() for name, figure in named.items()} for row, named in measured.items()}
    files = {
        out / TABLE: json_text({"title": ablation.title, "rows": tree}),
        out / "table.md": markdown(ablation, measured),
        out / "curves.png": lambda path: draw_curves(ablation, cells, path),
    }
    write_files(files)
    return list(files)


def markdown(ablation: Ablation, measured: dict[str, dict[str, Figure]]) -> str:
    """The table: mean and spread over seeds, and published results."""
    published = {name for row in ablation.rows.values() for name in row.published}
    columns = [name for name in ablation.figures if any(name in named for named in measured.values())]
    also = [name for name in ablation.figures if name in published] + sorted(published - set(ablation.figures))
    heads = [plain_markdown(name) for name in (*columns, *(f"{name}, published" for name in also))]
    lines = [f"# {plain_markdown(ablation.title)}", "", f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for row, named in measured.items():
        values = [_text(name, named.get(name)) for name in columns]
        values += [_number(name, ablation.rows[row].published.get(name)) for name in also]
        lines.append(f"| {plain_markdown(row)} | {' | '.join(values)} |")
    seeds = sorted({figure.count for named in measured.values() for figure in named.values()})
    lines += ["", f"{MARK}{' or '.join(map(str, seeds)) or 'no'} seeds."]
    return "\n".join(lines) + "\n"


def _text(name: str, figure: Figure | None) -> str:
    if figure is None:
        return "not measured"
    spread = f" ± {_number(name, figure.spread)}" if figure.count > 1 else ""
    return f"{_number(name, figure.mean)}{spread}"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if "usage" in name:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}" if name in ("ssim", "l1") else f"{value:.2f}"


def draw_curves(ablation: Ablation, cells: list[Cell], path: Path) -> None:
    """Plots logged metrics: one panel for each of CURVES, one colour per row, one line per seed."""
    import matplotlib.figure
    from matplotlib.ticker import PercentFormatter

    figure = matplotlib.figure.Figure((5 * len(CURVES), 4), layout="constrained")
    panels = figure.subplots(1, len(CURVES))
    colors = {row: f"C{number % 10}" for number, row in enumerate(ablation.rows)}
    named = set()
    for cell in cells:
        log = cell.run / "metrics.jsonl"
        lines = [json.loads(line) for _, line in metric_lines(log)] if log.is_file() else []
        for panel, name in zip(panels, CURVES, strict=True):
            points = [(line["step"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]
            if points:
                label = None if cell.row in named else cell.row
                named.add(cell.row)
                style = {"marker": "o", "ms": 4} if len(points) == 1 else {"lw": 1.3}
                panel.plot(*zip(*points, strict=True), color=colors[cell.row], alpha=0.8, label=label, **style)
    for panel, (name, title) in zip(panels, CURVES.items(), strict=True):
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
        if name.endswith("usage"):
            panel.set_ylim(0, 1.02)
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    if named:
        figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(ablation.title)
    figure.savefig(path, dpi=110, format="png")
