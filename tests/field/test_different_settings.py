"""Processes that were started with different settings are refused before the first step, in one line that names the
settings and the ranks. Otherwise a checkpoint would hold parts of several models."""

import json
import os
from pathlib import Path

import pytest
from model_checks import tokenizer_of
from ranks import settings
from samples import picture
from support import generator_of, write_generator_run, write_tokenizer_run

from tools import cli
from trainer import same_settings
from trainer.__main__ import main as train

FIX = "; give all of them the same command, the same files and the same ibq"


def on_each_node(commands: list[list[str]], folders: list[str], other_code: bool = False) -> int:
    """The command of this rank, on a node with a separate disk and checkout."""
    rank = int(os.environ["RANK"])
    os.chdir(folders[rank])
    if other_code and rank:
        same_settings.code_version = lambda: "0.1.0 (code 0123456789ab)"
    command = commands[rank]
    return train(command[1:]) if command[0] == "train" else cli.main(command)


def refused(ranks, tmp_path, *commands, folders=None, other_code=False) -> str:
    folders = [str(tmp_path)] * 2 if folders is None else folders
    orders = [[*map(str, command)] for command in commands]
    ended = ranks.command(2, on_each_node, orders, folders, other_code)
    assert ended.statuses == [2, 2] and len(set(ended.error_lines)) == 1, ended.err
    (line,) = set(ended.error_lines)
    assert line.startswith("ibq: error: the processes were started with different settings: ") and line.endswith(FIX)
    return line


def training(tmp_path, *changes) -> list[str]:
    common = {
        "data.train": "bundled:train",
        "data.workers": 0,
        "trainer.max_steps": 1,
        "run": tmp_path / "runs" / "new",
    }
    return ["train", "debug", *settings(common), *changes]


def test_a_setting_that_one_node_lacks(ranks, tmp_path):
    said = refused(ranks, tmp_path, training(tmp_path), training(tmp_path, "ema.decay=0", "data.flip=false"))
    assert ": data.flip is true on rank 0 and false on rank 1; ema.decay is 0.999 on rank 0 and 0.0 on rank 1;" in said
    assert not (tmp_path / "runs").exists()


def test_other_code(ranks, tmp_path):
    said = refused(ranks, tmp_path, training(tmp_path), training(tmp_path), other_code=True)
    version = same_settings.code_version()
    assert f': ibq is "{version}" on rank 0 and "0.1.0 (code 0123456789ab)" on rank 1;' in said


@pytest.fixture
def nodes(tmp_path) -> list[str]:
    """Two folders, each with pictures."""
    for node in ("node0", "node1"):
        (tmp_path / node / "photos").mkdir(parents=True)
        for number in range(8):
            picture(number).save(tmp_path / node / "photos" / f"im{number}.png")
    return [str(tmp_path / "node0"), str(tmp_path / "node1")]


def with_list(tmp_path, *changes) -> list[str]:
    recipe = {
        "data": {"sources": [{"name": "x", "root": "photos", "filters": {"not_keys": "not.txt"}}], "image_size": 32},
        "trainer": {"max_steps": 1, "global_batch_size": 8, "precision": "fp32", "device": "cpu"},
        "model": {"codebook_size": 16, "code_dim": 4, "channels": 8, "channel_multipliers": [1]},
    }
    for node in ("node0", "node1"):
        (tmp_path / node / "recipe.yaml").write_text(json.dumps(recipe))
    return ["train", "recipe.yaml", f"run={tmp_path}/runs/new", "data.workers=0", *changes]


def test_lists_of_keys_of_other_content(ranks, tmp_path, nodes):
    command = with_list(tmp_path)
    Path(nodes[0], "not.txt").write_text("im0.png\n")
    Path(nodes[1], "not.txt").write_text("im0.png\nim1.png\n")
    said = refused(ranks, tmp_path, command, command, folders=nodes)
    assert "the content of not_keys of source x is " in said and " on rank 0 and " in said


def test_a_source_of_another_weight_and_a_configuration_of_deepspeed(ranks, tmp_path, nodes):
    """data.sources is one setting: the line names what differs in it."""
    command = with_list(tmp_path, "engine.kind=deepspeed", "engine.config=zero.json")
    for node, stage in zip(nodes, (0, 1), strict=True):
        Path(node, "not.txt").write_text("im0.png\n")
        Path(node, "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    other = json.loads(Path(nodes[1], "recipe.yaml").read_text())
    other["data"]["sources"][0]["filters"]["min_side"] = 8
    Path(nodes[1], "recipe.yaml").write_text(json.dumps(other))
    said = refused(ranks, tmp_path, command, command, folders=nodes)
    assert "data.sources[0].filters.min_side is null on rank 0 and 8 on rank 1; " in said
    assert "the content of engine.config is " in said


def test_what_belongs_to_a_machine_may_differ(ranks, tmp_path, nodes):
    """Workers, and paths of equal data. Without run= the names of the processes may have different times."""
    common = {"trainer.max_steps": 1, "data.image_size": 16}
    own = [{"data.workers": rank, "data.train": f"{nodes[rank]}/photos"} for rank in range(2)]
    commands = [["train", "debug", *settings({**common, **of_rank})] for of_rank in own]
    ended = ranks.command(2, at_its_own_time, commands, str(tmp_path)).succeeded()
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "checkpoints" / "latest").read_text() == "step_00000001", ended.err


def at_its_own_time(commands: list[list[str]], folder: str) -> int:
    from datetime import datetime

    from trainer import loop

    rank = int(os.environ["RANK"])
    os.chdir(folder)

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 1, 0, 0, 59 - rank)

    loop.datetime = Clock
    return train(commands[rank][1:])


def test_commands_that_use_models(ranks, tmp_path, nodes):
    run = write_tokenizer_run(tmp_path / "run", tokenizer_of())
    tokenize = ["tokenize", run, "--images", "photos", "--size", "16", "--device", "cpu", "--out", tmp_path / "out"]
    other = [*tokenize, "--samples-per-shard", "3"]
    said = refused(ranks, tmp_path, tokenize, other, folders=nodes)
    assert "--samples-per-shard is " in said and not (tmp_path / "out").exists()
    generator = write_generator_run(tmp_path / "generator", generator_of(), run)
    sample = ["sample", generator, "--count", "4", "--device", "cpu", "--out", tmp_path / "samples"]
    said = refused(ranks, tmp_path, [*sample, "--seed", "1"], [*sample, "--seed", "2"])
    assert ": --seed is 1 on rank 0 and 2 on rank 1;" in said and not (tmp_path / "samples").exists()
