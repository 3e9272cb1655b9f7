"""Tasks: what is trained, and one step of it."""

from trainer.config import GeneratorRun, RunConfig
from trainer.parallel import World
from trainer.tasks.base import Task
from trainer.tasks.generator import GeneratorTask
from trainer.tasks.tokenizer import TokenizerTask


def make_task(config: RunConfig, world: World, micro_batch_size: int, micro_batches: int) -> Task:
    """The task that a recipe is for."""
    kind = GeneratorTask if isinstance(config, GeneratorRun) else TokenizerTask
    return kind(config, world, micro_batch_size, micro_batches)
