"""`ibq checkpoint`: imports published checkpoints, exports models, and describes both."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tools.console import echo

app = typer.Typer(
    help="Import published checkpoints, export models, and describe both.\n\nExample: ibq checkpoint info runs/mine",
    no_args_is_help=True,
)
SOURCE = (
    "A run's folder or one of its checkpoints, a file of weights (.ckpt, .pt), Emu3.5's folder, an export, or a name "
    "on the hub."
)


Wanted = Annotated[str, typer.Option(help="all, ema (averages) or raw (as trained).")]


@app.command("import")
def import_command(
    file: Annotated[
        str,
        typer.Argument(metavar="FILE.ckpt", help="A published checkpoint, Emu3.5's folder, or a name on the hub."),
    ],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    weights: Wanted = "all",
) -> None:
    """Convert a published checkpoint to a folder of safetensors with its configuration, and account for every key.

    If a generator's file contains its tokenizer, that is written to OUT/tokenizer.

    Example: ibq checkpoint import IBQ-AR-B.ckpt --out models/ar_b
    """
    from trainer.jobs.export import import_published

    _print(import_published(file, out, weights))


@app.command("export")
def export_command(
    source: Annotated[str, typer.Argument(help=SOURCE)],
    out: Annotated[Path, typer.Option(help="A new or empty folder; with --layout published a new FILE.ckpt.")],
    layout: Annotated[
        Literal["safetensors", "published", "emu"],
        typer.Option(
            help="published: one .ckpt for IBQ's published code. emu: a tokenizer's folder for Emu3.5's code."
        ),
    ] = "safetensors",
    weights: Wanted = "all",
) -> None:
    """Write a model as a folder of safetensors with its configuration, or in a published layout.

    Example: ibq checkpoint export runs/mine --out models/mine

    For the published code: ibq checkpoint export runs/mine --layout published --out mine.ckpt
    """
    from trainer.jobs.export import export, export_emu, export_published

    write = {"safetensors": export, "published": export_published, "emu": export_emu}[layout]
    _print(write(source, out, weights))


@app.command("info")
def info_command(
    source: Annotated[str, typer.Argument(help=SOURCE)],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Verify hashes, then print kind, step, sizes, weights, fingerprint and the classes of a generator.

    Example: ibq checkpoint info runs/mine/checkpoints/step_00001000 --json
    """
    from trainer.jobs.export import info

    found = info(source)
    if json:
        import json as to_json

        plain = {**found._asdict(), "models": [model._asdict() for model in found.models]}
        return echo(to_json.dumps(plain, indent=1))
    echo(f"{found.checkpoint}: {found.layout}")
    for model in found.models:
        beside = ", a discriminator beside them" if model.discriminator else ""
        echo(f"{model.kind}: {model.parameters:,} parameters, fingerprint {model.fingerprint}")
        echo(f"  weights: {' and '.join(model.weights)}{beside}")
        echo(f"  step: {'unknown' if model.step is None else f'{model.step:,}'}")
        for line in model.trained_on():
            echo(f"  {line}")
        echo(f"  {', '.join(f'{key}={value}' for key, value in model.config.items())}")
    if found.made_of:
        echo(f"made of: {found.made_of}")
    echo(f"verified: {found.verified}" if found.verified else f"no hashes in it; sha256 {found.sha256}")


def _print(made) -> None:
    for line in (*made.summary, f"written: {made.out}"):
        echo(line)
