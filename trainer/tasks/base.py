"""The interface between the training loop and a task, and code that all tasks share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import data
from trainer import TrainerError
from trainer.config import RunConfig
from trainer.engines import build_engine
from trainer.engines.base import Engine, clip_scale
from trainer.init_from import InitRecord
from trainer.model_state import ModelState
from trainer.optim import adam, set_weight_decay
from trainer.parallel import RowGroups, World, gather_objects, max_over_ranks, mean_over_ranks, sum_over_ranks
from trainer.precision import autocast_dtype
from trainer.schedules import learning_rate_factor, weight_decay

PICTURES = 8  # images that a validation shows


def row_of_pictures(images: Sequence[Tensor]) -> Tensor:
    """Images in [-1, 1], ``(3, h, w)`` each, side by side: uint8 ``(3, h, w)``. Smaller ones get a white margin."""
    from torchvision.utils import make_grid  # slow to import, and only used here

    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]), value=1.0) for image in images]
    row_chw = make_grid(torch.stack(padded) / 2 + 0.5, nrow=PICTURES, padding=2, pad_value=1)
    return (row_chw * 255).to(torch.uint8)


class Step(NamedTuple):
    """Result of a step. scalars: values to log; skipped: the networks that were not updated, because their loss or
    gradient was not finite; warning: a line to print."""

    scalars: dict[str, Tensor | float]
    skipped: list[str]
    warning: str | None = None


class Validation(NamedTuple):
    """scalars: equal on all ranks; pictures: by name, uint8 ``(3, h, w)``, on rank 0; notes: lines to print."""

    scalars: dict[str, float]
    pictures: dict[str, Tensor]
    notes: list[str]


class Task(ABC):
    """What is trained: builds the models, computes one step, validates. ``state`` is what checkpoints hold of it."""

    config: RunConfig
    world: World
    groups: RowGroups  # the ranks that share the rows of a codebook or a head
    state: ModelState
    parameters: int  # of the trained model, before sharding
    batch: dict[str, int]  # micro_batch_size, micro_batches
    validated: data.EvaluationImages | data.EvaluationTokens  # of this rank, in the latest validation

    # ------------------------------------------------------------------------------------------------ each task's own

    @abstractmethod
    def check_settings(self) -> None:
        """Raises TrainerError for settings that contradict each other; reads no weights."""

    def check(self) -> None:
        """Raises TrainerError for anything that would make training fail later."""
        self.check_settings()

    @abstractmethod
    def describe(self) -> list[str]:
        """The model in a few words each: number of codes, what is sharded, what is frozen."""

    def notes(self) -> list[str]:
        """Lines to print at the start."""
        return []

    def check_batch(self, batch: data.Batch) -> None:  # noqa: B027 (most tasks accept every batch)
        """Raises TrainerError for a batch that cannot be trained on."""

    @abstractmethod
    def inputs(self, batch: data.Batch) -> Any:
        """Moves a micro-batch to the device, in the form that `step` takes."""

    @abstractmethod
    def step(self, micro_batches: list, step: int) -> Step:
        """Trains on this rank's micro-batches of optimizer step ``step`` (from 0)."""

    @abstractmethod
    def validate(self, beat: Callable[[], None]) -> Validation:
        """Evaluates the EMA weights, or the trained ones where there is no EMA, on ``data.val``; all ranks call
        together. beat: called after each image, so that the watchdog sees progress."""

    def scalars(self, step: int) -> dict[str, float]:
        """Further values to log after step ``step`` (from 0); all ranks call together."""
        return {}

    @property
    def alarm(self) -> str | None:
        """A description of what is wrong with the model, or None."""
        return None

    def speed(self, images_per_second: float) -> dict[str, float]:
        """Values to log about speed."""
        return {"images_per_second": images_per_second}

    def frozen_bytes(self) -> dict[str, int]:
        """Bytes of the networks that are not trained, by a name to print."""
        return {}

    def load_initial_weights(self) -> InitRecord | None:
        """Loads the weights that a new run starts from, if the recipe names any; all ranks call together."""
        return None

    def init_from_data(self, micro_batches: Iterable) -> None:  # noqa: B027 (most tasks do not)
        """Initializes parameters from this rank's share of the first step's data; all ranks call together."""

    # ------------------------------------------------------------------------------------------------------- shared

    def make_adam(self, **changes) -> Callable:
        """Returns the function with which engines make their optimizer; ``changes`` replace the recipe's settings."""
        optimizer = self.config.optimizer
        return partial(adam, **{"lr": optimizer.lr, "config": optimizer, **changes})

    def build_main_engine(self, module: nn.Module, ignored: list[nn.Parameter]) -> Engine:
        """Wraps the main network into the recipe's engine."""
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
                "trainer.compile=true does not work with ZeRO 3, whose hooks gather parameters where the compiler "
                "cannot see them: use engine.kind=fsdp2, or ZeRO 0 to 2"
            )
        return engine

    @property
    def main_engine(self) -> Engine:
        """The engine of the main network."""
        return self.state.main_engine

    def learning_rate_factor(self, step: int) -> float:
        """The factor of the recipe's peak learning rate in step ``step`` (from 0)."""
        return learning_rate_factor(self.config.schedule, step, self.config.trainer.max_steps)

    def autocast(self):
        """Autocast to the recipe's precision."""
        dtype = autocast_dtype(self.config.trainer.precision)
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype is not None)

    def update(self, network: str, engines: list[Engine], loss: str, lr: float, step: int, metrics: StepMetrics):
        """Updates a network's engines, with gradients clipped by their joint norm; returns whether they were updated.

        If the loss or the gradient is not finite on any rank, no engine is updated on any rank, and the network is
        added to ``metrics.skipped``, unless fp16's loss scale was too large.
        """
        loss_scale = self.state.loss_scales[network]
        scale = 1 / loss_scale.value
        norm = scale * torch.stack([engine.grad_norm().float() for engine in engines]).norm()
        # One rank's NaN must stop all ranks. The loss is checked too: its gradient can be finite where it is not.
        metrics.set(loss, mean_over_ranks(metrics.scalars[loss].clone()))
        finite = bool(torch.isfinite(norm + metrics.scalars[loss]))
        metrics.set(f"lr/{network}", lr)
        metrics.set(f"grad_norm/{network}", norm)
        if loss_scale.needed:
            metrics.set(f"loss_scale/{network}", loss_scale.value)
        decay = weight_decay(self.config.optimizer, step, self.config.trainer.max_steps)
        for engine in engines:
            if finite:
                set_weight_decay(engine.param_groups, decay)
                engine.step(lr, scale * clip_scale(norm, self.config.trainer.gradient_clip_norm))
            else:
                engine.skip()
        if not loss_scale.update(finite) and not finite:
            metrics.skipped.append(network)
        return finite

    def validation_images(
        self, tokens: data.TokenSpec | None = None, **sizes
    ) -> Iterator[data.EvaluationImage | data.EvaluationToken]:
        """This rank's share of the first ``trainer.validation_images`` images of ``data.val``, or of their tokens.

        sizes: options of `data.evaluation_images` in place of those of the recipe."""
        config, world = self.config, self.world
        shard = (world.rank, world.size)
        if tokens:
            images = data.evaluation_tokens(config.data.val, tokens, shard=shard, access=data.access_of(config.data))
        else:
            options = dict(shard=shard, resize=config.data.resize, **data.validation_options(config.data))
            images = data.evaluation_images(config.data.val, **(options | sizes))
        self.validated = images
        return islice(images, len(range(world.rank, config.trainer.validation_images, world.size)))

    def validation_notes(self) -> list[str]:
        """What to say of the images that the latest validation has skipped; all ranks call together."""
        gathered = gather_objects(self.validated.skipped[:1])
        count = sum_over_ranks(torch.tensor(len(self.validated.skipped), device=self.world.device))
        first = next((skipped[0] for skipped in gathered if skipped), None)
        return [f"{int(count):,} images of data.val are left out, such as {first.key}: {first.reason}"] if first else []

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Within the context the main network is in eval mode and holds the EMA weights, if there is an EMA; all ranks
        enter and leave together."""
        module, ema = self.main_engine.module, self.state.ema
        with ema.in_place_of_weights() if ema else nullcontext():
            module.eval()
            try:
                yield
            finally:
                module.train()

    @property
    def forwards_together(self) -> bool:
        """Whether a forward is a collective, so that all ranks must run equally many."""
        return self.main_engine.forwards_together or self.groups.shard is not None

    def in_lockstep(self, items: Iterable, filler: Any) -> Iterator[tuple[Any, bool]]:
        """Yields (item, True). Where a forward is a collective, a rank that runs out of items yields (filler, False)
        until no rank has items left."""
        if not self.forwards_together:
            yield from ((item, True) for item in items)
            return
        items = iter(items)
        while max_over_ranks(self.world, (item := next(items, None)) is not None)[0]:
            yield (filler, False) if item is None else (item, True)


class StepMetrics:
    """The scalars of one step, kept on the device, and the networks that were not updated in it."""

    def __init__(self, micro_batches: int):
        self.share = 1 / micro_batches
        self.scalars: dict[str, Tensor | float] = {}
        self.skipped: list[str] = []
        self.warning: str | None = None

    def add(self, name: str, value: Tensor | float) -> None:
        """Adds a micro-batch's value to the mean over the step's micro-batches."""
        value = value.detach() if isinstance(value, Tensor) else value
        self.scalars[name] = self.scalars.get(name, 0.0) + self.share * value

    def set(self, name: str, value: Tensor | float) -> None:
        """Sets the step's value."""
        self.scalars[name] = value

    def result(self) -> Step:
        """The step's result."""
        return Step(self.scalars, self.skipped, self.warning)
