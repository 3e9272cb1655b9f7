"""The discriminator on a frozen encoder under several engines: ranks, resuming, exports, the dry run, refusals."""

import json
import sys
from functools import cache
from pathlib import Path

import pytest
from comparing import assert_refused, copy_until, differences, loss_lines
from encoders import ENCODER, write_encoder
from ranks import settings
from safetensors.torch import load_file

from model_zoo.io.load import load_tokenizer
from model_zoo.io.published_ckpt import is_publishable
from model_zoo.io.sharded_tensors import ShardedTensors

STEPS = 10
DINO = {"discriminator.kind": "dino", "discriminator.encoder": ENCODER, "discriminator.size": 64}
# The gradient of the hinge loss jumps where a logit crosses 1 or -1, which rounding may decide. This loss is smooth.
DINO |= {"loss.discriminator.kind": "vanilla"}
ENGINES = {
    "ddp": {},
    "zero1": {"engine.kind": "deepspeed", "engine.config": "zero1"},
    "zero3": {"engine.kind": "deepspeed", "engine.config": "zero3", "trainer.micro_batch_size": 2},  # accumulates
    "fsdp2": {"engine.kind": "fsdp2"},
}
IN_FULL = ("zero1", "zero3")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "weights.safetensors")


@pytest.fixture(scope="module")
def train(ranks, file, tmp_path_factory):
    """`train(processes, engine)`: the folder of a run of `debug` with this discriminator."""
    folder = tmp_path_factory.mktemp("dino")

    @cache
    def train(processes: int = 1, engine: str = "ddp") -> Path:
        run = folder / f"{processes}_{engine}"
        changes = {"trainer.max_steps": STEPS, "trainer.checkpoint_every_steps": 5, "discriminator.weights": file}
        ranks.train(processes, "debug", run, {**changes, **DINO, **ENGINES[engine]}).succeeded()
        return run

    return train


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=[pytest.mark.full] * (name in IN_FULL)) for name in ENGINES]
)
def test_ten_steps_of_two_ranks_equal_those_of_one(train, engine):
    expected, actual = loss_lines(train()), loss_lines(train(2, engine))
    assert [line["step"] for line in actual] == list(range(1, STEPS + 1))
    for line, true_line in zip(actual, expected, strict=True):
        for name in ("loss/total", "loss/discriminator", "loss/generator", "loss/lecam", "grad_norm/tokenizer"):
            assert line[name] == pytest.approx(true_line[name], rel=1e-4), (line["step"], name)
    assert actual[-1]["loss/discriminator"] < actual[0]["loss/discriminator"]
    found = differences(*(run / f"checkpoints/step_{STEPS:08d}" for run in (train(), train(2, engine))))
    assert found["discriminator"].whole < 1e-4 and found["tokenizer"].whole < 1e-4, found


