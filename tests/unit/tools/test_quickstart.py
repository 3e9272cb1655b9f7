"""`ibq quickstart`: what it asks of the commands that it consists of; nothing is trained."""

from types import SimpleNamespace

import pytest

from tools import quickstart
from trainer.recipes import load_recipe, save_config


@pytest.mark.parametrize("images", ["bundled:train", "my_photos"])
def test_every_part_runs_on_the_device_of_the_training(tmp_path, monkeypatch, images):
    devices = {}

    def train(recipe, overrides):
        run = tmp_path / recipe
        run.mkdir()
        config = load_recipe(recipe, [*overrides, f"run={run}"] if recipe == "quickstart" else overrides)
        devices[recipe] = config.trainer.device
        save_config(config, run / "config.yaml")
        return run

    def part(name):
        return lambda *_, **options: devices.update({name: options["device"]})

    for name in ("tools.evaluate.reconstruction", "tools.sample.sample", "tools.tokenize.tokenize"):
        monkeypatch.setattr(name, part(name))
    monkeypatch.setattr("trainer.loop.train", train)
    monkeypatch.setattr("trainer.reports.report.write_report", lambda run: None)
    monkeypatch.setattr("model_zoo.load_tokenizer", lambda run: SimpleNamespace(downsampling_factor=4))
    quickstart.quickstart(["trainer.device=cpu", f"data.train={images}"])
    assert set(devices.values()) == {"cpu"}
    assert len(devices) == (5 if images == "bundled:train" else 2)
