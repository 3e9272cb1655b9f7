import shutil
from dataclasses import replace

import pytest
import torch
from model_checks import TOKENIZER, assert_same, refused, tokenizer_of, write_checkpoint, write_run
from omegaconf import OmegaConf

from model_zoo import ModelError, Tokenizer, TokenizerConfig, load_tokenizer
from model_zoo.quantizers.registry import QUANTIZERS

TINY = replace(
    TOKENIZER, code_dim=8, channels=16, channel_multipliers=[1, 2], attention_factors=[4], latent_channels=12,
    patch_size=2,
    bridge_group=4,
)  # fmt: skip

OF_32_CODES = {"lfq": {"code_dim": 5}, "bsq": {"code_dim": 5}, "fsq": {"code_dim": 2, "levels": [8, 4]}}


def tiny(seed=0, **changes) -> Tokenizer:
    torch.manual_seed(seed)
    # 32 codes of quantizers whose dimensions follow from their number.
    changes = {**OF_32_CODES.get(changes.get("quantizer"), {}), **changes}
    tokenizer = Tokenizer(replace(TINY, **changes))
    if changes.get("quantizer") == "vqbridge":  # whose codes are all 0 at first
        torch.nn.init.normal_(tokenizer.quantize.projector.recover.weight, std=0.02)
    return tokenizer


def images(b=2, h=16, w=24, seed=1):
    return torch.rand(b, 3, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("codebook_size", [1024, 16384, 262144])
def test_default_configuration_has_the_published_parts(codebook_size):
    with torch.device("meta"):
        tokenizer = Tokenizer(TokenizerConfig(codebook_size=codebook_size))
        assert tokenizer.encode(torch.empty(1, 3, 256, 256)).shape == (1, 256, 16, 16)
        assert tokenizer.decode(torch.empty(1, 256, 16, 16)).shape == (1, 3, 256, 256)
    parts = {name: count(module) for name, module in tokenizer.named_children()}
    assert parts == {
        "encoder": 46_752_256,
        "quant_conv": 256 * 256 + 256,
        "quantize": codebook_size * 256,
        "post_quant_conv": 256 * 256 + 256,
        "decoder": 59_903_875,
    }
    assert count(tokenizer) == sum(parts.values())
    assert tokenizer.downsampling_factor == 16


def test_names_beside_encoder_and_decoder_are_the_published_ones():
    names = {name for name in tiny().state_dict() if not name.startswith(("encoder.", "decoder."))}
    assert names == {
        "quantize.embedding.weight",
        *(f"{layer}.{kind}" for layer in ("quant_conv", "post_quant_conv") for kind in ("weight", "bias")),
    }


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_tokenize_and_detokenize_shapes(name):
    tokenizer = tiny(quantizer=name).eval()
    assert tokenizer.downsampling_factor == 4
    index_bhw = tokenizer.tokenize(images())
    assert index_bhw.shape == (2, 4, 6) and index_bhw.dtype == torch.int64
    assert index_bhw.min() >= 0 and index_bhw.max() < 32
    reconstruction_bchw = tokenizer.detokenize(index_bhw)
    assert reconstruction_bchw.shape == (2, 3, 16, 24) and reconstruction_bchw.dtype == torch.float32
    assert not reconstruction_bchw.requires_grad
    assert tokenizer.encode(images()).shape == (2, tokenizer.config.code_dim, 4, 6)
    assert tokenizer.detokenize(index_bhw[:0]).shape == (0, 3, 16, 24)


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_detokenize_of_tokenize_is_the_forwards_reconstruction(name):
    tokenizer = tiny(quantizer=name).eval()
    with torch.no_grad():
        output = tokenizer(images())
    index_bhw = tokenizer.tokenize(images())
    assert len(index_bhw.unique()) > 3
    assert torch.equal(index_bhw, output.quantized.index_bhw)
    torch.testing.assert_close(tokenizer.detokenize(index_bhw), output.reconstruction_bchw, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_reconstruction_gives_every_parameter_of_encoder_and_decoder_a_gradient(name):
    tokenizer = tiny(quantizer=name)
    output = tokenizer(images())
    (output.reconstruction_bchw - images()).abs().mean().backward()
    without = {name for name, parameter in tokenizer.named_parameters() if parameter.grad is None}
    of_quantizer = {name for name, _ in tokenizer.named_parameters() if name.startswith("quantize.")}
    # Where the gradient goes straight through, the losses of the quantizer train it.
    assert without == (set() if tokenizer.quantize.soft_assignment else of_quantizer)
    assert tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0


def test_forward_gives_entropies_where_a_temperature_asks_for_them():
    tokenizer = tiny()
    assert tokenizer(images()).quantized.average_probability_k is None
    assert tokenizer(images(), 0.1).quantized.average_probability_k.shape == (32,)


def test_codes_of_bf16_autocast_are_quantized_in_fp32():
    tokenizer = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        output = tokenizer(images())
    assert output.quantized.quantized_bdhw.dtype == torch.float32


def test_fingerprints_tell_rules_of_assignment_apart():
    """Equal tensors: ibq takes the largest dot product, vq the nearest code. Fingerprints of ibq are pinned, because
    token shards contain them."""

    def fingerprint(**changes) -> str:
        tokenizer = tokenizer_of(**changes)
        with torch.no_grad():
            for parameter in tokenizer.parameters():
                parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) % 7 - 3)
        return tokenizer.fingerprint()

    assert fingerprint() == "87451feac266a3af"
    assert fingerprint(normalize=True) == "0608d528d864316d"
    nearest = {name: fingerprint(quantizer=name) for name in ("vq", "vq_ema", "rotation_vq")}
    assert len(set(nearest.values())) == 1 and fingerprint() not in nearest.values()  # three ways to train one rule
    assert fingerprint(quantizer="soft_vq") == fingerprint()  # the largest dot product, too
    assert len({fingerprint(quantizer="vq", normalize=norm) for norm in (False, True)} | {fingerprint()}) == 3


