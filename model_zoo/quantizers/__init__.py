"""Quantizers map features to discrete codes."""

from model_zoo.quantizers.base import CodebookQuantizer, Quantized, Quantizer

__all__ = ["CodebookQuantizer", "Quantized", "Quantizer"]
