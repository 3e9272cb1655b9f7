"""Published checkpoints: made here of our own models by renaming, and as the published code names and computes them."""

import json
import re
import time

import model_checks
import numpy as np
import pytest
import torch
from field.odd_checkpoints import ODD_TENSORS, ModelCheckpoint, wrapped
from golden import make_published
from golden.make_published import CLASSES, CODES, POSITIONS, classes, codes, images, weight_of
from model_checks import assert_same, tokenizer_of
from safetensors.torch import save_file

from model_zoo import Tokenizer, Transformer, TransformerConfig, load_generator, load_tokenizer
from model_zoo.discriminator import PatchDiscriminator
from model_zoo.io.load import read_weights
from model_zoo.io.published_ckpt import open_published, published_state, read_published

PUBLISHED = dict(
    code_dim=8, channels=16, channel_multipliers=[1, 1, 2], num_res_blocks=2, attention_factors=[2, 4],
    latent_channels=12, patch_size=1,
)  # fmt: skip
GENERATOR = TransformerConfig(vocabulary=32, classes=7, depth=3, heads=2)


def tokenizer(seed=0, **changes) -> Tokenizer:
    return tokenizer_of(seed, **PUBLISHED | changes)


def generator(seed=0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(GENERATOR)


def discriminator() -> PatchDiscriminator:
    torch.manual_seed(9)
    return PatchDiscriminator(channels=4, layers=1)


def behind(prefix, model) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}


def averages(prefix, model, names="") -> dict:
    """As Lightning modules with LitEma hold them."""
    named = {f"{prefix}model_ema.{(names + name).replace('.', '')}": t for name, t in model.state_dict().items()}
    return {**named, f"{prefix}model_ema.decay": torch.tensor(0.999), f"{prefix}model_ema.num_updates": torch.tensor(3)}


TRAINED_BESIDE = {
    **behind("loss.discriminator.", discriminator()),
    "loss.perceptual_loss.net.slice1.0.bias": torch.zeros(3),
}


@pytest.fixture
def write(tmp_path):
    def write(*states, name="published.ckpt"):
        state = {name: tensor for state in states for name, tensor in state.items()}
        torch.save({"state_dict": state, "epoch": 3}, tmp_path / name)
        return tmp_path / name

    return write


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
    beside = {prefix + name: tensor for name, tensor in TRAINED_BESIDE.items()}
    path = write(behind(prefix, tokenizer(1)), averages(prefix, tokenizer(2)), beside)
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


def refused(function, *arguments) -> str:
    message = model_checks.refused(function, *arguments)
    assert len(message) < 400  # of many tensors it names some
    return message


def test_missing_and_unexpected_tensors_are_told(write):
    state = behind("transformer.", generator())
    more = {**state, "transformer.blocks.1.attention.bias": torch.zeros(3)}
    assert "holds blocks.1.attention.bias, which is not expected" in refused(load_generator, write(more))
    del state["transformer.blocks.1.attention.wo.weight"]
    assert "lacks blocks.1.attention.wo.weight of shape [128, 128]" in refused(load_generator, write(state))
    del state["transformer.tok_emb.weight"]
    assert "lacks tok_emb.weight" in refused(load_generator, write(state))
    state = behind("", tokenizer())
    del state["decoder.mid.block_1.norm1.weight"]
    assert "lacks decoder.mid.block_1.norm1.weight of shape [32]" in refused(load_tokenizer, write(state))
    del state["encoder.conv_in.weight"]
    assert "lacks encoder.conv_in.weight" in refused(load_tokenizer, write(state))


def test_averages_of_some_tensors_only_are_refused(write):
    half = averages("", tokenizer())
    del half["model_ema.encoderconv_inweight"]
    path = write(behind("", tokenizer()), half)
    assert "no average of encoder.conv_in.weight" in refused(load_tokenizer, path)
    load_tokenizer(path, "raw")


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("lost", ["decoder.conv_out.bias", "encoder.conv_in.weight"])
def test_a_tensor_that_only_an_average_is_of_is_told(write, prefix, lost):
    state = behind(prefix, tokenizer(1))
    del state[prefix + lost]
    message = refused(load_tokenizer, write(state, averages(prefix, tokenizer(2))))
    assert f"lacks {prefix + lost if lost.startswith('decoder') else lost}" in message and "remove it" not in message


