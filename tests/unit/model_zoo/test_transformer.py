import copy
import math
from dataclasses import replace

import pytest
import torch
from model_checks import assert_same, random_transformer, refused, write_run
from omegaconf import OmegaConf
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from model_zoo import Transformer, TransformerConfig, load_generator
from model_zoo.ops.attention import causal_attention
from model_zoo.transformer import DecodePosition, checkpoint_blocks, flops_per_token, rope_table, rotate

TINY = TransformerConfig(vocabulary=40, classes=5, grid=[3, 4], depth=2, heads=2, head_dim=8, code_dim=6, dropout=0.0)


def tiny(seed=0, **changes) -> Transformer:
    return random_transformer(replace(TINY, **changes), seed)


def codes(images=3, count=11, seed=1):
    return torch.randint(TINY.vocabulary, (images, count), generator=torch.Generator().manual_seed(seed))


CLASSES = torch.tensor([0, 3, TINY.classes])


@pytest.mark.parametrize("changed", [0, 4, 10])
def test_a_code_changes_the_logits_behind_it_and_none_before(changed):
    transformer, index_bt = tiny(), codes()
    other_bt = index_bt.clone()
    other_bt[:, changed] = (other_bt[:, changed] + 1) % TINY.vocabulary
    with torch.no_grad():
        difference_bt = (transformer(index_bt, CLASSES) - transformer(other_bt, CLASSES)).abs().amax(dim=2)
    assert difference_bt.shape == (3, 12)
    assert difference_bt[:, : changed + 1].max() == 0
    assert difference_bt[:, changed + 1 :].min() > 1e-4


def test_the_class_changes_all_logits():
    transformer = tiny()
    with torch.no_grad():
        difference_bt = (transformer(codes(), CLASSES) - transformer(codes(), CLASSES - CLASSES)).abs().amax(dim=2)
    assert difference_bt[0].max() == 0 and difference_bt[1:].min() > 1e-3


