"""`ibq reconstruct`: side-by-side pictures."""

from pathlib import Path
from typing import Annotated

import typer

from tools.progress import progress


def reconstruct(
    run: Annotated[
        Path, typer.Argument(help="A run's folder, a checkpoint's in it, a published .ckpt, or an export's folder.")
    ],
    images: Annotated[str, typer.Option(help="Folder of images, image, tar or tars, zip file.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    size: Annotated[
        str | None,
        typer.Option(
            help="Pixels of the crop, or 'original'.", show_default="the run's data.val_image_size, or image_size"
        ),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(help="cv2_bilinear, pil_antialias or adm_center_crop.", show_default="the run's data.resize"),
    ] = None,
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
    batch_size: Annotated[int, typer.Option(help="Pictures at a time; with --size original always 1.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Writes each picture beside its reconstruction, and one overview.

    Example: ibq reconstruct runs/quickstart --images my_photos --out pictures
    """
    from trainer.evaluation.write_reconstructions import write_reconstructions

    with progress("pictures reconstructed") as tell:
        written = write_reconstructions(
            run,
            images=images,
            out=out,
            image_size=size,
            resize=resize,
            weights=weights,
            batch_size=batch_size,
            device=device,
            on_progress=tell,
        )
    if written.skipped:
        typer.echo(f"{len(written.skipped)} pictures skipped (unreadable), the first: {written.skipped[0]}")
    typer.echo(f"{written.image_count} pictures in {out}, the first of them together in {written.overview_path}")
