"""Import, export and fine-tuning of Emu3.5's tokenizer, with random weights at a small size."""

from functools import partial

import pytest
import torch
import yaml
from comparing import refusal
from emu_layout import FULL, SMALL, Forward, changed, pictures, state_of, write_emu
from model_checks import assert_same, tokenizer_of, write_run
from support import equal, generator_of, images, single_world, tokenizer_run, tokenizer_task

from model_zoo import ModelError, load_tokenizer
from model_zoo.io.emu_folder import read_emu_config
from model_zoo.io.hashing import sha256_of
from trainer import TrainerError
from trainer.config import TokenizerInitFromConfig
from trainer.init_from import read_initial_weights
from trainer.jobs.export import export, export_emu, export_published, import_published, info
from trainer.recipes import load_recipe

tiny = partial(tokenizer_of, codebook_size=16, channels=32, channel_multipliers=[1, 1], patch_size=1)
NORMALIZED = changed(SMALL, l2_normalize=True)


def state_in(folder):
    return torch.load(folder / "model.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("about", [SMALL, NORMALIZED], ids=["plain", "normalized"])
def test_a_round_trip_is_equal_to_the_bit(tmp_path, about):
    folder = write_emu(tmp_path / "emu", about)
    imported = import_published(folder, tmp_path / "imported")
    assert f"keys: {len(state_of(about))}: tokenizer {len(state_of(about))}" in imported.summary
    exported = export_emu(tmp_path / "imported", tmp_path / "back")
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["config.yaml", "model.ckpt"]
    state = state_in(tmp_path / "back")
    assert equal(state, state_of(about)) and all(tensor.dtype == torch.float32 for tensor in state.values())
    assert_same(load_tokenizer(tmp_path / "back"), load_tokenizer(folder))
    config = yaml.safe_load((tmp_path / "back" / "config.yaml").read_text())
    assert (
        config["ddconfig"].items() >= {key: about["ddconfig"][key] for key in ("ch", "ch_mult", "z_channels")}.items()
    )
    assert config["l2_normalize"] == about.get("l2_normalize", False) and config["use_entropy_loss"] is False
    said = "which the published loader does not pass to its quantizer" in exported.summary[-1]
    assert said == bool(about.get("l2_normalize"))
    found = info(folder)
    assert found.layout == "published" and found.sha256 == sha256_of(folder / "model.ckpt")
    assert found.models[0].fingerprint == info(tmp_path / "back").models[0].fingerprint
    # What is written has the same codes and pixels by the independent forward pass.
    forward, index_bhw = Forward(config, state), load_tokenizer(folder).tokenize(pictures(32, 32))
    assert torch.equal(forward.encode(pictures(32, 32))[0], index_bhw)


def test_the_layout_has_one_set_of_weights_and_no_discriminator(tmp_path):
    run = write_run(tmp_path / "run", {"model": tiny(1).config}, tokenizer=tiny(1), tokenizer_ema=tiny(2))
    made = export_emu(run, tmp_path / "ema")
    assert "without its raw weights: the layout has one set" in made.summary
    assert_same(load_tokenizer(tmp_path / "ema"), tiny(2))
    assert torch.load(tmp_path / "ema" / "model.ckpt")["global_step"] == 3
    export_emu(run, tmp_path / "raw", "raw")
    assert_same(load_tokenizer(tmp_path / "raw"), tiny(1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch_size": 4, "channel_multipliers": [1]}, "model.patch_size=4"),
        ({"local": True}, "model.local=true"),
        ({"quantizer": "vq"}, "model.quantizer=vq"),
        ({"normalize": True, "logit_scale": 10.0}, "model.logit_scale=10.0"),
        ({"normalize": True, "learn_logit_scale": True}, "model.learn_logit_scale=true"),
        ({"channels": 48}, "48 channels, not a multiple of the 32 groups"),
    ],
)
def test_a_model_that_the_layout_cannot_hold_is_refused(tmp_path, changes, said):
    run = write_run(tmp_path / "run", {"model": tiny(**changes).config}, tokenizer=tiny(**changes))
    message = refusal(ModelError, export_emu, run, tmp_path / "out")
    assert f"Emu3.5's layout does not support {said}" in message and "export to safetensors" in message
    assert not (tmp_path / "out").exists()


def test_a_generator_is_refused(tmp_path):
    model = generator_of()
    run = write_run(tmp_path / "run", {"model": model.config, "tokenizer": {"source": None}}, generator=model)
    assert "holds a generator, but Emu3.5's layout is a tokenizer's" in refusal(
        TrainerError, export_emu, run, tmp_path / "out"
    )


def test_what_is_there_already_is_kept(tmp_path):
    folder = write_emu(tmp_path / "emu")
    before = sha256_of(folder / "model.ckpt")
    assert "already exists" in refusal(ModelError, export_emu, folder, folder)
    assert sha256_of(folder / "model.ckpt") == before


# ---------------------------------------------------------------------------------------------------------- fine-tuning

# The model of SMALL, whose images of 16 x 16 have 4 x 4 tokens.
SETTINGS = dict(
    trainer__global_batch_size=2,
    model__codebook_size=64,
    model__code_dim=8,
    model__channels=32,
    model__channel_multipliers=[1, 1, 2],
    model__num_res_blocks=2,
    model__attention_factors=[4],
    model__latent_channels=16,
    model__patch_size=1,
    model__local=False,
    discriminator__norm="batch",
)


@pytest.mark.parametrize("freeze", [None, "encoder"])
def test_fine_tuning_starts_from_the_folder_and_goes_back_into_it(tmp_path, freeze):
    folder = write_emu(tmp_path / "emu")
    with single_world() as world:
        task = tokenizer_task(world, **SETTINGS, init_from=TokenizerInitFromConfig(str(folder), freeze=freeze))
        record = task.load_initial_weights()
        assert record.fingerprint == load_tokenizer(folder).fingerprint()
        assert str(folder) in record.origin
        assert equal(task.tokenizer.state_dict(), state_of(SMALL))
        task.step([images(0, count=2)], 0)
    run = write_run(tmp_path / "run", {"model": task.config.model}, tokenizer=task.tokenizer)
    made = export_emu(run, tmp_path / "back", "raw")
    assert made.summary[0].endswith(f"keys: {len(state_of(SMALL))}")
    state, start = state_in(tmp_path / "back"), state_of(SMALL)
    assert state.keys() == start.keys() and equal(state, task.tokenizer.state_dict())
    assert not torch.equal(state["decoder.conv_out.weight"], start["decoder.conv_out.weight"])
    unchanged = torch.equal(state["encoder.conv_in.weight"], start["encoder.conv_in.weight"])
    assert unchanged == (freeze == "encoder")
    assert (load_tokenizer(tmp_path / "back").fingerprint() == record.fingerprint) == (freeze == "encoder")


def test_a_recipe_of_another_shape_or_normalization_is_told_what_to_type(tmp_path):
    folder = write_emu(tmp_path / "emu", NORMALIZED)
    message = refusal(TrainerError, read_initial_weights, tokenizer_run(**SETTINGS, init_from__source=str(folder)))
    assert "model.normalize is true there and false here; use model.normalize=true" in message


def test_the_recipe_has_the_published_shape(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(FULL))
    published, _ = read_emu_config(tmp_path)
    model = load_recipe("ibq_131072_emu", []).model
    assert {key: getattr(model, key) for key in published} == published


def test_an_export_of_the_folder_in_the_published_layout(tmp_path):
    export_published(write_emu(tmp_path / "emu"), tmp_path / "one.ckpt")
    assert_same(load_tokenizer(tmp_path / "one.ckpt"), load_tokenizer(tmp_path / "emu"))
    export(tmp_path / "one.ckpt", tmp_path / "out")
    assert_same(load_tokenizer(tmp_path / "out"), load_tokenizer(tmp_path / "emu"))
