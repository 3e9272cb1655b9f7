"""The commands one after the other, as a user goes through them, and settings that the recipe `debug` leaves out."""

import json
import math
import re
import shutil

import pytest
import torch
from comparing import loss_lines, read_metrics, unchanged
from model_checks import assert_same
from PIL import Image
from ranks import settings
from samples import picture

from model_zoo import load_tokenizer
from model_zoo.io.sharded_tensors import ShardedTensors

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve smooth pictures in two sub-folders, none of them square."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        path = folder / ("cats" if number % 2 else "dogs") / f"{number}.{('png', 'jpg', 'webp')[number % 3]}"
        path.parent.mkdir(exist_ok=True)
        picture(number, (110 + 5 * number, 100)).save(path)
    return folder


def test_train_leaves_a_whole_run_folder(runs):
    run = runs("one")
    assert (run / "config.yaml").is_file()
    assert (run / "checkpoints/latest").read_text() == "step_00000020"
    assert list((run / "tensorboard").glob("events.*"))
    for step in (10, 20):
        with Image.open(run / f"samples/step_{step:08d}.png") as sample:
            assert min(sample.size) > 32


def test_train_lowers_the_loss(runs):
    reconstruction = [line["loss/reconstruction"] for line in loss_lines(runs("one"))]
    assert sum(reconstruction[-5:]) < 0.95 * sum(reconstruction[:5])


def test_evaluate(runs, ranks):
    run = runs("one")
    finished = ranks.ibq("evaluate", "reconstruction", run, "--device", "cpu").succeeded()
    report = json.loads((run / "report.json").read_text())
    for name in ("psnr", "ssim", "l1", "usage", "perplexity", "baseline_mean_color_psnr", "baseline_palette_psnr"):
        assert math.isfinite(report[name]), name
    assert report["manifest"]["checkpoint"] == "step_00000020"
    assert report["image_count"] == len(report["images"]) > 0
    page = (run / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    assert not re.findall(r"@import|url\((?!['\"]?data:)|<script[^>]+src", page)
    assert f"{report['psnr']:.2f}" in page
    for path in (run / "report.json", run / "report.png", run / "report.html"):
        assert str(path) in finished.out


def test_reconstruct(runs, ranks, pictures, tmp_path):
    arguments = "--images", pictures, "--out", tmp_path / "out", "--size", "original", "--weights", "raw"
    finished = ranks.ibq("reconstruct", runs("one"), *arguments, "--device", "cpu").succeeded()
    assert "12 images" in finished.out
    written = sorted((tmp_path / "out").glob("*.png"))
    assert len(written) == 12 + 1
    for path in written:
        with Image.open(path) as image:
            image.load()


def test_doctor(ranks):
    finished = ranks.ibq("doctor")
    assert finished.status in (0, 1)  # 1 where this machine lacks something, which is not what is tested here
    assert "Traceback" not in finished.err
    assert "torch" in finished.out


def test_pack_and_train_on_tars(ranks, pictures, tmp_path):
    """As published, but for size: BatchNorm in the discriminator, bf16, adaptive weight, loader processes."""
    for split in ("train", "val"):
        out = tmp_path / "tars" / split
        options = "--prefix", split, "--max-samples-per-shard", "5", "--layout", "imagenet"
        finished = ranks.ibq("shards", "pack", pictures, "--out", out, *options).succeeded()
        assert "packed 12 images into 3 tars" in finished.out
    run = tmp_path / "run"
    changes = {
        "data.train": f"{tmp_path}/tars/train/train-{{000000..000002}}.tar",
        "data.val": tmp_path / "tars/val",
        "data.image_size": 64,
        "data.workers": 1,
        "discriminator.norm": "batch",
        "loss.generator.adaptive": "true",
        "loss.generator.kind": "linear",
        "trainer.precision": "bf16",
        "trainer.max_steps": 4,
    }
    ranks.ibq("train", "debug", f"run={run}", *settings(changes)).succeeded()
    lines, training = read_metrics(run), loss_lines(run)
    assert len(training) == 4
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert training[-1]["loss/reconstruction"] < training[0]["loss/reconstruction"]
    assert training[-1]["weight/generator"] != training[0]["weight/generator"]
    assert [line["step"] for line in lines if "val/psnr" in line] == [4]
    discriminator = ShardedTensors(run / "checkpoints/step_00000004").tensors("discriminator/")
    assert discriminator["main.3.num_batches_tracked"] == 3 * 4  # real and fake for itself, and fake for the generator


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_a_codebook_spread_over_two_processes_is_exported_whole(trained, ranks, tmp_path, weights):
    changes = {"codebook_parallel": 2, "trainer.max_steps": 2, "trainer.checkpoint_every_steps": 2}
    run, out = trained("debug", 2, changes), tmp_path / "out"
    ranks.ibq("checkpoint", "export", run, "--out", out).succeeded()
    expected, exported = (load_tokenizer(source, weights) for source in (run, out))
    assert_same(exported, expected)
    assert exported.quantize.embedding.weight.shape == (256, 16)


def test_tf32_is_pytorchs_switch(ibq_here, tmp_path):
    before = torch.get_float32_matmul_precision()
    try:
        for chosen, precision in (("true", "high"), ("false", "highest")):
            changes = {"trainer.tf32": chosen, "trainer.max_steps": 1, "data.val": "null"}
            ibq_here("train", "debug", f"run={tmp_path / chosen}", *settings(changes)).succeeded()
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.full
@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_equals_eager(runs):
    for line, true_line in zip(loss_lines(runs("compiled")), loss_lines(runs("one"))[:2], strict=True):
        assert line["loss/total"] == pytest.approx(true_line["loss/total"], rel=1e-3)
        assert line["loss/discriminator"] == pytest.approx(true_line["loss/discriminator"], rel=1e-3)


def test_not_finite_in_a_resumed_run_leaves_its_checkpoint(runs, ranks, tmp_path):
    run = shutil.copytree(runs("stopped"), tmp_path / "run")
    with unchanged(run / "checkpoints"):
        changes = "trainer.max_steps=14", "trainer.checkpoint_every_steps=1", "optimizer.lr=1e30"
        finished = ranks.ibq("resume", run, *changes)
        assert finished.status == 2, finished.err
        (line,) = finished.error_lines
        assert "is not finite at step" in line
        assert "Traceback" not in finished.err
