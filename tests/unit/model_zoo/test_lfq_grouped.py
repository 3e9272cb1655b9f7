import itertools

import pytest
import torch
from model_checks import features, quantizer_of, refused, tokens

from model_zoo.config import EntropyLoss
from model_zoo.losses import entropy_penalty


def signs_of_bits(bits) -> torch.Tensor:
    """(2^bits, bits) in float64, lowest bit first."""
    return torch.tensor([code[::-1] for code in itertools.product([-1.0, 1.0], repeat=bits)], dtype=torch.float64)


@pytest.mark.parametrize(("d", "groups"), [(4, 4), (6, 2), (6, 3), (8, 2)])
@pytest.mark.parametrize("temperature", [0.01, 0.5, 4.0])
def test_entropies_are_those_of_the_softmax_over_each_groups_codes(d, groups, temperature):
    quantizer, z_bdhw = quantizer_of("lfq", 2**d, d, groups=groups), features(d)
    quantized = quantizer(z_bdhw, temperature)
    z_nd = tokens(z_bdhw).double().requires_grad_()
    bits = d // groups
    sample_entropy, average_entropy, average = 0.0, 0.0, []
    for group in range(groups):
        part_nb = z_nd[:, group * bits : (group + 1) * bits]
        log_p_nk = (2 * part_nb @ signs_of_bits(bits).T / temperature).log_softmax(dim=1)
        sample_entropy = sample_entropy - (log_p_nk.exp() * log_p_nk).sum(dim=1).mean()
        average_k = log_p_nk.exp().mean(dim=0)
        average_entropy = average_entropy - (average_k * (average_k + 1e-5).log()).sum()
        average.append(average_k)
    assert quantized.average_probability_k.shape == (groups * 2**bits,)
    torch.testing.assert_close(quantized.average_probability_k.double(), torch.cat(average), rtol=1e-4, atol=1e-7)
    assert quantized.sample_entropy.item() == pytest.approx(sample_entropy.item(), rel=1e-5, abs=1e-7)

    mine_nd = z_nd.detach().clone().requires_grad_()
    assigned = quantizer.assign(mine_nd, temperature)
    as_quantized = quantized._replace(
        sample_entropy=assigned.sample_entropy, average_probability_k=assigned.average_probability_k
    )
    penalty = entropy_penalty(as_quantized, assigned.average_probability_k, EntropyLoss())
    exact = sample_entropy - average_entropy
    assert penalty.loss.item() == pytest.approx(exact.item(), rel=1e-9, abs=1e-12)
    penalty.loss.backward()
    exact.backward()
    torch.testing.assert_close(mine_nd.grad, z_nd.grad, rtol=1e-7, atol=1e-11)


def test_groups_change_only_the_entropy_of_the_mean():
    """One group is the default, bit for bit."""
    z_bdhw = features(6).detach()
    plain, one, two = (quantizer_of("lfq", 64, 6, groups=groups)(z_bdhw, 0.5) for groups in (None, 1, 2))
    for field in ("quantized_bdhw", "index_bhw", "commitment", "sample_entropy", "average_probability_k"):
        assert torch.equal(getattr(plain, field), getattr(one, field))
        if field != "average_probability_k":
            assert torch.equal(getattr(plain, field), getattr(two, field))
    # The groups' means are the marginals of the whole one.
    whole_hl = plain.average_probability_k.view(8, 8)
    torch.testing.assert_close(two.average_probability_k, torch.cat([whole_hl.sum(dim=0), whole_hl.sum(dim=1)]))


def test_more_codes_than_can_be_counted_need_no_number_for_each():
    quantizer, z_bdhw = quantizer_of("lfq", 2**32, 32, groups=4), features(32, b=4, h=16, w=16)
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        quantized = quantizer(z_bdhw, 0.01)
    assert quantized.average_probability_k.shape == (4 * 256,)
    assert max(sizes) == 1024 * 32
    index_bhw = quantized.index_bhw
    assert int(index_bhw.max()) > 2**31
    assert torch.equal(tokens(quantizer.lookup(index_bhw)), tokens(z_bdhw).sign())
    assert quantizer.counts_groups and quantizer.counted_codes == 2 * 2**16
    counted = quantizer.counted(index_bhw)
    signs = tokens(z_bdhw).view(-1, 2, 16) > 0
    expected = (signs * 2 ** torch.arange(16)).sum(dim=2) + 2**16 * torch.arange(2)
    assert torch.equal(counted.flatten(0, 2), expected)


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_groups_that_are_counted_have_at_most_16_bits_whatever_the_groups_of_the_entropy(name):
    quantizer = quantizer_of(name, 2**35, 35, groups=35)
    assert quantizer.counted_sizes == [2**12, 2**12, 2**11]
    index_n = torch.tensor([0, 2**35 - 1, (5 << 24) + (6 << 12) + 7])
    first_g, last_g = torch.tensor([0, 2**12, 2**13]), torch.tensor([2**12 - 1, 2**13 - 1, 2**13 + 2**11 - 1])
    assert torch.equal(quantizer.counted(index_n), torch.stack([first_g, last_g, first_g + torch.tensor([7, 6, 5])]))


@pytest.mark.parametrize(("name", "bits", "groups"), [("lfq", 6, 2), ("bsq", 18, 18), ("bsq", 24, 24)])
def test_codebooks_that_can_be_counted_are_counted_whole(name, bits, groups):
    quantizer, index_n = quantizer_of(name, 2**bits, bits, groups=groups), torch.tensor([0, 5, 2**bits - 1])
    assert quantizer.counted_sizes == [2**bits] and not quantizer.counts_groups
    assert torch.equal(quantizer.counted(index_n), index_n)


def test_what_makes_no_groups_is_refused():
    assert "give one of 1, 2, 3, 6" in refused(quantizer_of, "lfq", 64, 6, groups=4)
    assert "does not split 32 bits" in refused(quantizer_of, "lfq", 2**32, 32)
    assert "give one of 2, 4, 8, 16, 32" in refused(quantizer_of, "lfq", 2**32, 32, groups=1)
    assert "at most 62 bits" in refused(quantizer_of, "lfq", 2**64, 64, groups=8)
