"""The `ibq` command. Imports only typer, so that `ibq --help` is quick; each command imports what it needs."""

import contextlib
import sys

import typer

from tools import ablate, checkpoint, doctor, evaluate, quickstart, reconstruct, sample, shards, tokenize, train
from tools.bench import command as bench

# The packages' exceptions for mistakes of the user. They are looked up without importing the packages: if a package was
# not imported, it did not raise.
USER_ERRORS = (("data", "DataError"), ("model_zoo", "ModelError"), ("trainer", "TrainerError"))
# click's class; where click is depends on typer's version.
UsageError = typer.BadParameter.__base__

app = typer.Typer(
    name="ibq",
    help="Train discrete image tokenizers (IBQ), evaluate them, and prepare their data.\n\nExample: ibq quickstart",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for function in (
    quickstart.quickstart,
    train.train,
    train.resume,
    train.recipes,
    doctor.doctor,
    reconstruct.reconstruct,
    sample.sample,
    tokenize.tokenize,
    ablate.ablate,
):
    app.command()(function)
for name, module in (("evaluate", evaluate), ("checkpoint", checkpoint), ("shards", shards), ("bench", bench)):
    app.add_typer(module.app, name=name)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and exits: 0, 1 if a check failed, 2 after a mistake of the user, 75 after a signal to stop with
    the run saved, 130 after Ctrl-C, 128 + its number after another signal to stop."""
    arguments = sys.argv[1:] if arguments is None else arguments
    ending = contextlib.nullcontext()
    if arguments[:1] != ["doctor"]:  # which reports shadowed packages itself
        for shadow in doctor.shadowed_packages():
            _fail(f"Python imports {shadow.file} as `{shadow.package}` instead of ibq's package: {shadow.fix}")
        from data.stop_signals import ending_as_by_ctrl_c  # only now it is known that `data` is ours
        from data.text import accept_all_names

        accept_all_names()
        ending = ending_as_by_ctrl_c()
    try:
        with ending:
            sys.exit(app(arguments or ["--help"], prog_name="ibq", standalone_mode=False))
    except UsageError as error:
        message = error.format_message()
        if message.startswith("Usage:"):  # a group or command without arguments: the message is its help
            print(message, file=sys.stderr)
            sys.exit(2)
        _fail(f"{_printable(message).rstrip('.')} (see `{error.ctx.command_path} --help`)")
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        watchdog = sys.modules.get("trainer.watchdog")
        if watchdog and isinstance(error, watchdog.Stopped):
            sys.stderr.write(f"ibq: {_printable(str(error))}\n")
            sys.exit(error.status)
        imported = [(sys.modules[package], name) for package, name in USER_ERRORS if package in sys.modules]
        if not any(isinstance(error, getattr(package, name)) for package, name in imported):
            raise
        _fail(_printable(str(error)))


def _printable(text: str) -> str:
    """See `data.text`, which `ibq doctor` does without: Python may find another package called `data`."""
    text_module = sys.modules.get("data.text")
    return text_module.printable(text) if text_module else text


def _fail(message: str) -> None:
    sys.stderr.write(f"ibq: error: {message}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
