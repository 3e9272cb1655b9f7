import pytest
import torch
from torch import nn

from trainer.ema import Ema


def model(seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Embedding(5, 3))


def test_starts_as_a_copy_of_the_weights_it_is_built_on():
    module = model()
    module.load_state_dict(model(seed=1).state_dict())
    ema = Ema(module, decay=0.999)
    assert ema.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in ema.state_dict().items())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert all(value.any() for value in ema.state_dict().values())  # a copy, not a view


def test_is_the_running_average_with_the_smaller_decay_of_early_steps():
    module, decay = model(), 0.2
    ema = Ema(module, decay)
    expected = {name: value.double() for name, value in module.state_dict().items()}
    used = []
    for step in range(6):
        module.load_state_dict(model(seed=step + 1).state_dict())
        ema.update(module, step)
        used.append(min(decay, (2 + step) / (11 + step)))
        expected = {
            name: used[-1] * average + (1 - used[-1]) * module.state_dict()[name].double()
            for name, average in expected.items()
        }
    assert used == pytest.approx([2 / 11, 0.2, 0.2, 0.2, 0.2, 0.2])  # both branches of the formula
    for name, value in ema.state_dict().items():
        torch.testing.assert_close(value, expected[name].float(), rtol=1e-5, atol=1e-6)


def test_late_steps_use_the_whole_decay():
    module = model()
    ema = Ema(module, decay=0.999)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    module.load_state_dict(model(seed=1).state_dict())
    ema.update(module, step=100_000)
    for name, value in ema.state_dict().items():
        expected = 0.999 * before[name].double() + 0.001 * module.state_dict()[name].double()
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-7)


def test_update_leaves_the_weights_alone():
    module = model()
    ema = Ema(module, decay=0.5)
    module.load_state_dict(model(seed=1).state_dict())
    ema.update(module, 3)
    assert all(torch.equal(value, model(seed=1).state_dict()[name]) for name, value in module.state_dict().items())


def test_keeps_fp32_of_bf16_weights():
    module = model().bfloat16()
    ema = Ema(module, decay=0.999)
    ema.update(module, 0)
    assert all(value.dtype == torch.float32 for value in ema.state_dict().values())


def test_state_round_trip_goes_on_bit_for_bit():
    module = model()
    ema = Ema(module, decay=0.9)
    module.load_state_dict(model(seed=1).state_dict())
    ema.update(module, 0)
    resumed = Ema(model(seed=5), decay=0.9)
    saved = {name: value.clone() for name, value in ema.state_dict().items()}
    resumed.load_state_dict(saved)
    module.load_state_dict(model(seed=2).state_dict())
    for average in (ema, resumed):
        average.update(module, 1)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in ema.state_dict().items())
    # What was loaded is copied: the caller's tensors do not move along.
    assert not any(torch.equal(value, saved[name]) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize("change", ["missing", "additional", "renamed"])
def test_wrong_names_are_a_key_error_and_change_nothing(change):
    ema = Ema(model(), decay=0.9)
    state = {name: torch.zeros_like(value) for name, value in ema.state_dict().items()}
    if change != "additional":
        del state["0.bias"]
    if change != "missing":
        state["0.offset"] = torch.zeros(4)
    with pytest.raises(KeyError, match=r"EMA names differ.*0\."):
        ema.load_state_dict(state)
    assert all(torch.equal(value, model().state_dict()[name]) for name, value in ema.state_dict().items())
