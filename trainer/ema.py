"""Exponential moving average of trained weights, spread as the weights are."""

from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import Tensor

from model_zoo.io.sharded_tensors import TensorShard
from trainer.engines.base import Engine


class Ema:
    """Running average, in fp32, of the pieces of weights that are on this rank.

    Build it when the weights that training starts from are in the engines: it starts as their copy.
    """

    def __init__(self, engines: Iterable[Engine], decay: float):
        self.decay = decay
        self.engines = list(engines)
        self.weights = [piece.values for engine in self.engines for piece in engine.weights()]
        self.averages = [values.float().clone() for values in self.weights]

    @torch.no_grad()
    def begin(self) -> None:
        """The average of nothing but the weights as they are now, where they were loaded after it was built."""
        torch._foreach_copy_(self.averages, self.weights)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call once after optimiser step ``step`` (from 0). Early steps use a smaller decay, (2 + step) / (11 + step),
        as in the published training, so that a short run's average is not its random start."""
        decay = min(self.decay, (2 + step) / (11 + step))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)

    def pieces(self, engine: Engine) -> list[TensorShard]:
        """The averages of one of the engines' weights, beside ``engine.weights()``."""
        first = sum(len(other.weights()) for other in self.engines[: self.engines.index(engine)])
        pieces = engine.weights()
        averages: list[Tensor] = self.averages[first : first + len(pieces)]
        return [piece._replace(values=values) for piece, values in zip(pieces, averages, strict=True)]

    @contextmanager
    def in_place_of_weights(self):
        """Within, the engines compute with the averages. Weights and averages change places, a piece at a time, so that
        nobody holds a second copy; all ranks enter and leave together."""
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
            engine.publish()
