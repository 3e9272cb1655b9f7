"""Codes as moving averages against the paper's equations in float64, token by token."""

import pytest
import torch
from model_checks import features, quantizer_of, refused, tokens
from torch import Tensor

from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.quantizers.base import Quantizer

CODES, DIM, DECAY = 37, 8, 0.9
FIRST_RESTART = 10  # 1 / (1 - DECAY)


def make(**changes) -> Quantizer:
    torch.manual_seed(0)
    return quantizer_of("vq_ema", CODES, DIM, codebook_decay=DECAY, **changes).train()


def before_restarts(**changes) -> Quantizer:
    """After as many updates as restart no code, with weights and statistics as at the start."""
    quantizer = make(**changes)
    statistics = quantizer.statistics()
    statistics["updates"].fill_(FIRST_RESTART - 1)
    statistics["sums"].copy_(codes(quantizer))
    return quantizer


def batch(step: int, images: int = 2) -> Tensor:
    """Features that drift, so that the codes have somewhere to go."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(images, DIM, 3, 5, generator=generator) + 0.3 * step


def codes(quantizer: Quantizer) -> Tensor:
    return quantizer.embedding.weight.detach()


def step(quantizer: Quantizer, *micro_batches: Tensor) -> None:
    quantizer.anneal(0.5)
    for z_bdhw in micro_batches:
        quantizer(z_bdhw)
    quantizer.after_step()


def distances(codes_kd: Tensor, z_bdhw: Tensor) -> Tensor:
    """Of codes to features, in float64, in which they have no rounding to speak of."""
    return torch.cdist(codes_kd.double(), tokens(z_bdhw).double())


class Published:
    """Eq. 6-8 with the Laplace smoothing of the public code, one token after another."""

    def __init__(self, codes_kd: Tensor):
        self.codes = codes_kd.double().clone()
        self.usage, self.sums = torch.ones(CODES, dtype=torch.float64), self.codes.clone()

    def step(self, z_nd: Tensor) -> Tensor:
        count, total = torch.zeros_like(self.usage), torch.zeros_like(self.sums)
        chosen = []
        for z_d in z_nd.double():
            nearest = min(range(CODES), key=lambda k: float((z_d - self.codes[k]).square().sum()))
            count[nearest] += 1
            total[nearest] += z_d
            chosen.append(nearest)
        self.usage = self.usage * DECAY + count * (1 - DECAY)
        self.sums = self.sums * DECAY + total * (1 - DECAY)
        n = self.usage.sum()
        self.codes = self.sums / ((self.usage + 1e-5) / (n + CODES * 1e-5) * n)[:, None]
        return torch.tensor(chosen)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_codes_follow_the_papers_equations(parts):
    quantizer = make()
    published = Published(codes(quantizer))
    for number in range(6):
        z_bdhw = batch(number)
        quantizer.anneal(0.5)
        index = torch.cat([quantizer(part).index_bhw.flatten() for part in z_bdhw.chunk(parts)])
        quantizer.after_step()
        assert torch.equal(index, published.step(tokens(z_bdhw)))
        torch.testing.assert_close(codes(quantizer).double(), published.codes, rtol=1e-5, atol=1e-5)
    moved_k = (codes(quantizer) - codes(make())).norm(dim=1)
    assert (moved_k > 0.1).sum() > 5 and (moved_k < 1e-3).sum() > 5  # those in use, and the others


def test_values_losses_and_gradients_are_those_of_vq_without_a_codebook_loss():
    quantizer, z_bdhw = make(), features()
    z_nd, codes_kd = tokens(z_bdhw).double(), codes(quantizer).double()
    index_n = (z_nd[:, None] - codes_kd).square().sum(dim=2).argmin(dim=1)
    quantized = quantizer(z_bdhw, 0.5)
    assert torch.equal(quantized.index_bhw.flatten(), index_n)
    got_nd = quantized.quantized_bdhw.movedim(1, 3).flatten(0, 2)
    torch.testing.assert_close(got_nd.double(), codes_kd[index_n], rtol=1e-6, atol=1e-6)
    assert quantized.codebook is None and quantized.sample_entropy is None and quantized.double_quantization is None
    commitment = (z_nd - codes_kd[index_n]).square().mean()
    assert quantized.commitment.item() == pytest.approx(commitment.item(), rel=1e-6)
    up_nd = torch.randn(z_nd.shape, dtype=torch.float64)
    (quantized.commitment + (got_nd * up_nd).sum()).backward()
    expected_nd = up_nd + 2 * (z_nd - codes_kd[index_n]) / z_nd.numel()
    torch.testing.assert_close(tokens(z_bdhw.grad).double(), expected_nd, rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in quantizer.parameters())


def test_only_the_training_pass_of_an_updated_step_counts():
    quantizer, expected = make(), make()
    step(expected, batch(1))
    step(expected, batch(3))

    quantizer.anneal(0.1)
    with torch.no_grad():
        quantizer(batch(1))  # the first pass of gradient accumulation
    quantizer(batch(1))
    quantizer.after_step()
    quantizer.eval()(batch(2))  # validation
    quantizer.train().tokenize(batch(2))
    before = codes(quantizer).clone()
    quantizer.after_step()  # nothing was chosen: the codes are frozen
    assert torch.equal(codes(quantizer), before)
    quantizer.anneal(0.2)
    quantizer(batch(2))  # skipped: after_step is not called
    step(quantizer, batch(3))
    assert torch.equal(codes(quantizer), codes(expected))


@pytest.mark.parametrize("restart_below", [0.0, 1.0])
def test_training_goes_on_from_weights_and_statistics_bit_for_bit(restart_below):
    straight = make(restart_below=restart_below)
    for number in range(13):
        step(straight, batch(number))
    stopped, resumed = make(restart_below=restart_below), make(restart_below=restart_below)
    for number in range(8):
        step(stopped, batch(number))
    assert set(stopped.state_dict()) == {"embedding.weight"}
    resumed.load_state_dict(stopped.state_dict())
    for name, value in resumed.statistics().items():
        value.copy_(stopped.statistics()[name])
    for number in range(8, 13):
        step(resumed, batch(number))
    assert torch.equal(codes(resumed), codes(straight))
    assert all(torch.equal(value, straight.statistics()[name]) for name, value in resumed.statistics().items())


def test_the_averages_start_from_the_codes_that_are_there_at_the_first_step():
    quantizer = make()
    with torch.no_grad():  # as by codebook_init=features, or init_from
        quantizer.embedding.weight.mul_(0.5)
    published = Published(codes(quantizer))
    step(quantizer, batch(0))
    published.step(tokens(batch(0)))
    torch.testing.assert_close(codes(quantizer).double(), published.codes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_unused_codes_restart_at_features_of_the_batch(parts):
    quantizer, images = before_restarts(restart_below=0.95), batch(2, images=4)
    published = Published(codes(quantizer))
    published.step(tokens(images))
    alive_k = published.usage >= 0.95
    dead = int((~alive_k).sum())
    assert 10 < dead < CODES
    step(quantizer, *images.chunk(parts))
    torch.testing.assert_close(codes(quantizer)[alive_k].double(), published.codes[alive_k], rtol=1e-4, atol=1e-5)
    distance_mn = distances(codes(quantizer)[~alive_k], images)
    nearest_m = distance_mn.argmin(dim=1)
    assert distance_mn.amin(dim=1).max() < 1e-3 and len(nearest_m.unique()) == dead  # without replacement
    usage_k = quantizer.statistics()["usage"]
    assert torch.equal(usage_k[~alive_k], torch.full((dead,), 0.95))
    torch.testing.assert_close(usage_k[alive_k].double(), published.usage[alive_k])
    # Where they restart depends on the step's number, not on how the batch is cut.
    whole = before_restarts(restart_below=0.95)
    step(whole, images)
    assert torch.equal(codes(whole), codes(quantizer))
    step(whole, images + 50)  # so far away that hardly a code is chosen
    again_m = distances(codes(whole)[~alive_k], images + 50).argmin(dim=1)
    assert (again_m != nearest_m).sum() > dead / 2


def test_a_step_restarts_no_more_codes_than_it_has_features():
    quantizer = before_restarts(restart_below=0.95)
    before = codes(quantizer).clone()
    z_bdhw = torch.full((1, DIM, 1, 3), 5.0) + torch.arange(3)
    step(quantizer, z_bdhw)
    distance_kn = distances(codes(quantizer), z_bdhw)
    moved_k = (codes(quantizer) - before).norm(dim=1) > 0.01
    assert moved_k.sum() <= 4  # the chosen code, and a code for each feature
    assert (distance_kn.amin(dim=0) < 1e-3).all()


def test_no_code_restarts_before_the_statistics_know_which_codes_are_in_use():
    """As in fine-tuning, which loads the codes of a source and no statistics: N starts at 1."""
    source = make()
    step(source, batch(0))
    plain, restarting = make(), make(restart_below=1.0)  # which N = 1 falls below in the first step
    for quantizer in (plain, restarting):
        quantizer.load_state_dict(source.state_dict())
    for number in range(1, FIRST_RESTART):
        for quantizer in (plain, restarting):
            step(quantizer, batch(number))
        assert torch.equal(codes(restarting), codes(plain))
    step(restarting, batch(FIRST_RESTART))
    step(plain, batch(FIRST_RESTART))
    assert not torch.equal(codes(restarting), codes(plain))
    assert quantizer_of("vq_ema", CODES, DIM).first_restart == 100  # decay 0.99
    assert quantizer_of("vq_ema", CODES, DIM, codebook_decay=0.0).first_restart == 1


def test_restarts_bring_codes_into_use():
    used = {}
    for restart_below in (0.0, 0.2):
        quantizer = make(restart_below=restart_below)
        for number in range(30):
            step(quantizer, batch(number % 3, images=8) + 6)
        used[restart_below] = len(quantizer.eval()(batch(1, images=8) + 6).index_bhw.unique())
    assert used[0.0] < 8 and used[0.2] > 25


def test_what_it_cannot_do_is_refused():
    assert "set codebook_parallel=1" in refused(quantizer_of, "vq_ema", 8, 4, shard=CodebookShard(0, 4, None))
    assert "set model.normalize=false" in refused(quantizer_of, "vq_ema", 8, 4, normalize=True)
