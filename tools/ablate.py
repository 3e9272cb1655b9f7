"""`ibq ablate`: a table of comparisons by one command."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def ablate(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="A table's name (see `ibq recipes`) or a .yaml file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the table's in all rows.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for runs and table.  [default: runs/TABLE]")] = None,
    seeds: Annotated[str, typer.Option(metavar="0,1,2", help="Each row is trained with each.")] = "0",
    rows: Annotated[str | None, typer.Option(metavar="NAME;NAME", help="These rows only.")] = None,
    launch: Annotated[
        str,
        typer.Option(
            help="What starts training and judging, such as 'torchrun --nproc-per-node 8'.", show_default="this Python"
        ),
    ] = sys.executable,
    judge: Annotated[str, typer.Option(help="Options of `ibq evaluate reconstruction`, in quotes.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands, for a scheduler; run none.")] = False,
) -> None:
    """Trains every row of a table, judges each alike, and draws figures and curves beside the published ones.

    The same command goes on where a former one ended; runs that are there are not trained again.

    Example: ibq ablate quantizers data.train=tars data.val=imagenet/val --launch 'torchrun --nproc-per-node 8'
    """
    from trainer import TrainerError
    from trainer.jobs.ablation import (
        cells_of,
        is_begun,
        is_judged,
        is_trained,
        load_ablation,
        note_judged,
        seeds_there,
        write_table,
    )
    from trainer.jobs.resumable import writing
    from trainer.recipes import load_recipe

    ablation = load_ablation(table)
    out = out or Path("runs") / Path(table).stem
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError as error:
        raise TrainerError(f"--seeds {seeds} are no whole numbers such as 0,1,2") from error
    launcher, options = _words("--launch", launch), _words("--judge", judge)
    if not launcher or not shutil.which(launcher[0]):
        raise TrainerError(f"--launch {launch!r}: there is no such command; leave it out for this Python")
    named = [row.strip() for row in rows.split(";")] if rows else None
    cells = cells_of(ablation, named, numbers, overrides or [], out)
    # A mistake is found before anything is trained; the table is of all that is there, whichever rows are asked for.
    for cell in cells:
        load_recipe(ablation.recipe, cell.overrides)
    table_cells = cells_of(ablation, None, sorted({*numbers, *seeds_there(out)}), overrides or [], out)
    for cell in table_cells:
        is_trained(ablation, cell)
    if not dry_run:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(cells, start=1):
        commands = []
        if not is_trained(ablation, cell):
            resumed = ["--resume", str(cell.run)] if is_begun(cell) else [ablation.recipe, *cell.overrides]
            commands.append([*launcher, "-m", "trainer", *resumed])
        if commands or not is_judged(cell, judge):
            report = ["--report", str(cell.report)]
            commands.append([*launcher, "-m", "tools", "evaluate", "reconstruction", str(cell.run), *report, *options])
        for command in commands:
            typer.echo(shlex.join(command) if dry_run else f"[{number}/{len(cells)}] {shlex.join(command)}")
            if not dry_run and (status := subprocess.run(command, check=False).returncode):
                raise TrainerError(f"row {cell.row!r}, seed {cell.seed}, ended with status {status}: see above")
        if commands and not dry_run:
            with writing(out):
                note_judged(cell, judge)
    if not dry_run:
        with writing(out):
            written = write_table(ablation, [cell for cell in table_cells if is_judged(cell, judge)], out)
        typer.echo(written[1].read_text())
        typer.echo("\n".join(map(str, written)))


def _words(option: str, text: str) -> list[str]:
    """As a shell cuts them. Raises TrainerError."""
    from trainer import TrainerError

    try:
        return shlex.split(text)
    except ValueError as error:
        raise TrainerError(f"{option} {text!r}: {error}") from error
