"""Exponential moving average of trained weights, sharded as the weights are."""

from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import Tensor

from model_zoo.io.sharded_tensors import TensorShard
from trainer.engines.base import Engine


class Ema:
    """Moving average, in fp32, of this rank's shards of the weights.

    The average starts as a copy of the weights that the engines hold when it is built.
    """

    def __init__(self, engines: Iterable[Engine], decay: float):
        self.decay = decay
        self.engines = list(engines)
        self.weights = [shard.values for engine in self.engines for shard in engine.weights()]
        self.averages = [values.float().clone() for values in self.weights]

    @torch.no_grad()
    def restart(self) -> None:
        """Sets the average to the present weights. Call it after other weights were loaded."""
        torch._foreach_copy_(self.averages, self.weights)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call once after optimizer step ``step`` (from 0).

        Early steps use a smaller decay, (2 + step) / (11 + step), as in the published training, so that the average of
        a short run does not retain its random initial weights.
        """
        decay = min(self.decay, (2 + step) / (11 + step))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)

    def shards(self, engine: Engine) -> list[TensorShard]:
        """The averages of an engine's weights, in the order of ``engine.weights()``."""
        first = sum(len(other.weights()) for other in self.engines[: self.engines.index(engine)])
        shards = engine.weights()
        averages: list[Tensor] = self.averages[first : first + len(shards)]
        return [shard._replace(values=values) for shard, values in zip(shards, averages, strict=True)]

    @contextmanager
    def in_place_of_weights(self):
        """Within the context the engines compute with the averages; all ranks enter and leave together.

        Weights and averages are swapped one shard at a time, so that no second copy of the model is needed.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self.weights, self.averages, strict=True):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)
        for engine in self.engines:
            engine.sync_weights()
