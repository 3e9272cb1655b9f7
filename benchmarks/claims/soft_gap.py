"""Claim (b): PSNR of Soft VQ from soft mixtures (as trained) and from codes (as used), at each checkpoint of the runs.

python benchmarks/claims/soft_gap.py RUN [RUN ...] --images PATH --out soft_gap.png
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

import model_zoo
from data import evaluation_images
from trainer.checkpoint import checkpoint_folders
from trainer.metrics.image import psnr
from trainer.recipes import load_run_config


class Gap(NamedTuple):
    """Mean PSNR over images in dB, decoded from mixtures at that step's temperature (soft) and from codes (hard)."""

    step: int
    temperature: float
    soft: float
    hard: float


@torch.no_grad()
def gap(checkpoint: Path, max_steps: int, images_bchw: torch.Tensor) -> Gap:
    tokenizer = model_zoo.load_tokenizer(checkpoint)
    tokenizer.quantize.train()  # returns mixtures; the other modules stay in eval mode
    step = int(checkpoint.name.removeprefix("step_"))
    tokenizer.quantize.anneal((step - 1) / max_steps)
    soft, hard = [], []
    for batch_bchw in images_bchw.split(32):
        z_bdhw = tokenizer.encode(batch_bchw)
        soft += psnr(batch_bchw, tokenizer.decode(tokenizer.quantize(z_bdhw).quantized_bdhw)).tolist()
        hard += psnr(batch_bchw, tokenizer.detokenize(tokenizer.quantize.tokenize(z_bdhw))).tolist()
    return Gap(step, tokenizer.quantize.temperature.item(), sum(soft) / len(soft), sum(hard) / len(hard))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", required=True)
    parser.add_argument("--out", type=Path, default=Path("soft_gap.png"))
    arguments = parser.parse_args()
    found = {}
    for run in arguments.runs:
        config = load_run_config(run, [])
        images = evaluation_images(arguments.images, image_size=config.data.image_size, resize=config.data.resize)
        images_bchw = torch.stack([image.image_chw for image in images]).float() / 127.5 - 1
        found[str(run)] = [gap(c, config.trainer.max_steps, images_bchw) for c in sorted(checkpoint_folders(run))]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for number, gaps in enumerate(found.values()):
        steps = [one.step for one in gaps]
        axes.plot(steps, [one.soft for one in gaps], color="C0", label=None if number else "soft: mixtures of codes")
        axes.plot(steps, [one.hard for one in gaps], color="C3", label=None if number else "hard: codes")
    axes.set(title="Soft VQ: what it trains on, and what it is used as", xlabel="step", ylabel="PSNR, held-out (dB)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(arguments.out, dpi=110)
    as_json = {run: [one._asdict() for one in gaps] for run, gaps in found.items()}
    arguments.out.with_suffix(".json").write_text(json.dumps(as_json, indent=1) + "\n")
    for run, gaps in found.items():
        for one in gaps:
            print(f"{run} step {one.step}: T {one.temperature:.2g}, soft {one.soft:.2f} dB, hard {one.hard:.2f} dB")


if __name__ == "__main__":
    main()
