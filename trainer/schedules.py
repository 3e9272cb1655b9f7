"""Learning-rate schedules: pure functions of the step, so that a resumed run needs no saved state."""

import math

from trainer.config import ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, max_steps: int) -> float:
    """What the peak rate is multiplied by in step ``step`` (from 0) of ``max_steps``."""
    if step < config.warmup_steps:
        return step / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    if config.kind == "multistep":
        return config.factor ** sum(step >= milestone for milestone in config.milestones)
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1 - progress
    return config.final_ratio + (1 - config.final_ratio) * shape


def ramp(step: int, start_step: int, ramp_steps: int) -> float:
    """0 before ``start_step``, then linearly to 1 within ``ramp_steps`` (0: at once)."""
    if step < start_step:
        return 0.0
    return min(1.0, (step - start_step + 1) / ramp_steps) if ramp_steps else 1.0
