"""`ibq train`, `ibq resume` and `ibq recipes`."""

from pathlib import Path
from typing import Annotated

import typer

from tools.console import Overrides, echo

RECIPES = Path(__file__).resolve().parent.parent / "model_zoo" / "recipes"


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe's name (see `ibq recipes`) or the path of a .yaml file.")
    ],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print recipe, mesh, batch and the memory of each process.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --dry-run: number of processes of the run.")
    ] = None,
) -> None:
    """Train a recipe in one process.

    In many processes: torchrun --nproc-per-node 8 -m trainer RECIPE [KEY=VALUE]...

    Example: ibq train debug run=runs/mine optimizer.lr=2e-4

    Memory of each of 64 processes: ibq train ibq_262144 --dry-run --processes 64 engine.config=zero3
    """
    if dry_run:
        from trainer.dry_run import dry_run as print_memory

        return print_memory(recipe, overrides or [], processes)
    if processes is not None:
        raise typer.BadParameter("--processes needs --dry-run; to train in many processes use torchrun")
    from trainer import loop

    loop.train(recipe, overrides or [])


def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's folder, or one of its checkpoints.")],
    overrides: Overrides = None,
) -> None:
    """Resume a run from its newest complete checkpoint, or from the checkpoint given.

    The number of processes and the engine may change: torchrun --nproc-per-node 8 -m trainer --resume RUN

    Example: ibq resume runs/mine trainer.max_steps=20000
    """
    from trainer import loop

    loop.resume(run, overrides or [])


def recipes() -> None:
    """List recipes with a one-line description.

    Example: ibq recipes
    """
    # importlib.resources would import model_zoo.
    paths = sorted(RECIPES.rglob("*.yaml"))
    width = max(len(path.stem) for path in paths)
    for path in paths:
        description = path.read_text(encoding="utf-8").partition("\n")[0]
        echo(f"{path.stem:<{width}}  {description.lstrip('# ')}")
