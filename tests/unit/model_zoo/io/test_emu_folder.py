"""The folder of Emu3.5's tokenizer, with random weights: read as an independent forward pass computes, or refused."""

import logging
import math
import re
from dataclasses import asdict

import model_checks
import pytest
import torch
import yaml
from emu_layout import FACTOR, FULL, PARAMETERS, SMALL, Forward, changed, pictures, shapes_of, state_of, write_emu
from golden.make_published import MARGIN, weight_of

from model_zoo import Tokenizer, TokenizerConfig, load_generator, load_tokenizer
from model_zoo.io.emu_folder import is_emu_folder, read_emu_config, write_emu_config
from model_zoo.io.load import read_weights

NO_LEVEL_HAS_IT = changed(SMALL, ddconfig__attn_resolutions=[8])
FINER_LEVELS = changed(SMALL, ddconfig__attn_resolutions=[32, 64])
NORMALIZED = changed(SMALL, l2_normalize=True)
BY_NAME = {
    "small": SMALL, "attention in the middle": NO_LEVEL_HAS_IT, "attention at finer levels": FINER_LEVELS,
    "normalized": NORMALIZED,
}  # fmt: skip
described = pytest.mark.parametrize("about", BY_NAME.values(), ids=BY_NAME)


@described
@pytest.mark.parametrize("size", [(32, 32), (20, 44), (44, 12)], ids=str)
def test_codes_and_pixels_are_those_of_an_independent_forward_pass(tmp_path, about, size):
    forward, images_bchw = Forward(about, state_of(about)), pictures(*size)
    tokenizer = load_tokenizer(write_emu(tmp_path / "emu", about))
    index_bhw, logits_bhwk = forward.encode(images_bchw)
    first, second = logits_bhwk.topk(2, dim=3).values.unbind(3)
    assert (first - second).min() > MARGIN  # no rounding decides a code
    assert index_bhw.unique().numel() > 10
    found_bhw = tokenizer.tokenize(images_bchw)
    assert found_bhw.shape[1:] == (size[0] // FACTOR, size[1] // FACTOR)
    assert torch.equal(found_bhw, index_bhw)
    pixels_bchw = forward.decode(index_bhw)
    if about is not FINER_LEVELS:  # whose rounding in fp32 is larger
        assert (tokenizer.detokenize(found_bhw) - pixels_bchw).abs().max() < 1e-5
        with torch.no_grad():
            assert (tokenizer(images_bchw).reconstruction_bchw - pixels_bchw).abs().max() < 1e-5
    assert (tokenizer.double().detokenize(found_bhw) - pixels_bchw).abs().max() < 1e-12


def test_normalization_changes_codes(tmp_path):
    images_bchw = pictures(32, 32)
    plain, normalized = (
        load_tokenizer(write_emu(tmp_path / str(i), about)) for i, about in enumerate((SMALL, NORMALIZED))
    )
    assert not torch.equal(plain.tokenize(images_bchw), normalized.tokenize(images_bchw))


def test_the_keys_of_the_full_size(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(FULL))
    config, notes = read_emu_config(tmp_path)
    assert not notes
    with torch.device("meta"):
        state = Tokenizer(TokenizerConfig(**config)).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == shapes_of(FULL)
    assert sum(map(math.prod, shapes_of(FULL).values())) == PARAMETERS


@pytest.mark.parametrize("plain", [False, True])
def test_a_state_dict_may_be_plain_and_has_one_set_of_weights(tmp_path, plain):
    folder = write_emu(tmp_path / "emu", plain=plain)
    for weights in ("ema", "raw"):
        found = read_weights(folder, "tokenizer", weights)
        assert found.weights == "raw" and found.discriminator is None and found.recipe == str(folder / "config.yaml")
        assert all(torch.equal(found.tensors[key], tensor) for key, tensor in state_of(SMALL).items())


@described
def test_a_configuration_is_written_as_it_is_read(tmp_path, about):
    config, _ = read_emu_config(write_emu(tmp_path / "emu", about, state={}))
    again = tmp_path / "again"
    again.mkdir()
    write_emu_config(again / "config.yaml", asdict(TokenizerConfig(**config)))
    assert is_emu_folder(again)
    found, notes = read_emu_config(again)
    assert found == config and len(notes) == bool(about.get("l2_normalize"))


def test_what_is_ignored_is_said(tmp_path, caplog):
    about = changed(NORMALIZED, ddconfig__dropout=0.1, ddconfig__attn_type="vanilla", learning_rate=1e-4)
    with caplog.at_level(logging.WARNING):
        load_tokenizer(write_emu(tmp_path / "emu", about))
    text = caplog.text
    assert "l2_normalize is true" in text and "the published loader does not pass the key" in text
    assert "ddconfig.dropout=0.1 has no effect" in text
    assert "ignored, as in the published code: learning_rate, ddconfig.attn_type" in text


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(folder, length: int = 500) -> str:
    message = model_checks.refused(load_tokenizer, folder)
    assert len(message) < length
    return message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cosine_similarity": True}, "cosine_similarity=true is not supported, only false"),
        ({"remap": "used.npy"}, "remap=used.npy is not supported, only null"),
        ({"l2_normalize": "yes"}, "l2_normalize='yes' is neither true nor false"),
        ({"ddconfig__double_z": True}, "ddconfig.double_z=true is not supported, only false"),
        (
            {"ddconfig__double_z": ...},
            "it lacks ddconfig.double_z, and only false is supported, which is not the default",
        ),
        ({"ddconfig__in_channels": 1}, "ddconfig.in_channels=1 is not supported, only 3"),
        ({"ddconfig__out_ch": ...}, "it lacks ddconfig.out_ch, and only 3 is supported"),
        ({"ddconfig__resamp_with_conv": False}, "ddconfig.resamp_with_conv=false is not supported, only true"),
        ({"ddconfig__give_pre_end": True}, "ddconfig.give_pre_end=true is not supported, only false"),
        ({"ddconfig__ch": ...}, "it lacks ddconfig.ch"),
        ({"ddconfig__ch_mult": ...}, "it lacks ddconfig.ch_mult"),
        ({"n_embed": ...}, "it lacks n_embed"),
        ({"n_embed": 10**30}, "n_embed=1" + "0" * 30 + " is not a whole number of 2 to"),
        ({"embed_dim": "eight"}, "embed_dim='eight' is not a whole number"),
        ({"ddconfig__ch_mult": []}, "ddconfig.ch_mult=[] has no level"),
        ({"ddconfig__ch_mult": [1, 0.5]}, "ddconfig.ch_mult=[1, 0.5] is not a list of whole numbers"),
        ({"ddconfig__ch": 48}, "48 channels, not a multiple of the 32 groups"),
        ({"ddconfig__resolution": 250}, "ddconfig.resolution=250 is not a multiple of 4"),
        ({"ddconfig": [1]}, "ddconfig is [1], not a group of keys"),
    ],
)
def test_a_setting_that_the_model_does_not_have_is_named(tmp_path, changes, said):
    folder = write_emu(tmp_path / "emu", changed(SMALL, **changes), state=state_of(SMALL))
    message = refused(folder)
    assert message.startswith(f"{folder / 'config.yaml'} does not describe Emu3.5's tokenizer: ") and said in message


