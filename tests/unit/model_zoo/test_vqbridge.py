import math

import pytest
import torch
from model_checks import features, nearest_by_hand, quantizer_of, refused, tokens

from model_zoo.config import QuantizerLoss
from model_zoo.losses import quantizer_loss
from model_zoo.ops.codebook_parallel import CodebookShard

SIZES = dict(bridge_group=4, bridge_width=12, bridge_depth=2, bridge_heads=3)
CODES, DIM = 36, 8


def make(seed: int = 0):
    """Every weight random, as after training: the last layer starts at 0."""
    torch.manual_seed(seed)
    quantizer = quantizer_of("vqbridge", CODES, DIM, **SIZES)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.normal_(std=0.4)
    return quantizer


def normed(x_gw):
    centred_gw = x_gw - x_gw.mean(dim=1, keepdim=True)
    return centred_gw / (centred_gw.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()


def gelu(x):
    """Its tanh approximation."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bridge(weights: dict, table_kd):
    """Compress, process, recover, head by head and token by token."""

    def linear(x, name):
        return x @ weights[f"projector.{name}.weight"].T + weights[f"projector.{name}.bias"]

    width, heads, group = SIZES["bridge_width"], SIZES["bridge_heads"], SIZES["bridge_group"]
    size = width // heads
    groups = [torch.cat([table_kd[first + i] for i in range(group)]) for first in range(0, CODES, group)]
    x_gw = linear(torch.stack(groups), "compress")
    for i in range(SIZES["bridge_depth"]):
        qkv = linear(normed(x_gw), f"blocks.{i}.qkv")
        queries, keys, values = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
        attended = []
        for h in range(heads):
            of_head = slice(h * size, (h + 1) * size)
            weight_gg = (queries[:, of_head] @ keys[:, of_head].T / math.sqrt(size)).softmax(dim=1)
            attended.append(weight_gg @ values[:, of_head])
        x_gw = x_gw + linear(torch.cat(attended, dim=1), f"blocks.{i}.attended")
        x_gw = x_gw + linear(gelu(linear(normed(x_gw), f"blocks.{i}.expand")), f"blocks.{i}.contract")
    out = linear(normed(x_gw), "recover")
    return torch.stack([out[k // group][k % group * DIM : (k % group + 1) * DIM] for k in range(CODES)])


def test_forward_losses_and_gradients_are_the_papers_in_float64():
    quantizer, z_bdhw = make(), features()
    quantized = quantizer(z_bdhw)
    direction_bdhw = torch.randn(z_bdhw.shape, generator=torch.Generator().manual_seed(2))
    beta = 0.25
    loss = quantizer_loss(quantized, QuantizerLoss(form="paper", beta=beta))
    (loss + (quantized.quantized_bdhw * direction_bdhw).sum()).backward()

    z_nd = tokens(z_bdhw).double().requires_grad_()
    weights = {name: p.detach().double().requires_grad_() for name, p in quantizer.named_parameters()}
    codes_kd = bridge(weights, weights["embedding.weight"])
    grad_nd = tokens(direction_bdhw).double()
    index_n, code_nd, commitment, codebook = nearest_by_hand(z_nd, codes_kd, grad_nd, (beta, 1))

    assert len(index_n.unique()) > 5
    torch.testing.assert_close(quantizer.codes().double(), codes_kd, rtol=1e-4, atol=1e-5)
    assert torch.equal(quantized.index_bhw.flatten(), index_n)
    torch.testing.assert_close(tokens(quantized.quantized_bdhw).double(), code_nd.detach(), rtol=1e-4, atol=1e-5)
    assert quantized.commitment.item() == pytest.approx(commitment.item(), rel=1e-5)
    assert quantized.codebook.item() == pytest.approx(codebook.item(), rel=1e-5)
    assert quantized.double_quantization is None and quantized.sample_entropy is None
    torch.testing.assert_close(tokens(z_bdhw.grad).double(), z_nd.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in quantizer.named_parameters():
        expected = weights[name].grad
        assert expected.norm() > 1e-7 or name.endswith("bias"), name  # that of the keys' bias is 0
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=1e-3, atol=1e-5, msg=name)


def test_chosen_codes_have_a_gradient_in_all_rows():
    quantizer = make()
    quantized = quantizer(features())
    quantized.codebook.backward()
    assert len(quantized.index_bhw.unique()) < CODES
    assert quantizer.embedding.weight.grad.abs().amax(dim=1).gt(0).all()


def test_tokens_and_codes_are_those_of_training():
    quantizer, z_bdhw = make(), features()
    quantized = quantizer(z_bdhw)
    assert torch.equal(quantizer.tokenize(z_bdhw), quantized.index_bhw)
    torch.testing.assert_close(quantizer.lookup(quantized.index_bhw), quantized.quantized_bdhw, rtol=1e-6, atol=1e-6)
    assert torch.equal(quantizer.codes()[quantized.index_bhw], quantizer.lookup(quantized.index_bhw).movedim(1, -1))


@pytest.mark.parametrize("name", ["embedding.weight", "projector.compress.weight", "projector.recover.bias"])
def test_codes_follow_weights_that_change_in_any_way(name):
    quantizer = make().eval()
    before_kd = quantizer.codes().detach().clone()
    weight = dict(quantizer.named_parameters())[name]
    kept = weight.detach().clone()
    weight.data = weight.data + 1  # which autograd's version counter does not see
    assert not torch.equal(quantizer.codes(), before_kd)
    weight.data.copy_(kept)
    assert torch.equal(quantizer.codes(), before_kd)


def test_at_inference_codes_are_computed_once():
    quantizer, z_bdhw = make().eval(), features()
    computed = []
    quantizer.projector.register_forward_hook(lambda *_: computed.append(1))
    with torch.no_grad():
        index_bhw = quantizer.tokenize(z_bdhw)
        quantizer.lookup(index_bhw)
        assert torch.equal(quantizer.tokenize(z_bdhw), index_bhw) and len(computed) == 1
    quantizer.codes().sum().backward()  # with a gradient they are computed
    assert len(computed) == 2 and quantizer.embedding.weight.grad is not None
    quantizer.train()
    with torch.no_grad():
        quantizer.tokenize(z_bdhw)
        quantizer.tokenize(z_bdhw)
    assert len(computed) == 4


@pytest.mark.parametrize("change", ["in place", "another storage", "load_state_dict", "hidden from versions", "dtype"])
def test_codes_that_are_kept_follow_weights(change):
    quantizer, other = make().eval(), make(seed=1)
    weight = quantizer.embedding.weight
    with torch.no_grad():
        before_kd = quantizer.codes()
        if change == "in place":
            weight.mul_(2)
        elif change == "another storage":
            weight.data = 2 * weight.data
        elif change == "load_state_dict":
            quantizer.load_state_dict(other.state_dict())
        elif change == "hidden from versions":  # as engines do that update a flat buffer, in training
            quantizer.train()
            weight.data.mul_(2)
            quantizer.eval()
        else:
            quantizer.to(torch.float64)
        expected_kd = quantizer.projector(weight)
        assert not torch.equal(before_kd.to(expected_kd), expected_kd) or change == "dtype"
        assert torch.equal(quantizer.codes(), expected_kd)


def test_it_starts_as_the_released_code_does():
    torch.manual_seed(0)
    quantizer = quantizer_of("vqbridge", 4096, 16, bridge_group=64)
    assert quantizer.embedding.weight.std().item() == pytest.approx(1 / (4096 * math.sqrt(3)), rel=0.02)
    assert quantizer.embedding.weight.requires_grad
    weights = dict(quantizer.projector.named_parameters())
    assert all(not value.any() for name, value in weights.items() if name.endswith("bias"))
    assert not weights["recover.weight"].any() and not quantizer.codes().any()
    bound = math.sqrt(6 / (64 * 16 + 256))
    assert weights["compress.weight"].abs().max().item() == pytest.approx(bound, rel=0.01)
    assert weights["blocks.1.expand.weight"].shape == (512, 256)


def test_at_the_published_size_it_has_the_published_parameters():
    with torch.device("meta"):
        quantizer = quantizer_of("vqbridge", 262144, 256)
    inputs, width = 64 * 256, 256
    block = width * 3 * width + 3 * width + width * width + width + 2 * (width * 2 * width) + 2 * width + width
    expected = inputs * width + width + 2 * block + width * inputs + inputs
    assert sum(p.numel() for p in quantizer.projector.parameters()) == expected


def test_it_computes_in_fp32_under_autocast():
    quantizer, z_bdhw = make(), features().detach()
    expected, codes_kd = quantizer(z_bdhw), quantizer.codes()
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(z_bdhw)
        assert torch.equal(quantizer.tokenize(z_bdhw), expected.index_bhw)
        assert torch.equal(quantizer.codes(), codes_kd)
    assert torch.equal(quantized.quantized_bdhw, expected.quantized_bdhw)


def test_what_it_cannot_do_is_refused():
    shard = CodebookShard(0, 18, None)
    assert "codebook_parallel=1" in refused(quantizer_of, "vqbridge", CODES, DIM, shard=shard, **SIZES)
    assert "model.normalize=false" in refused(quantizer_of, "vqbridge", CODES, DIM, normalize=True, **SIZES)
    message = refused(quantizer_of, "vqbridge", 100, DIM, bridge_group=64)
    assert "give model.bridge_group=50 or model.codebook_size=128" in message
    message = refused(quantizer_of, "vqbridge", 64, DIM, bridge_width=250)
    assert "give model.bridge_width=252" in message
