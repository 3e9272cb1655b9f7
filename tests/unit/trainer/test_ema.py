from typing import NamedTuple

import pytest
import torch
from support import averages, equal, weights
from torch import nn

from model_zoo.io.sharded_tensors import whole_tensor
from trainer.config import OptimizerConfig
from trainer.ema import Ema
from trainer.engines.ddp import DataParallel
from trainer.optim import adam

pytestmark = pytest.mark.usefixtures("world")


def model(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 3))


class Replicated(DataParallel):
    """Computes with its weights themselves."""

    def __init__(self, module):
        super().__init__(module, lambda p: adam(p, 1e-3, OptimizerConfig()), micro_batch_size=1, micro_batches=1)


def set_weights(module, seed):
    """In place, as an optimizer would."""
    module.load_state_dict(model(seed).state_dict())


class Averaged(NamedTuple):
    """A model, its engine and the average of its weights."""

    module: nn.Module
    engine: Replicated
    ema: Ema


def averaged(decay: float, seed: int = 0) -> Averaged:
    module = model(seed)
    engine = Replicated(module)
    return Averaged(module, engine, Ema((engine,), decay))


def test_starts_as_a_copy_of_the_weights_it_is_built_on():
    module, of, ema = averaged(decay=0.999, seed=1)
    assert equal(averages(ema, of), weights(module))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert equal(averages(ema, of), weights(model(seed=1)))  # a copy, not a view


def test_is_the_running_average_with_the_smaller_decay_of_early_steps():
    decay = 0.2
    module, of, ema = averaged(decay)
    expected = {name: value.double() for name, value in weights(module).items()}
    used = []
    for step in range(6):
        set_weights(module, seed=step + 1)
        ema.update(step)
        used.append(min(decay, (2 + step) / (11 + step)))
        now = weights(module)
        expected = {name: used[-1] * old + (1 - used[-1]) * now[name].double() for name, old in expected.items()}
    assert used == pytest.approx([2 / 11, 0.2, 0.2, 0.2, 0.2, 0.2])  # both branches of the formula
    expected = {name: value.float() for name, value in expected.items()}
    torch.testing.assert_close(averages(ema, of), expected, rtol=1e-5, atol=1e-6)


def test_late_steps_use_the_whole_decay():
    module, of, ema = averaged(decay=0.999)
    before = averages(ema, of)
    set_weights(module, seed=1)
    ema.update(step=100_000)
    now = weights(module)
    expected = {name: (0.999 * old.double() + 0.001 * now[name].double()).float() for name, old in before.items()}
    torch.testing.assert_close(averages(ema, of), expected, rtol=1e-6, atol=1e-7)


def test_update_leaves_the_weights_alone():
    module, _, ema = averaged(decay=0.5)
    set_weights(module, seed=1)
    ema.update(3)
    assert equal(weights(module), weights(model(seed=1)))


def test_keeps_fp32_of_bf16_weights():
    of = Replicated(model().bfloat16())
    ema = Ema((of,), decay=0.999)
    assert all(value.dtype == torch.float32 for value in averages(ema, of).values())


def test_each_engine_has_its_own_shards_beside_its_weights():
    """Of the same names and shapes, so that a mix-up would go unnoticed but for the values."""
    engines = [Replicated(model(seed)) for seed in range(3)]
    ema = Ema(iter(engines), decay=0.9)
    for seed, of in enumerate(engines):
        shards = ema.shards(of)
        assert [shard[:3] for shard in shards] == [shard[:3] for shard in of.weights()]
        assert equal(averages(ema, of), weights(model(seed)))


def test_goes_on_from_what_is_written_into_its_shards_bit_for_bit():
    module, of, ema = averaged(decay=0.9)
    set_weights(module, seed=1)
    ema.update(0)
    set_weights(module, seed=2)
    _, other, resumed = averaged(decay=0.9, seed=2)
    for into, saved in zip(resumed.shards(other), ema.shards(of), strict=True):
        into.values.copy_(saved.values)
    assert not equal(averages(resumed, other), weights(module))
    for average in (ema, resumed):
        average.update(1)
    assert equal(averages(ema, of), averages(resumed, other))


class Published(Replicated):
    """Computes with a copy of its weights, as ZeRO does, until told to take them over."""

    def __init__(self, module):
        super().__init__(module)
        self.flat = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def weights(self):
        return [whole_tensor(name, values) for name, values in self.flat.items()]

    @torch.no_grad()
    def sync_weights(self):
        for name, parameter in self.parameters.items():
            parameter.copy_(self.flat[name])


@pytest.mark.parametrize("kind", [Replicated, Published])
def test_averages_and_weights_change_places_and_back_bit_for_bit(kind):
    modules = [model(seed) for seed in (0, 1)]
    engines = [kind(module) for module in modules]
    ema = Ema(engines, decay=0.5)
    for of in engines:
        for shard in of.weights():
            shard.values.mul_(1.1)
        of.sync_weights()
    ema.update(0)
    raw, average = [weights(module) for module in modules], [averages(ema, of) for of in engines]
    assert not equal(raw[0], average[0]) and not equal(raw[1], average[1])
    held = [parameter.data_ptr() for module in modules for parameter in module.parameters()]
    with pytest.raises(RuntimeError, match="inside"), ema.in_place_of_weights():
        assert all(equal(weights(module), there) for module, there in zip(modules, average, strict=True))
        assert all(equal(averages(ema, of), there) for of, there in zip(engines, raw, strict=True))
        raise RuntimeError("inside")  # they are back whatever happens
    assert all(equal(weights(module), there) for module, there in zip(modules, raw, strict=True))
    assert all(equal(averages(ema, of), there) for of, there in zip(engines, average, strict=True))
    assert held == [parameter.data_ptr() for module in modules for parameter in module.parameters()]