@pytest.mark.parametrize("code", [-1, 32, 10**9])
def test_codes_outside_the_codebook_are_refused(code):
    index_bhw = torch.tensor([[[0, 31], [5, code]]])
    assert "codes must lie in [0, 32)" in refused(tiny().detokenize, index_bhw)
    tiny().detokenize(index_bhw.clamp(0, 31))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("quantizer", "nearest", "'nearest': choose one of .*ibq.*vq"),
        ("codebook_size", 1, "model.codebook_size=1 must be at least 2"),
        ("code_dim", 0, "model.code_dim=0 must be at least 1"),
        ("channels", 0, r"model\.channels=.* must (be|have) at least 1"),
        ("channel_multipliers", [], r"model\.channel_multipliers=.* must (be|have) at least 1"),
        ("channel_multipliers", [1, -1], r"model\.channel_multipliers=.* must (be|have) at least 1"),
        ("num_res_blocks", 0, r"model\.num_res_blocks=.* must (be|have) at least 1"),
        ("latent_channels", -3, r"model\.latent_channels=.* must (be|have) at least 1"),
        ("patch_size", 0, r"model\.patch_size=.* must (be|have) at least 1"),
    ],
)
def test_configurations_that_cannot_be_are_refused(name, value, message):
    with pytest.raises(ModelError, match=message):
        tiny(**{name: value})


@pytest.fixture(scope="module")
def written_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("written") / "run"
    for step in (5, 10):
        models = {"tokenizer": tiny(seed=step), "tokenizer_ema": tiny(seed=step + 1)}
        models["discriminator"] = torch.nn.Linear(2, 2)
        write_run(run, {"seed": 3, "model": TINY}, step=step, ranks=2, **models)
    (run / "checkpoints" / "latest").write_text("step_00000010\n")
    return run