@pytest.mark.parametrize("text", ["ddconfig: {", "ddconfig: &a [*a]\n", "ddconfig:\n- 1\n", "ddconfig: \x00\n"])
def test_a_broken_configuration_is_one_line(tmp_path, text):
    folder = write_emu(tmp_path / "emu")
    (folder / "config.yaml").write_text(text)
    assert "does not describe Emu3.5's tokenizer" in refused(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_embed": 32}, "holds quantize.embedding.weight of shape [64, 8], expected [32, 8]"),
        ({"embed_dim": 4}, "holds quant_conv.weight of shape [8, 16, 1, 1], expected [4, 16, 1, 1]"),
        ({"ddconfig__attn_resolutions": [32]}, "lacks encoder.down.1.attn.0.norm.weight"),
        ({"ddconfig__attn_resolutions": []}, "holds encoder.down.2.attn.0.norm.weight, which is not expected"),
        ({"ddconfig__resolution": 32}, "lacks encoder.down.1.attn.0.norm.weight"),
        ({"ddconfig__num_res_blocks": 3}, "lacks encoder.down.0.block.2.norm1.weight"),
        ({"ddconfig__ch_mult": [1, 1, 2, 2]}, "lacks encoder.down.2.downsample.conv.weight"),
        ({"ddconfig__z_channels": 8}, "holds encoder.conv_out.weight of shape [16, 64, 3, 3], expected [8, 64, 3, 3]"),
        (
            {"ddconfig__ch": 64},
            "holds encoder.mid.block_1.conv1.weight of shape [64, 64, 3, 3], expected [128, 128, 3, 3]",
        ),
    ],
)
def test_weights_of_another_configuration_are_named(tmp_path, changes, said):
    folder = write_emu(tmp_path / "emu", changed(SMALL, **changes), state=state_of(SMALL))
    message = refused(folder, 700)
    assert f"does not hold the weights of {folder / 'config.yaml'}: it " in message and said in message


