"""One of the processes of a training run: ``torchrun --nproc-per-node 8 -m trainer RECIPE [KEY=VALUE]...``."""

import os
import sys

from data import DataError
from data.text import accept_all_names, printable
from model_zoo import ModelError
from trainer import TrainerError
from trainer.watchdog import Stopped, end_with_launcher

USAGE = """usage: python -m trainer RECIPE [KEY=VALUE]...
       python -m trainer --resume RUN_OR_CHECKPOINT [KEY=VALUE]...
       python -m trainer RECIPE --dry-run [--processes N] [KEY=VALUE]...
Started by torchrun or the deepspeed launcher, once in each process. `ibq train --help` says more; `ibq recipes` lists
the recipes. --dry-run trains nothing and prints what each process would hold.
Example: torchrun --nproc-per-node 8 -m trainer ibq_16384 data.train='tars/{000..999}.tar'"""


def main(arguments: list[str]) -> int:
    """Trains or resumes; returns the exit status: 0, 2 after a mistake of the user, 75 after a signal to stop with
    everything saved, 130 after Ctrl-C."""
    # The deepspeed launcher adds this one; the rank is in the environment anyway.
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["--resume"]:
        print(USAGE)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    accept_all_names()
    try:
        end_with_launcher()  # before the imports, which take seconds
        from trainer.loop import resume, train

        if "--dry-run" in arguments:
            from trainer.dry_run import dry_run

            dry_run(*_dry_run_arguments(arguments))
        elif arguments[0] == "--resume":
            resume(arguments[1], arguments[2:])
        else:
            train(arguments[0], arguments[1:])
    except (DataError, ModelError, TrainerError) as error:
        # One write: print makes two where Python does not buffer, and the lines of many processes run into each other.
        sys.stderr.write(f"ibq: error: {printable(str(error))}\n")
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"ibq: {printable(str(stopped))}\n")
        return stopped.status
    except KeyboardInterrupt:
        return 130
    return 0


def _dry_run_arguments(arguments: list[str]) -> tuple[str, list[str], int | None]:
    """(recipe, overrides, processes) of a command line with --dry-run."""
    rest, processes = [], None
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option == "--processes":
            value = value if equals else next(words, "")
            if not value.isdecimal() or int(value) < 1:
                raise TrainerError(f"--processes={value} must be a whole number of at least 1")
            processes = int(value)
        elif word != "--dry-run":
            rest.append(word)
    if not rest or rest[0].startswith("-"):
        raise TrainerError("--dry-run is for a recipe: python -m trainer RECIPE --dry-run [--processes N]")
    return rest[0], rest[1:], processes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
