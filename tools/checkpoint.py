"""`ibq checkpoint`: published checkpoints in, models out, and what a source holds."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Reads published checkpoints, exports models, and says what a source holds.\n\n"
    "Example: ibq checkpoint info runs/mine",
    no_args_is_help=True,
)
SOURCE = "A run's folder, a checkpoint's in it, a published .ckpt, an export, or a name on the model hub."


class Layout(str, Enum):
    safetensors = "safetensors"
    published = "published"


Wanted = Annotated[str, typer.Option(help="all, ema or raw: averages, those that were trained, or both.")]


@app.command("import")
def import_command(
    file: Annotated[str, typer.Argument(metavar="FILE.ckpt", help="A published checkpoint, or its name on the hub.")],
    out: Annotated[Path, typer.Option(help="A new folder, or an empty one.")],
    weights: Wanted = "all",
) -> None:
    """Writes a published checkpoint as a folder of safetensors with its configuration, and accounts for every key.

    A generator's tokenizer, where it is in the file, comes to lie in OUT/tokenizer.

    Example: ibq checkpoint import IBQ-AR-B.ckpt --out models/ar_b
    """
    from trainer.jobs.export import import_published

    _tell(import_published(file, out, weights))


@app.command("export")
def export_command(
    source: Annotated[str, typer.Argument(help=SOURCE)],
    out: Annotated[Path, typer.Option(help="A new folder, or an empty one; of the published layout a new FILE.ckpt.")],
    layout: Annotated[
        Layout, typer.Option(help="Of the published code: one .ckpt that it reads.")
    ] = Layout.safetensors,
    weights: Wanted = "all",
) -> None:
    """Writes a model as a folder of safetensors with its configuration, or in the published layout.

    Example: ibq checkpoint export runs/mine --out models/mine

    For the published code: ibq checkpoint export runs/mine --layout published --out mine.ckpt
    """
    from trainer.jobs.export import export, export_published

    _tell((export if layout is Layout.safetensors else export_published)(source, out, weights))


@app.command("info")
def info_command(
    source: Annotated[str, typer.Argument(help=SOURCE)],
    json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Says what a source holds, after comparing its hashes: kind, step, sizes, weights, fingerprint.

    Example: ibq checkpoint info runs/mine/checkpoints/step_00001000 --json
    """
    from trainer.jobs.export import info

    found = info(source)
    if json:
        import json as to_json

        plain = {**found._asdict(), "models": [model._asdict() for model in found.models]}
        return typer.echo(to_json.dumps(plain, indent=1))
    typer.echo(f"{found.checkpoint}: {found.layout}")
    for model in found.models:
        beside = ", a discriminator beside them" if model.discriminator else ""
        typer.echo(f"{model.kind}: {model.parameters:,} parameters, fingerprint {model.fingerprint}")
        typer.echo(f"  weights: {' and '.join(model.weights)}{beside}")
        typer.echo(f"  step: {'unknown' if model.step is None else f'{model.step:,}'}")
        typer.echo(f"  {', '.join(f'{key}={value}' for key, value in model.config.items())}")
    if found.made_of:
        typer.echo(f"made of: {found.made_of}")
    typer.echo(f"verified: {found.verified}" if found.verified else f"no hashes in it; sha256 {found.sha256}")


def _tell(made) -> None:
    for line in (*made.summary, f"written: {made.out}"):
        typer.echo(line)
