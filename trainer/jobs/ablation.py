"""Tables of comparisons: a recipe trained in several variants and by several seeds, each judged alike, its figures and
curves beside the published ones."""

import functools
import json
import math
import operator
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from model_zoo import ModelError
from model_zoo.io.load import find_checkpoint
from trainer import TrainerError
from trainer.config import RunConfig
from trainer.jobs.resumable import check_same
from trainer.recipes import ABLATIONS, explain, find_recipe, leaves, load_recipe, load_run_config, read_recipe, renamed
from trainer.telemetry import metric_lines

CURVES = {
    "codebook/usage": "codebook usage in training",
    "val/usage": "usage, held-out",
    "val/psnr": "PSNR, held-out (dB)",
}
JUDGED = "ablation.txt"  # beside a report: the options that it was made with


@dataclass
class Row:
    """set: what the variant changes in the recipe, ``key=value``; published: its figures, where there are any."""

    set: list[str] = field(default_factory=list)
    published: dict[str, float] = field(default_factory=dict)


@dataclass
class Ablation:
    """recipe: a name, or a file beside the table's; set: what all rows change in it; figures: columns, names of
    report.json; rows: by name."""

    recipe: str
    title: str
    figures: list[str] = field(default_factory=lambda: ["psnr", "usage"])
    set: list[str] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=dict)


class Cell(NamedTuple):
    """One run of a table: of a row by a seed."""

    row: str
    seed: int
    overrides: list[str]
    run: Path

    @property
    def report(self) -> Path:
        """Of its own, which no other evaluation of the run writes over."""
        return self.run / "ablation.json"


def load_ablation(name: str) -> Ablation:
    """The table of that name, or in that YAML file. Raises TrainerError, one line."""
    path, schema = find_recipe(name, [ABLATIONS]), OmegaConf.structured(Ablation)
    try:
        ablation = OmegaConf.to_object(OmegaConf.merge(schema, read_recipe(path)))
    except OmegaConfBaseException as error:
        raise TrainerError(f"{path}: {explain(error, schema)}") from error
    if not ablation.rows:
        raise TrainerError(f"{path} has no rows")
    for table in (ablation, *ablation.rows.values()):
        table.set = list(map(renamed, table.set))
    if ablation.recipe.endswith((".yaml", ".yml")):
        ablation.recipe = str(path.parent / ablation.recipe)
    return ablation


def cells_of(
    ablation: Ablation, rows: list[str] | None, seeds: list[int], overrides: list[str], out: Path
) -> list[Cell]:
    """Every run of the rows (None: all). The command's overrides win over the table's. Raises TrainerError."""
    for row in rows or ():
        if row not in ablation.rows:
            raise TrainerError(f"the table has no row {row!r}: choose among {'; '.join(ablation.rows)}")
    for override in overrides:
        if override.partition("=")[0] in ("run", "seed"):
            raise TrainerError(f"{override} cannot be set: --out and --seeds decide")
    for what, chosen in (("--seeds", seeds), ("--rows", rows or [])):
        if len(set(chosen)) < len(chosen):
            raise TrainerError(f"{what} names one twice: {', '.join(map(str, chosen))}")
    folders = {row: re.sub(r"[^\w.]+", "_", row.lower()).strip("_.") for row in ablation.rows}
    if len(set(folders.values()) - {""}) < len(folders):
        raise TrainerError(f"two rows of the table would have one folder: rename one of {'; '.join(folders)}")
    cells = []
    for row in rows or ablation.rows:
        chosen = {
            setting.partition("=")[0]: setting for setting in [*ablation.set, *ablation.rows[row].set, *overrides]
        }
        for seed in seeds:
            run = out / folders[row] / f"seed_{seed}"
            cells.append(Cell(row, seed, [*chosen.values(), f"seed={seed}", f"run={run}"], run))
    return cells


def seeds_there(out: Path) -> list[int]:
    """Of runs that former commands left in the table's folder."""
    return sorted({int(run.name.removeprefix("seed_")) for run in out.glob("*/seed_*") if run.name[5:].isdecimal()})


