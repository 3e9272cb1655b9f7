"""Numerical operations, each public one with a slow readable twin that its fast versions are tested against."""

from model_zoo.ops.chunked import nearest_by_dot
from model_zoo.ops.index_backprop import IndexBackprop, average_entropy, fastest_impl, index_backprop

__all__ = ["IndexBackprop", "average_entropy", "fastest_impl", "index_backprop", "nearest_by_dot"]
