import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from trainer.config import OptimizerConfig
from trainer.engines.ddp import DataParallel
from trainer.optim import MOMENTS, adam, adam_settings, get_step, set_step, set_weight_decay, start_moments

CONFIG = OptimizerConfig(betas=[0.6, 0.8], epsilon=1e-3, weight_decay=0.1)


class FusedAdam(torch.optim.Optimizer):
    """apex's interface in plain PyTorch: the step is counted by group, and zero_grad takes no argument."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True):  # fmt: skip
        defaults = dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)
        assert adam_w_mode and set_grad_none and not amsgrad

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
                mean = state["exp_avg"] / (1 - beta1 ** group["step"])
                spread = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * mean / (spread + group["eps"]))


class OnGpu(nn.Parameter):
    """Says that it lies on a GPU."""

    is_cuda = True


@pytest.fixture
def apex(monkeypatch):
    module = ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    monkeypatch.setitem(sys.modules, "amp_C", ModuleType("amp_C"))


def parameters(kind=nn.Parameter) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [kind(torch.randn(3, 2)), kind(torch.randn(4))]


def torchs(kind=nn.Parameter):
    return adam(parameters(kind), 0.1, CONFIG)


def apexs():
    return adam(parameters(OnGpu), 0.1, CONFIG)


def of(optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def settings(group: dict) -> tuple:
    return tuple(group[key] for key in ("lr", "betas", "eps", "weight_decay"))


def moments(optimizer) -> list[torch.Tensor]:
    return [optimizer.state[parameter][key] for parameter in of(optimizer) for key in MOMENTS]


def update(optimizer, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in of(optimizer):
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_it_is_pytorchs_fused_adamw_with_the_recipes_settings():
    optimizer = torchs()
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"] is True
    matrices, others = optimizer.param_groups
    assert settings(matrices) == (0.1, (0.6, 0.8), 1e-3, 0.1) and settings(others) == (0.1, (0.6, 0.8), 1e-3, 0.0)
    assert [parameter.ndim for parameter in matrices["params"] + others["params"]] == [2, 1]
    assert adam_settings(CONFIG) == {key: matrices[key] for key in ("betas", "eps", "weight_decay")}


def test_weight_decay_that_changes_is_that_of_matrices_alone():
    config = OptimizerConfig(weight_decay=0.0, final_weight_decay=0.08)
    optimizer = adam(parameters(), 0.1, config)
    set_weight_decay(optimizer.param_groups, 0.04)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.04, 0.0]


def test_without_decay_there_is_one_group():
    optimizer = adam(parameters(), 0.1, OptimizerConfig())
    set_weight_decay(optimizer.param_groups, 0.0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]


def test_parameters_without_memory_have_an_optimizer_too():
    assert adam([nn.Parameter(torch.empty(2, device="meta"))], 0.1, CONFIG).defaults["fused"] is False


@pytest.mark.usefixtures("apex")
def test_apex_is_taken_for_cuda_alone_and_not_where_it_cannot_take_the_parameters():
    optimizer = apexs()
    assert type(optimizer) is FusedAdam
    matrices, others = optimizer.param_groups
    assert settings(matrices) == (0.1, (0.6, 0.8), 1e-3, 0.1) and settings(others) == (0.1, (0.6, 0.8), 1e-3, 0.0)
    assert type(torchs()) is torch.optim.AdamW
    assert type(adam(parameters(OnGpu), 0.1, CONFIG, apex=False)) is torch.optim.AdamW


def test_without_apex_and_with_the_other_project_of_that_name_pytorchs_is_taken(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))  # PyPI's: no apex.optimizers
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
    assert type(torchs(OnGpu)) is torch.optim.AdamW
    monkeypatch.setitem(sys.modules, "apex", None)  # not installed
    assert type(torchs(OnGpu)) is torch.optim.AdamW


@pytest.mark.parametrize("make", [torchs, apexs])
@pytest.mark.usefixtures("apex")
def test_moments_are_there_before_the_first_step_and_change_nothing(make):
    started, plain = make(), make()
    start_moments(started, of(started))
    assert get_step(started) == 0
    assert [moment.shape for moment in moments(started)] == [p.shape for p in of(started) for _ in MOMENTS]
    assert not any(moment.any() for moment in moments(started))
    for seed in (1, 2):
        update(started, seed)
        update(plain, seed)
        assert get_step(started) == get_step(plain) == seed
    for one, other in zip(of(started) + moments(started), of(plain) + moments(plain), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", [torchs, apexs])
@pytest.mark.parametrize("remake", [torchs, apexs])
@pytest.mark.usefixtures("apex")
def test_either_goes_on_from_moments_and_step_of_the_other(make, remake):
    first, second = make(), remake()
    start_moments(first, of(first))
    start_moments(second, of(second))
    for seed in (1, 2, 3):
        update(first, seed)
    with torch.no_grad():
        for one, other in zip(of(first) + moments(first), of(second) + moments(second), strict=True):
            other.copy_(one)
    set_step(second, get_step(first))
    assert get_step(second) == 3
    update(first, 4)
    update(second, 4)
    assert get_step(first) == get_step(second) == 4
    for one, other in zip(of(first), of(second), strict=True):
        torch.testing.assert_close(other.detach(), one.detach(), rtol=1e-5, atol=1e-6)
    # The step matters: as if it were the first one, the same moments move the weights elsewhere.
    set_step(second, 0)
    before = [p.detach().clone() for p in of(second)]
    update(second, 5)
    update(first, 5)
    assert get_step(second) == 1
    assert not any(torch.allclose(one, other, rtol=1e-3) for one, other in zip(of(first), of(second), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(before, of(second), strict=True))


@pytest.mark.usefixtures("apex", "world")
def test_an_engine_steps_skips_and_clears_by_apex_too():
    module = nn.Linear(2, 1)
    module.weight, module.bias = OnGpu(torch.ones(1, 2)), OnGpu(torch.zeros(1))
    engine = DataParallel(module, lambda p: adam(p, 0.1, CONFIG), micro_batch_size=1, micro_batches=1)
    assert type(engine.optimizer) is FusedAdam
    for number in (1, 2):
        engine.backward(engine(torch.ones(1, 2)).sum(), last=True)
        engine.grad_norm()
        engine.step(0.1)
        assert engine.updates == number and module.weight.grad is None
    moved = module.weight.detach().clone()
    assert not torch.equal(moved, torch.ones(1, 2))
    engine.backward(engine(torch.ones(1, 2)).sum(), last=True)
    engine.skip()
    assert engine.updates == 2 and module.weight.grad is None and torch.equal(module.weight, moved)
    engine.updates = 7
    assert engine.updates == 7
