"""Quantizers: features in, discrete codes out."""

from model_zoo.quantizers.base import CodebookQuantizer, Quantized, Quantizer

__all__ = ["CodebookQuantizer", "Quantized", "Quantizer"]
