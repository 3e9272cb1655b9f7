"""What a resumed run may change of its settings."""

import json

import pytest
from comparing import refusal

from trainer import TrainerError
from trainer.changes import Change, changes_since, read_changes, settings_of
from trainer.recipes import load_recipe

DATA = "data.train=bundled:train"


def saved(recipe="debug", *overrides) -> dict:
    """Settings as a checkpoint has them."""
    return json.loads(json.dumps(settings_of(load_recipe(recipe, [DATA, *overrides]))))


def now(*overrides, recipe="debug"):
    return load_recipe(recipe, [DATA, *overrides])


def test_equal_settings_are_no_change_wherever_the_run_lies():
    assert changes_since(saved("debug", "run=a"), now("run=b"), 5) == []
    assert changes_since(saved("ar_debug"), now(recipe="ar_debug"), 5) == []


@pytest.mark.parametrize(
    "change",
    ["trainer.global_batch_size=16", "data.crop=center", "ema.decay=0.5", "optimizer.betas=[0.1,0.2]",
     "engine.kind=fsdp2", "trainer.max_steps=999", "loss.perceptual.weight=0.5"],
)  # fmt: skip
def test_what_is_allowed_is_told(change):
    key = change.split("=")[0]
    ((after, changed, before, after_value),) = found = changes_since(saved(), now(change), 5)
    assert (after, changed) == (5, key) and before != after_value
    assert str(found[0]) == f"changed after step 5: {key} was {json.dumps(before)} and is now {json.dumps(after_value)}"
    assert read_changes(json.loads(json.dumps({"changes": found}))) == [Change(5, key, before, after_value)]


@pytest.mark.parametrize("change", ["model.quantizer=vq", "model.patch_size=2", "discriminator.norm=batch"])
def test_what_the_weights_are_is_refused(change):
    key = change.split("=")[0]
    said = refusal(TrainerError, changes_since, saved(), now(change), 5)
    assert "cannot resume: the checkpoint was written with other settings" in said
    assert f"{key} was " in said and "set it back" in said


def test_other_grids_are_refused_with_the_way_to_a_run_of_these():
    config = now("model.grids=[8x8,4x16]", recipe="ar_debug")
    said = refusal(TrainerError, changes_since, saved("ar_debug"), config, 5)
    assert 'model.grids was [] and is now ["8x8", "4x16"]; set it back, or start a new run with init_from' in said


def test_the_adversarial_term_neither_begins_nor_drops_its_discriminator():
    off = "loss.generator.weight=0"
    for kind in ("patchgan", "dino"):
        others = [f"discriminator.kind={kind}", *[f"discriminator.sha256={'0' * 64}"] * (kind == "dino")]
        without = saved("debug", off, f"discriminator.kind={kind}")
        said = refusal(TrainerError, changes_since, without, now(*others), 5)
        assert "loss.generator.weight was 0 and is now 0.1, but the checkpoint has no discriminator" in said
        assert "start a new run with init_from.source=RUN loss.generator.weight=0.1" in said
    said = refusal(TrainerError, changes_since, saved(), now(off), 5)
    assert "loss.generator.weight was 0.1 and is now 0, and later checkpoints would have no discriminator" in said
    paused = "loss.discriminator.start_step=1000000000"  # what the message names
    assert [change.key for change in changes_since(saved(), now(paused), 5)] == ["loss.discriminator.start_step"]
    assert [change.key for change in changes_since(saved(), now("loss.generator.weight=0.2"), 5)]
    assert changes_since(saved("debug", off), now(off), 5) == []


def test_a_tokenizer_that_was_not_known_yet_is_no_change():
    config = now("tokenizer.fingerprint=0123456789abcdef", recipe="ar_debug")
    assert [change.key for change in changes_since(saved("ar_debug"), config, 5)] == ["tokenizer.fingerprint"]
    before = saved("ar_debug", "tokenizer.fingerprint=fedcba9876543210")
    assert "tokenizer.fingerprint was " in refusal(TrainerError, changes_since, before, config, 5)


def test_keys_that_one_version_does_not_have_are_no_change():
    before = saved()
    del before["ema.decay"], before["init_from.weights"], before["data.missing"]
    before["model.former"] = 1
    assert changes_since(before, now(), 5) == []
    before["init_from.weights"] = "ema"  # the default of a former version, as config.yaml has it, too
    assert changes_since(before, now("init_from.weights=ema"), 5) == []


@pytest.mark.parametrize(
    ("recipe", "change"),
    [("ar_debug", "model.grids=[8x8,4x16]"), ("ar_debug", "model.embedding=codebook"),
     ("debug", "discriminator.kind=dino"), ("debug", "model.quantizer=vq")],
)  # fmt: skip
def test_a_setting_that_the_checkpoint_lacks_has_its_default(recipe, change):
    before, key = saved(recipe), change.split("=")[0]
    default = json.dumps(before.pop(key))
    assert f"{key} was {default} and is now " in refusal(
        TrainerError, changes_since, before, now(change, recipe=recipe), 5
    )


def test_a_changed_setting_that_the_checkpoint_lacks_is_told():
    before = saved()
    del before["loss.perceptual.kind"]
    assert changes_since(before, now("loss.perceptual.kind=convnext"), 5) == [
        Change(5, "loss.perceptual.kind", "lpips", "convnext")
    ]


def test_former_names_and_defaults_are_no_change():
    before = saved("debug", "model.codebook_init=normal", "trainer.keep_last=7", "init_from.source=a")
    del before["model.codebook_init"]
    before["trainer.keep_checkpoints"] = before.pop("trainer.keep_last")
    before |= {
        f"start.{key}": before.pop(f"init_from.{key}") for key in ("source", "weights", "discriminator", "freeze")
    }
    same = "model.codebook_init=normal", "trainer.keep_last=7", "init_from.source=a"
    assert changes_since({**before, "engine.kind": "replicated"}, now(*same, "engine.kind=ddp"), 5) == []
