"""`ibq evaluate`: how good a trained tokenizer is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tools import evaluate_generation
from tools.progress import progress

if TYPE_CHECKING:
    from trainer.evaluation.reconstruction_report import EvaluatedRun

app = typer.Typer(no_args_is_help=True, help="Measure a trained tokenizer.")


@app.callback()
def evaluate() -> None:
    """Measure a trained tokenizer."""


app.command("generation")(evaluate_generation.generation)


@app.command(no_args_is_help=True)
def reconstruction(
    run: Annotated[
        Path, typer.Argument(help="A run's folder, a checkpoint's in it, a published .ckpt, or an export's folder.")
    ],
    images: Annotated[
        str | None,
        typer.Option(help="Folder of images, image, tar or tars, zip file.", show_default="the run's data.val"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="eval_imagenet, eval_coco_zero_shot, ...: conditions of published figures.", metavar="NAME"),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="auto (what its weights files are there for), all, or a list such as rfid,lpips_vgg.",
            show_default="the recipe's, or auto",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Pixels of the crop, or 'original'.",
            show_default="the recipe's, or the run's data.val_image_size or image_size; without a run 256",
        ),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            help="cv2_bilinear, pil_antialias or adm_center_crop.",
            show_default="the recipe's, or the run's data.resize; without a run cv2_bilinear",
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
    report: Annotated[
        Path | None,
        typer.Option(
            help="FILE.json; FILE.md and pictures go beside it.",
            show_default="RUN/report.json; without a run NAME_reconstruction.json",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Pictures at a time, in each process; with --size original always 1.")
    ] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """rFID, LPIPS, PSNR, SSIM, L1 and codebook usage of reconstructions, beside published figures and two baselines
    that learn nothing.

    In many processes: torchrun --nproc-per-node 8 -m tools evaluate reconstruction RUN --recipe eval_imagenet ...

    Example: ibq evaluate reconstruction runs/quickstart --images my_photos --size original
    """
    judge(
        run,
        images=images,
        recipe=recipe,
        measures=metrics,
        image_size=size,
        resize=resize,
        weights=weights,
        report_path=report,
        batch_size=batch_size,
        device=device,
    )


def judge(run: Path, **options) -> None:
    """Evaluates a tokenizer with a progress bar (options as of `trainer.evaluation.evaluate_run`), rewrites report.html
    if the numbers went into the run's report, and prints the tables."""
    from trainer.evaluation.evaluate_run import RUN_REPORT, evaluate_run
    from trainer.reports.report import write_report

    console = Console()
    with progress("pictures evaluated") as on_progress:
        evaluated = evaluate_run(run, **options, on_progress=on_progress)
    if evaluated is None:  # another process tells
        return
    print_report(evaluated, console)
    if evaluated.json_path == run / RUN_REPORT:
        console.print(f"report: {write_report(run)}", soft_wrap=True, highlight=False)


def print_report(evaluated: "EvaluatedRun", console: Console) -> None:
    """Figures beside baselines and published ones, warnings, what was left out, and where the files are."""
    from trainer.evaluation.reconstruction_report import figure_rows
    from trainer.reports.measures import MEASURES, describe_crop, describe_seconds

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    report = evaluated.report
    title = f"Reconstruction of {report.image_count:,} images, {describe_crop(evaluated.provenance)}"
    _print_table(console, f"{title} (protocol: {report.protocol})", figure_rows(report))
    factor = report.downsampling_factor
    console.print(
        f"palette: {report.codebook_size:,} colours fitted to these very pictures, one for each {factor}x{factor} "
        "patch: the same bits per token as the tokenizer.",
        style="dim",
    )
    if evaluated.provenance["recipe"] and len(evaluated.comparison) > 2:
        _print_table(console, "Beside published figures", evaluated.comparison)
        for difference in evaluated.differences:
            say(f"measured otherwise than published: {difference}")
    for warning in evaluated.warnings:
        say(f"warning: {warning}")
    for measure, reason in report.not_measured.items():
        say(f"{MEASURES[measure].title} was not measured: {reason}")
    if report.infinite_psnr_count:
        say(f"{report.infinite_psnr_count} pictures came back exact: their infinite PSNR is left out.")
    if report.skipped:
        say(f"{len(report.skipped)} pictures skipped (unreadable or too small), the first: {report.skipped[0]}")
    say(f"seconds: {describe_seconds(evaluated.provenance['seconds'])}")
    pictures = ", ".join(map(str, evaluated.grids.values()))
    for what, path in (
        ("numbers", evaluated.json_path),
        ("table", evaluated.markdown_path),
        ("pictures", pictures),
    ):
        say(f"{what}: {path}")


def _print_table(console: Console, title: str, rows: list[list[str]]) -> None:
    """Rows of text, the first of them headings."""
    table = Table(title=title)
    for place, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if place else "left")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
