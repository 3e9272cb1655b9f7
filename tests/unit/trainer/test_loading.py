"""Ranks that load a model compare the hashes of its checkpoint together, and refuse a damaged one together."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_checks import tokenizer_of, write_manifest, write_run
from support import GENERATOR, generator_of, generator_run, tokenizer_run, write_generator_run

from model_zoo import load_tokenizer
from model_zoo.io import manifest
from model_zoo.io.hashing import sha256_of
from trainer import TrainerError
from trainer.jobs.sample import sample
from trainer.loading import check_together, load_newest
from trainer.parallel import World
from trainer.tasks.generator import GeneratorTask
from trainer.tasks.initialization import load_initial_weights

CHECKPOINT = "checkpoints/step_00000003"
FILES = ["rank_00000.safetensors", "rank_00001.safetensors", "rank_00002.safetensors", "state.json"]


@pytest.fixture
def run(tmp_path):
    tokenizer = tokenizer_of(codebook_size=16)
    config = {"model": tokenizer.config}
    write_manifest(write_run(tmp_path / "run", config, ranks=3, tokenizer_ema=tokenizer) / CHECKPOINT)
    return tmp_path / "run"


def hashed_by_ranks(folders: list[Path], work) -> tuple[list[str], str | None]:
    """On each rank, in its folder: the files that it reads for their hashes, and the error."""
    hashed = []

    def recording(file):
        hashed.append(file.name)
        return sha256_of(file)

    manifest.sha256_of = recording
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), torch.device("cpu"))
    os.chdir(folders[world.rank])
    try:
        work(world)
    except TrainerError as error:
        return sorted(hashed), str(error)
    return sorted(hashed), None


def load(world: World) -> None:
    load_newest(world, "run", load_tokenizer)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def test_each_file_is_read_by_one_rank(ranks, run):
    found = ranks.call(2, hashed_by_ranks, [run.parent] * 2, load)
    assert [error for _, error in found] == [None, None]
    assert sorted(found[0][0] + found[1][0]) == FILES and found[0][0] and found[1][0]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_by_all_ranks(ranks, run, name):
    flip_a_bit(run / CHECKPOINT / name)
    said = f"{CHECKPOINT} is damaged: {name} is not what was written (its sha256 differs)"
    for _, error in ranks.call(2, hashed_by_ranks, [run.parent] * 2, load):
        assert said in error


def test_each_copy_of_a_checkpoint_is_read(ranks, run, tmp_path):
    """As on nodes whose disks are their own."""
    copy = tmp_path / "other"
    shutil.copytree(run, copy / "run")
    found = ranks.call(3, hashed_by_ranks, [run.parent, copy, copy], load)
    assert [error for _, error in found] == [None] * 3
    assert found[0][0] == FILES and sorted(found[1][0] + found[2][0]) == FILES
    flip_a_bit(copy / "run" / CHECKPOINT / FILES[1])
    for _, error in ranks.call(3, hashed_by_ranks, [run.parent, copy, copy], load):
        assert f"{FILES[1]} is not what was written" in error


def train_generator(world: World) -> None:
    config = generator_run(replace(GENERATOR, vocabulary=16))
    config.tokenizer.source = "run"
    GeneratorTask(config, world, 1, 1)


def fine_tune(world: World) -> None:
    """The run's tokenizer is not the recipe's, which is found after it was read."""
    config = tokenizer_run(init_from__source="run")
    with pytest.raises(TrainerError, match=r"init_from\.source=run: its model is not the recipe's"):
        load_initial_weights(config, world, None, None)


def sample_one(world: World) -> None:
    """Joins the process group itself."""
    sample("generator", count=1, device="cpu")


@pytest.mark.parametrize("work", [train_generator, fine_tune, sample_one])
def test_commands_read_each_file_of_a_tokenizer_once(ranks, run, work):
    write_generator_run(run.with_name("generator"), generator_of(vocabulary=16), Path("run"))
    found = ranks.call(2, hashed_by_ranks, [run.parent] * 2, work, join=work is not sample_one)
    assert [error for _, error in found] == [None, None]
    assert sorted(found[0][0] + found[1][0]) == FILES


def look_for_nothing(world: World) -> None:
    check_together(world, "nothing")


def test_a_missing_source_is_left_to_reading(ranks, tmp_path):
    assert ranks.call(2, hashed_by_ranks, [tmp_path] * 2, look_for_nothing) == [([], None)] * 2
