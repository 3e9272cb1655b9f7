"""`ibq evaluate generation`: quality of a generator's images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.console import print_table, progress
from tools.options import BatchSize, Device

if TYPE_CHECKING:
    from trainer.evaluation.generation_report import EvaluatedGeneration
    from trainer.evaluation.sweep import Sweep

# Not --run, which torchrun takes for an abbreviation of its own option.
Generator = Annotated[
    Path | None, typer.Option(help="Instead of --samples: a generator's run to sample at several settings.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE,VALUE", help="With --generator: guidance, temperature, top_k, top_p ...; may be repeated."
    ),
]
OutFolder = Annotated[
    Path | None, typer.Option(help="With --generator: folder for samples, sweep.json, sweep.md and sweep.png.")
]
Metrics = Annotated[
    str | None, typer.Option(metavar="fid,is,pr", help="What to measure; pr is precision and recall.  [default: all]")
]
Cache = Annotated[
    str | None, typer.Option(metavar="DIR", help="Cache of features, or 'none'.  [default: in ibq's cache]")
]
AsSample = typer.Option(help="With --generator, as in `ibq sample`.")


def generation(
    samples: Annotated[
        Path | None, typer.Option(help="FILE.npz of `ibq sample`, or a folder of images of one size.")
    ] = None,
    reference: Annotated[
        Path, typer.Option(help="ADM's reference .npz; or images, as in --samples.", show_default=False)
    ] = ...,
    report: Annotated[
        Path | None, typer.Option(help="FILE.json; FILE.md is written beside it.  [default: NAME_generation.json]")
    ] = None,
    metrics: Metrics = None,
    seed: Annotated[int, typer.Option(help="Of the shuffle before the Inception score's splits.")] = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    cache: Cache = None,
    generator: Generator = None,
    sweep: Settings = None,
    count: Annotated[int, typer.Option(help="With --generator: images for each setting.")] = 50_000,
    out: OutFolder = None,
    classes: Annotated[str | None, AsSample] = None,
    tokenizer: Annotated[str | None, AsSample] = None,
    precision: Annotated[str, AsSample] = "fp32",
    sample_batch_size: Annotated[int, typer.Option(help="With --generator: images sampled in a batch.")] = 32,
) -> None:
    """Measure gFID, Inception score, precision and recall by ADM's protocol, beside published results.

    In many processes: torchrun --nproc-per-node 8 -m tools evaluate generation --samples ...

    Example: ibq evaluate generation --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz

    Several settings: ibq evaluate generation --generator runs/generator --sweep guidance=1.5,2,2.5
    --sweep temperature=1,1.1 --reference VIRTUAL_imagenet256_labeled.npz --count 10000 --out sweeps/generator
    """
    if (samples is None) == (generator is None):
        raise typer.BadParameter("use either --samples, or --generator with --sweep and --out")
    scoring = dict(metrics=metrics, seed=seed, batch_size=batch_size, device=device, cache=cache)
    if samples is not None:
        if sweep or out:
            raise typer.BadParameter("--sweep and --out need --generator; with --samples use --report")
        from trainer.evaluation.generation import evaluate_generation

        with progress("done") as on_progress:
            evaluated = evaluate_generation(samples, reference, report_path=report, on_progress=on_progress, **scoring)
        if evaluated is not None:  # otherwise another process prints the result
            print_report(evaluated)
        return
    if not sweep or out is None or report is not None:
        raise typer.BadParameter("--generator needs --sweep NAME=VALUE,VALUE and --out DIR, which holds the reports")
    sampling = dict(classes=classes, tokenizer=tokenizer, precision=precision)
    sampling |= dict(batch_size=sample_batch_size, device=device)
    from trainer.evaluation.sweep import sweep as evaluate_sweep

    options = dict(count=count, out=out, sampling=sampling, scoring=scoring)
    with progress("done") as on_progress:
        swept = evaluate_sweep(generator, reference, sweep, **options, on_progress=on_progress)
    if swept is not None:
        print_sweep(swept)


def print_report(evaluated: "EvaluatedGeneration") -> None:
    """Results beside published ones, warnings, and where the files are."""
    report = evaluated.report
    print_table(f"{report.sample_count:,} samples (protocol: {report.protocol})", evaluated.comparison)
    if report.inception_score is not None:
        typer.echo(f"standard deviation of the Inception score over its splits: {report.inception_score_std:.2f}")
    typer.echo(f"gFID's reference: {report.reference_statistics}")
    _print_warnings(report.warnings)
    for measure, reason in report.not_measured.items():
        typer.echo(f"{measure} was not measured: {reason}")
    typer.echo(f"numbers: {evaluated.json_path}\ntable: {evaluated.markdown_path}")


def print_sweep(swept: "Sweep") -> None:
    """A row for each setting, warnings, and where the files are."""
    print_table(f"{swept.evaluated[0].report.sample_count:,} samples for each setting", swept.table)
    _print_warnings([warning for one in swept.evaluated for warning in one.report.warnings])
    typer.echo(f"chart: {swept.chart_path}\nnumbers: {swept.json_path}\ntable: {swept.markdown_path}")


def _print_warnings(warnings: list[str]) -> None:
    for warning in dict.fromkeys(warnings):
        typer.secho(f"warning: {warning}", fg="yellow")
