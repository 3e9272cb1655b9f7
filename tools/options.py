"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the recipe's.")]
Tokenizer = Annotated[
    Path, typer.Argument(help="A run's folder or one of its checkpoints, a published .ckpt, or an export's folder.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Weights = Annotated[str, typer.Option(help="ema or raw.")]
BatchSize = Annotated[int, typer.Option(help="Images in a batch, in each process.")]
