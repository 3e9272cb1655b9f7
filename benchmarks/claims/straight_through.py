"""Trains IBQ with VQ's straight-through gradient added: what the reconstruction says of a code vector goes on to its
feature unchanged, besides through softmax(z C^T). For claim (a): is it the weak gradient through the softmax that keeps
IBQ's PSNR from being ahead? An experiment, not a method of this project.

    python benchmarks/claims/straight_through.py benchmarks/claims/small.yaml data.train=TARS data.val=TARS \
        trainer.max_steps=400 seed=0 run=claims/straight_through/seed_0

Arguments are those of `python -m trainer`.
"""

import sys

from torch import Tensor

from model_zoo.quantizers.base import Quantized
from model_zoo.quantizers.ibq import IndexBackpropQuantizer
from model_zoo.registry import QUANTIZERS
from trainer.__main__ import main


class StraightThrough(IndexBackpropQuantizer):
    def forward(self, z_bdhw: Tensor, entropy_temperature: float | None = None) -> Quantized:
        out = super().forward(z_bdhw, entropy_temperature)
        z_bdhw = z_bdhw.float()
        # The values stay; the double quantization term keeps the gradient that it has.
        return out._replace(quantized_bdhw=out.quantized_bdhw + (z_bdhw - z_bdhw.detach()))


if __name__ == "__main__":
    QUANTIZERS["ibq"] = StraightThrough
    sys.exit(main(sys.argv[1:]))
