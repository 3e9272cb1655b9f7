"""DeepSpeed: ZeRO shards optimiser state (1) and gradients (2) over ranks."""

import json
import os
import sysconfig
from importlib import resources
from pathlib import Path

import deepspeed
import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer import TrainerError
from trainer.engines.base import Engine


def load_deepspeed_config(name: str, *, micro_batch_size: int, micro_batches: int, clip_norm: float | None) -> dict:
    """A JSON of ds_configs by name, or of the user's by path, its "auto" values filled from the recipe."""
    packaged = Path(str(resources.files("ds_configs")))
    path = Path(name) if name.endswith(".json") else packaged / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in packaged.glob("*.json")))
        raise TrainerError(f"engine.config={name} is unknown: choose one of {known}, or give the path of a .json file")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise TrainerError(f"{path} is not valid JSON: {error}") from error
    recipe = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": micro_batch_size * micro_batches * torch.distributed.get_world_size(),
        "gradient_clipping": clip_norm or 0.0,
    }
    for key, value in recipe.items():
        if config.get(key, "auto") == "auto":
            config[key] = value
        elif config[key] != value:
            raise TrainerError(f'{path}: "{key}" is {config[key]}, the recipe says {value}; write "auto" there')
    if config.get("zero_optimization", {}).get("stage", 0) > 2:
        raise TrainerError(f"{path}: ZeRO stage 3 is not supported yet; use stage 0, 1 or 2")
    for key in ("fp16", "bf16"):
        if config.get(key, {}).get("enabled"):
            raise TrainerError(f'{path}: remove "{key}"; the recipe\'s trainer.precision decides')
    return config


class DeepSpeed(Engine):
    """Parameters stay in fp32 on every rank (trainer.precision is an autocast around the forward); what is sharded is
    the optimiser's state and, in stage 2, the gradients."""

    def __init__(self, config: str, module, optimizer: Optimizer, **batch):
        super().__init__(module, optimizer, **batch)
        settings = load_deepspeed_config(config, **batch)
        # DeepSpeed compiles its CPU collectives with the ninja that pip put beside python, but looks for it on PATH.
        os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
        os.environ.setdefault("LOCAL_RANK", "0")  # a single process needs no launcher, but DeepSpeed insists on it
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)  # divides by gradient_accumulation_steps itself

    def step(self, lr: float) -> Tensor | float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        if self.engine.zero_optimization():
            self.engine.step()
            return self.engine.get_global_grad_norm()
        # Stage 0 does not tell the norm; its gradients are whole and reduced until its step clips and clears them.
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        self.engine.step()
        return norm

    def save(self, folder: Path) -> None:
        # Its own `latest` file would be written before all ranks are done: ours is written last, by rename.
        self.engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder), tag="deepspeed")