def test_a_generators_and_a_discriminators_tensor_that_only_an_average_is_of_is_told(write):
    state = behind("transformer.", generator(1))
    del state["transformer.blocks.2.attention.wo.weight"]
    path = write(state, averages("", generator(2), "transformer."))
    assert "lacks transformer.blocks.2.attention.wo.weight, of which it holds an average" in refused(
        load_generator, path
    )
    lost = "loss.discriminator.main.0.weight"
    averaged = averages("", tokenizer(2)) | {f"model_ema.{lost.replace('.', '')}": torch.zeros(4, 3, 4, 4)}
    path = write(behind("", tokenizer(1)), {n: t for n, t in TRAINED_BESIDE.items() if n != lost}, averaged)
    assert f"lacks {lost}, of which it holds an average" in refused(load_tokenizer, path)


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
        assert "bad.ckpt is damaged or not a checkpoint: download it again" in refused(load_generator, path)
    torch.save({"state_dict": tokenizer().state_dict()}, path, _use_new_zipfile_serialization=False)
    assert "old format, but only zip files are supported: save it again" in refused(load_tokenizer, path)
    torch.save([torch.zeros(3)], path)
    assert "holds no state_dict" in refused(load_generator, path)
    torch.save({"state_dict": {}, "hyper_parameters": GENERATOR}, path)
    assert "holds a pickled model_zoo.config.TransformerConfig" in refused(load_generator, path)
    torch.save({"epoch": 3, "net": tokenizer().state_dict()}, path)
    assert "but net: save the weights alone: torch.save(torch.load('bad.ckpt')['net']" in refused(load_tokenizer, path)
    whole = write(behind("transformer.", generator()))
    content = bytearray(whole.read_bytes())
    content[len(content) // 2] ^= 1  # torch.load would not notice
    whole.write_bytes(content)
    assert re.search(r"is damaged \(the checksum of \S+ differs\): download it again", refused(load_generator, whole))
    whole.write_bytes(content[:-100])
    assert "is damaged or not a checkpoint: download it again" in refused(load_generator, whole)
    assert "'ema' or 'raw', not 'best'" in refused(load_generator, whole, "best")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("decoder.mid.block_1.norm1.weight", (31,), "of shape [31], expected [32]"),
        ("quantize.embedding.weight", (32,), "of shape [32], expected 2 dimensions"),
        ("encoder.conv_in.weight", (17, 3, 3, 3), "16 channels, not a multiple of the 17 of encoder.conv_in.weight"),
        ("loss.discriminator.main.2.weight", (8, 4, 3, 3), "of shape [8, 4, 3, 3], expected [8, 4, 4, 4]"),
        ("loss.discriminator.main.0.weight", (3,), "of shape [3], expected 4 dimensions"),
    ],
)
def test_tensors_of_another_shape_are_told(write, name, shape, message):
    state = {**behind("", tokenizer()), **TRAINED_BESIDE, name: torch.zeros(shape)}
    assert message in refused(load_tokenizer, write(state))


@pytest.mark.parametrize(
    "name",
    [
        "loss.logvar",
        "quantize.used",
        "model_ema.encoderconv_out",
        "encoder",
        "ema.decay",
    ],
)
def test_keys_that_no_published_model_has_are_told(write, name):
    path = write(behind("", tokenizer()), averages("", tokenizer()), {name: torch.zeros(2, 3)})
    assert f"holds {name} of shape [2, 3], which no published tokenizer or generator has" in refused(
        load_tokenizer, path
    )


def test_what_is_no_tensor_is_told(write):
    message = refused(load_tokenizer, write(behind("", tokenizer()), {"encoder.scale": 3.0}))
    assert "encoder.scale in its state_dict is not a tensor" in message


def test_a_pickled_callback_is_named_and_the_advice_works(tmp_path, monkeypatch):
    """A whole model, too."""
    monkeypatch.chdir(tmp_path)
    whole = tokenizer(1)
    states = {"state_dict": whole.state_dict(), "callbacks": {"ModelCheckpoint": ModelCheckpoint()}}
    for saved, named in ((states, "field.odd_checkpoints.ModelCheckpoint"), (whole, "model_zoo.tokenizer.Tokenizer")):
        torch.save(saved, "theirs.ckpt")
        message = model_checks.refused(load_tokenizer, "theirs.ckpt")
        assert f"holds a pickled {named}, and loading it could run code" in message
        advice = message.partition("alone: ")[2].partition(", with ")[0]
        assert ", with file.state_dict() if it is a whole model" in message
        exec(advice if saved is states else advice.replace("file['state_dict']", "file.state_dict()"))
        assert_same(load_tokenizer("weights.pt"), whole)


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "pth", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_plain_state_dicts_are_loaded_by_their_keys(tmp_path, caplog, suffix, prefix):
    models = {"tokenizer": tokenizer(1), "generator": generator(2)}
    for kind, load in (("tokenizer", load_tokenizer), ("generator", load_generator)):
        state, path = wrapped(models[kind].state_dict(), prefix), tmp_path / f"{kind}.{suffix}"
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
        caplog.clear()
        assert_same(load(path), models[kind])
        said = f"{path}: the wrappers' names (module, _orig_mod ...) were removed from {len(state)} keys"
        assert [message for message in caplog.messages if "quantizer" not in message] == [said] * bool(prefix)


