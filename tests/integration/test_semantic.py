"""The semantic term under every engine: ranks, resuming, exports, the dry run, and what is refused."""

import json
import sys
from functools import cache
from pathlib import Path

import pytest
from comparing import assert_refused, copy_until, differences, loss_lines
from encoders import ENCODER, write_encoder
from ranks import settings
from safetensors.torch import load_file
from samples import picture

from model_zoo.io.load import load_tokenizer
from model_zoo.io.sharded_tensors import ShardedTensors

STEPS = 10
ENGINES = {
    "ddp": {},
    "zero0": {"engine.kind": "deepspeed", "engine.config": "zero0"},
    "zero1": {"engine.kind": "deepspeed", "engine.config": "zero1"},
    "zero2": {"engine.kind": "deepspeed", "engine.config": "zero2"},
    "zero3": {"engine.kind": "deepspeed", "engine.config": "zero3", "trainer.micro_batch_size": 2},  # accumulates
    "fsdp2": {"engine.kind": "fsdp2"},
    "codebook 2": {"codebook_parallel": 2},
}
IN_FULL = ("zero0", "zero1", "fsdp2")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "weights.safetensors")


@pytest.fixture(scope="module")
def train(ranks, file, tmp_path_factory):
    """`train(processes, engine)`: the folder of a run of `debug_semantic`."""
    folder = tmp_path_factory.mktemp("semantic")

    @cache
    def train(processes: int = 1, engine: str = "ddp") -> Path:
        run = folder / f"{processes}_{engine.replace(' ', '_')}"
        changes = {"trainer.max_steps": STEPS, "loss.semantic.weights": file, **ENGINES[engine]}
        ranks.train(processes, "debug_semantic", run, changes).succeeded()
        return run

    return train


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=[pytest.mark.full] * (name in IN_FULL)) for name in ENGINES]
)
def test_ten_steps_of_two_ranks_equal_those_of_one(train, engine):
    expected, actual = loss_lines(train()), loss_lines(train(2, engine))
    assert [line["step"] for line in actual] == list(range(1, STEPS + 1))
    for line, true_line in zip(actual, expected, strict=True):
        for name in ("loss/total", "loss/semantic", "loss/reconstruction", "grad_norm/tokenizer"):
            assert line[name] == pytest.approx(true_line[name], rel=1e-4), (line["step"], name)
    assert actual[-1]["loss/semantic"] < actual[0]["loss/semantic"]
    folders = [run / f"checkpoints/step_{STEPS:08d}" for run in (train(), train(2, engine))]
    found = differences(*folders)
    assert found["semantic_head"].whole < 1e-4 and found["semantic_head.exp_avg"].whole < 0.05, found


