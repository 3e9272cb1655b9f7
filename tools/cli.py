"""The `ibq` command. Only typer is imported here, so that `ibq --help` is quick; each command imports what it needs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tools import ablate, checkpoint, evaluate, reconstruct, sample, shards, tokenize
from tools import doctor as doctor_tool
from tools.bench import command as bench

# Each is the package's one exception for mistakes of the user. They are compared without importing the packages: an
# exception whose package was never imported cannot have been raised.
USER_ERRORS = (("data", "DataError"), ("model_zoo", "ModelError"), ("trainer", "TrainerError"))
# click's class, wherever this version of typer keeps click.
UsageError = typer.BadParameter.__base__

app = typer.Typer(
    name="ibq",
    help="Trains discrete image tokenizers (IBQ), judges them, and prepares their data.\n\nExample: ibq quickstart",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the recipe's.")]


@app.command()
def quickstart(overrides: Overrides = None) -> None:
    """Trains a small tokenizer on real photographs, then a generator on its codes, and judges the tokenizer.

    Packs the photographs first, nothing is downloaded; at the end it says where the pictures and the report are.
    Settings that begin with `generator.` are the generator's.

    Example: ibq quickstart trainer.max_steps=200 generator.trainer.max_steps=50
    """
    from tools.quickstart import quickstart

    quickstart(overrides or [])


@app.command("train")
def train_command(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe's name (see `ibq recipes`) or the path of a .yaml file.")
    ],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train nothing; print recipe, mesh, batch and each process's memory.")
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --dry-run: of how many processes the run would be.")
    ] = None,
) -> None:
    """Trains a recipe in one process.

    In many: torchrun --nproc-per-node 8 -m trainer RECIPE [KEY=VALUE]...

    Example: ibq train debug run=runs/mine optimizer.lr=2e-4

    What 64 processes would hold, found out here: ibq train ibq_262144 --dry-run --processes 64 engine.config=zero3
    """
    if dry_run:
        from trainer.dry_run import dry_run as plan

        return plan(recipe, overrides or [], processes)
    if processes is not None:
        raise typer.BadParameter("--processes is for --dry-run; torchrun starts many processes")
    from trainer.loop import train

    train(recipe, overrides or [])


@app.command("resume")
def resume_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's folder, or that of one of its checkpoints.")],
    overrides: Overrides = None,
) -> None:
    """Goes on from a run's newest complete checkpoint, or from the very checkpoint that is named.

    Any number of processes under any engine may go on: torchrun --nproc-per-node 8 -m trainer --resume RUN

    Example: ibq resume runs/mine trainer.max_steps=20000
    """
    from trainer.loop import resume

    resume(run, overrides or [])


@app.command()
def recipes() -> None:
    """Lists the recipes, each with the first line of its story.

    Example: ibq recipes
    """
    # Not through importlib.resources, which would import model_zoo and with it torch to list some file names.
    paths = sorted((Path(__file__).resolve().parent.parent / "model_zoo" / "recipes").rglob("*.yaml"))
    width = max(len(path.stem) for path in paths)
    for path in paths:
        story = path.read_text(encoding="utf-8").partition("\n")[0]
        typer.echo(f"{path.stem:<{width}}  {story.lstrip('# ')}")


@app.command()
def doctor() -> None:
    """Says what this machine has, what is missing, and the mend.

    Exit status 1 where something is a problem.

    Example: ibq doctor
    """
    if not doctor_tool.doctor():
        raise typer.Exit(1)


app.command()(reconstruct.reconstruct)
app.command()(sample.sample)
app.command()(tokenize.tokenize)
app.command()(ablate.ablate)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(shards.app, name="shards")
app.add_typer(bench.app, name="bench")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and exits: 0, 1 where a check failed, 2 after a mistake of the user, 75 after SIGTERM with a
    run saved, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] != ["doctor"]:  # which reports them itself, among the rest
        for shadow in doctor_tool.shadowed_packages():
            _fail(f"Python imports {shadow.file} as `{shadow.package}`, not ibq's own package: {shadow.mend}")
    try:
        sys.exit(app(arguments or ["--help"], prog_name="ibq", standalone_mode=False))
    except UsageError as error:
        message = error.format_message()
        if message.startswith("Usage:"):  # a group or command without arguments: the message is its help
            print(message, file=sys.stderr)
            sys.exit(2)
        _fail(f"{message.rstrip('.')} (see `{error.ctx.command_path} --help`)")
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        guards = sys.modules.get("trainer.watchdog")
        if guards and isinstance(error, guards.Stopped):
            sys.stderr.write(f"ibq: {error}\n")
            sys.exit(guards.STOPPED)
        if not _is_user_error(error):
            raise
        _fail(str(error))


def _is_user_error(error: Exception) -> bool:
    classes = [getattr(sys.modules.get(package), name, ()) for package, name in USER_ERRORS]
    return any(isinstance(error, error_class) for error_class in classes)


def _fail(message: str) -> None:
    sys.stderr.write(f"ibq: error: {message}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