def is_trained(ablation: Ablation, cell: Cell) -> bool:
    """Whether the cell's run is at its end. Raises TrainerError where the folder holds one of other settings."""
    if not (cell.run / "config.yaml").is_file():
        return False
    asked, found = load_recipe(ablation.recipe, cell.overrides), load_run_config(cell.run, [])
    check_same(cell.run, "a run", _settings(found), _settings(asked), lambda key, former: f"{key}={former.get(key)}")
    return _step(cell.run) == asked.trainer.max_steps


def is_begun(cell: Cell) -> bool:
    """Whether there is a checkpoint to go on from. Raises TrainerError for a run without any."""
    if not (cell.run / "config.yaml").is_file():
        return False
    if _step(cell.run) == 0:
        raise TrainerError(f"{cell.run} was begun and holds no checkpoint: remove it")
    return True


def is_judged(cell: Cell, options: str) -> bool:
    """Whether its report is there, made with these options of `ibq evaluate reconstruction`."""
    note = cell.run / JUDGED
    return cell.report.is_file() and note.is_file() and note.read_text() == options


def note_judged(cell: Cell, options: str) -> None:
    """After its report was made with these options."""
    (cell.run / JUDGED).write_text(options)


def _step(run: Path) -> int:
    try:
        return int(find_checkpoint(run).name.removeprefix("step_"))
    except ModelError:
        return 0


def _settings(config: RunConfig) -> dict:
    """By dotted key."""
    node = OmegaConf.structured(config)
    plain = OmegaConf.to_container(node)
    return {key: functools.reduce(operator.getitem, key.split("."), plain) for key in leaves(node)}


class Figure(NamedTuple):
    """Over the seeds; spread is the sample standard deviation, 0 for one."""

    mean: float
    spread: float
    count: int


def figures(ablation: Ablation, cells: list[Cell]) -> dict[str, dict[str, Figure]]:
    """Row -> name -> its figure over the cells, which are judged."""
    found: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        report = json.loads(cell.report.read_text())
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


def write_table(ablation: Ablation, cells: list[Cell], out: Path) -> list[Path]:
    """table.json, table.md and curves.png of cells that are judged; returns their paths."""
    measured = figures(ablation, cells)
    tree = {row: {name: figure._asdict() for name, figure in named.items()} for row, named in measured.items()}
    as_json = json.dumps({"title": ablation.title, "rows": tree}, indent=1) + "\n"
    makers = {
        "table.json": lambda path: path.write_text(as_json),
        "table.md": lambda path: path.write_text(markdown(ablation, measured)),
        "curves.png": lambda path: draw_curves(ablation, cells, path),
    }
    for name, make in makers.items():
        unfinished = out / f".unfinished_{name}"
        make(unfinished)
        unfinished.replace(out / name)
    return [out / name for name in makers]


def markdown(ablation: Ablation, measured: dict[str, dict[str, Figure]]) -> str:
    """The table: measured mean and spread over seeds, and the published figures where there are any."""
    published = {name for row in ablation.rows.values() for name in row.published}
    columns = [name for name in ablation.figures if any(name in named for named in measured.values())]
    also = [name for name in ablation.figures if name in published] + sorted(published - set(ablation.figures))
    heads = [*columns, *(f"{name}, published" for name in also)]
    lines = [f"# {ablation.title}", "", f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for row, named in measured.items():
        values = [_text(name, named.get(name)) for name in columns]
        values += [_number(name, ablation.rows[row].published.get(name)) for name in also]
        lines.append(f"| {row} | {' | '.join(values)} |")
    seeds = sorted({figure.count for named in measured.values() for figure in named.values()})
    lines += ["", f"Mean ± standard deviation over {' or '.join(map(str, seeds)) or 'no'} seeds."]
    return "\n".join(lines) + "\n"


def _text(name: str, figure: Figure | None) -> str:
    if figure is None:
        return "not measured"
    spread = f" ± {_number(name, figure.spread)}" if figure.count > 1 else ""
    return f"{_number(name, figure.mean)}{spread}"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name.startswith("usage"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4f}" if name in ("ssim", "l1") else f"{value:.2f}"


def draw_curves(ablation: Ablation, cells: list[Cell], path: Path) -> None:
    """What was logged as training went: a panel for each of CURVES, a colour for each row, a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(CURVES), figsize=(5 * len(CURVES), 4), layout="constrained")
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
            panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    if named:
        figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(ablation.title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
