"""Engines: how a module's parameters, gradients and optimiser are spread over ranks. See `base.Engine`."""

from trainer.config import EngineConfig
from trainer.engines.base import Engine, clip_scale
from trainer.engines.codebook import Codebook
from trainer.engines.replicated import Replicated

__all__ = ["Codebook", "Engine", "Replicated", "build_engine", "clip_scale"]


def build_engine(config: EngineConfig, module, optimizer, **batch) -> Engine:
    """The engine that the recipe names, around a module that lies on its device with its weights loaded."""
    if config.kind == "replicated":
        return Replicated(module, optimizer, **batch)
    from trainer.engines.deepspeed import DeepSpeed  # DeepSpeed takes seconds to import

    return DeepSpeed(config.config, module, optimizer, **batch)
