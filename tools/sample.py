"""`ibq sample`: images from a generator."""

from pathlib import Path
from typing import Annotated

import typer

from tools.console import BatchSize, Device, counted, echo, progress

Classes = Annotated[
    str | None,
    typer.Option(metavar="1,2,7-9", help="Classes, or 'none' for no class.  [default: all that were trained]"),
]
Out = Annotated[Path | None, typer.Option(help="Folder of PNGs, FILE.npz or FILE.png.  [default: RUN/sampled]")]
Size = Annotated[
    str | None,
    typer.Option(
        metavar="HEIGHTxWIDTH", help="Pixels of the images, such as 384x640.  [default: those of the run's model.grid]"
    ),
]
Schedule = Annotated[str | None, typer.Option(help="constant, linear or cosine.  [default: the run's]")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k most likely codes; 0 is all.  [default: the run's]")]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the most likely codes with this total probability.  [default: the run's]"),
]
Source = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Tokenizer's run, .ckpt, export or hub name.  [default: the run's]"),
]


def sample(
    run: Annotated[
        Path, typer.Argument(help="A generator's run or one of its checkpoints, a .ckpt, an export, or a hub name.")
    ],
    classes: Classes = None,
    count: Annotated[int, typer.Option(help="Number of images; classes alternate.")] = 16,
    out: Out = None,
    size: Size = None,
    seed: Annotated[int, typer.Option(help="Seed of the images.")] = 0,
    temperature: Annotated[float | None, typer.Option(help="Above 0.  [default: the run's]")] = None,
    guidance: Annotated[float | None, typer.Option(help="At least 0; 1 is none.  [default: the run's]")] = None,
    guidance_schedule: Schedule = None,
    top_k: TopK = None,
    top_p: TopP = None,
    batch_size: BatchSize = 32,
    tokenizer: Source = None,
    weights: Annotated[str | None, typer.Option(help="ema or raw.  [default: ema if the run has it]")] = None,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    compile: Annotated[bool, typer.Option("--compile", help="Use torch.compile; worthwhile for many images.")] = False,
) -> None:
    """Sample images from a generator. Running it again resumes.

    In many processes: torchrun --nproc-per-node 8 -m tools sample RUN --count 50000 --out FILE.npz

    Example: ibq sample runs/generator --classes 207,360-362 --count 32 --guidance 2 --out dogs.png
    """
    from trainer.jobs.sample import sample

    settings = dict(temperature=temperature, guidance=guidance, guidance_schedule=guidance_schedule)
    settings |= dict(top_k=top_k, top_p=top_p)
    with progress("images sampled") as on_progress:
        sampled = sample(
            run,
            classes=classes,
            count=count,
            out=out,
            size=size,
            seed=seed,
            sampling={name: value for name, value in settings.items() if value is not None},
            batch_size=batch_size,
            tokenizer=tokenizer,
            weights=weights,
            device=device,
            precision=precision,
            compile=compile,
            on_progress=lambda done, count, per_second: on_progress(done, count, f"{per_second:,.2f} images/s"),
        )
    if sampled is None:  # another process prints the result
        return
    if sampled.made:
        echo(f"{counted(sampled.made, 'image')} sampled, {sampled.images_per_second:,.2f} images/s")
    else:
        echo("all images existed already")
    echo(f"{counted(sampled.images, 'image')}: {sampled.out}\nreport: {sampled.report}")
