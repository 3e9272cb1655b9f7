"""Quantizer classes by their name in recipes. A new quantizer needs one file, one line here, one recipe, one test."""

from model_zoo.quantizers.bsq import BinarySphericalQuantizer
from model_zoo.quantizers.fsq import FiniteScalarQuantizer
from model_zoo.quantizers.ibq import IndexBackpropQuantizer
from model_zoo.quantizers.lfq import LookupFreeQuantizer
from model_zoo.quantizers.soft_vq import SoftVectorQuantizer
from model_zoo.quantizers.vq import VectorQuantizer

QUANTIZERS = {
    "ibq": IndexBackpropQuantizer,
    "vq": VectorQuantizer,
    "soft_vq": SoftVectorQuantizer,
    "lfq": LookupFreeQuantizer,
    "bsq": BinarySphericalQuantizer,
    "fsq": FiniteScalarQuantizer,
}
