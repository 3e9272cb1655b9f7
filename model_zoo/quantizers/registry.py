"""Quantizer classes by their name in recipes. A new quantizer needs one file, one line here, one recipe, one test."""

from model_zoo.quantizers.bsq import BinarySphericalQuantizer
from model_zoo.quantizers.fsq import FiniteScalarQuantizer
from model_zoo.quantizers.ibq import IndexBackpropQuantizer
from model_zoo.quantizers.lfq import LookupFreeQuantizer
from model_zoo.quantizers.rotation_vq import RotationQuantizer
from model_zoo.quantizers.simvq import SimVQQuantizer
from model_zoo.quantizers.soft_vq import SoftVectorQuantizer
from model_zoo.quantizers.vq import VectorQuantizer
from model_zoo.quantizers.vq_ema import MovingAverageQuantizer
from model_zoo.quantizers.vqbridge import VQBridgeQuantizer
from model_zoo.quantizers.vqgan_lc import LargeCodebookQuantizer

QUANTIZERS = {
    "ibq": IndexBackpropQuantizer,
    "vq": VectorQuantizer,
    "vq_ema": MovingAverageQuantizer,
    "rotation_vq": RotationQuantizer,
    "soft_vq": SoftVectorQuantizer,
    "lfq": LookupFreeQuantizer,
    "bsq": BinarySphericalQuantizer,
    "fsq": FiniteScalarQuantizer,
    "simvq": SimVQQuantizer,
    "vqbridge": VQBridgeQuantizer,
    "vqgan_lc": LargeCodebookQuantizer,
}
