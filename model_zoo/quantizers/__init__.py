"""Quantizers: features in, discrete codes out."""

from model_zoo.quantizers.base import Quantized, Quantizer

__all__ = ["Quantized", "Quantizer"]
