"""Prints the SHA-256 of all losses of seeded runs, to show that a refactor left training as it was.

    python tests/same_losses.py                      this checkout
    python tests/same_losses.py --ddp replicated     a checkout from before `engine.kind=replicated` became `ddp`

Run it before and after the change, on the same machine and with the same packages: other processors round differently.
Each run takes 60 steps and logs every step; the digest covers every value under `loss/` of every step.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tokens import write_tokens

STEPS = 60
ENGINES = {
    "ddp": ["engine.kind=ddp"],
    "zero1": ["engine.kind=deepspeed", "engine.config=zero1"],
    "zero3": ["engine.kind=deepspeed", "engine.config=zero3"],
    "fsdp2": ["engine.kind=fsdp2"],
}


def runs(tokens: Path) -> dict[str, tuple[int, list[str]]]:
    """Name -> (number of processes, arguments of `python -m trainer` without the run folder)."""
    every = [f"trainer.max_steps={STEPS}", "trainer.log_every_steps=1", "trainer.device=cpu"]
    every += ["trainer.validate_every_steps=1000", "trainer.checkpoint_every_steps=1000"]
    # The weight is that of the recipe when the digests in docs/LOG.md were taken.
    found = {"quickstart": (1, ["quickstart", *every, "loss.reconstruction.weight=1"])}
    for name, engine in ENGINES.items():
        for shards in (1, 2):
            label = f"debug {name}" + (" codebook_parallel=2" if shards == 2 else "")
            found[label] = 2, ["debug", *every, *engine, f"codebook_parallel={shards}"]
    found["ar_debug"] = 1, ["ar_debug", *every, f"data.train={tokens}", f"data.val={tokens}"]
    return found


def digest(run: Path) -> str:
    """The SHA-256 of all losses in a run's metrics.jsonl. Raises ValueError unless every step is there."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss/total" in line]
    if [line["step"] for line in lines] != list(range(1, STEPS + 1)):
        raise ValueError(f"{run} does not hold {STEPS} steps")
    losses = [{name: value for name, value in sorted(line.items()) if name.startswith("loss/")} for line in lines]
    return hashlib.sha256(json.dumps(losses).encode()).hexdigest()


def main() -> None:
    """Trains each run in processes of one thread and prints its digest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ddp", default="ddp", help="what engine.kind calls plain PyTorch in the checkout that runs")
    parser.add_argument("--only", help="run only those whose name contains this text")
    options = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        write_tokens(tokens)
        for number, (name, (processes, arguments)) in enumerate(runs(tokens).items()):
            if options.only and options.only not in name:
                continue
            run = Path(folder) / str(number)
            arguments = [argument.replace("kind=ddp", f"kind={options.ddp}") for argument in arguments]
            torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
            launcher = torchrun if processes > 1 else []
            command = [sys.executable, *launcher, "-m", "trainer", *arguments, f"run={run}"]
            subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
            print(f"{name:32} {digest(run)}", flush=True)


if __name__ == "__main__":
    main()
