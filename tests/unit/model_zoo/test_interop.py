"""Published checkpoints, made here of our own models by renaming."""

from dataclasses import replace

import pytest
import torch

from model_zoo import (
    ModelError,
    Tokenizer,
    TokenizerConfig,
    Transformer,
    TransformerConfig,
    load_generator,
    load_tokenizer,
)

TOKENIZER = TokenizerConfig(
    codebook_size=32,
    code_dim=8,
    channels=16,
    channel_multipliers=[1, 1, 2],
    num_res_blocks=2,
    attention_factors=[2, 4],
    latent_channels=12,
)
GENERATOR = TransformerConfig(vocabulary=32, classes=7, depth=3, heads=2)


def tokenizer(seed=0, **changes) -> Tokenizer:
    torch.manual_seed(seed)
    return Tokenizer(replace(TOKENIZER, **changes))


def generator(seed=0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(GENERATOR)


def behind(prefix, model) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}


def averages(prefix, model, names="") -> dict:
    """As Lightning modules with LitEma hold them."""
    named = {f"{prefix}model_ema.{(names + name).replace('.', '')}": t for name, t in model.state_dict().items()}
    return {**named, f"{prefix}model_ema.decay": torch.tensor(0.999), f"{prefix}model_ema.num_updates": torch.tensor(3)}


TRAINED_BESIDE = {
    "loss.discriminator.main.0.weight": torch.zeros(3),
    "loss.perceptual_loss.net.slice1.0.bias": torch.zeros(3),
}


@pytest.fixture
def write(tmp_path):
    def write(*states, name="published.ckpt"):
        state = {name: tensor for state in states for name, tensor in state.items()}
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / name)
        return tmp_path / name

    return write


def assert_same(loaded, expected):
    assert loaded.config == expected.config
    assert not any(module.training for module in loaded.modules())
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel_multipliers": [1, 3], "attention_factors": []},
        {"code_dim": 5, "codebook_size": 11, "num_res_blocks": 1},
    ],
)
def test_a_published_tokenizers_configuration_is_inferred(write, changes):
    changes = {"attention_factors": [2, 4], **changes}
    assert_same(load_tokenizer(write(behind("", tokenizer(**changes)), TRAINED_BESIDE)), tokenizer(**changes))


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize(("weights", "seed"), [("raw", 1), ("ema", 2)])
def test_a_published_tokenizers_averages(write, prefix, weights, seed):
    path = write(behind(prefix, tokenizer(1)), averages(prefix, tokenizer(2)), TRAINED_BESIDE)
    assert_same(load_tokenizer(str(path), weights), tokenizer(seed))


def test_a_published_generator_and_the_tokenizer_in_it(write):
    computed = {"transformer.freqs_cis": torch.zeros(257, 32, 2), "freqs_cis": torch.zeros(3)}
    path = write(behind("transformer.", generator()), computed, behind("first_stage_model.", tokenizer(5)))
    assert_same(load_generator(path), generator())
    assert_same(load_generator(path, "raw"), generator())
    assert_same(load_tokenizer(path), tokenizer(5))
    with torch.no_grad():
        index_bt, class_b = torch.arange(32)[None], torch.tensor([3])
        assert torch.equal(load_generator(path)(index_bt, class_b), generator().eval()(index_bt, class_b))


def test_a_generator_in_half_precision_is_loaded_in_fp32(write):
    path = write(behind("transformer.", generator().half()))
    assert {tensor.dtype for tensor in load_generator(path).parameters()} == {torch.float32}


@pytest.mark.parametrize(("weights", "seed"), [("raw", 1), ("ema", 2)])
def test_a_published_generators_averages(write, weights, seed):
    path = write(behind("transformer.", generator(1)), averages("", generator(2), "transformer."))
    assert_same(load_generator(path, weights), generator(seed))


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(load, path, *arguments) -> str:
    with pytest.raises(ModelError) as error:
        load(path, *arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def test_missing_and_unexpected_tensors_are_told(write):
    state = behind("transformer.", generator())
    more = {**state, "transformer.blocks.1.attention.bias": torch.zeros(3)}
    assert "Unexpected key(s)" in refused(load_generator, write(more))
    assert "blocks.1.attention.bias" in refused(load_generator, write(more))
    del state["transformer.blocks.1.attention.wo.weight"]
    assert "blocks.1.attention.wo.weight" in refused(load_generator, write(state))
    del state["transformer.tok_emb.weight"]
    assert "lacks tok_emb.weight" in refused(load_generator, write(state))
    state = behind("", tokenizer())
    del state["decoder.mid.block_1.norm1.weight"]
    assert "decoder.mid.block_1.norm1.weight" in refused(load_tokenizer, write(state))
    del state["encoder.conv_in.weight"]
    assert "lacks encoder.conv_in.weight" in refused(load_tokenizer, write(state))


def test_averages_of_some_tensors_only_are_refused(write):
    half = averages("", tokenizer())
    del half["model_ema.encoderconv_inweight"]
    path = write(behind("", tokenizer()), half)
    assert "no average of encoder.conv_in.weight" in refused(load_tokenizer, path)
    load_tokenizer(path, "raw")


def test_the_other_kind_is_told(write):
    path = write(behind("transformer.", generator()))
    assert "holds no tokenizer: it is a generator's checkpoint" in refused(load_tokenizer, path)
    path = write(behind("", tokenizer()))
    assert "holds no generator: it is a tokenizer's checkpoint" in refused(load_generator, path)
    assert "holds no generator" in refused(load_generator, write(TRAINED_BESIDE))


def test_files_that_are_no_checkpoint_are_refused(tmp_path, write):
    assert "does not exist" in refused(load_tokenizer, tmp_path / "nowhere.ckpt")
    path = tmp_path / "bad.ckpt"
    for content in (b"no zip file", b""):
        path.write_bytes(content)
        assert "bad.ckpt is damaged or no checkpoint: download it again" in refused(load_generator, path)
    torch.save([torch.zeros(3)], path)
    assert "holds no state_dict" in refused(load_generator, path)
    torch.save({"state_dict": {}, "hyper_parameters": TOKENIZER}, path)
    assert "holds more than tensors" in refused(load_generator, path)
    whole = write(behind("transformer.", generator()))
    whole.write_bytes(whole.read_bytes()[:-100])
    assert "is damaged or no checkpoint: download it again" in refused(load_generator, whole)
    assert "'ema' or 'raw', not 'best'" in refused(load_generator, whole, "best")
