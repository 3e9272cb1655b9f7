"""DeepSpeed: ZeRO shards optimiser state (1) and gradients (2) over ranks."""

import json
import os
import sys
import sysconfig
from importlib import resources
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer import TrainerError
from trainer.engines.base import Engine


def load_deepspeed_config(name: str, *, micro_batch_size: int, micro_batches: int) -> dict:
    """A JSON of ds_configs by name, or of the user's by path, its "auto" values filled from the recipe."""
    packaged = Path(str(resources.files("ds_configs")))
    path = Path(name) if name.endswith(".json") else packaged / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in packaged.glob("*.json")))
        raise TrainerError(f"engine.config={name} is unknown: choose one of {known}, or give the path of a .json file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainerError(f"{path} is not valid JSON: {error}") from error
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
    if not isinstance(zero, dict):
        raise TrainerError(f'{path} is no DeepSpeed configuration: an object, with "zero_optimization" an object too')
    if zero.get("stage", 0) not in (0, 1, 2):
        raise TrainerError(f"{path}: ZeRO stage {zero['stage']} is not supported yet; use stage 0, 1 or 2")
    for key in ("offload_optimizer", "offload_param"):
        if key in zero:
            raise TrainerError(f'{path}: "{key}" is not supported yet; remove it')
    for key in ("fp16", "bf16", "optimizer", "scheduler"):
        if key in config:
            raise TrainerError(f'{path}: remove "{key}"; the recipe decides (trainer.precision, optimizer, schedule)')
    recipe = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": micro_batch_size * micro_batches * torch.distributed.get_world_size(),
    }
    # The norm to clip by is that of all of the generator's parameters, and DeepSpeed knows nothing of the codebook: the
    # task clips. Left out, DeepSpeed's own default would be 1.
    if config.get("gradient_clipping", "auto") != "auto":
        raise TrainerError(f'{path}: write "auto" for "gradient_clipping"; trainer.gradient_clip_norm decides')
    config["gradient_clipping"] = 0.0
    for key, value in recipe.items():
        if config.get(key, "auto") == "auto":
            config[key] = value
        elif config[key] != value:
            raise TrainerError(f'{path}: "{key}" is {config[key]}, the recipe says {value}; write "auto" there')
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
        if torch.distributed.get_rank() == 0 and not torch.cuda.is_available():
            print("DeepSpeed's first start on a CPU compiles for about a minute ...", file=sys.stderr, flush=True)
        try:
            # The optimiser's parameters alone: DeepSpeed would overwrite the others, which may differ between ranks (a
            # sharded codebook), by rank 0's.
            trained = nn.ParameterList(p for group in optimizer.param_groups for p in group["params"])
            self.engine, *_ = deepspeed.initialize(model=trained, optimizer=optimizer, config=settings)
        except (ValueError, AssertionError, DeepSpeedConfigError) as error:  # pydantic's errors are ValueErrors
            what = " ".join(str(error).split())[:300]
            raise TrainerError(f"DeepSpeed refuses engine.config={config}: {what}") from error

    @property
    def param_groups(self) -> list[dict]:
        return self.engine.optimizer.param_groups

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)  # divides by gradient_accumulation_steps itself

    def grad_norm(self) -> Tensor:
        if self.engine.zero_optimization():
            self.norm = self.engine.optimizer.scaled_global_norm()
        else:  # stage 0: the gradients are whole and reduced
            self.norm = torch.nn.utils.get_total_norm(self._gradients())
        return self.norm

    def step(self, lr: float, scale: Tensor | float = 1.0) -> None:
        for group in self.param_groups:
            group["lr"] = lr
        if not self.engine.zero_optimization():
            torch._foreach_mul_(self._gradients(), scale)
        else:
            # ZeRO divides by (norm + 1e-6) / clip_grad where that is above 1; 0 switches it off.
            self.engine.optimizer.clip_grad = float((self.norm + 1e-6) * scale) if scale < 1 else 0.0
        self.engine.step()

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.engine.module.parameters() if p.grad is not None]

    def save(self, folder: Path) -> None:
        # Its own `latest` file would be written before all ranks are done: ours is written last, by rename.
        self.engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag="deepspeed")
        if path is None:
            raise OSError(f"no whole DeepSpeed checkpoint in {folder}")