def test_resumed_equals_unbroken_bit_for_bit(train, ranks, tmp_path):
    run = copy_until(train(), 5, tmp_path / "run")
    ranks.resume(1, run).succeeded()
    files = [folder / f"checkpoints/step_{STEPS:08d}/rank_00000.safetensors" for folder in (train(), run)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert loss_lines(run)[-5:] == loss_lines(train())[-5:]


def test_resumed_by_another_engine_the_heads_continue(train, ranks, tmp_path):
    run = copy_until(train(), 5, tmp_path / "run")
    ranks.resume(2, run, "engine.kind=fsdp2").succeeded()
    found = differences(*(of / f"checkpoints/step_{STEPS:08d}" for of in (train(), run)))
    assert found["discriminator"].whole < 1e-4


def test_the_run_keeps_the_hash_and_no_checkpoint_has_the_encoder(train, file):
    run = train()
    settings_of_run = json.loads((run / "checkpoints/step_00000010/state.json").read_text())["settings"]
    digest = settings_of_run["discriminator.sha256"]
    assert len(digest) == 64 and f"sha256: {digest}" in (run / "config.yaml").read_text()
    assert not [name for name in ShardedTensors(run / "checkpoints/step_00000010").names() if "patch_embed" in name]


@pytest.fixture
def without_encoder(train, file, monkeypatch):
    """Neither timm nor the encoder's file."""
    train()
    monkeypatch.setitem(sys.modules, "timm", None)
    moved = file.rename(file.with_suffix(".moved"))
    yield
    moved.rename(file)


def test_exports_hold_the_heads_and_need_no_encoder(train, without_encoder, ibq_here, tmp_path):
    ibq_here("checkpoint", "export", train(), "--out", tmp_path / "export").succeeded()
    assert load_tokenizer(tmp_path / "export").fingerprint() == load_tokenizer(train()).fingerprint()
    heads = load_file(tmp_path / "export/discriminator.safetensors")
    assert heads and all(name.startswith("heads.") for name in heads)
    assert not is_publishable(heads)


def test_a_new_run_takes_over_the_heads(train, file, ranks, tmp_path):
    changes = {"trainer.max_steps": 1, "discriminator.weights": file, "init_from.source": train(), **DINO}
    ended = ranks.train(1, "debug", tmp_path / "run", changes).succeeded()
    assert "discriminator: the source's" in ended.err
    patchgan = {"trainer.max_steps": 1, "init_from.source": train()}
    assert "discriminator: random weights" in ranks.train(1, "debug", tmp_path / "other", patchgan).succeeded().err


REFUSED = {
    "no file": (["discriminator.weights=nowhere.pth"], ["nowhere.pth does not exist", "discriminator.weights=FILE"]),
    "hash": (["discriminator.sha256=abc"], ["is not the encoder of this run", "discriminator.sha256=abc"]),
    "size": (["discriminator.size=100"], ["discriminator.size=100 must be a multiple of 16"]),
    "small pictures": (["data.image_size=12"], ["data.image_size=12 must be at least 16 for the discriminator"]),
    "weights of another": (
        ["discriminator.encoder=vit_small_patch16_224.dino"],
        [f"holds the weights of {ENCODER}", f"discriminator.encoder={ENCODER}"],
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_are_one_line(file, ibq_here, tmp_path, mistake):
    changes, said = REFUSED[mistake]
    given = {"run": tmp_path / "run", "discriminator.weights": file, **DINO}
    given |= dict(change.split("=", 1) for change in changes)
    assert_refused(ibq_here("train", "debug", *settings(given)), *said)
    assert not (tmp_path / "run").exists()


def test_another_file_is_refused_when_the_run_is_resumed(train, ibq_here, tmp_path):
    run = copy_until(train(), 5, tmp_path / "run")
    other = write_encoder(tmp_path / "other.safetensors", seed=1)
    assert_refused(ibq_here("resume", run, f"discriminator.weights={other}"), "is not the encoder of this run")
    hidden = [f"discriminator.weights={other}", "discriminator.sha256=null"]
    assert_refused(ibq_here("resume", run, *hidden), "discriminator.sha256 was ", "set it back")


def test_the_dry_run_counts_encoder_heads_and_convnext(ranks, tmp_path):
    """Of the published networks, without their files."""
    arguments = "train", "debug", "--dry-run", "--processes", 2, "data.train=null", "discriminator.kind=dino"
    perceptual = "loss.perceptual.weight=1", "loss.perceptual.kind=lpips+convnext"
    ended = ranks.ibq(*arguments, *perceptual, cwd=tmp_path).succeeded()
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    of_head = sum((384 * 384 * kernel + 3 * 384 for kernel in (1, 9)), start=384 + 1)  # biases, and those of the norms
    encoder, heads, convnext = (4 * count / 1e6 for count in (21_665_664, 5 * of_head, 50_223_688))
    frozen = "vit_small_patch16_224, 21.7 M parameters, frozen, of the discriminator"
    for line in (
        f"{frozen} {encoder:.2f} MB 0 0 0 {encoder:.2f} MB",
        f"ConvNeXt-S, frozen {convnext:.2f} MB 0 0 0 {convnext:.2f} MB",
        "LPIPS, frozen 58.86 MB 0 0 0 58.86 MB",
        f"discriminator {heads:.2f} MB {heads:.2f} MB {2 * heads:.2f} MB 0 {4 * heads:.2f} MB",
        "discriminator a full copy on each of 2",
    ):
        assert line in lines, ended.out
