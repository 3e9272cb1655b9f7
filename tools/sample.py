"""`ibq sample`: images of a generator."""

from pathlib import Path
from typing import Annotated

import typer

from tools.progress import progress


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def sample(
    run: Annotated[Path, typer.Argument(help="A generator's run, a checkpoint in it, a .ckpt, export or hub name.")],
    classes: Annotated[
        str | None, typer.Option(metavar="1,2,7-9", help="Or 'none', for images of no class.  [default: all]")
    ] = None,
    count: Annotated[int, typer.Option(help="Images; the classes take turns.")] = 16,
    out: Annotated[
        Path | None, typer.Option(help="Folder of PNGs, FILE.npz or FILE.png.  [default: RUN/sampled]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed, other images.")] = 0,
    temperature: Annotated[float | None, typer.Option(help="Above 0.  [default: the run's]")] = None,
    guidance: Annotated[float | None, typer.Option(help="From 0; 1 is none.  [default: the run's]")] = None,
    guidance_schedule: Annotated[
        str | None, typer.Option(help="constant, linear or cosine.  [default: the run's]")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Likeliest codes; 0: all.  [default: the run's]")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Probability of the likeliest codes.  [default: the run's]")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time, in each process.")] = 32,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Its run, .ckpt, export or hub name.  [default: the run's]")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="ema or raw.  [default: ema where the run keeps it]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    compile: Annotated[bool, typer.Option("--compile", help="By torch.compile; pays for many images.")] = False,
) -> None:
    """Samples images of a generator. The same command goes on where a former one ended.

    In many processes: torchrun --nproc-per-node 8 -m tools sample RUN --count 50000 --out FILE.npz

    Example: ibq sample runs/generator --classes 207,360-362 --count 32 --guidance 2 --out dogs.png
    """
    from trainer.jobs.sample import sample

    asked = {
        "temperature": temperature,
        "guidance": guidance,
        "guidance_schedule": guidance_schedule,
        "top_k": top_k,
        "top_p": top_p,
    }
    with progress("images sampled") as tell:
        sampled = sample(
            run,
            classes=classes,
            count=count,
            out=out,
            seed=seed,
            sampling={name: value for name, value in asked.items() if value is not None},
            batch_size=batch_size,
            tokenizer=tokenizer,
            weights=weights,
            device=device,
            precision=precision,
            compile=compile,
            on_progress=lambda done, count, per_second: tell(done, count, f"{per_second:,.2f} images/s"),
        )
    if sampled is None:  # another process tells
        return
    if sampled.made:
        typer.echo(f"{counted(sampled.made, 'image')} sampled, {sampled.images_per_second:,.2f} images/s")
    else:
        typer.echo("everything was there already")
    typer.echo(f"{counted(sampled.images, 'image')}: {sampled.out}\nreport: {sampled.report}")