def test_resumed_equals_unbroken_bit_for_bit(train, ranks, tmp_path):
    run = copy_until(train(), 5, tmp_path / "run")
    ranks.resume(1, run).succeeded()
    files = [folder / f"checkpoints/step_{STEPS:08d}/rank_00000.safetensors" for folder in (train(), run)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert loss_lines(run)[-5:] == loss_lines(train())[-5:]


def test_resumed_by_another_engine_the_head_goes_on(train, ranks, tmp_path):
    run = copy_until(train(), 5, tmp_path / "run")
    ranks.resume(2, run, "engine.kind=fsdp2").succeeded()
    found = differences(*(of / f"checkpoints/step_{STEPS:08d}" for of in (train(), run)))
    assert found["semantic_head"].whole < 1e-4


def test_the_run_keeps_the_encoder_and_no_checkpoint_has_it(train, file):
    run = train()
    config = (run / "config.yaml").read_text()
    digest = json.loads((run / "checkpoints/step_00000010/state.json").read_text())["settings"]["loss.semantic.sha256"]
    assert len(digest) == 64 and f"sha256: {digest}" in config
    names = ShardedTensors(run / "checkpoints/step_00000010").names()
    models = {name.split("/")[0].split(".")[0] for name in names}
    assert "semantic_head" in models and "semantic_head_ema" not in models
    assert not [name for name in names if "patch_embed" in name]


@pytest.fixture
def without_encoder(train, file, monkeypatch):
    """Neither timm nor the encoder's file."""
    train()
    monkeypatch.setitem(sys.modules, "timm", None)
    moved = file.rename(file.with_suffix(".moved"))
    yield
    moved.rename(file)


def test_exports_and_evaluations_need_neither_head_nor_encoder(train, without_encoder, ibq_here, tmp_path):
    ibq_here("checkpoint", "export", train(), "--out", tmp_path / "export").succeeded()
    exported, ours = load_tokenizer(tmp_path / "export"), load_tokenizer(train())
    assert exported.state_dict().keys() == ours.state_dict().keys()
    assert exported.fingerprint() == ours.fingerprint()
    files = [path for path in (tmp_path / "export").iterdir() if path.suffix == ".safetensors"]
    assert files and not [name for path in files for name in load_file(path) if "semantic" in name or "layers" in name]
    report = tmp_path / "report.json"
    ibq_here("evaluate", "reconstruction", train(), "--metrics", "psnr", "--report", report).succeeded()
    assert json.loads(report.read_text())["psnr"] > 5


def test_another_file_is_refused_when_the_run_is_resumed(train, ibq_here, tmp_path):
    run = copy_until(train(), 5, tmp_path / "run")
    other = write_encoder(tmp_path / "other.safetensors", seed=1)
    assert_refused(ibq_here("resume", run, f"loss.semantic.weights={other}"), "is not the encoder of this run")
    hidden = [f"loss.semantic.weights={other}", "loss.semantic.sha256=null"]
    assert_refused(ibq_here("resume", run, *hidden), "loss.semantic.sha256 was ", "set it back")


def test_the_term_begins_in_no_run_that_had_none(file, ranks, ibq_here, tmp_path):
    changes = {"trainer.max_steps": 2, "trainer.checkpoint_every_steps": 1, "loss.semantic.weight": 0}
    ranks.train(1, "debug_semantic", tmp_path / "run", changes).succeeded()
    begun = ["trainer.max_steps=3", "loss.semantic.weight=0.5", f"loss.semantic.weights={file}"]
    assert_refused(ibq_here("resume", tmp_path / "run", *begun), "has no head for this term")


REFUSED = {
    "no file": (["loss.semantic.weights=nowhere.pth"], ["nowhere.pth does not exist", "huggingface.co/timm"]),
    "no encoder": (["loss.semantic.encoder=resnet50"], ["loss.semantic.encoder=resnet50 is unknown: choose one of"]),
    "size": (["loss.semantic.size=100"], ["loss.semantic.size=100 must be a multiple of 16"]),
    "hash": (["loss.semantic.sha256=abc"], ["loss.semantic.sha256=abc"]),
    "weights of another": (
        ["loss.semantic.encoder=vit_small_patch14_dinov2.lvd142m", "loss.semantic.size=224"],
        [f"holds the weights of {ENCODER}, not of vit_small_patch14_dinov2.lvd142m"],
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_are_one_line(file, ibq_here, tmp_path, mistake):
    changes, said = REFUSED[mistake]
    given = {"run": tmp_path / "run", "loss.semantic.weights": file}
    given |= dict(change.split("=", 1) for change in changes)
    assert_refused(ibq_here("train", "debug_semantic", *settings(given)), *said)
    assert not (tmp_path / "run").exists()


def test_the_dry_run_counts_encoder_and_head(ranks, tmp_path):
    """Without the encoder's file."""
    arguments = "train", "debug_semantic", "--dry-run", "--processes", 2, "data.train=null"
    ended = ranks.ibq(*arguments, cwd=tmp_path).succeeded()
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert "test_vit, 0.3 M parameters, frozen 1.22 MB 0 0 0 1.22 MB" in lines, ended.out
    assert "semantic_head a full copy on each of 2" in lines
    head = (16 * 128 + 128 + 128 * 64 + 64) * 4 / 1e6
    assert f"semantic_head {head:.2f} MB {head:.2f} MB {2 * head:.2f} MB 0 {4 * head:.2f} MB" in lines, ended.out


def test_pictures_of_any_shape_are_aligned(ranks, file, tmp_path):
    """On one rank and on two. The encoder has 4 x 6, 5 x 5 and 6 x 4 patches for 6 x 10, 8 x 8 and 10 x 6 tokens."""
    (tmp_path / "pictures").mkdir()
    for number, shape in enumerate([(48, 48), (72, 40), (40, 72)] * 8):  # width, height
        picture(number, shape).save(tmp_path / f"pictures/{number:02d}.png")
    changes = {
        **{"data.train": tmp_path / "pictures", "data.val": "null", "data.crop": "center", "trainer.max_steps": 6},
        **{"data.buckets": "[32x32,24x40,40x24]", "loss.semantic.weights": file, "loss.semantic.size": 80},
    }
    for processes in (1, 2):
        ranks.train(processes, "debug_semantic", tmp_path / f"run_{processes}", changes).succeeded()
    one, two = (loss_lines(tmp_path / f"run_{processes}") for processes in (1, 2))
    shapes = {name for line in one for name in line if name.startswith("loss/reconstruction/")}
    assert len(shapes) == 3
    for line, other in zip(one, two, strict=True):
        assert 0 < line["loss/semantic"] < 2
        assert other["loss/semantic"] == pytest.approx(line["loss/semantic"], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.full)])
def test_half_precision_follows_single(train, ranks, file, tmp_path, precision):
    changes = {"loss.semantic.weights": file, "trainer.precision": precision, "trainer.max_steps": 3}
    ranks.train(1, "debug_semantic", tmp_path / "run", changes).succeeded()
    for line, expected in zip(loss_lines(tmp_path / "run"), loss_lines(train())[:3], strict=True):
        assert line["loss/semantic"] == pytest.approx(expected["loss/semantic"], rel=0.01)
