"""`ibq evaluate`: quality of reconstructions and of generated images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools import evaluate_generation
from tools.console import counted, print_table, progress
from tools.options import BatchSize, Device, Tokenizer, Weights

if TYPE_CHECKING:
    from trainer.evaluation.reconstruction_report import EvaluatedRun

app = typer.Typer(no_args_is_help=True, help="Evaluate a trained tokenizer or generator.")
app.command("generation")(evaluate_generation.generation)


@app.command(no_args_is_help=True)
def reconstruction(
    run: Tokenizer,
    images: Annotated[
        str | None,
        typer.Option(help="Folder of images, image, tar or tars, zip file.", show_default="the run's data.val"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Protocol of published results: eval_imagenet, eval_coco_zero_shot, ...", metavar="NAME"),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="auto (all whose weights files exist), all, or a list such as rfid,lpips_vgg.",
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
    weights: Weights = "ema",
    report: Annotated[
        Path | None,
        typer.Option(
            help="FILE.json; FILE.md and images are written beside it.",
            show_default="RUN/report.json; without a run NAME_reconstruction.json",
        ),
    ] = None,
    batch_size: BatchSize = 16,
    device: Device = "auto",
) -> None:
    """Measure rFID, LPIPS, PSNR, SSIM, L1 and codebook usage, beside published results and two baselines.

    In many processes: torchrun --nproc-per-node 8 -m tools evaluate reconstruction RUN --recipe eval_imagenet ...

    Example: ibq evaluate reconstruction runs/quickstart --images my_photos --size original
    """
    evaluate_and_print(
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


def evaluate_and_print(run: Path, **options) -> None:
    """Evaluates a tokenizer with a progress bar and prints the tables. Rewrites the run's report.html if the results
    went into the run's report.

    options: of `trainer.evaluation.evaluate_run.evaluate_run`.
    """
    from trainer.evaluation.evaluate_run import RUN_REPORT, evaluate_run
    from trainer.reports.report import write_report

    with progress("images evaluated") as on_progress:
        evaluated = evaluate_run(run, **options, on_progress=on_progress)
    if evaluated is None:  # another process prints the result
        return
    print_report(evaluated)
    if evaluated.json_path == run / RUN_REPORT:
        typer.echo(f"report: {write_report(run)}")


def print_report(evaluated: "EvaluatedRun") -> None:
    """Results beside baselines and published ones, warnings, what was not measured, and where the files are."""
    from trainer.evaluation.reconstruction_report import figure_rows
    from trainer.reports.measures import MEASURES, describe_crop, describe_seconds

    report = evaluated.report
    title = f"Reconstruction of {report.image_count:,} images, {describe_crop(evaluated.provenance)}"
    print_table(f"{title} (protocol: {report.protocol})", figure_rows(report))
    factor = report.downsampling_factor
    typer.echo(
        f"palette: {report.codebook_size:,} colours fitted to these images, one per {factor}x{factor} patch: "
        "the same bits per token as the tokenizer."
    )
    if evaluated.provenance["recipe"] and len(evaluated.comparison) > 2:
        print_table("Beside published results", evaluated.comparison)
        for difference in evaluated.differences:
            typer.echo(f"differs from the published protocol: {difference}")
    for warning in evaluated.warnings:
        typer.secho(f"warning: {warning}", fg="yellow")
    for measure, reason in report.not_measured.items():
        typer.echo(f"{MEASURES[measure].title} was not measured: {reason}")
    if report.infinite_psnr_count:
        exact = counted(report.infinite_psnr_count, "image")
        typer.echo(f"{exact} reconstructed exactly; their infinite PSNR is left out of the mean.")
    if report.skipped:
        skipped = counted(len(report.skipped), "image")
        typer.echo(f"{skipped} skipped (unreadable or too small), the first: {report.skipped[0]}")
    typer.echo(f"seconds: {describe_seconds(evaluated.provenance['seconds'])}")
    typer.echo(f"numbers: {evaluated.json_path}\ntable: {evaluated.markdown_path}")
    typer.echo(f"images: {', '.join(map(str, evaluated.grids.values()))}")
