"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no saved state."""

import math

from trainer.config import OptimizerConfig, ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, max_steps: int) -> float:
    """The factor of the peak learning rate in step ``step`` (from 0) of ``max_steps``."""
    if step < config.warmup_steps:
        return config.warmup_from + (1 - config.warmup_from) * step / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    if config.kind == "multistep":
        return config.factor ** sum(step >= milestone for milestone in config.milestones)
    rest = max_steps - config.warmup_steps
    held = config.hold * rest
    progress = min(1.0, max(0.0, step - config.warmup_steps - held) / max(1.0, rest - held))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1 - progress
    return config.final_ratio + (1 - config.final_ratio) * shape


def ramp(step: int, start_step: int, ramp_steps: int) -> float:
    """A factor that is 0 before ``start_step`` and then rises linearly to 1 within ``ramp_steps`` (0: at once)."""
    if step < start_step:
        return 0.0
    return min(1.0, (step - start_step + 1) / ramp_steps) if ramp_steps else 1.0


def weight_decay(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """The weight decay of matrices in step ``step`` (from 0) of ``max_steps``."""
    if config.final_weight_decay is None:
        return config.weight_decay
    shape = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max_steps)))
    return config.final_weight_decay + (config.weight_decay - config.final_weight_decay) * shape
