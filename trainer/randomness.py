"""Random number generators of every rank: seeded at the start, saved and restored."""

import torch

from model_zoo.io.sharded_tensors import ShardedTensors, TensorShard, whole_tensor
from trainer.parallel import World


def seed_everything(seed: int, step: int, world: World) -> None:
    """Seeds this rank's generators. Each rank, and each step that a run starts or resumes from, gets another stream."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + world.rank & (1 << 63) - 1)


def random_state(world: World) -> list[TensorShard]:
    """The state of this rank's generators, as tensors of a checkpoint."""
    return [whole_tensor(name, state) for name, state in _states(world).items()]


def restore_random_state(files: ShardedTensors, world: World) -> None:
    """Restores what `random_state` returned with the same number of ranks."""
    for name in _states(world):
        if name not in files:  # saved by a run without a GPU
            continue
        state = files.tensor(name)
        if "/cuda/" in name:
            torch.cuda.set_rng_state(state, world.device)
        else:
            torch.set_rng_state(state)


def _states(world: World) -> dict[str, torch.Tensor]:
    states = {f"random/cpu/{world.rank}": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"random/cuda/{world.rank}"] = torch.cuda.get_rng_state(world.device)
    return states