def cached_logits(transformer, index_bt, class_b, masked, grid=None):
    caches, tokens = transformer.new_caches(len(class_b), grid=grid), index_bt.shape[1] + 1
    logits = []
    for position in range(tokens):
        mask_1t = (torch.arange(tokens) <= position)[None] if masked else None
        at = DecodePosition(torch.tensor([position]), position == 0, tokens if masked else position + 1, mask_1t)
        code_b = index_bt[:, position - 1] if position else None
        logits.append(transformer.next_logits(code_b, class_b, caches, at, grid))
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("embedding", ["learned", "codebook"])
@torch.no_grad()
def test_cached_logits_are_those_of_a_forward(masked, embedding):
    transformer = tiny(embedding=embedding)
    expected_btv = transformer(codes(), CLASSES)
    assert expected_btv.std() > 0.1
    actual_btv = cached_logits(transformer, codes(), CLASSES, masked)
    torch.testing.assert_close(actual_btv, expected_btv, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_forward_of_fewer_codes_gives_the_first_logits():
    transformer = tiny()
    logits_btv = transformer(codes(), CLASSES)
    for count in (0, 5):
        torch.testing.assert_close(transformer(codes()[:, :count], CLASSES), logits_btv[:, : count + 1])
    assert "12 codes leave nothing to predict of 12" in refused(transformer, codes(count=12), CLASSES)


def test_the_loss_is_the_cross_entropy_of_the_forwards_logits():
    transformer, index_bt = tiny(), codes(count=12)
    logits_btv = transformer(index_bt[:, :-1], CLASSES)
    expected = F.cross_entropy(logits_btv.flatten(0, 1), index_bt.flatten())
    torch.testing.assert_close(transformer.loss(index_bt, CLASSES, impl="dense").loss, expected)


def test_an_untrained_model_finds_all_codes_equally_likely():
    torch.manual_seed(0)
    transformer = Transformer(TINY).eval()
    assert transformer(codes(), CLASSES).abs().max() == 0
    loss = transformer.loss(codes(count=12), CLASSES, impl="dense").loss
    assert loss.item() == pytest.approx(math.log(TINY.vocabulary), rel=1e-6)


@pytest.mark.parametrize(
    ("layers", "hidden", "parameters"),
    [(16, 2816, 342_994_944), (20, 3584, 649_640_960), (24, 4096, 1_076_103_168), (30, 5120, 2_063_331_840)],
)
def test_published_sizes(layers, hidden, parameters):
    with torch.device("meta"):
        transformer = Transformer(TransformerConfig(depth=layers, heads=layers))
    assert sum(parameter.numel() for parameter in transformer.parameters()) == parameters
    assert transformer.config.width == 64 * layers and transformer.config.hidden == hidden
    assert transformer.blocks[0].feed_forward.w1.weight.shape == (hidden, 64 * layers)


def test_rotary_embeddings_are_complex_rotations_by_row_and_column():
    rows, columns, head_dim = 3, 4, 8
    x_bthd = torch.randn(2, 13, 5, head_dim, generator=torch.Generator().manual_seed(0))
    rotated_bthd = rotate(x_bthd, rope_table(rows, columns, head_dim))
    assert rotated_bthd[:, 0].abs().max() == 0  # the class
    pairs = torch.view_as_complex(x_bthd.unflatten(-1, (-1, 2)).contiguous())
    for position in range(1, 13):
        row, column = divmod(position - 1, columns)
        angles = [row, row / 100, column, column / 100]  # base 10,000, two pairs each
        turned = pairs[:, position] * torch.exp(1j * torch.tensor(angles))
        expected = torch.view_as_real(turned).flatten(-2)
        torch.testing.assert_close(rotated_bthd[:, position], expected, rtol=1e-5, atol=1e-5)


def test_attention_of_pytorch_is_the_dense_one():
    q, k, v = torch.randn(3, 2, 13, 4, 8, generator=torch.Generator().manual_seed(0))
    logits_bhts = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(8)
    weights_bhts = logits_bhts.masked_fill(torch.ones(13, 13, dtype=torch.bool).triu(1), -math.inf).softmax(dim=-1)
    torch.testing.assert_close(causal_attention(q, k, v), torch.einsum("bhts,bshd->bthd", weights_bhts, v))


@pytest.mark.parametrize("embedding", ["learned", "codebook"])
def test_flops_are_those_that_pytorch_counts(embedding):
    # By plain products: PyTorch counts no attention kernel of the CPU.
    transformer = tiny(embedding=embedding)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        transformer(codes(), CLASSES)
    assert counter.get_total_flops() == pytest.approx(
        flops_per_token(transformer.config) * 3 * transformer.config.tokens, rel=1e-12
    )


@pytest.mark.parametrize("selective", [False, True])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(selective):
    plain = tiny().train()
    checkpointed = copy.deepcopy(plain)
    checkpoint_blocks(checkpointed, selective)
    losses = [model.loss(codes(count=12), CLASSES, impl="dense").loss for model in (plain, checkpointed)]
    for loss in losses:
        loss.backward()
    assert losses[0] == losses[1]
    for parameter, other in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert parameter.grad.abs().sum() > 0
        torch.testing.assert_close(parameter.grad, other.grad)


def test_codebook_embedding_is_a_projection_of_frozen_code_vectors():
    transformer = tiny(embedding="codebook")
    embedding = transformer.tok_emb
    assert embedding.codebook_vd.shape == (40, 6)
    assert "tok_emb.codebook_vd" in transformer.state_dict()
    assert "tok_emb.codebook_vd" not in dict(transformer.named_parameters())
    expected = embedding.codebook_vd[codes()] @ embedding.projection.weight.T + embedding.projection.bias
    torch.testing.assert_close(embedding(codes()), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": ["3x4", "2x5", "3x4"]}, "model.grids has 3x4 twice: leave one out"),
        ({"grids": ["4x3", "2x5"]}, "model.grid=[3,4] is not among model.grids=[4x3,2x5]: set model.grid=[4,3] or"),
        ({"grids": ["3x4", "2*5"]}, "model.grids: '2*5' must be ROWSxCOLUMNS, each 1 to 1024, such as 24x40"),
        ({"grids": ["3x4", "0x5"]}, "model.grids: '0x5' must be"),
        ({"grids": ["3x4", "2x1025"]}, "model.grids: '2x1025' must be"),
        ({"grids": ["3x4", "2x5x1"]}, "model.grids: '2x5x1' must be"),
        ({"grids": ["3x4"], "grid": [3]}, "model.grid=[3] must be rows and columns"),
        ({"embedding": "random"}, "model.embedding=random is unknown: choose one of learned, codebook"),
        ({"head_dim": 6}, "model.head_dim=6 must be a multiple of 4"),
        ({"grid": [16]}, "model.grid=[16] must be rows and columns"),
        ({"grid": [0, 3]}, "model.grid=[0, 3]"),
        ({"depth": 0}, "model.depth=0 must be at least 1"),
        ({"vocabulary": 0}, "model.vocabulary=0"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"gate_init": math.inf}, "model.gate_init=inf must be finite"),
    ],
)
def test_configurations_that_make_no_model_are_refused(change, message):
    assert message in refused(Transformer, replace(TINY, **change))


# --------------------------------------------------------------------------------------------------------------- grids

GRIDS = ["2x5", "3x4", "5x2"]


def test_grids_are_those_of_the_list_or_the_only_one():
    assert replace(TINY, grids=GRIDS).all_grids == ((2, 5), (3, 4), (5, 2))
    assert TINY.all_grids == ((3, 4),)
    assert replace(TINY, grids=GRIDS).tokens == TINY.tokens == 12


