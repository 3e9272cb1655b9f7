"""AdamW by the fastest implementation that is installed, and its state under names that all implementations share."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


def adam(parameters: Iterable[nn.Parameter], lr: float, config: OptimizerConfig, apex: bool = True) -> Optimizer:
    """AdamW with the recipe's settings: apex's FusedAdam on CUDA if apex is installed, else PyTorch's fused one.

    apex: False for parameters that apex cannot update, such as DTensors.
    """
    parameters = list(parameters)
    settings = dict(lr=lr, **adam_settings(config))
    groups = decay_groups(parameters, config)
    if apex and parameters[0].is_cuda:
        try:
            import amp_C  # noqa: F401  (its kernels, without which FusedAdam raises)
            from apex.optimizers import FusedAdam
        except ImportError:  # PyPI's `apex` is another project and has no such modules
            pass
        else:
            return FusedAdam(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=not parameters[0].is_meta, **settings)


def decay_groups(parameters: list[nn.Parameter], config: OptimizerConfig) -> list[dict]:
    """Parameter groups: matrices and kernels are decayed, one-dimensional parameters are not. Without weight decay,
    there is one group."""
    if not config.weight_decay and config.final_weight_decay is None:
        return [dict(params=parameters)]
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [dict(params=matrices, decays=True), dict(params=others, weight_decay=0.0, decays=False)]
    return [group for group in groups if group["params"]]


def set_weight_decay(groups: list[dict], decay: float) -> None:
    """Sets the weight decay of the parameter groups that are decayed."""
    for group in groups:
        if group.get("decays"):
            group["weight_decay"] = decay


def adam_settings(config: OptimizerConfig) -> dict:
    """Settings that a resumed run takes from its recipe, not from its checkpoint."""
    return dict(betas=tuple(config.betas), eps=config.epsilon, weight_decay=config.weight_decay)


def start_moments(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Creates zero moments and step 0 for each parameter, so that they can be loaded before the first step."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        for key in MOMENTS:
            state[key] = torch.zeros_like(parameter)
        if isinstance(optimizer, torch.optim.AdamW):
            fused = optimizer.defaults["fused"]
            state["step"] = torch.zeros((), device=parameter.device if fused else "cpu", dtype=torch.float32)
    set_step(optimizer, 0)


def get_step(optimizer: Optimizer) -> int:
    """The number of updates that the moments have seen."""
    for state in optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return int(optimizer.param_groups[0].get("step", 0))  # apex counts by group


def set_step(optimizer: Optimizer, step: int) -> None:
    """Sets the number of updates that the moments have seen."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)
    if not isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            group["step"] = step