@pytest.fixture
def run(written_run, tmp_path):
    """A run folder with two checkpoints, `latest` naming the second, whose raw and EMA weights differ."""
    return shutil.copytree(written_run, tmp_path / "run")


@pytest.mark.parametrize(
    ("place", "weights", "seed"),
    [
        (".", ["raw"], 10),
        (".", ["ema"], 11),
        (".", [], 11),
        ("checkpoints/step_00000005", ["raw"], 5),
        ("checkpoints/step_00000005", ["ema"], 6),
    ],
)
def test_load_tokenizer_takes_the_asked_weights_of_the_latest_or_the_named_checkpoint(run, place, weights, seed):
    assert_same(load_tokenizer(str(run / place), *weights), tiny(seed=seed))


def test_load_tokenizer_takes_a_run_in_a_folder_named_checkpoints(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert_same(load_tokenizer(run.rename(tmp_path / "checkpoints" / "first_try")), tiny(seed=11))


def test_load_tokenizer_refuses_what_is_no_run_folder(run, tmp_path):
    assert "is not a run folder" in refused(load_tokenizer, tmp_path / "nowhere")
    assert "is not a run folder" in refused(load_tokenizer, run / "checkpoints")
    assert "is not a run folder" in refused(load_tokenizer, run / "config.yaml")


def test_load_tokenizer_refuses_a_run_without_a_checkpoint(run):
    (run / "checkpoints" / "latest").unlink()
    message = refused(load_tokenizer, run)
    assert "no finished checkpoint" in message and "checkpoint_every_steps" in message


def test_load_tokenizer_refuses_checkpoints_that_do_not_exist(run):
    assert "holds no ema weights" in refused(load_tokenizer, run / "checkpoints" / "step_00000099")
    (run / "checkpoints" / "latest").write_text("step_00000099")
    assert "latest names step_00000099, which does not exist" in refused(load_tokenizer, run)


def test_load_tokenizer_says_how_to_do_without_ema(run):
    write_checkpoint(run / "checkpoints" / "step_00000010", ranks=2, tokenizer=tiny(seed=10))
    assert "--weights raw" in refused(load_tokenizer, run)
    assert_same(load_tokenizer(run, "raw"), tiny(seed=10))


def test_load_tokenizer_refuses_other_names_of_weights(run):
    assert "'ema' or 'raw', not 'best'" in refused(load_tokenizer, run, "best")


def test_load_tokenizer_refuses_a_checkpoint_with_a_part_missing(run):
    (run / "checkpoints" / "step_00000010" / "rank_00001.safetensors").unlink()
    message = refused(load_tokenizer, run)
    assert "step_00000010 is incomplete: tokenizer_ema/" in message and "lacks its elements from" in message


def test_load_tokenizer_refuses_a_damaged_part(run):
    part = run / "checkpoints" / "step_00000010" / "rank_00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    assert f"{part} is not a file of a checkpoint" in refused(load_tokenizer, run)


@pytest.mark.parametrize("change", [{"codebook_size": 64}, {"num_res_blocks": 2}, {"attention_factors": [2, 4]}])
def test_load_tokenizer_refuses_the_weights_of_another_recipe(run, change):
    OmegaConf.save({"model": replace(TINY, **change)}, run / "config.yaml")
    message = refused(load_tokenizer, run)
    assert f"step_00000010 (ema weights) does not hold the weights of {run / 'config.yaml'}: it " in message


@pytest.mark.parametrize("content", ["seed: 3", "model: [1", "model: {colours: 7}", "model: {code_dim: many}", "7"])
def test_load_tokenizer_refuses_a_recipe_of_no_tokenizer(run, content):
    (run / "config.yaml").write_text(content)
    assert f"{run / 'config.yaml'} does not describe a tokenizer (" in refused(load_tokenizer, run)
