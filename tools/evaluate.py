"""`ibq evaluate`: quality of reconstructions and of generated images."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.console import BatchSize, Device, ImageSuffixes, Tokenizer, Weights, counted, echo, print_table, progress

if TYPE_CHECKING:
    from trainer.evaluation.generation_report import EvaluatedGeneration
    from trainer.evaluation.reconstruction_report import EvaluatedRun
    from trainer.evaluation.sweep import Sweep

app = typer.Typer(no_args_is_help=True, help="Evaluate a trained tokenizer or generator.")

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


@app.command()
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
            print_generation(evaluated)
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
            help="Pixels of the crop, sizes such as 384x640 (of several the nearest), or 'original'.",
            show_default="the recipe's, or the run's data.val_image_size, buckets or image_size; without a run 256",
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
    image: ImageSuffixes = None,
) -> None:
    """Measure rFID, LPIPS, PSNR, SSIM, L1 and codebook usage, beside published results and two baselines.

    In many processes: torchrun --nproc-per-node 8 -m tools evaluate reconstruction RUN --recipe eval_imagenet ...

    Example: ibq evaluate reconstruction runs/quickstart --images my_photos --size original
    """
    from trainer.evaluation.evaluate_run import RUN_REPORT, evaluate_run
    from trainer.reports.report import write_report

    with progress("images evaluated") as on_progress:
        evaluated = evaluate_run(
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
            image=image,
            on_progress=on_progress,
        )
    if evaluated is None:  # another process prints the result
        return
    print_reconstruction(evaluated)
    if evaluated.json_path == run / RUN_REPORT:
        echo(f"report: {write_report(run)}")


def print_reconstruction(evaluated: "EvaluatedRun") -> None:
    """Results beside baselines and published ones, warnings, what was not measured, and where the files are."""
    from trainer.evaluation.reconstruction_report import figure_rows
    from trainer.reports.measures import MEASURES, describe_crop, describe_seconds

    report = evaluated.report
    title = f"Reconstruction of {report.image_count:,} images, {describe_crop(evaluated.provenance)}"
    print_table(f"{title} (protocol: {report.protocol})", figure_rows(report))
    echo(_describe_palette(report.codebook_size, report.downsampling_factor))
    if evaluated.provenance["recipe"] and len(evaluated.comparison) > 2:
        print_table("Beside published results", evaluated.comparison)
        for difference in evaluated.differences:
            echo(f"differs from the published protocol: {difference}")
    _print_warnings(evaluated.warnings)
    for measure, reason in report.not_measured.items():
        echo(f"{MEASURES[measure].title} was not measured: {reason}")
    if report.infinite_psnr_count:
        exact = counted(report.infinite_psnr_count, "image")
        echo(f"{exact} reconstructed exactly; their infinite PSNR is left out of the mean.")
    if report.skipped:
        skipped = counted(len(report.skipped), "image")
        echo(f"{skipped} skipped (unreadable or too small), the first: {report.skipped[0]}")
    echo(f"seconds: {describe_seconds(evaluated.provenance['seconds'])}")
    echo(f"numbers: {evaluated.json_path}\ntable: {evaluated.markdown_path}")
    echo(f"images: {', '.join(map(str, evaluated.grids.values()))}")


def _describe_palette(codes: int, factor: int) -> str:
    from trainer.reports.measures import ALL_COLORS, has_fitted_palette

    where = f"one per {factor}x{factor} patch"
    if has_fitted_palette(codes):
        return f"palette: {codes:,} colours fitted to these images, {where}: the same bits per token as the tokenizer."
    bits = f"24 bits per token, and the tokenizer has {math.log2(codes):.4g}"
    return f"palette: all {ALL_COLORS:,} colours, {where}: {bits}."


def print_generation(evaluated: "EvaluatedGeneration") -> None:
    """Results beside published ones, warnings, and where the files are."""
    report = evaluated.report
    print_table(f"{report.sample_count:,} samples (protocol: {report.protocol})", evaluated.comparison)
    if report.inception_score is not None:
        echo(f"standard deviation of the Inception score over its splits: {report.inception_score_std:.2f}")
    echo(f"gFID's reference: {report.reference_statistics}")
    _print_warnings(report.warnings)
    for measure, reason in report.not_measured.items():
        echo(f"{measure} was not measured: {reason}")
    echo(f"numbers: {evaluated.json_path}\ntable: {evaluated.markdown_path}")


def print_sweep(swept: "Sweep") -> None:
    """A row for each setting, warnings, and where the files are."""
    print_table(f"{swept.evaluated[0].report.sample_count:,} samples for each setting", swept.table)
    _print_warnings([warning for one in swept.evaluated for warning in one.report.warnings])
    echo(f"chart: {swept.chart_path}\nnumbers: {swept.json_path}\ntable: {swept.markdown_path}")


def _print_warnings(warnings: list[str]) -> None:
    from data.text import printable

    for warning in dict.fromkeys(warnings):
        typer.secho(f"warning: {printable(warning)}", fg="yellow")
