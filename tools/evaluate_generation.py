"""`ibq evaluate generation`: how good a generator's pictures are."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tools.progress import progress

if TYPE_CHECKING:
    from trainer.evaluation.generation_report import EvaluatedGeneration
    from trainer.evaluation.sweep import Sweep


def generation(
    samples: Annotated[
        Path | None, typer.Option(help="FILE.npz of `ibq sample`, or a folder of images of one size.")
    ] = None,
    reference: Annotated[
        Path, typer.Option(help="ADM's reference .npz; or images, as of --samples.", show_default=False)
    ] = ...,
    report: Annotated[
        Path | None, typer.Option(help="FILE.json; FILE.md goes beside it.  [default: NAME_generation.json]")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="fid,is,pr", help="Which; pr: precision and recall.  [default: all]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the samples' one shuffle before the Inception score.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images at a time, in each process.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    cache: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where features are kept, or 'none'.  [default: in ibq's cache]")
    ] = None,
    # Not --run, which torchrun takes for an abbreviation of an option of its own.
    generator: Annotated[
        Path | None, typer.Option(help="Instead of --samples: a generator's run to sample at several settings.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE,VALUE", help="With --generator: guidance, temperature, top_k, top_p ...; repeat it."
        ),
    ] = None,
    count: Annotated[int, typer.Option(help="With --generator: images of each setting.")] = 50_000,
    out: Annotated[
        Path | None, typer.Option(help="With --generator: folder for samples, sweep.json, sweep.md and sweep.png.")
    ] = None,
    classes: Annotated[str | None, typer.Option(help="With --generator, as of `ibq sample`.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="With --generator, as of `ibq sample`.")] = None,
    precision: Annotated[str, typer.Option(help="With --generator, as of `ibq sample`.")] = "fp32",
    sample_batch_size: Annotated[int, typer.Option(help="With --generator: images sampled at a time.")] = 32,
) -> None:
    """gFID, Inception score, precision and recall of samples, by ADM's protocol, beside the published figures.

    In many processes: torchrun --nproc-per-node 8 -m tools evaluate generation --samples ...

    Example: ibq evaluate generation --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz

    Several settings: ibq evaluate generation --generator runs/generator --sweep guidance=1.5,2,2.5
    --sweep temperature=1,1.1 --reference VIRTUAL_imagenet256_labeled.npz --count 10000 --out sweeps/generator
    """
    if (samples is None) == (generator is None):
        raise typer.BadParameter("give either --samples, or --generator with --sweep and --out")
    scoring = {"metrics": metrics, "seed": seed, "batch_size": batch_size, "device": device, "cache": cache}
    if samples is not None:
        if sweep or out:
            raise typer.BadParameter("--sweep and --out are for --generator; the report of --samples goes to --report")
        from trainer.evaluation.generation import evaluate_generation

        with progress("done") as tell:
            evaluated = evaluate_generation(samples, reference, report_path=report, on_progress=tell, **scoring)
        if evaluated is not None:  # another process tells
            print_report(evaluated)
        return
    if not sweep or out is None or report is not None:
        raise typer.BadParameter("--generator needs --sweep NAME=VALUE,VALUE and --out DIR, where the reports go")
    from trainer.evaluation.sweep import sweep as judge

    sampling = {
        "classes": classes,
        "tokenizer": tokenizer,
        "precision": precision,
        "batch_size": sample_batch_size,
        "device": device,
    }
    with progress("done") as tell:
        swept = judge(
            generator, reference, sweep, count=count, out=out, sampling=sampling, scoring=scoring, on_progress=tell
        )
    if swept is not None:
        print_sweep(swept)


def print_report(evaluated: "EvaluatedGeneration") -> None:
    """The figures beside published ones, warnings, and where the files are."""
    report, console = evaluated.report, Console()
    _print_table(console, f"{report.sample_count:,} samples (protocol: {report.protocol})", evaluated.comparison)
    if report.inception_score is not None:
        console.print(f"standard deviation of the Inception score over its splits: {report.inception_score_std:.2f}")
    console.print(f"gFID's reference: {report.reference_statistics}", soft_wrap=True, highlight=False)
    _print_warnings(console, report.warnings)
    for measure, why in report.not_measured.items():
        console.print(f"{measure} was not measured: {why}", soft_wrap=True, highlight=False)
    for what, path in (("numbers", evaluated.json_path), ("table", evaluated.markdown_path)):
        console.print(f"{what}: {path}", soft_wrap=True, highlight=False)


def print_sweep(swept: "Sweep") -> None:
    """A row for each setting, warnings, and where the files are."""
    console = Console()
    _print_table(console, f"{swept.evaluated[0].report.sample_count:,} samples for each setting", swept.table)
    _print_warnings(console, dict.fromkeys(warning for one in swept.evaluated for warning in one.report.warnings))
    for what, path in (("chart", swept.chart_path), ("numbers", swept.json_path), ("table", swept.markdown_path)):
        console.print(f"{what}: {path}", soft_wrap=True, highlight=False)


def _print_table(console: Console, title: str, rows: list[list[str]]) -> None:
    table = Table(title=title)
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*(cell.strip("*") for cell in row))
    console.print(table)


def _print_warnings(console: Console, warnings: Iterable[str]) -> None:
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True, highlight=False)
