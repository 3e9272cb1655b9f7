"""What real processes hold: builds the task of each recipe in turn and writes every rank's bytes.

``torchrun ... holding.py RECIPES.json OUT``: the first holds a list of overrides of `debug`, OUT.RANK takes for each of
them {network: (parameters, gradients, optimizer, EMA)}; without DeepSpeed, gradients are those of a real backward.
"""

import json
import sys
from pathlib import Path

import torch

from trainer.dry_run import networks_held
from trainer.parallel import start_world, stop_world
from trainer.recipes import load_recipe
from trainer.start_plan import plan_batch
from trainer.tasks.tokenizer import TokenizerTask


def real_gradients(task: TokenizerTask, images: list[torch.Tensor]) -> dict[str, int]:
    """Bytes of the gradients that lie on the parameters as the optimiser's step begins."""
    seen = {}
    for name in ("generator", "codebook", "discriminator"):
        engine = getattr(task, name)

        def step(*arguments, name=name, engine=engine, go_on=engine.step):
            seen[name] = sum(gradient.nbytes for gradient in engine._gradients())
            go_on(*arguments)

        engine.step = step
    task.step(images, 0)
    return seen


if __name__ == "__main__":
    world = start_world("cpu", timeout_seconds=60)
    answers = []
    for overrides in json.loads(Path(sys.argv[1]).read_text()):
        config = load_recipe("debug", overrides)
        task = TokenizerTask(config, world, *plan_batch(config, world))
        networks = {name: list(held) for name, held in networks_held(task).items()}
        if config.engine.kind != "deepspeed":
            side, count = config.data.image_size, task.main_engine.micro_batch_size
            gradients = real_gradients(task, [torch.zeros(count, 3, side, side, dtype=torch.uint8)])
            for name, number in gradients.items():
                networks[name][1] = number
        answers.append(networks)
    Path(f"{sys.argv[2]}.{world.rank}").write_text(json.dumps(answers))
    stop_world()
