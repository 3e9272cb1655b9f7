"""The state of a run's models: engines, averages, loss scales and buffers, and their tensors on disk."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from model_zoo.io.sharded_tensors import ShardedTensors, TensorShard, whole_tensor
from trainer.ema import Ema
from trainer.engines.base import Engine
from trainer.optim import MOMENTS
from trainer.precision import LossScale


class Network(NamedTuple):
    """An engine, and where its weights belong: parameter NAME is tensor ``prefix + NAME`` of the model ``model``."""

    engine: Engine
    model: str
    prefix: str = ""

    def named(self, shard: TensorShard, kind: str = "") -> TensorShard:
        """The shard under its name in a checkpoint: ``tokenizer/encoder.conv_in.weight``, ``tokenizer_ema/...``."""
        return shard._replace(name=f"{self.model}{kind}/{self.prefix}{shard.name}")


class ModelState:
    """Everything that a checkpoint holds of the models.

    trained: the networks with an optimizer, by name, in the order in which checkpoints store them; the first is the
    main network. frozen: networks, or parts of one, that are not trained. averaged: the trained networks that the EMA
    follows; empty: there is no EMA. buffers: returns what is neither trained nor derived from the recipe, by its name
    in checkpoints; the values are equal on all ranks, or rank 0's count. optional: buffers that checkpoints of earlier
    versions lack, and the values that they then get.

    Tensors are stored in shards, so that any number of ranks under any engine can load what others saved.
    """

    def __init__(
        self,
        trained: dict[str, Network],
        frozen: dict[str, Network],
        *,
        averaged: Iterable[str],
        ema_decay: float,
        loss_scales: dict[str, LossScale],
        buffers: Callable[[], dict[str, Tensor]],
        is_main: bool,
        optional: dict[str, Tensor] | None = None,
    ):
        self.trained, self.frozen = trained, frozen
        self.loss_scales, self.buffers, self.is_main = loss_scales, buffers, is_main
        self.optional = optional or {}
        self.ema = Ema([trained[name].engine for name in averaged], ema_decay) if ema_decay > 0 else None

    @property
    def main_engine(self) -> Engine:
        """The engine of the main network."""
        return next(iter(self.trained.values())).engine

    def tensors(self) -> list[TensorShard]:
        """This rank's shards of a checkpoint's tensors. The shards of all ranks together hold every element once."""
        shards = []
        for network in self.trained.values():
            for kind, of_kind in self._kinds(network).items():
                shards += [network.named(shard, kind).part(*network.engine.replica) for shard in of_kind]
        for network in self.frozen.values():
            for kind in ("", "_ema") if self.ema else ("",):  # the average of constant weights is the weights
                shards += [network.named(s, kind).part(*network.engine.replica) for s in network.engine.weights()]
        return shards + (self._buffer_shards() if self.is_main else [])

    def numbers(self) -> dict:
        """The small JSON-able values of a checkpoint."""
        return {
            "updates": {name: network.engine.updates for name, network in self.trained.items()},
            "loss_scales": {name: scale.state_dict() for name, scale in self.loss_scales.items()},
        }

    @torch.no_grad()
    def load(self, files: ShardedTensors, numbers: dict) -> None:
        """Restores `tensors` and `numbers` of any number of ranks under any engines; all ranks call together. If the
        checkpoint was written without an EMA, the average starts from its weights.

        Raises ModelError where the checkpoint's tensors do not fit the models.
        """
        main = next(iter(self.trained.values()))
        restarts = self.ema is not None and not files.names(f"{main.model}_ema/")
        for name, network in self.trained.items():
            for kind, shards in self._kinds(network).items():
                for shard in shards if not (restarts and kind == "_ema") else ():
                    files.fill(network.named(shard, kind))
            network.engine.updates = self._saved(numbers["updates"], name)
            network.engine.sync_weights()
        for network in self.frozen.values():
            for shard in network.engine.weights():
                files.fill(network.named(shard))
        for shard in self._buffer_shards():
            if restarts and shard.name.startswith(f"{main.model}_ema/"):
                continue  # a constant of the average, which the checkpoint does not have
            if shard.name in files or shard.name not in self.optional:
                files.fill(shard)
            else:
                shard.values.copy_(self.optional[shard.name])
        if restarts:
            self.ema.restart()
        for name, scale in self.loss_scales.items():
            scale.load_state_dict(self._saved(numbers["loss_scales"], name))

    @torch.no_grad()
    def write(self, model: str, tensors: dict[str, Tensor]) -> None:
        """Replaces a model's weights by whole tensors, named as in its state dict, and restarts the EMA from them; all
        ranks call together."""
        for network in (self.trained | self.frozen).values():
            if network.model == model:
                for shard in network.engine.weights():
                    values = tensors[f"{network.prefix}{shard.name}"].reshape(-1)
                    shard.values.copy_(values[shard.start : shard.start + len(shard.values)])
                network.engine.sync_weights()
        if self.ema:
            self.ema.restart()

    def _kinds(self, network: Network) -> dict[str, list[TensorShard]]:
        """A trained network's shards by kind: weights, their averages, the optimizer's moments."""
        engine = network.engine
        weights = engine.weights()
        kinds = {"": weights}
        if self.ema and engine in self.ema.engines:
            kinds["_ema"] = self.ema.shards(engine)
        for key in MOMENTS:
            moments = zip(weights, engine.moments(key), strict=True)
            kinds[f".{key}"] = [shard._replace(values=values) for shard, values in moments]
        return kinds

    def _saved(self, values: dict, name: str):
        """A network's saved value. A checkpoint may not name the network: its model was trained by fewer engines, all
        of which step together, or it is from before tokenizers' main network had its present name."""
        main = next(iter(self.trained))
        return values[next(key for key in (name, main, "generator") if key in values)]

    def _buffer_shards(self) -> list[TensorShard]:
        return [whole_tensor(name, value) for name, value in self.buffers().items()]
