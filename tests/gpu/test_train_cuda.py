"""Training on CUDA. These tests have never run on a GPU yet: none was at hand when they were written."""

import pytest
import torch
from comparing import read_metrics

from trainer.loop import train

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def losses(run, name="loss/total"):
    return [line[name] for line in read_metrics(run) if name in line]


def test_cuda_starts_with_the_losses_of_the_cpu(tmp_path):
    runs = {
        device: train("debug", [f"run={tmp_path / device}", "trainer.max_steps=5", f"trainer.device={device}"])
        for device in ("cpu", "cuda")
    }
    # fp32, but TF32 in convolutions is PyTorch's default on CUDA.
    assert losses(runs["cuda"]) == pytest.approx(losses(runs["cpu"]), rel=2e-2)


def test_bf16_trains_with_deepspeed_on_cuda(tmp_path):
    overrides = [f"run={tmp_path / 'run'}", "trainer.precision=bf16", "engine.kind=deepspeed", "engine.config=zero2"]
    run = train("debug", [*overrides, "trainer.max_steps=40", "discriminator.norm=batch"])
    reconstruction = losses(run, "loss/reconstruction")
    assert sum(reconstruction[-5:]) < sum(reconstruction[:5])