def test_names_of_wrappers_inside_and_in_averages_are_removed(write):
    compiled = {name.replace("encoder.", "encoder._orig_mod."): t for name, t in tokenizer(1).state_dict().items()}
    averaged = {name.replace("ema.", "ema._orig_mod"): t for name, t in averages("", tokenizer(2)).items()}
    averaged |= {f"model_ema.{name}": averaged.pop(f"model_ema._orig_mod{name}") for name in ("decay", "num_updates")}
    path = write(compiled, averaged)
    assert_same(load_tokenizer(path, "raw"), tokenizer(1))
    assert_same(load_tokenizer(path), tokenizer(2))
    path = write(compiled, {"encoder.conv_in.weight": torch.zeros(16, 3, 3, 3)})
    assert "holds encoder.conv_in.weight twice, once as encoder." in refused(load_tokenizer, path)


def test_a_file_of_an_export_or_of_a_run_names_the_folder(tmp_path):
    """Whose configuration says more than shapes do."""
    for beside in ("config.yaml", "manifest.json"):
        folder = tmp_path / beside.partition(".")[0]
        folder.mkdir()
        (folder / beside).touch()
        save_file(tokenizer().state_dict(), folder / "model.safetensors")
        assert f"give its folder {folder}" in refused(load_tokenizer, folder / "model.safetensors")


# ------------------------------------------------------------------------------------------- what cannot be a weight


@pytest.mark.parametrize("odd", ODD_TENSORS)
@pytest.mark.parametrize("name", ["decoder.mid.block_1.conv1.weight", "loss.discriminator.main.0.weight"])
def test_what_cannot_be_a_weight_is_refused_by_its_name(write, name, odd):
    state = {**behind("", tokenizer()), **TRAINED_BESIDE}
    path = write(state, {name: ODD_TENSORS[odd](state[name])})
    message = refused(load_tokenizer, path)
    assert name.removeprefix("loss.discriminator.") in message
    assert "NaN or infinity" in message if odd in ("NaN", "infinity") else "no weight" in message


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("transformer.blocks.999999999.ffn_norm.weight", "holds blocks.999999999.ffn_norm.weight, but only 4 such"),
        (f"transformer.blocks.{'9' * 5000}.ffn_norm.weight", "but only 4 such parts"),
        ("transformer.blocks.-1.ffn_norm.weight", "holds blocks.-1.ffn_norm.weight, which is not expected"),
        ("encoder.down.77.block.0.conv1.weight", "holds encoder.down.77.block.0.conv1.weight, but only 4 such"),
        ("loss.discriminator.main.999999999.weight", "its discriminator lacks main."),
    ],
)
def test_numbers_of_blocks_that_cannot_be_are_refused(write, key, said):
    kind = ("transformer.", generator(), load_generator) if "blocks" in key else ("", tokenizer(), load_tokenizer)
    state = {**behind(*kind[:2]), **TRAINED_BESIDE, key: torch.zeros(4)}
    assert said in refused(kind[2], write(state))


@pytest.mark.parametrize(
    "keys",
    [
        [f"encoder.down.{n}.block.0.conv1.weight" for n in range(8000)],
        [f"transformer.blocks.{n}.ffn_norm.weight" for n in range(8000)],
        [f"model_ema.encoderdown{n}" for n in range(8000)],
    ],
)
def test_many_keys_take_time_in_proportion(write, keys):
    start = time.process_time()
    load = load_generator if "blocks" in keys[0] else load_tokenizer
    state = behind("", tokenizer()) | behind("transformer.", generator())
    refused(load, write(state, dict.fromkeys(keys, torch.zeros(16, 1))))
    assert time.process_time() - start < 4


