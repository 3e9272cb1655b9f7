"""What the training loop and checkpoints ask of a task, whatever it trains."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from data import Batch
from model_zoo.io.sharded_tensors import ShardedTensors, TensorShard, whole
from trainer import TrainerError
from trainer.config import RunConfig
from trainer.ema import Ema
from trainer.engines import Engine, build_engine, clip_scale
from trainer.init_from import InitRecord
from trainer.optim import MOMENTS, adam, set_weight_decay
from trainer.parallel import RowGroups, World, any_rank, mean_over_ranks
from trainer.precision import LossScale, autocast_dtype
from trainer.schedules import learning_rate_factor, weight_decay


class Step(NamedTuple):
    """What a step gives: scalars to log, and the networks that were left as they were, for not being finite."""

    scalars: dict[str, Tensor | float]
    skipped: list[str]


class Validation(NamedTuple):
    """scalars: the same on all ranks; pictures: by name, uint8 (3, h, w), on rank 0; notes: what is to be said."""

    scalars: dict[str, float]
    pictures: dict[str, Tensor]
    notes: list[str]


class Task(ABC):
    """Owns the models, their engines and EMA: everything that a checkpoint must hold but data.

    A task has a main engine, ``generator``, and may have others.
    """

    # Of each engine: the model it is of, and what its weights' names in that model's state dict begin with.
    MODELS: ClassVar[dict[str, tuple[str, str]]]

    config: RunConfig
    world: World
    generator: Engine
    groups: RowGroups  # who shares rows, of a codebook or a head
    ema: Ema | None
    loss_scales: dict[str, LossScale]
    parameters: int  # of the trained model, before it is spread
    batch: dict[str, int]  # micro_batch_size, micro_batches

    # ------------------------------------------------------------------------------------------------ what a task is

    @abstractmethod
    def engines(self) -> dict[str, Engine]:
        """By name; the order is that of checkpoints."""

    @abstractmethod
    def check_settings(self) -> None:
        """Raises TrainerError for settings that do not fit each other; computes with no weights."""

    def check(self) -> None:
        """Raises TrainerError before training for what it could not begin with."""
        self.check_settings()

    @abstractmethod
    def describe(self) -> list[str]:
        """What is trained, in a few words each: parameters, codes."""

    def check_batch(self, batch: Batch) -> None:  # noqa: B027 (most tasks take any)
        """Raises TrainerError for a batch that cannot be trained on."""

    @abstractmethod
    def inputs(self, batch: Batch) -> Any:
        """A micro-batch, on the device, as `step` takes it."""

    @abstractmethod
    def step(self, micro_batches: list, step: int) -> Step:
        """One optimiser step, number ``step`` from 0, on this rank's micro-batches."""

    @abstractmethod
    def validate(self, beat: Callable[[], None]) -> Validation:
        """Judges the EMA weights, or else the trained ones, on ``data.val``; all ranks call together."""

    def scalars(self, step: int) -> dict[str, float]:
        """More to log after step ``step`` (from 0); all ranks call together."""
        return {}

    @property
    def alarm(self) -> str | None:
        """What is wrong with the model, if anything."""
        return None

    def speed(self, images_per_second: float) -> dict[str, float]:
        """What to log of it."""
        return {"images_per_second": images_per_second}

    def frozen_bytes(self) -> dict[str, int]:
        """Of networks that are not trained."""
        return {}

    def held_parts(self) -> dict[str, Engine]:
        """Of the models, what a recipe freezes: engines without an optimiser, by name."""
        return {}

    def begin(self) -> InitRecord | None:
        """Before a new run's first step: loads the weights that it starts from, if any; all ranks call together."""
        return None

    def fit(self, micro_batches: Iterable) -> None:  # noqa: B027 (most tasks need none)
        """Before a new run's first step, with this rank's share of it as `inputs` makes it: fits what is to begin near
        the data."""

    def buffers(self) -> dict[str, Tensor]:
        """What is not trained and belongs into checkpoints, by its name there; the same on all ranks, or rank 0's."""
        return {}

    # ------------------------------------------------------------------------------------------------ what tasks share

    def make_adam(self, **changes) -> Callable:
        """What engines make their optimiser with."""
        optimizer = self.config.optimizer
        return partial(adam, **{"lr": optimizer.lr, "config": optimizer, **changes})

    def build_generator(self, module: nn.Module, ignored: list[nn.Parameter]) -> Engine:
        """The recipe's engine around the main network."""
        engine = build_engine(
            self.config.engine,
            self.world,
            module,
            self.make_adam(),
            ignored=ignored,
            gather_dtype=autocast_dtype(self.config.trainer.precision),
            **self.batch,
        )
        if self.config.trainer.compile and self.config.engine.kind == "deepspeed" and engine.forwards_together:
            raise TrainerError(
                "trainer.compile=true does not go with ZeRO 3, whose hooks gather parameters where the compiler "
                "does not look: use engine.kind=fsdp2, or ZeRO 0 to 2"
            )
        return engine

    def learning_rate_factor(self, step: int) -> float:
        """Of the recipe's peak, in step ``step`` from 0."""
        return learning_rate_factor(self.config.schedule, step, self.config.trainer.max_steps)

    def autocast(self):
        """The recipe's precision."""
        dtype = autocast_dtype(self.config.trainer.precision)
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype is not None)

    def update(
        self, network: str, engines: list[Engine], loss: str, lr: float, step: int, scalars: "Means", bad: list[str]
    ) -> bool:
        """Steps a network's engines, clipped by their joint norm; or skips them all where loss or gradient is not
        finite, and says so in ``bad`` unless it was fp16's scale that was too large. Returns whether it stepped."""
        loss_scale = self.loss_scales[network]
        scale = 1 / loss_scale.value
        norm = scale * torch.stack([engine.grad_norm().float() for engine in engines]).norm()
        # Of all ranks: one rank's NaN is everyone's. A loss can be no number where its gradient is one.
        scalars.set(loss, mean_over_ranks(scalars.values[loss].clone()))
        finite = bool(torch.isfinite(norm + scalars.values[loss]))
        scalars.set(f"lr/{network}", lr)
        scalars.set(f"grad_norm/{network}", norm)
        if loss_scale.needed:
            scalars.set(f"loss_scale/{network}", loss_scale.value)
        decay = weight_decay(self.config.optimizer, step, self.config.trainer.max_steps)
        for engine in engines:
            if finite:
                set_weight_decay(engine.param_groups, decay)
                engine.step(lr, scale * clip_scale(norm, self.config.trainer.gradient_clip_norm))
            else:
                engine.skip()
        if not loss_scale.update(finite) and not finite:
            bad.append(network)
        return finite

    @contextmanager
    def evaluation(self):
        """The main network in eval mode with EMA weights where there are any; training weights are back afterwards. All
        ranks enter and leave together."""
        module = self.generator.module
        with self.ema.in_place_of_weights() if self.ema else nullcontext():
            module.eval()
            try:
                yield
            finally:
                module.train()

    @property
    def forwards_together(self) -> bool:
        """Whether a forward is a collective, so that all ranks must run as many of them."""
        return self.generator.forwards_together or self.groups.shard is not None

    def in_step(self, items, filler):
        """(item, whether it counts): where a forward is a collective, ranks that have no more items go on with the
        filler until none has any."""
        if not self.forwards_together:
            yield from ((item, True) for item in items)
            return
        items = iter(items)
        while any_rank(self.world, (item := next(items, None)) is not None)[0]:
            yield (filler, False) if item is None else (item, True)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def pieces(self) -> list[TensorShard]:
        """This rank's part of a checkpoint's tensors. All ranks' together hold each of them once."""
        pieces = []
        for network, engine in self.engines().items():
            kinds = {"": engine.weights()}
            if self.ema and engine in self.ema.engines:
                kinds["_ema"] = self.ema.pieces(engine)
            for key in MOMENTS:
                beside = zip(engine.weights(), engine.moments(key), strict=True)
                kinds[f".{key}"] = [piece._replace(values=values) for piece, values in beside]
            for kind, of_kind in kinds.items():
                pieces += [self._named(network, kind, piece).share(*engine.replica) for piece in of_kind]
        for network, part in self.held_parts().items():
            for kind in ("", "_ema") if self.ema else ("",):  # what never moves is its own average
                pieces += [self._named(network, kind, piece).share(*part.replica) for piece in part.weights()]
        return pieces + (self._buffer_pieces() if self.world.is_main else [])

    def state(self) -> dict:
        """The small numbers of a checkpoint."""
        return {
            "updates": {network: engine.updates for network, engine in self.engines().items()},
            "loss_scales": {name: scale.state_dict() for name, scale in self.loss_scales.items()},
        }

    @torch.no_grad()
    def load(self, files: ShardedTensors, state: dict) -> None:
        """All ranks restore what `pieces` and `state` gave, by whatever number of ranks under whatever engines."""
        for network, engine in self.engines().items():
            weights = engine.weights()
            for piece in weights:
                files.fill(self._named(network, "", piece))
            if self.ema and engine in self.ema.engines:
                for piece in self.ema.pieces(engine):
                    files.fill(self._named(network, "_ema", piece))
            for key in MOMENTS:
                for piece, values in zip(weights, engine.moments(key), strict=True):
                    files.fill(self._named(network, f".{key}", piece._replace(values=values)))
            # All engines of a model step together, however many they were when the checkpoint was written.
            engine.updates = state["updates"].get(network, state["updates"]["generator"])
            engine.publish()
        for network, part in self.held_parts().items():
            for piece in part.weights():
                files.fill(self._named(network, "", piece))
        for piece in self._buffer_pieces():
            files.fill(piece)
        for name, scale in self.loss_scales.items():
            scale.load_state_dict(state["loss_scales"][name])

    @torch.no_grad()
    def fill(self, model: str, tensors: dict[str, Tensor]) -> None:
        """Writes whole tensors, by the names of that model's state dict, to wherever its weights lie; averages begin
        there. All ranks call together."""
        for network, engine in (self.engines() | self.held_parts()).items():
            of, prefix = self.MODELS[network]
            if of == model:
                for piece in engine.weights():
                    values = tensors[f"{prefix}{piece.name}"].reshape(-1)
                    piece.values.copy_(values[piece.start : piece.start + len(piece.values)])
                engine.publish()
        if self.ema:
            self.ema.begin()

    def _buffer_pieces(self) -> list[TensorShard]:
        return [whole(name, value) for name, value in self.buffers().items()]

    def _named(self, network: str, kind: str, piece: TensorShard) -> TensorShard:
        """By its name in a checkpoint: ``tokenizer/encoder.conv_in.weight``, ``tokenizer_ema/...``."""
        model, prefix = self.MODELS[network]
        return piece._replace(name=f"{model}{kind}/{prefix}{piece.name}")


class Means:
    """Scalars of one step; ``add`` averages over micro-batches and keeps them on the device."""

    def __init__(self, share: float):
        self.share = share
        self.values: dict[str, Tensor | float] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        value = value.detach() if isinstance(value, Tensor) else value
        self.values[name] = self.values.get(name, 0.0) + self.share * value

    def set(self, name: str, value: Tensor | float) -> None:
        self.values[name] = value
