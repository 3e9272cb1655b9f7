"""Processes whose nodes have different copies of the same data are refused, in one line that names the ranks. Otherwise
samples would be lost or repeated, because every process takes its share of what it sees."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from model_checks import tokenizer_of
from ranks import settings
from samples import index_of, picture, write_tars
from support import generator_of, write_generator_run, write_tokenizer_run

from tools import cli
from trainer import TrainerError
from trainer.__main__ import main as train
from trainer.evaluation.features import FeatureExtractor, FolderImages
from trainer.parallel import World

FIX = "; give all nodes the same files"


def on_its_node(folder: str, command: list[str]) -> int:
    """A command on a node whose relative paths lead to its own disk."""
    os.chdir(Path(folder) / f"node{os.environ['RANK']}")
    return train(command[1:]) if command[0] == "train" else cli.main(command)


def copies(place: Path, *missing: str) -> Path:
    """node0/photos and node1/photos of 12 pictures with classes; node1 lacks some files."""
    photos = place / "node0" / "photos"
    photos.mkdir(parents=True)
    for number in range(12):
        picture(number).save(photos / f"im{number:02d}.png")
        (photos / f"im{number:02d}.cls").write_text("3")
    shutil.copytree(photos, place / "node1" / "photos")
    for name in missing:
        (place / "node1" / "photos" / name).unlink()
    return place


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_tokenizer_run(tmp_path_factory.mktemp("run") / "run", tokenizer_of())


def refused(ranks, place: Path, *command) -> str:
    ended = ranks.command(2, on_its_node, str(place), [*map(str, command)])
    assert ended.statuses == [2, 2] and len(set(ended.error_lines)) == 1, ended.err
    return ended.error_lines[0]


TOKENIZE = "--size", "16", "--samples-per-shard", "6", "--device", "cpu"


def test_tokenize(ranks, run, tmp_path):
    copies(tmp_path, "im03.png", "im04.png")
    said = refused(ranks, tmp_path, "tokenize", run, "--images", "photos", "--out", tmp_path / "out", *TOKENIZE)
    assert "--images photos is not the same for all processes: images: 1 shard, 12 samples (" in said
    assert ") on rank 0; images: 1 shard, 10 samples (" in said and said.endswith(f") on rank 1{FIX}")
    assert not (tmp_path / "out").exists()


def test_tokenize_where_only_a_class_is_missing(ranks, run, tmp_path):
    copies(tmp_path, "im03.cls")
    said = refused(ranks, tmp_path, "tokenize", run, "--images", "photos", "--out", tmp_path / "out", *TOKENIZE)
    assert said.count("12 samples (") == 2 and said.endswith(f") on rank 1{FIX}")


def test_tokenize_of_equal_copies(ranks, run, tmp_path):
    """Also where they were copied without their times."""
    copies(tmp_path)
    for path in (tmp_path / "node1" / "photos").iterdir():
        os.utime(path, (1_700_000_000, 1_700_000_000))
    command = ["tokenize", str(run), "--images", "photos", "--out", str(tmp_path / "out"), *TOKENIZE]
    assert "12 samples" in ranks.command(2, on_its_node, str(tmp_path), command).succeeded().out


def test_evaluate_reconstruction(ranks, run, tmp_path):
    copies(tmp_path, "im03.png")
    options = "--images", "photos", "--size", "16", "--report", tmp_path / "report.json", "--device", "cpu"
    said = refused(ranks, tmp_path, "evaluate", "reconstruction", run, *options)
    assert "--images photos is not the same for all processes: 12 samples (" in said and "11 samples (" in said
    assert said.endswith(FIX) and not (tmp_path / "report.json").exists()


def test_training_data_and_validation(ranks, tmp_path):
    copies(tmp_path, "im03.png")
    common = settings({"data.image_size": 16, "data.workers": 0})
    for changes, what in (
        (["data.train=photos"], "the training data"),
        (["data.train=bundled:val", "data.val=photos"], "data.val=photos"),
    ):
        said = refused(ranks, tmp_path, "train", "debug", f"run={tmp_path}/runs/new", *common, *changes)
        assert f"{what} is not the same for all processes: " in said and "11 samples" in said and said.endswith(FIX)
        assert not (tmp_path / "runs").exists()


def test_training_on_other_tars(ranks, tmp_path):
    for node, counts in ((0, [5, 3]), (1, [3, 5])):
        (tmp_path / f"node{node}").mkdir()
        index_of(write_tars(tmp_path / f"node{node}" / "tars", counts), tmp_path / f"node{node}" / "tars.index")
    said = refused(ranks, tmp_path, "train", "debug", f"run={tmp_path}/run", *settings(), "data.train=tars")
    assert "the training data is not the same" in said and said.count("2 shards, 8 samples (") == 2


def test_an_output_folder_on_another_disk_of_each_node(ranks, run, tmp_path):
    images = write_tars(tmp_path / "tars", [4, 4])
    generator = write_generator_run(tmp_path / "generator", generator_of(), run)
    for node in range(2):
        for name in ("tokens", "samples"):
            (tmp_path / f"node{node}" / name).mkdir(parents=True)
    fix = "put --out on a disk that all nodes share and that nothing else removes files from, and run the command again"
    said = refused(ranks, tmp_path, "tokenize", run, "--images", images, "--out", "tokens", *TOKENIZE)
    assert f"1 of 2 shards that were written are not there, first tokens/tokens-000001.tar: {fix}" in said
    options = "--count", 4, "--batch-size", 1, "--device", "cpu"
    said = refused(ranks, tmp_path, "sample", generator, *options, "--out", "samples")
    assert f"2 of 4 images are in samples, though all were written: {fix}" in said


def stale_runs(place: Path, write) -> Path:
    """node0/run and node1/run, of the same step with other weights."""
    for node in range(2):
        write(place / f"node{node}" / "run", node)
    return place


def test_tokenizers_of_stale_copies_of_a_run(ranks, tmp_path):
    images = write_tars(tmp_path / "tars", [4])
    stale_runs(tmp_path, lambda run, seed: write_tokenizer_run(run, tokenizer_of(seed)))
    report = "--report", tmp_path / "report.json", "--size", "16", "--device", "cpu"
    for command in (
        ("tokenize", "run", "--images", images, "--out", tmp_path / "out", *TOKENIZE),
        ("evaluate", "reconstruction", "run", "--images", images, *report),
    ):
        said = refused(ranks, tmp_path, *command)
        assert "the tokenizer is not the same for all processes: fingerprint " in said and said.endswith(FIX)
    assert not (tmp_path / "out").exists() and not (tmp_path / "report.json").exists()


def test_generators_of_stale_copies_of_a_run(ranks, run, tmp_path):
    stale_runs(tmp_path, lambda place, seed: write_generator_run(place, generator_of(seed), run))
    said = refused(ranks, tmp_path, "sample", "run", "--count", "4", "--out", tmp_path / "out", "--device", "cpu")
    assert "the generator is not the same for all processes: fingerprint " in said and said.endswith(FIX)
    assert not (tmp_path / "out").exists()


def test_training_from_stale_copies_of_a_run(ranks, tmp_path):
    data = {"data.train": "bundled:val", "data.workers": 0, "data.image_size": 16}
    for node in range(2):
        run = tmp_path / f"node{node}" / "run"
        arguments = settings({**data, "trainer.max_steps": 1, "trainer.global_batch_size": 4, "seed": node})
        ranks.start(1, "debug", f"run={run}", *arguments).wait().succeeded()
    resume = "train", "--resume", "run", "trainer.max_steps=2", "seed=0"
    said = refused(ranks, tmp_path, *resume)
    assert "the checkpoint run/checkpoints/step_00000001 is not the same for all processes: manifest " in said
    start = f"run={tmp_path}/new", "init_from.source=run", *settings({**data, "data.image_size": 16})
    said = refused(ranks, tmp_path, "train", "debug", *start)
    assert "the checkpoint run/checkpoints/step_00000001 is not the same for all processes: manifest " in said
    shutil.rmtree(tmp_path / "node1" / "run" / "checkpoints" / "step_00000001")
    assert "no manifest on rank 1" in refused(ranks, tmp_path, *resume)


def extracted(folder: str) -> str:
    rank = int(os.environ["RANK"])
    os.chdir(Path(folder) / f"node{rank}")
    images = FolderImages(Path("photos"))
    extractor = FeatureExtractor(World(rank, 2, torch.device("cpu")), 4, None)
    try:
        extractor.extract(images, lambda done, total: None)
    except TrainerError as error:
        return str(error)
    return "nothing"


def test_images_of_an_evaluation_of_samples(ranks, tmp_path):
    copies(tmp_path, "im03.png")
    first, second = ranks.call(2, extracted, str(tmp_path))
    assert first == second and "12 images of 48x40 pixels (" in first and "11 images of 48x40 pixels (" in first
    assert first.endswith(FIX)