@pytest.mark.parametrize(
    "key",
    [
        "loss.discriminator.main.0.weight",
        "model_ema.encoderconv_inweight",
        "first_stage_model.encoder.conv_in.weight",
        "transformer.head.weight",
        "quantize.used",
        "encoder_ema.conv_in.weight",
    ],
)
def test_a_key_that_the_tokenizer_has_not_is_named(tmp_path, key):
    state = state_of(SMALL)
    message = refused(write_emu(tmp_path / "emu", state={**state, key: torch.zeros(3)}))
    assert f"holds {key}, which Emu3.5's tokenizer does not have: remove it" in message
    message = refused(write_emu(tmp_path / "more", state={**state, key: torch.zeros(3), "other": torch.zeros(1)}))
    assert f"holds {key} (and 1 more such)" in message


@pytest.mark.parametrize(
    "key", ["encoder.mid.attn_1.extra", "quantize.embedding.bias", "decoder.up.7.block.0.conv1.weight"]
)
def test_a_key_beside_those_of_a_module_is_named(tmp_path, key):
    state = {**state_of(SMALL), key: torch.zeros(3)}
    assert f"holds {key}, which is not expected" in refused(write_emu(tmp_path / "emu", state=state))


ONE_LEVEL = changed(SMALL, ddconfig__ch_mult=[1], ddconfig__num_res_blocks=1, ddconfig__attn_resolutions=[64])


@pytest.mark.parametrize("key", list(shapes_of(ONE_LEVEL))[::5])
def test_a_missing_key_is_named(tmp_path, key):
    about, state = ONE_LEVEL, state_of(ONE_LEVEL)
    del state[key]
    assert re.search(rf"lacks {re.escape(key)}( |$)", refused(write_emu(tmp_path / "emu", about, state)))


def test_values_that_are_no_weights_are_refused(tmp_path):
    key = "decoder.conv_out.bias"
    for odd, said in ((torch.zeros(3, dtype=torch.int64), "of torch.int64"), (torch.full((3,), math.nan), "NaN")):
        assert said in refused(write_emu(tmp_path / said.split(".")[-1], state={**state_of(SMALL), key: odd}))


def test_half_of_a_folder(tmp_path):
    folder = write_emu(tmp_path / "emu")
    for name in ("model.ckpt", "model.safetensors"):
        (folder / "model.safetensors").touch()
        message = refused(folder / name)
        assert message.startswith(f"{folder / name} is a part of Emu3.5's tokenizer: give its folder {folder}")
    (folder / "model.ckpt").rename(tmp_path / "model.ckpt")
    assert refused(folder) == f"{folder / 'model.ckpt'} does not exist"
    (folder / "config.yaml").unlink()
    (folder / "model.safetensors").unlink()
    (tmp_path / "model.ckpt").rename(folder / "model.ckpt")
    assert "no config.yaml with ddconfig: copy the config.yaml" in refused(folder)
    assert load_tokenizer(folder / "model.ckpt").config.codebook_size == 64  # as a state dict alone
    assert "holds no generator" in model_checks.refused(load_generator, write_emu(tmp_path / "whole"))


def test_a_run_may_hold_a_file_of_that_name(tmp_path):
    tokenizer = model_checks.tokenizer_of(1)
    run = model_checks.write_run(tmp_path / "run", {"model": tokenizer.config}, tokenizer=tokenizer)
    torch.save(state_of(SMALL), run / "model.ckpt")
    model_checks.assert_same(load_tokenizer(run, "raw"), tokenizer)


def test_a_repository_on_the_hub_may_hold_other_forms_beside_it(tmp_path):
    folder = write_emu(tmp_path / "emu")
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text("{}")
    key = "encoder.conv_in.weight"
    assert torch.equal(load_tokenizer(folder).state_dict()[key], weight_of(key, (32, 3, 3, 3)))
