"""Engines: how a module's parameters, gradients and optimizer state are distributed over ranks. See `base.Engine`."""

from collections.abc import Iterable

import torch
from torch import nn

from trainer.config import EngineConfig
from trainer.engines.base import Engine, MakeOptimizer
from trainer.engines.ddp import DataParallel
from trainer.parallel import World


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
    """Wraps a module into the recipe's engine. The module must be on its device and initialized.

    ignored: parameters of the module that belong to another engine. gather_dtype: see `fsdp2.Fsdp2`.
    """
    if config.kind == "ddp":
        return DataParallel(module, make_optimizer, ignored, **batch)
    if config.kind == "fsdp2":
        from trainer.engines.fsdp2 import Fsdp2

        return Fsdp2(config, world, module, make_optimizer, ignored, gather_dtype, **batch)
    from trainer.engines.deepspeed import DeepSpeed  # DeepSpeed takes seconds to import

    return DeepSpeed(config.config, module, make_optimizer, ignored, **batch)
