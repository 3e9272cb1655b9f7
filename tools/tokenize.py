"""`ibq tokenize`: images to token shards."""

from pathlib import Path
from typing import Annotated

import typer

from tools.console import BatchSize, Device, ImageSuffixes, Weights, counted, echo, progress


def tokenize(
    run: Annotated[
        Path, typer.Argument(help="A tokenizer's run or one of its checkpoints, a .ckpt, an export, or a hub name.")
    ],
    images: Annotated[str, typer.Option(help="Folder of images, zip file, tars, pattern or URL, as in data.train.")],
    out: Annotated[Path, typer.Option(help="Folder for the token shards.")],
    views: Annotated[
        str, typer.Option(metavar="KIND", help="Views of each image: original, flip (both orientations) or ten-crop.")
    ] = "original",
    size: Annotated[
        str | None,
        typer.Option(
            help="Pixels of a square, such as 256, which every image is resized to. Or sizes such as "
            "384x640,512x512,640x384: each image has the one that keeps most of it, and too small ones are left out.",
            show_default="the run's data.image_size",
        ),
    ] = None,
    pixels: Annotated[
        str | None,
        typer.Option(help="Sides of squares, such as 512: in place of --size, sizes of about as many pixels."),
    ] = None,
    max_aspect: Annotated[
        float | None, typer.Option(help="With --pixels: largest ratio of a size's sides.", show_default="2")
    ] = None,
    max_enlargement: Annotated[
        float | None,
        typer.Option(
            help="With several sizes: how far an image may be enlarged; smaller ones are left out.",
            show_default="the run's data.max_enlargement",
        ),
    ] = None,
    weights: Weights = "ema",
    source: Annotated[
        str, typer.Option(metavar="NAME", help="Entry of data/sources.yaml which says where captions and classes are.")
    ] = "images",
    classes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Number the class folders as this classes.json."),
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Largest number of samples in a tar.")] = 10_000,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    image: ImageSuffixes = None,
    workers: Annotated[
        int | None, typer.Option(help="Decoding threads in each process.  [default: a share of the cores]")
    ] = None,
) -> None:
    """Write the codes of images as tars that a generator trains on. Running it again resumes; training reads no folder
    that is not finished.

    In many processes: torchrun --nproc-per-node 8 -m tools tokenize RUN --images PATH --out DIR

    Example: ibq tokenize runs/mine --images imagenet/train --source imagenet --views ten-crop --out tokens/imagenet
    """
    from trainer.jobs.tokenize import tokenize

    with progress("images tokenized") as on_progress:
        done = tokenize(
            run,
            images=images,
            out=out,
            views=views,
            image_size=size,
            pixels=pixels,
            max_aspect=max_aspect,
            max_enlargement=max_enlargement,
            weights=weights,
            source=source,
            classes=classes,
            samples_per_shard=samples_per_shard,
            batch_size=batch_size,
            device=device,
            workers=workers,
            image=image,
            on_progress=on_progress,
            on_note=echo,
        )
    if done is None:  # another process prints the result
        return
    if done.skipped:
        echo(f"{counted(len(done.skipped), 'image')} skipped (see {out}/skipped.jsonl), the first: {done.skipped[0]}")
    before = "" if done.made == done.samples else f", {done.samples - done.made:,} of them existed already"
    tars = counted(done.shards, "tar")
    echo(f"{counted(done.samples, 'sample')} of tokenizer {done.tokenizer} in {tars} in {out}{before}")
    if len(done.grids) > 1:
        counts = ", ".join(f"{grid} ({count:,})" for grid, count in done.grids.items())
        most = max(done.grids, key=done.grids.get).replace("x", ",")
        echo(f"grids: {counts}: train with 'model.grids=[{','.join(done.grids)}]' 'model.grid=[{most}]'")
    else:
        for grid in done.grids:
            echo(f"train with 'model.grid=[{grid.replace('x', ',')}]'")
