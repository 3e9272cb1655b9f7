"""Trains IBQ with VQ's straight-through gradient added: the gradient of a code vector also goes to its feature
unchanged, not only through softmax(z C^T). This is an experiment for claim (a), not a method of this project.

    python benchmarks/claims/straight_through.py benchmarks/claims/small.yaml data.train=TARS data.val=TARS \
        trainer.max_steps=400 seed=0 run=claims/straight_through/seed_0

Takes the arguments of `python -m trainer`. Only this script defines the run's model.quantizer=ibq_straight_through, so
`--resume RUN` needs this script too.
"""

import sys

from torch import Tensor

from model_zoo.quantizers.base import Quantized
from model_zoo.quantizers.ibq import IndexBackpropQuantizer
from model_zoo.quantizers.registry import QUANTIZERS
from trainer.__main__ import main


class StraightThroughQuantizer(IndexBackpropQuantizer):
    def forward(self, z_bdhw: Tensor, entropy_temperature: float | None = None) -> Quantized:
        out = super().forward(z_bdhw, entropy_temperature)
        if not self.training:
            return out
        z_bdhw = z_bdhw.float()
        # Changes no values and adds the gradient. The gradient of the double quantization term stays as it is.
        return out._replace(quantized_bdhw=out.quantized_bdhw + (z_bdhw - z_bdhw.detach()))


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    QUANTIZERS["ibq_straight_through"] = StraightThroughQuantizer
    named = [] if arguments[0] == "--resume" else ["model.quantizer=ibq_straight_through"]
    sys.exit(main([*arguments, *named]))
