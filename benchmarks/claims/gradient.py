"""Claim (a): how much of the reconstruction gradient reaches the features through IBQ's softmax.

    python benchmarks/claims/gradient.py 'claims/usage/ibq/seed_*' --images PATH

g is the gradient of L1 with respect to the code vectors, which VQ passes to the features unchanged; s is the gradient
that IBQ passes to them through softmax(z C^T). Prints |s| / |g| over all tokens, the cosine of s and g, and the entropy
of the softmax next to that of a uniform distribution. Uses the raw weights, not the EMA, and the first 32 images.
"""

import argparse
import glob
import math
from itertools import islice
from pathlib import Path

import torch

import model_zoo
from data import DataError, evaluation_images
from model_zoo import ModelError
from model_zoo.quantizers.ibq import IndexBackpropQuantizer
from trainer import TrainerError
from trainer.recipes import load_run_config

PICTURES = 32


def said(run: Path, images: str) -> str:
    data = load_run_config(run, []).data
    pictures = islice(evaluation_images(images, image_size=data.image_size, resize=data.resize), PICTURES)
    images_bchw = torch.stack([picture.image_chw for picture in pictures]).float() / 127.5 - 1
    tokenizer = model_zoo.load_tokenizer(run, "raw")
    if not isinstance(tokenizer.quantize, IndexBackpropQuantizer):
        raise ModelError(f"{run}: this is for runs of ibq, not of {tokenizer.config.quantizer}")
    with torch.no_grad():
        z_bdhw = tokenizer.encode(images_bchw)
    z_bdhw.requires_grad_()
    quantized_bdhw = tokenizer.quantize.train()(z_bdhw).quantized_bdhw
    code_bdhw = quantized_bdhw.detach().requires_grad_()
    (straight,) = torch.autograd.grad((tokenizer.decode(code_bdhw) - images_bchw).abs().mean(), code_bdhw)
    (through,) = torch.autograd.grad(quantized_bdhw, z_bdhw, straight)
    cosine = (straight * through).sum() / (straight.norm() * through.norm())
    codes_kd = tokenizer.quantize.embedding.weight.detach()
    entropy = torch.distributions.Categorical(logits=z_bdhw.detach().movedim(1, -1) @ codes_kd.T).entropy().mean()
    return (
        f"{run}: through the softmax {through.norm() / straight.norm():.1%} of the gradient, cosine {cosine:.2f}; "
        f"entropy {entropy:.2f} of {math.log(len(codes_kd)):.2f} nats"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders, or glob patterns of run folders")
    parser.add_argument("--images", required=True)
    arguments = parser.parse_args()
    try:
        for pattern in arguments.runs:
            for run in sorted(glob.glob(pattern)) or [pattern]:
                print(said(Path(run), arguments.images), flush=True)
    except (DataError, ModelError, TrainerError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
