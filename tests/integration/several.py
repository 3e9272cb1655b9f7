"""Trains several recipes one after another in the same processes: importing takes longer than `debug` does.

``torchrun ... several.py RUNS.json``, which holds a list of the arguments of `python -m trainer`. Says each run's exit
status; one that fails does not end the others. The processes meet once: a store cannot be used for a second meeting.
"""

import json
import sys
import traceback
from pathlib import Path

from trainer import loop
from trainer.__main__ import main
from trainer.parallel import start_world

if __name__ == "__main__":
    world = start_world("cpu", timeout_seconds=60)
    loop.start_world = lambda *_: world
    loop.stop_world = lambda: None
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        try:
            status = main(arguments)
        except Exception:
            traceback.print_exc()
            status = 1
        if world.is_main:
            run = next(argument for argument in arguments if argument.startswith("run="))
            print(f"{run.removeprefix('run=')} ended with status {status}", flush=True)
