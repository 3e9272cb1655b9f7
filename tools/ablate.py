"""`ibq ablate`: trains and evaluates every row of a table of variants or baselines."""

import itertools
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from tools.console import Overrides, echo


def ablate(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="A table's name (see `ibq recipes`) or a .yaml file.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for runs and table.  [default: runs/TABLE]")] = None,
    seeds: Annotated[str, typer.Option(metavar="0,1,2", help="Each row is trained with each seed.")] = "0",
    rows: Annotated[str | None, typer.Option(metavar="NAME;NAME", help="Only these rows.")] = None,
    launch: Annotated[
        str,
        typer.Option(
            help="Command that starts training and evaluation, such as 'torchrun --nproc-per-node 8'.",
            show_default="this Python",
        ),
    ] = sys.executable,
    judge: Annotated[str, typer.Option(help="Options of `ibq evaluate reconstruction`, quoted.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the commands, for a scheduler.")] = False,
) -> None:
    """Train and evaluate every row of a table, and draw results beside the published ones. Running it again resumes.

    Example: ibq ablate quantizers data.train=tars data.val=imagenet/val --launch 'torchrun --nproc-per-node 8'
    """
    from trainer import TrainerError
    from trainer.files import writing
    from trainer.jobs import ablation as jobs
    from trainer.jobs.ablation_inputs import check_inputs_of_new

    ablation = jobs.load_ablation(table)
    out = out or Path("runs") / Path(table).stem
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError as error:
        raise TrainerError(f"--seeds {seeds} is not a list of integers such as 0,1,2") from error
    launcher, options = _split("--launch", launch), _split("--judge", judge)
    if not launcher or not shutil.which(launcher[0]):
        raise TrainerError(f"--launch {launch!r}: no such command; omit it to use this Python")
    if any(option.split("=")[0] == "--report" for option in options):
        raise TrainerError("--judge must not hold --report: each row has its own report, from which the table is made")
    named = [row.strip() for row in rows.split(";")] if rows else None
    cells = jobs.cells_of(ablation, named, numbers, overrides or [], out)
    # The table shows all finished cells, whichever rows are asked for. Checks everything before training starts.
    table_cells = jobs.cells_of(ablation, None, sorted({*numbers, *jobs.existing_seeds(out)}), overrides or [], out)
    _check(ablation, cells, table_cells, judge, out)
    commands = [list(_commands(cell, launcher, judge, options)) for cell in cells]
    if dry_run:
        for command in itertools.chain(*commands):
            echo(shlex.join(command))
        return
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    for number, (cell, of_cell) in enumerate(zip(cells, commands, strict=True), start=1):
        if of_cell:
            if not jobs.is_begun(cell):
                check_inputs_of_new(cell, [other for other in table_cells if jobs.is_begun(other)])
            with writing(out):
                jobs.unmark_evaluated(cell)
        for command in of_cell:
            echo(f"[{number}/{len(cells)}] {shlex.join(command)}")
            if status := _run(command):
                raise TrainerError(f"row {cell.row!r}, seed {cell.seed}, ended with status {status}: see above")
        if of_cell:
            with writing(out):
                jobs.mark_evaluated(cell, judge)
    _write_table(ablation, table_cells, judge, out)


def _check(ablation, cells: list, table_cells: list, judge: str, out: Path) -> None:
    """Raises TrainerError for all that can be known to be wrong before anything is trained."""
    from trainer import TrainerError
    from trainer.jobs import ablation as jobs
    from trainer.jobs.ablation_inputs import check_same_inputs
    from trainer.recipes import load_recipe

    for cell in cells:
        if load_recipe(cell.recipe, cell.overrides).task != "tokenizer":
            raise TrainerError(
                f"row {cell.row!r}: {cell.recipe} is a recipe for a generator, and `ibq ablate` evaluates "
                "reconstructions: name a tokenizer's recipe"
            )
    for cell in table_cells:
        jobs.is_trained(cell)
    jobs.check_table(ablation, out)
    jobs.check_others(cells, table_cells, judge)
    check_same_inputs([cell for cell in table_cells if jobs.is_begun(cell)])


def _write_table(ablation, cells: list, judge: str, out: Path) -> None:
    """Writes and prints the table of all evaluated cells, and names those that have begun and are not in it."""
    from trainer.files import writing
    from trainer.jobs import ablation as jobs
    from trainer.jobs.ablation_inputs import check_same_inputs

    evaluated = [cell for cell in cells if jobs.is_evaluated(cell, judge)]
    check_same_inputs(evaluated)
    with writing(out):
        written = jobs.write_table(ablation, evaluated, out)
    echo("\n".join([written[1].read_text(encoding="utf-8"), *map(str, written)]))
    if missing := [cell for cell in cells if cell not in evaluated and jobs.is_begun(cell)]:
        names = "; ".join(f"{cell.row} (seed {cell.seed})" for cell in missing)
        echo(f"not in the table, since not yet trained and evaluated: {names}")


def _commands(cell, launcher: list[str], judge: str, options: list[str]) -> Iterator[list[str]]:
    """The commands that a cell still needs: training, then evaluation."""
    from trainer.jobs import ablation as jobs

    trained = jobs.is_trained(cell)
    if not trained:
        arguments = ["--resume", str(cell.run)] if jobs.is_begun(cell) else [cell.recipe, *cell.overrides]
        yield [*launcher, "-m", "trainer", *arguments]
    if not trained or not jobs.is_evaluated(cell, judge):
        report = ["--report", str(cell.report)]
        yield [*launcher, "-m", "tools", "evaluate", "reconstruction", str(cell.run), *report, *options]


def _run(command: list[str]) -> int:
    """The command's exit status. Where this process is to stop, so is the command, which saves before it ends."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # leaving the context waits for it
            raise


def _split(option: str, text: str) -> list[str]:
    """Splits as a shell does. Raises TrainerError."""
    from trainer import TrainerError

    try:
        return shlex.split(text)
    except ValueError as error:
        raise TrainerError(f"{option} {text!r}: {error}") from error
