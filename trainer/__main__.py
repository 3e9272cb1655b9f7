"""One of the processes of a training run: ``torchrun --nproc-per-node 8 -m trainer RECIPE [KEY=VALUE]...``."""

import os
import sys

from data import DataError
from model_zoo import ModelError
from trainer import TrainerError
from trainer.guards import STOPPED, Stopped

USAGE = """usage: python -m trainer RECIPE [KEY=VALUE]...
       python -m trainer --resume RUN_OR_CHECKPOINT [KEY=VALUE]...
Started by torchrun or the deepspeed launcher, once in each process. `ibq train --help` says more; `ibq recipes` lists
the recipes. Example: torchrun --nproc-per-node 8 -m trainer ibq_16384 data.train='tars/{000..999}.tar'"""


def main(arguments: list[str]) -> int:
    """Trains or resumes; returns the exit status: 0, 2 after a mistake of the user, 75 after SIGTERM with everything
    saved, 130 after Ctrl-C."""
    # The deepspeed launcher adds this one; the rank is in the environment anyway.
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["--resume"]:
        print(USAGE)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    try:
        from trainer.loop import resume, train

        if arguments[0] == "--resume":
            resume(arguments[1], arguments[2:])
        else:
            train(arguments[0], arguments[1:])
    except (DataError, ModelError, TrainerError) as error:
        # One write: print makes two where Python does not buffer, and the lines of many processes run into each other.
        sys.stderr.write(f"ibq: error: {error}\n")
        return 2
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"ibq: {stopped}\n")
        return STOPPED
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