# -------------------------------------------------------------------------------------------- the published code itself


GOLDEN = dict(np.load(make_published.FILE))


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Files with the published code's keys: a tokenizer's and a generator's. What is not read of them is left small."""
    folder = tmp_path_factory.mktemp("published")
    for kind in ("tokenizer", "generator"):
        shapes = json.loads(str(GOLDEN[f"{kind}_keys"]))
        state = {n: torch.zeros(1) if "perceptual" in n else weight_of(n, tuple(s)) for n, s in shapes.items()}
        torch.save({"state_dict": state, "global_step": 5, "optimizer_states": [{}]}, folder / f"{kind}.ckpt")
    return folder


def assert_close(ours: torch.Tensor, name: str):
    torch.testing.assert_close(ours, torch.tensor(GOLDEN[name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["raw", "ema"])
@torch.no_grad()
def test_a_tokenizer_computes_what_the_published_code_computes(golden, weights):
    ours = load_tokenizer(golden / "tokenizer.ckpt", weights)
    assert_close(ours.encode(images()), f"{weights}_features")
    index_bhw = ours.tokenize(images())
    assert index_bhw.tolist() == GOLDEN[f"{weights}_index"].tolist()
    assert_close(ours.detokenize(index_bhw), f"{weights}_reconstruction")


@torch.no_grad()
def test_a_generator_computes_what_the_published_code_computes(golden):
    ours = load_generator(golden / "generator.ckpt")
    assert (ours.config.classes, ours.config.vocabulary) == (CLASSES, CODES)
    assert_close(ours(codes(), classes())[:, POSITIONS], "logits")


def test_every_key_of_the_published_code_is_accounted_for(golden):
    published = open_published(golden / "tokenizer.ckpt")
    part, left_out = published.parts["tokenizer"], dict(published.left_out)
    assert left_out.pop("training state beside state_dict") == ["global_step", "optimizer_states"]
    (perceptual,) = left_out.values()
    assert all(name.startswith("loss.perceptual_loss.") for name in perceptual)
    averaging = 2  # decay and num_updates
    assert (
        published.keys
        == sum(map(len, part)) + len(perceptual) + averaging
        == len(json.loads(str(GOLDEN["tokenizer_keys"])))
    )
    assert part.model_ema.keys() == part.model.keys() and part.discriminator_ema.keys() < part.discriminator.keys()
    assert published.average == (pytest.approx(0.999), -1) and published.step == 5

    published = open_published(golden / "generator.ckpt")
    parts, left_out = published.parts, published.left_out
    assert published.keys == sum(len(g) for p in parts.values() for g in p) + sum(map(len, left_out.values())) - 2
    assert not parts["tokenizer"].discriminator and any("untrained" in why for why in left_out)


def test_laying_out_what_was_read_gives_the_published_codes_keys_and_bits(golden):
    source = golden / "tokenizer.ckpt"
    state = torch.load(source, weights_only=True)["state_dict"]
    raw, ema = (read_published(source, "tokenizer", weights) for weights in ("raw", "ema"))
    again = published_state("tokenizer", raw, ema)
    assert again.keys() == {name for name in state if "perceptual" not in name}
    assert all(torch.equal(again[name], state[name]) and again[name].dtype == state[name].dtype for name in again)

    source = golden / "generator.ckpt"
    state = torch.load(source, weights_only=True)["state_dict"]
    again = published_state("generator", read_published(source, "generator", "raw"))
    assert again.keys() == {name for name in state if name.startswith("transformer.")}
    assert all(torch.equal(again[name], state[name]) for name in again)


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("tokenizer", {"patch_size": 2}, "model.patch_size=2"),
        ("tokenizer", {"local": True}, "model.local=true"),
        ("tokenizer", {"quantizer": "lfq"}, "model.quantizer=lfq"),
        ("tokenizer", {"channels": 16}, "16 channels"),
        ("generator", {"embedding": "codebook"}, "model.embedding=codebook"),
        ("generator", {"grid": [4, 8]}, "not square"),
        ("generator", {"grids": ["16x16", "8x32"]}, "model.grids=[16x16,8x32], whose embeddings"),
    ],
)
def test_models_that_the_published_code_cannot_build_are_not_laid_out(golden, kind, change, named):
    raw = read_weights(golden / f"{kind}.ckpt", kind, "raw")
    message = refused(published_state, kind, raw._replace(config=raw.config | change))
    assert "the published layout does not support " in message and named in message and "safetensors" in message
