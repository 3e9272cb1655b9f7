import numpy as np
import pytest
import torch
from model_checks import features, nearest_by_hand, quantizer_of, refused, tokens
from safetensors.torch import save_file

from model_zoo.config import QuantizerLoss
from model_zoo.losses import quantizer_loss
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.quantizers.vqgan_lc import read_table

ROWS, ROW_DIM, DIM = 37, 12, 8


def table() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, ROW_DIM)).astype(np.float32)


@pytest.fixture
def codes(tmp_path) -> str:
    path = tmp_path / "codes.npy"
    np.save(path, table())
    return str(path)


def make(codes: str):
    torch.manual_seed(0)
    quantizer = quantizer_of("vqgan_lc", ROWS, DIM, codes=codes, table_dim=ROW_DIM)
    quantizer.read_codes()
    return quantizer


def test_forward_losses_and_gradients_are_the_papers_in_float64(codes):
    quantizer, z_bdhw = make(codes), features()
    quantized = quantizer(z_bdhw)
    direction_bdhw = torch.randn(z_bdhw.shape, generator=torch.Generator().manual_seed(2))
    beta = 0.33
    loss = quantizer_loss(quantized, QuantizerLoss(form="reference", beta=beta))
    (loss + (quantized.quantized_bdhw * direction_bdhw).sum()).backward()

    # k = argmin_j |z - P(c_j)|^2; z + sg(P(c_k) - z); |z - sg(P(c_k))|^2 + beta |sg(z) - P(c_k)|^2.
    z_nd = tokens(z_bdhw).double().requires_grad_()
    weight_dr = quantizer.projector.weight.detach().double().requires_grad_()
    bias_d = quantizer.projector.bias.detach().double().requires_grad_()
    codes_kd = torch.from_numpy(table()).double() @ weight_dr.T + bias_d
    grad_nd = tokens(direction_bdhw).double()
    index_n, code_nd, commitment, codebook = nearest_by_hand(z_nd, codes_kd, grad_nd, (1, beta))

    assert len(index_n.unique()) > 5
    assert torch.equal(quantized.index_bhw.flatten(), index_n)
    assert torch.equal(quantizer.tokenize(z_bdhw).flatten(), index_n)
    torch.testing.assert_close(quantizer.codes().double(), codes_kd, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokens(quantizer.lookup(quantized.index_bhw)).double(), code_nd, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokens(quantized.quantized_bdhw).double(), code_nd.detach(), rtol=1e-5, atol=1e-6)
    assert quantized.commitment.item() == pytest.approx(commitment.item(), rel=1e-5)
    assert quantized.codebook.item() == pytest.approx(codebook.item(), rel=1e-5)
    assert quantized.double_quantization is None and quantized.sample_entropy is None
    torch.testing.assert_close(tokens(z_bdhw.grad).double(), z_nd.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.projector.weight.grad.double(), weight_dr.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantizer.projector.bias.grad.double(), bias_d.grad, rtol=1e-4, atol=1e-6)
    assert quantizer.embedding.weight.grad is None and not quantizer.embedding.weight.requires_grad


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_tables_of_both_formats_are_read(tmp_path, dtype):
    values = table().astype(dtype)
    np.save(tmp_path / "codes.npy", values)
    save_file({"any name": torch.from_numpy(values)}, tmp_path / "codes.safetensors")
    expected_kr = torch.from_numpy(values.astype(np.float32))
    for name in ("codes.npy", "codes.safetensors"):
        assert torch.equal(read_table(str(tmp_path / name), ROWS, ROW_DIM), expected_kr)


def test_the_file_is_part_of_the_state_and_not_needed_for_building_a_model(codes):
    first = make(codes)
    second = quantizer_of("vqgan_lc", ROWS, DIM, codes="gone.npy", table_dim=ROW_DIM)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.tokenize(features()), first.tokenize(features()))
    assert set(first.state_dict()) == {"embedding.weight", "projector.weight", "projector.bias"}


def test_the_projector_starts_as_the_released_code_does():
    torch.manual_seed(0)
    quantizer = quantizer_of("vqgan_lc", 16, 8, table_dim=768)
    assert quantizer.projector.weight.shape == (8, 768)
    assert quantizer.projector.weight.std().item() == pytest.approx(8**-0.5, rel=0.03)


def test_a_table_that_is_missing_or_does_not_fit_is_refused(codes, tmp_path):
    def message(name: str | None, rows: int = ROWS, row_dim: int = ROW_DIM) -> str:
        return refused(read_table, name if name is None else str(tmp_path / name), rows, row_dim)

    assert "give a .npy or .safetensors file of 37 rows of 12 values with model.codes=FILE" in message(None)
    assert "nowhere.npy does not exist" in message("nowhere.npy")
    assert "must be a .npy or .safetensors file" in message("codes.pth")
    assert "holds 37 x 12 values, but model.codebook_size=100: give 37" in message("codes.npy", rows=100)
    assert "holds 37 x 12 values, but model.table_dim=768: give 12" in message("codes.npy", row_dim=768)
    for name, content in (("text.npy", b"hello"), ("empty.npy", b""), ("text.safetensors", b"hello, world")):
        (tmp_path / name).write_bytes(content)
        assert "cannot be read" in message(name)
    np.save(tmp_path / "flat.npy", np.zeros(37))
    assert "shape [37]" in message("flat.npy")
    np.save(tmp_path / "words.npy", np.array([["a"] * ROW_DIM] * ROWS))
    assert "cannot be read" in message("words.npy")
    np.save(tmp_path / "nan.npy", np.full((ROWS, ROW_DIM), np.nan))
    assert "not finite" in message("nan.npy")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "two.safetensors")
    assert "holds 2 tensors" in message("two.safetensors")


def test_what_it_cannot_do_is_refused():
    assert "codebook_parallel=1" in refused(quantizer_of, "vqgan_lc", 16, 4, shard=CodebookShard(0, 8, None))
    assert "model.normalize=false" in refused(quantizer_of, "vqgan_lc", 16, 4, normalize=True)
