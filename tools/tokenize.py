"""`ibq tokenize`: images to token shards."""

from pathlib import Path
from typing import Annotated

import typer

from tools.progress import progress
from tools.sample import counted


def tokenize(
    run: Annotated[Path, typer.Argument(help="A tokenizer's run, a checkpoint in it, a .ckpt, export or hub name.")],
    images: Annotated[str, typer.Option(help="Folder of images, zip file, tars, pattern or URL, as data.train.")],
    out: Annotated[Path, typer.Option(help="Folder for the token shards.")],
    views: Annotated[
        str, typer.Option(metavar="KIND", help="Of each image: original, flip (and mirrored) or ten-crop.")
    ] = "original",
    size: Annotated[int | None, typer.Option(help="Pixels of a view.  [default: the run's data.image_size]")] = None,
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema",
    source: Annotated[
        str, typer.Option(metavar="NAME", help="Entry of data/sources.yaml: where captions and classes are.")
    ] = "images",
    samples_per_shard: Annotated[int, typer.Option(help="At most.")] = 10_000,
    batch_size: Annotated[int, typer.Option(help="Views at a time, in each process.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Threads that decode, in each process.  [default: a share of the cores]")
    ] = None,
) -> None:
    """Writes the codes of images as tars that a generator trains on. The same command goes on where a former one ended.

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
            weights=weights,
            source=source,
            samples_per_shard=samples_per_shard,
            batch_size=batch_size,
            device=device,
            workers=workers,
            on_progress=on_progress,
        )
    if done is None:  # another process tells
        return
    if done.skipped:
        typer.echo(
            f"{counted(len(done.skipped), 'image')} skipped (see {out}/skipped.jsonl), the first: {done.skipped[0]}"
        )
    before = "" if done.made == done.samples else f", {done.samples - done.made:,} of them were there already"
    tars = counted(done.shards, "tar")
    typer.echo(f"{counted(done.samples, 'sample')} of tokenizer {done.tokenizer} in {tars} in {out}{before}")
