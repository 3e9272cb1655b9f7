"""Plots the curves of any runs, as `ibq ablate` does for a table, and prints their last validations.

python benchmarks/claims/curves.py VQ='claims/long/vq_*/seed_*' IBQ='claims/long/ibq/seed_*' --out curves.png
"""

import argparse
import glob
import json
import statistics
from pathlib import Path

from trainer.jobs.ablation import Ablation, Cell, Row, draw_curves
from trainer.telemetry import metric_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUNS", help="a name, and a glob pattern of its run folders")
    parser.add_argument("--title", default="")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    if not arguments.out.absolute().parent.is_dir():
        parser.error(f"--out {arguments.out}: no such folder")
    cells = []
    for named in arguments.runs:
        name, _, pattern = named.partition("=")
        runs = [run for run in map(Path, sorted(glob.glob(pattern))) if validations(run)]
        if not runs:
            parser.error(f"{named}: no validated run there; write NAME=RUNS, a name and the folders of its runs")
        if any(cell.row == name for cell in cells):
            parser.error(f"{name} is there twice: one pattern for each name")
        cells += [Cell(name, seed, [], run) for seed, run in enumerate(runs)]
    rows = {cell.row: Row() for cell in cells}
    draw_curves(Ablation("", arguments.title, rows=rows), cells, arguments.out)
    for row in rows:
        last = [validations(cell.run)[-1] for cell in cells if cell.row == row]
        print(f"{row}: {said(last, 'val/psnr')} dB, usage {said(last, 'val/usage', 100)}% after {steps(last)} steps")


def validations(run: Path) -> list[dict]:
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for _, line in metric_lines(log)] if log.is_file() else []
    return [line for line in lines if "val/psnr" in line]


def said(lines: list[dict], name: str, factor: float = 1) -> str:
    values = [factor * line[name] for line in lines]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread} ({', '.join(f'{value:.2f}' for value in values)})"


def steps(lines: list[dict]) -> str:
    return " or ".join(map(str, sorted({line["step"] for line in lines})))


if __name__ == "__main__":
    main()
