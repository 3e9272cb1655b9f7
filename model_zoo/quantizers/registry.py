"""Quantizer classes by their name in recipes. A new quantizer needs one file, one line here, one recipe, one test."""

from model_zoo.quantizers.ibq import IndexBackpropQuantizer
from model_zoo.quantizers.lfq import LookupFreeQuantizer
from model_zoo.quantizers.simvq import SimVQQuantizer
from model_zoo.quantizers.soft_vq import SoftVectorQuantizer
from model_zoo.quantizers.vq import VectorQuantizer
from model_zoo.quantizers.vqbridge import VQBridgeQuantizer
from model_zoo.quantizers.vqgan_lc import LargeCodebookQuantizer

QUANTIZERS = {
    "ibq": IndexBackpropQuantizer,
    "vq": VectorQuantizer,
    "soft_vq": SoftVectorQuantizer,
    "lfq": LookupFreeQuantizer,
    "simvq": SimVQQuantizer,
    "vqbridge": VQBridgeQuantizer,
    "vqgan_lc": LargeCodebookQuantizer,
}
