"""Numerical operations. Fast versions are tested against a slow, readable reference implementation."""

from model_zoo.ops.chunked import nearest_code
from model_zoo.ops.codebook_parallel import CodebookShard, lookup_code, sum_over_shards
from model_zoo.ops.index_backprop import fastest_impl, index_backprop
from model_zoo.ops.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from model_zoo.ops.tiled import Settings, SkipStats
from model_zoo.ops.types import IndexBackprop, average_entropy

__all__ = [
    "CodebookShard",
    "IndexBackprop",
    "LinearCrossEntropy",
    "Settings",
    "SkipStats",
    "average_entropy",
    "fastest_impl",
    "index_backprop",
    "linear_cross_entropy",
    "lookup_code",
    "nearest_code",
    "sum_over_shards",
]
