"""Commands that read a checkpoint take the settings that it was trained with, whatever a later resume wrote into the
run's config.yaml before it failed."""

import json
from pathlib import Path

import torch
from model_checks import tokenizer_of
from support import as_float, generator_of, images, tokenizer_run, write_generator_run, write_tokenizer_run

from model_zoo.io.load import find_checkpoint, load_tokenizer, read_weights
from trainer.changes import settings_of
from trainer.config import RunConfig
from trainer.jobs.sample import _load_models
from trainer.jobs.setup import data_config, run_config
from trainer.recipes import load_run_config, save_config


def failed_resume(run: Path, config: RunConfig, **changes) -> Path:
    """Records the configuration in the run's checkpoint, and writes the changed one to config.yaml; returns the
    checkpoint."""
    checkpoint = find_checkpoint(run)
    (checkpoint / "state.json").write_text(json.dumps({"step": 3, "settings": settings_of(config)}))
    save_config(config, run / "config.yaml")
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    save_config(load_run_config(run, overrides), run / "config.yaml")
    return checkpoint


def test_of_a_tokenizer(tmp_path):
    run = write_tokenizer_run(tmp_path / "run", tokenizer_of())
    sources = [{"name": "a", "root": "tars", "filters": {"min_side": 8}, "fields": {"aesthetic": "score"}}]
    config = tokenizer_run(data__image_size=32, data__resize="pil_antialias", data__sources=sources, ema__decay=0.9)
    changes = {"data__image_size": 48, "data__resize": "cv2_bilinear", "data__val": "other", "ema__decay": 0.5}
    checkpoint = failed_resume(run, config, **changes)
    found = data_config(checkpoint)
    assert (found.image_size, found.resize, found.val) == (32, "pil_antialias", None)
    assert found.sources[0].filters.min_side == 8 and found.sources[0].fields == {"aesthetic": "score"}
    assert run_config(checkpoint).optimizer == config.optimizer
    assert read_weights(run, "tokenizer").average.decay == 0.9
    (checkpoint / "state.json").unlink()  # of an earlier version
    assert data_config(checkpoint).image_size == 48


def test_the_model_is_that_of_the_checkpoint(tmp_path):
    """An edited config.yaml would give other codes without a word: `normalize` has no weights."""
    run = write_tokenizer_run(tmp_path / "run", tokenizer_of())
    images_bchw = as_float(images())
    index_bhw = load_tokenizer(run).tokenize(images_bchw)
    config = load_run_config(run, [])
    checkpoint = failed_resume(run, config, model__normalize=not config.model.normalize)
    loaded = load_tokenizer(run)
    assert loaded.config == config.model and torch.equal(loaded.tokenize(images_bchw), index_bhw)
    (checkpoint / "state.json").unlink()  # of an earlier version
    assert load_tokenizer(run).config.normalize != config.model.normalize


def test_of_a_generator(tmp_path):
    tokenizer = write_tokenizer_run(tmp_path / "tokenizer", tokenizer_of())
    run = write_generator_run(tmp_path / "run", generator_of(), tokenizer)
    config = load_run_config(run, [])
    checkpoint = failed_resume(run, config, sampling__temperature=3.0, ema__decay=0.9)
    models = _load_models(checkpoint, None, None)  # raw weights: the checkpoint has no average
    assert models.held_weights == "raw" and models.recipe.sampling.temperature == 1.0
