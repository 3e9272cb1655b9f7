"""A resumed run prints that data.val holds other images than before, since it continues the curves, and that a list of
keys has another content."""

import json
from pathlib import Path

import pytest
import yaml
from ranks import settings
from samples import picture

import model_zoo
from trainer.checkpoint import load_state


def validated_on(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for number in numbers:
        picture(number).save(folder / f"im{number:02d}.png")


@pytest.mark.parametrize("now", [range(10), range(4, 14), range(4)])
def test_other_images_are_said_and_recorded(ranks, tmp_path, now):
    images, run = tmp_path / "images", tmp_path / "run"
    validated_on(images, range(10))
    data = {"data.train": "bundled:val", "data.val": str(images), "data.workers": 0, "data.image_size": 16}
    arguments = settings({**data, "trainer.max_steps": 1, "trainer.global_batch_size": 4})
    ranks.start(1, "debug", f"run={run}", *arguments).wait().succeeded()
    validated_on(images, now)
    err = ranks.resume(1, run, "trainer.max_steps=2").succeeded().err
    changes = {
        key: (after, before, now)
        for after, key, before, now in load_state(run / "checkpoints/step_00000002")["changes"]
    }
    assert ("changed after step 1: the content of data.val was" in err) == (now != range(10))
    if now == range(10):
        assert changes.keys() == {"trainer.max_steps"}
    else:
        after, former, current = changes["the content of data.val"]
        assert after == 1 and former.startswith("10 samples (") and current.startswith(f"{len(now)} samples (")
        assert json.dumps(current) in err


@pytest.mark.parametrize("now", ["im00.png\n", "im00.png\nim01.png\n"])
def test_another_content_of_a_list_of_keys_is_printed_and_recorded(ranks, tmp_path, now):
    images, run, keys = tmp_path / "images", tmp_path / "run", tmp_path / "not.txt"
    validated_on(images, range(8))
    keys.write_text("im00.png\n")
    recipe = Path(model_zoo.__file__).parent / "recipes/tokenizer/debug.yaml"
    source = {"name": "x", "root": str(images), "filters": {"not_keys": str(keys)}}
    (tmp_path / "recipe.yaml").write_text(
        json.dumps({**yaml.safe_load(recipe.read_text()), "data": {"image_size": 16, "sources": [source]}})
    )
    arguments = settings({"data.workers": 0, "trainer.max_steps": 1, "trainer.global_batch_size": 4})
    ranks.start(1, tmp_path / "recipe.yaml", f"run={run}", *arguments).wait().succeeded()
    keys.write_text(now)
    err = ranks.resume(1, run, "trainer.max_steps=2").succeeded().err
    name = "the content of not_keys of source x"
    assert (f"changed after step 1: {name} was " in err) == (now != "im00.png\n")
    changed = {key for _, key, _, _ in load_state(run / "checkpoints/step_00000002")["changes"]}
    assert changed == {"trainer.max_steps", *([name] if now != "im00.png\n" else [])}
