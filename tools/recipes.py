"""`ibq recipes`."""

from pathlib import Path

import typer

RECIPES = Path(__file__).resolve().parent.parent / "model_zoo" / "recipes"


def recipes() -> None:
    """List recipes with a one-line description.

    Example: ibq recipes
    """
    # importlib.resources would import model_zoo.
    paths = sorted(RECIPES.rglob("*.yaml"))
    width = max(len(path.stem) for path in paths)
    for path in paths:
        description = path.read_text(encoding="utf-8").partition("\n")[0]
        typer.echo(f"{path.stem:<{width}}  {description.lstrip('# ')}")
