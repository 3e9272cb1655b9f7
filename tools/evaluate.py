"""`ibq evaluate`: how good a trained tokenizer is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tools.progress import progress

if TYPE_CHECKING:
    from trainer.evaluate import EvaluatedRun

app = typer.Typer(no_args_is_help=True, help="Measure a trained tokenizer.")


@app.callback()
def evaluate() -> None:
    """Measure a trained tokenizer."""


@app.command(no_args_is_help=True)
def reconstruction(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    images: Annotated[
        str | None, typer.Option(help="Folder of images, image, tar or tars.", show_default="the run's data.val")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Pixels of the crop, or 'original'.", show_default="the run's data.val_image_size, or image_size"
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
    report: Annotated[
        Path | None, typer.Option(help="FILE.json; FILE.png goes beside it.", show_default="RUN/report.json")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures at a time; with --size original always 1.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """PSNR, SSIM, L1 and codebook usage of reconstructions, beside two baselines that learn nothing.

    Example: ibq evaluate reconstruction runs/quickstart --images my_photos --size original
    """
    judge(
        run,
        images=images,
        image_size=size,
        weights=weights,
        report_path=report,
        batch_size=batch_size,
        device=device,
    )


def judge(run: Path, **options) -> None:
    """Evaluates a run with a progress bar (options as of `trainer.evaluate.evaluate_run`), writes the run's report.html
    anew unless the numbers went elsewhere, and prints the table."""
    from trainer.evaluate import evaluate_run
    from trainer.report import write_report

    console = Console()
    with progress("pictures evaluated") as on_progress:
        evaluated = evaluate_run(run, **options, on_progress=on_progress)
    print_report(evaluated, console)
    if options.get("report_path") is None:
        console.print(f"report: {write_report(run)}", soft_wrap=True, highlight=False)


def print_report(evaluated: "EvaluatedRun", console: Console) -> None:
    """The table of values beside baselines, what was left out, and where the files are."""
    report = evaluated.report
    table = Table(title=f"Reconstruction of {report.image_count:,} pictures (protocol: {report.protocol})")
    table.add_column("")
    for heading in ("tokenizer", "palette", "mean colour"):
        table.add_column(heading, justify="right")
    values = report.psnr, report.baseline_palette_psnr, report.baseline_mean_color_psnr
    table.add_row("PSNR (dB)", *(f"{value:.2f}" for value in values))
    table.add_row("SSIM", f"{report.ssim:.4f}")
    table.add_row("L1 on [-1, 1]", f"{report.l1:.4f}")
    table.add_row("codebook usage", f"{report.usage:.1%}")
    table.add_row("perplexity", f"{report.perplexity:,.1f}")
    console.print(table)
    factor = report.downsampling_factor
    console.print(
        f"palette: {report.codebook_size:,} colours fitted to these very pictures, one for each {factor}x{factor} "
        "patch: the same bits per token as the tokenizer.",
        style="dim",
    )
    if report.infinite_psnr_count:
        console.print(f"{report.infinite_psnr_count} pictures came back exact: their infinite PSNR is left out.")
    if report.skipped:
        console.print(f"{len(report.skipped)} pictures skipped (unreadable or tiny), the first: {report.skipped[0]}")
    for what, path in (("numbers", evaluated.json_path), ("pictures", evaluated.picture_path)):
        console.print(f"{what}: {path}", soft_wrap=True, highlight=False)
