"""A resumed run prints that data.val holds other images than before, since it continues the curves, and that a list of
keys or the token shards have another content."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from ranks import settings
from samples import picture
from tokens import write_tokens

import model_zoo
from data.index import write_index
from data.prep.check import check_shards
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


def tokenized(folder: Path, seed: int, indexed: bool) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    write_tokens(folder, count=32, seed=seed)
    urls = sorted(map(str, folder.glob("*.tar")))
    if indexed:
        found = list(check_shards(urls))
        write_index(folder / "index.safetensors", urls, [one.table for one in found], [one.sha256 for one in found])


# Shards without an index, as of earlier versions, are not compared.
@pytest.mark.parametrize(("seed", "indexed", "told"), [(1, True, True), (0, True, False), (1, False, False)])
def test_token_shards_that_were_made_again_are_printed_and_recorded(ranks, tmp_path, seed, indexed, told):
    tokens, run = tmp_path / "tokens", tmp_path / "run"
    tokenized(tokens, 0, indexed=True)
    arguments = settings({"data.train": str(tokens), "data.workers": 0, "trainer.max_steps": 1})
    ranks.start(1, "ar_debug", f"run={run}", *arguments).wait().succeeded()
    tokenized(tokens, seed, indexed)
    err = ranks.resume(1, run, "trainer.max_steps=2").succeeded().err
    name = "the content of the tars of source train"
    assert (f"changed after step 1: {name} was " in err) == told
    state = load_state(run / "checkpoints/step_00000002")
    assert {key for _, key, _, _ in state["changes"]} == {"trainer.max_steps", *([name] if told else [])}
    tokenized(tokens, 0, indexed=True)
    assert (f"changed after step 2: {name} was " in ranks.resume(1, run, "trainer.max_steps=3").succeeded().err) == told
