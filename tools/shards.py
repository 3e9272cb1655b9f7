"""`ibq shards`: folders of images to WebDataset tars."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

NAMED_SKIPS = 10

app = typer.Typer(help="Make WebDataset tars for training and evaluation.", no_args_is_help=True)


@app.callback()
def _shards() -> None:
    """Make WebDataset tars for training and evaluation."""


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="Folder with jpg, png or webp images, searched with its sub-folders.")],
    out: Annotated[Path, typer.Option(help="Folder for the tars; must not hold tars yet.")],
    prefix: Annotated[str, typer.Option(help="Tars are named PREFIX-000000.tar and so on.")] = "train",
    max_samples_per_shard: Annotated[int, typer.Option(help="Images in a tar, at most.")] = 10_000,
    max_bytes_per_shard: Annotated[
        int, typer.Option(help="A tar is closed once its files reach this size.")
    ] = 1_000_000_000,
    shorter_side: Annotated[
        int | None, typer.Option(help="Store larger images as JPEG with this shorter side, in pixels.")
    ] = None,
    quality: Annotated[int, typer.Option(help="JPEG quality of resized images, 1 to 100.")] = 95,
    classes_from_folders: Annotated[
        bool, typer.Option(help="Class = index of the top sub-folder; see classes.json.")
    ] = False,
    shuffle: Annotated[
        bool, typer.Option(help="Mix the images in a fixed order; otherwise they are sorted by path.")
    ] = True,
) -> None:
    """Pack a folder of images into WebDataset tars.

    A caption comes from a .txt file beside the image, a class from a .cls file (a number) or from its folder.

    Example: ibq shards pack photos --out shards/photos --shorter-side 256
    """
    import data

    console = Console(stderr=True)
    columns = TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("packing", total=None)
        report = data.pack(
            folder,
            out,
            prefix=prefix,
            max_samples_per_shard=max_samples_per_shard,
            max_bytes_per_shard=max_bytes_per_shard,
            shorter_side=shorter_side,
            quality=quality,
            classes_from_folders=classes_from_folders,
            shuffle=shuffle,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    typer.echo(f"packed {report.samples} images into {len(report.shards)} tars in {out}")
    if report.skipped:
        typer.echo(f"skipped {len(report.skipped)} that cannot be read:", err=True)
        for skipped in report.skipped[:NAMED_SKIPS]:
            typer.echo(f"  {skipped.source}: {skipped.reason}", err=True)
        if len(report.skipped) > NAMED_SKIPS:
            typer.echo(f"  and {len(report.skipped) - NAMED_SKIPS} more", err=True)
