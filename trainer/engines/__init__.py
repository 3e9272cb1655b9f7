"""Engines: how a module's parameters, gradients and optimiser are spread over ranks. See `base.Engine`."""

from collections.abc import Iterable

import torch
from torch import nn

from trainer.config import EngineConfig
from trainer.engines.base import Engine, MakeOptimizer, Memory, clip_scale
from trainer.engines.ddp import DataParallel
from trainer.engines.row_sharded import RowSharded
from trainer.parallel import World

__all__ = ["DataParallel", "Engine", "MakeOptimizer", "Memory", "RowSharded", "build_engine", "clip_scale"]


def build_engine(
    config: EngineConfig,
    world: World,
    module: nn.Module,
    make_optimizer: MakeOptimizer,
    *,
    ignored: Iterable[nn.Parameter] = (),
    gather_dtype: torch.dtype | None = None,
    **batch,
) -> Engine:
    """The engine that the recipe names, around a module that lies on its device with its weights initialised.

    ignored: parameters of the module that are not the engine's. gather_dtype: see `fsdp2.Fsdp2`.
    """
    if config.kind == "ddp":
        return DataParallel(module, make_optimizer, ignored, **batch)
    if config.kind == "fsdp2":
        from trainer.engines.fsdp2 import Fsdp2

        return Fsdp2(config, world, module, make_optimizer, ignored, gather_dtype, **batch)
    from trainer.engines.deepspeed import DeepSpeed  # DeepSpeed takes seconds to import

    return DeepSpeed(config.config, module, make_optimizer, ignored, **batch)
