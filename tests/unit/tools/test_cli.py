"""The `ibq` command: it starts quickly, every help has an example, mistakes are one line."""

from unittest.mock import Mock

import pytest
import typer

import data
import model_zoo
import trainer.loop
from tools import cli


def leaves(command, path=()):
    """Every command below a group, with its path."""
    for name, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from leaves(child, (*path, name))
        else:
            yield (*path, name)


LEAVES = sorted(" ".join(path) for path in leaves(typer.main.get_command(cli.app)))


def test_start_up_imports_nothing_heavy(launch):
    heavy = ["torch", "numpy", "deepspeed", "trainer", "model_zoo", "data", "rich.progress"]
    script = f"import sys, tools.cli; print([name for name in {heavy} if name in sys.modules])"
    assert launch.python("-c", script).succeeded().out.strip() == "[]"


def test_the_commands_are_there():
    assert {"quickstart", "train", "resume", "reconstruct", "recipes", "doctor"} < set(LEAVES)
    assert {"evaluate reconstruction", "shards pack", "shards check", "shards stats"} < set(LEAVES)


@pytest.mark.parametrize("path", LEAVES)
def test_every_help_has_an_example(ibq, path):
    out = ibq(*path.split(), "--help").succeeded().out
    assert f"Example: ibq {path}" in out


def test_no_arguments_show_the_help(ibq):
    out = ibq().succeeded().out
    assert "Example: ibq quickstart" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian", "debug"], "'trian'"),
        (["train"], "'RECIPE'"),
        (["train", "--fast", "debug"], "--fast"),
        (["resume"], "'RUN'"),
    ],
)
def test_wrong_usage_is_one_line(refused_by_ibq, arguments, said):
    line = refused_by_ibq(*arguments)
    assert said in line and "--help`" in line


@pytest.mark.parametrize("error", [data.DataError, model_zoo.ModelError, trainer.TrainerError])
def test_a_mistake_of_the_user_is_one_line(refused_by_ibq, monkeypatch, error):
    mistake = error("no recipe is called nothing: see `ibq recipes`")
    monkeypatch.setattr(trainer.loop, "train", Mock(side_effect=mistake))
    assert refused_by_ibq("train", "nothing") == "ibq: error: no recipe is called nothing: see `ibq recipes`\n"


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(trainer.loop, "train", Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "debug"])


def test_interrupt_is_130(ibq, monkeypatch):
    monkeypatch.setattr(trainer.loop, "train", Mock(side_effect=KeyboardInterrupt))
    assert ibq("train", "debug").status == 130


def test_train_and_resume_pass_their_arguments_on(ibq, monkeypatch):
    calls = []
    monkeypatch.setattr(trainer.loop, "train", lambda *arguments: calls.append(("train", *arguments)))
    monkeypatch.setattr(trainer.loop, "resume", lambda *arguments: calls.append(("resume", *arguments)))
    ibq("train", "debug", "seed=1", "optimizer.lr=1e-4").succeeded()
    ibq("resume", "runs/mine", "trainer.max_steps=9").succeeded()
    assert calls == [
        ("train", "debug", ["seed=1", "optimizer.lr=1e-4"]),
        ("resume", "runs/mine", ["trainer.max_steps=9"]),
    ]


def test_recipes_are_listed_with_a_description(ibq):
    out = ibq("recipes").succeeded().out
    listed = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert {"quickstart", "debug", "ibq_16384", "vqgan_16384"} <= set(listed)
    assert not any(text.startswith("#") for text in listed.values())
