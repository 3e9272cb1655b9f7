"""`ibq reconstruct`: images beside their reconstructions."""

from pathlib import Path
from typing import Annotated

import typer

from tools.console import BatchSize, Device, ImageSuffixes, Tokenizer, Weights, counted, echo, progress


def reconstruct(
    run: Tokenizer,
    images: Annotated[str, typer.Option(help="Folder of images, image, tar or tars, zip file.")],
    out: Annotated[
        Path,
        typer.Option(help="Folder for the results: new, empty, or of an earlier call, whose pictures it replaces."),
    ],
    size: Annotated[
        str | None,
        typer.Option(
            help="Pixels of the crop, sizes such as 384x640 (of several the nearest), or 'original'.",
            show_default="the run's data.val_image_size, buckets or image_size",
        ),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(help="cv2_bilinear, pil_antialias or adm_center_crop.", show_default="the run's data.resize"),
    ] = None,
    weights: Weights = "ema",
    batch_size: BatchSize = 16,
    device: Device = "auto",
    image: ImageSuffixes = None,
) -> None:
    """Write each image beside its reconstruction, and one overview.

    Example: ibq reconstruct runs/quickstart --images my_photos --out pictures
    """
    from trainer.evaluation.evaluate_run import write_reconstructions

    with progress("images reconstructed") as on_progress:
        written = write_reconstructions(
            run,
            images=images,
            out=out,
            image_size=size,
            resize=resize,
            weights=weights,
            batch_size=batch_size,
            device=device,
            image=image,
            on_progress=on_progress,
        )
    if written.skipped:
        echo(f"{counted(len(written.skipped), 'image')} skipped (unreadable), the first: {written.skipped[0]}")
    echo(f"{counted(written.image_count, 'image')} in {out}; overview of the first: {written.overview_path}")