def test_a_model_of_several_grids_begins_as_the_models_of_one():
    """To the bit: in its initial weights, and for each grid in what it computes with trained ones."""
    initial = []
    for grids in ([], GRIDS):
        torch.manual_seed(0)
        initial.append(Transformer(replace(TINY, grids=grids)).state_dict())
    assert initial[1].pop("grid_emb.weight").abs().max() == 0
    assert initial[0].keys() == initial[1].keys()
    assert all(torch.equal(value, initial[1][name]) for name, value in initial[0].items())
    several = tiny(grids=GRIDS)
    several.grid_emb.weight.data.zero_()
    state = {name: value for name, value in several.state_dict().items() if name != "grid_emb.weight"}
    for grid in several.config.all_grids:
        one = tiny(grid=list(grid))
        one.load_state_dict(state)
        index_bt = codes(count=math.prod(grid))
        with torch.no_grad():
            assert torch.equal(several(index_bt[:, :-1], CLASSES, grid), one(index_bt[:, :-1], CLASSES))
            assert several.loss(index_bt, CLASSES, grid=grid).loss == one.loss(index_bt, CLASSES).loss


@torch.no_grad()
def test_the_grid_changes_all_logits_and_the_default_is_that_of_the_configuration():
    transformer, index_bt = tiny(grids=GRIDS), codes(count=9)
    wide_btv, default_btv, tall_btv = (transformer(index_bt, CLASSES, grid) for grid in ((2, 5), None, (5, 2)))
    assert (wide_btv - tall_btv).abs().amax(dim=2).min() > 1e-3
    assert torch.equal(default_btv, transformer(index_bt, CLASSES, [3, 4]))


def test_a_loss_trains_the_embedding_of_its_grid_alone():
    transformer = tiny(grids=GRIDS)
    transformer.loss(codes(count=10), CLASSES, grid=(5, 2)).loss.backward()
    grad_gw = transformer.grid_emb.weight.grad
    assert grad_gw[2].abs().min() > 0 and grad_gw[:2].abs().max() == 0


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_cached_logits_of_each_grid_are_those_of_a_forward(masked):
    transformer = tiny(grids=GRIDS)
    for grid in transformer.config.all_grids:
        index_bt = codes(count=math.prod(grid) - 1)
        actual_btv = cached_logits(transformer, index_bt, CLASSES, masked, grid)
        torch.testing.assert_close(actual_btv, transformer(index_bt, CLASSES, grid), rtol=1e-4, atol=1e-4)


def test_the_operations_of_a_grid_are_those_that_pytorch_counts():
    transformer = tiny(grids=GRIDS)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        transformer(codes(count=9), CLASSES, (2, 5))
    assert counter.get_total_flops() == pytest.approx(flops_per_token(transformer.config, (2, 5)) * 3 * 10, rel=1e-12)


def test_what_is_of_no_known_grid_is_refused():
    transformer = tiny(grids=GRIDS)
    unknown = "4x3 is a grid unknown to the generator: it knows 2x5, 3x4, 5x2"
    assert unknown in refused(transformer, codes(), CLASSES, (4, 3))
    assert unknown in refused(transformer.loss, codes(count=12), CLASSES, grid=[4, 3])
    assert unknown in refused(transformer.new_caches, 1, grid=(4, 3))
    assert "4x3 is a grid unknown to the generator: it knows 3x4" in refused(tiny(), codes(), CLASSES, (4, 3))
    assert "10 codes leave nothing to predict of 10" in refused(transformer, codes(count=10), CLASSES, (2, 5))
    said = "12 codes per image are not a grid of 2x5, which has 10: give the grid of these codes"
    assert said in refused(transformer.loss, codes(count=12), CLASSES, grid=(2, 5))
    assert "10 codes per image are not a grid of 3x4" in refused(transformer.loss, codes(count=10), CLASSES)


# ------------------------------------------------------------------------------------------------------- load_generator


@pytest.fixture
def run(tmp_path):
    models = {"generator": tiny(1, embedding="codebook"), "generator_ema": tiny(2, embedding="codebook")}
    return write_run(tmp_path / "run", {"task": "generator", "model": models["generator"].config}, **models)


@pytest.mark.parametrize(("weights", "seed"), [("raw", 1), ("ema", 2)])
def test_load_generator_takes_the_asked_weights(run, weights, seed):
    loaded, expected = load_generator(run, weights), tiny(seed, embedding="codebook")
    assert_same(loaded, expected)
    with torch.no_grad():  # with what is in no checkpoint, too
        assert torch.equal(loaded(codes(), CLASSES), expected(codes(), CLASSES))


@torch.no_grad()
def test_load_generator_of_several_grids(tmp_path):
    expected = tiny(3, grids=GRIDS)
    run = write_run(tmp_path / "run", {"task": "generator", "model": expected.config}, generator=expected)
    loaded = load_generator(run, "raw")
    assert_same(loaded, expected)
    for grid in expected.config.all_grids:
        assert torch.equal(loaded(codes(count=9), CLASSES, grid), expected(codes(count=9), CLASSES, grid))


def test_load_generator_refuses_other_weights(run):
    OmegaConf.save({"model": replace(TINY, embedding="codebook", depth=3)}, run / "config.yaml")
    message = refused(load_generator, run)
    assert "does not hold the weights of " in message and "lacks blocks.2." in message
