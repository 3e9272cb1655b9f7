"""Compares methods at several reconstruction weights. Prints each method at its own best weight; draws PSNR and usage
over weights, and PSNR over usage.

    python benchmarks/claims/weights.py claims/weight_* --out claims/weights.png

A folder weight_W is the output of `ibq ablate benchmarks/claims/methods.yaml loss.reconstruction.weight=W`. The best
weight has the highest PSNR with seed 0; the printed figures are means over all seeds of that weight.
"""

import argparse
import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from trainer.jobs.ablation import cells_of, existing_seeds, load_ablation

METHODS = Path(__file__).parent / "methods.yaml"
FIGURES = {"psnr": "{:.2f}", "ssim": "{:.3f}", "usage": "{:.1%}", "perplexity": "{:,.0f}"}
Reports = dict[float, dict[int, dict]]  # weight -> seed -> report.json


def read(folders: list[Path]) -> dict[str, Reports]:
    """The reports of each method of the table that has any."""
    found: dict[str, Reports] = {}
    for folder in folders:
        weight = float(folder.name.removeprefix("weight_"))
        for cell in cells_of(load_ablation(str(METHODS)), None, existing_seeds(folder), [], folder):
            if cell.report.is_file():
                report = json.loads(cell.report.read_text())
                found.setdefault(cell.row, {}).setdefault(weight, {})[cell.seed] = report
    return {row: dict(sorted(reports.items())) for row, reports in found.items()}


def best_weight(reports: Reports) -> float:
    with_seed_0 = {weight: seeds[0]["psnr"] for weight, seeds in reports.items() if 0 in seeds}
    return max(with_seed_0, key=with_seed_0.get)


def said(reports: list[dict], name: str) -> str:
    values, form = [report[name] for report in reports], FIGURES[name].format
    return form(statistics.fmean(values)) + (f" ± {form(statistics.stdev(values))}" if len(values) > 1 else "")


def table(methods: dict[str, Reports]) -> str:
    """Markdown: each method at its best weight, the best PSNR first."""
    lines = [f"| method | weights | best | {' | '.join(FIGURES)} | seeds |", "|---" * (len(FIGURES) + 4) + "|"]
    best = {row: best_weight(reports) for row, reports in methods.items()}
    of_best = {row: [*methods[row][weight].values()] for row, weight in best.items()}
    for row, reports in sorted(of_best.items(), key=lambda one: -statistics.fmean(report["psnr"] for report in one[1])):
        figures = " | ".join(said(reports, name) for name in FIGURES)
        tried = ", ".join(f"{weight:g}" for weight in methods[row])
        lines.append(f"| {row} | {tried} | {best[row]:g} | {figures} | {len(reports)} |")
    return "\n".join(lines)


def draw(methods: dict[str, Reports], path: Path) -> None:
    """Seed 0 of each method at each weight."""
    figure = Figure((16, 6), layout="constrained")
    psnr, usage, both = figure.subplots(1, 3, width_ratios=(1, 1, 1.6))
    for number, (row, reports) in enumerate(methods.items()):
        points = [(weight, seeds[0]["psnr"], seeds[0]["usage"]) for weight, seeds in reports.items() if 0 in seeds]
        weights, psnrs, usages = zip(*points, strict=True)
        style = {"color": f"C{number % 10}", "marker": "os^"[number // 10], "ms": 5, "lw": 2.5 if row == "IBQ" else 1.2}
        psnr.plot(weights, psnrs, label=row, **style)
        usage.plot(weights, usages, **style)
        both.plot(usages, psnrs, **style)
        best, left = psnrs.index(max(psnrs)), max(usages) > 0.15
        where = {"xytext": (-5 if left else 5, 4), "textcoords": "offset points", "ha": "right" if left else "left"}
        both.annotate(row, (usages[best], psnrs[best]), fontsize=7, **where)
    tried = sorted({weight for reports in methods.values() for weight in reports})
    for panel in (psnr, usage):
        panel.set(xscale="log", xlabel="loss.reconstruction.weight")
        panel.set_xticks(tried, [f"{weight:g}" for weight in tried])
        panel.set_xticks([], minor=True)
    for panel in (psnr, both):
        panel.set_ylabel("PSNR, held-out pictures (dB)")
    usage.set_ylabel("codes used by held-out pictures")
    usage.yaxis.set_major_formatter(PercentFormatter(1.0))
    both.set_xlabel("codes used by held-out pictures")
    both.xaxis.set_major_formatter(PercentFormatter(1.0))
    for panel in (psnr, usage, both):
        panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="weight_W")
    parser.add_argument("--out", type=Path, default=Path("weights.png"))
    arguments = parser.parse_args()
    if not arguments.out.absolute().parent.is_dir():
        parser.error(f"--out {arguments.out}: no such folder")
    for folder in arguments.folders:
        if not folder.is_dir() or not folder.name.startswith("weight_"):
            parser.error(f"{folder}: give folders named weight_W, W being the reconstruction weight of the runs in it")
    methods = read(arguments.folders)
    if not methods:
        parser.error("no evaluated run there: `ibq ablate` evaluates them")
    draw(methods, arguments.out)
    print(table(methods))


if __name__ == "__main__":
    main()
