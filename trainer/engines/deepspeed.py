"""DeepSpeed: ZeRO shards optimiser state (1), gradients (2), parameters (3) over ranks, and can offload to the CPU."""

import json
import math
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import Tensor, nn

from model_zoo.io.sharded_tensors import TensorShard
from trainer import TrainerError
from trainer.engines.base import Engine, MakeOptimizer, Memory, Root, stored_bytes, trained_parameters
from trainer.optim import start_moments

# DeepSpeed calls torch's collectives by their former names, and would say so on every rank.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


# What a configuration may hold. Others were not tried with this trainer, change what the recipe decides, or lay pieces
# out otherwise than `_place` reads them (round_robin_gradients).
KEYS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_optimization", "zero_force_ds_cpu_optimizer", "zero_allow_untested_optimizer"),
    *("steps_per_print", "wall_clock_breakdown", "comms_logger"),
)
ZERO_KEYS = (
    *("stage", "contiguous_gradients", "overlap_comm", "reduce_scatter", "reduce_bucket_size", "allgather_bucket_size"),
    *("allgather_partitions", "offload_optimizer", "offload_param", "stage3_prefetch_bucket_size"),
    *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters"),
    *("stage3_max_reuse_distance",),
)


def load_deepspeed_config(name: str, *, micro_batch_size: int, micro_batches: int) -> dict:
    """A JSON of ds_configs by name, or of the user's by path, its "auto" values filled from the recipe."""
    packaged = Path(str(resources.files("ds_configs")))
    path = Path(name) if name.endswith(".json") else packaged / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in packaged.glob("*.json")))
        raise TrainerError(f"engine.config={name} is unknown: choose one of {known}, or give the path of a .json file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainerError(f"{path} is not valid JSON: {error}") from error
    zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
    if not isinstance(zero, dict):
        raise TrainerError(f'{path} is no DeepSpeed configuration: an object, with "zero_optimization" an object too')
    for key in ("fp16", "bf16", "bfloat16", "data_types", "torch_autocast", "optimizer", "scheduler"):
        if key in config:
            raise TrainerError(f'{path}: remove "{key}"; the recipe decides (trainer.precision, optimizer, schedule)')
    for key in [*(config.keys() - set(KEYS)), *(zero.keys() - set(ZERO_KEYS))]:
        raise TrainerError(f'{path}: "{key}" is not supported; remove it')
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise TrainerError(f"{path}: there is no ZeRO stage {stage!r}; use 0, 1, 2 or 3")
    for key in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(key, {}), dict):
            raise TrainerError(f'{path}: "{key}" must be an object: {{"device": "cpu"}}')
        device = zero.get(key, {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise TrainerError(f'{path}: "{key}" to {device} is not supported: its state could not be saved; use "cpu"')
        if device == "cpu" and zero.get("stage", 0) < (1 if key == "offload_optimizer" else 3):
            least = "1" if key == "offload_optimizer" else "3"
            raise TrainerError(f'{path}: "{key}" needs ZeRO stage {least} or above')
    recipe = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": micro_batch_size * micro_batches * dist.get_world_size(),
    }
    # The norm to clip by is that of all of the generator's parameters, and DeepSpeed knows nothing of the codebook: the
    # task clips. Left out, DeepSpeed's own default would be 1.
    if config.get("gradient_clipping", "auto") != "auto":
        raise TrainerError(f'{path}: write "auto" for "gradient_clipping"; trainer.gradient_clip_norm decides')
    config["gradient_clipping"] = 0.0
    # Offloaded state is updated by PyTorch's fused Adam, which is vectorised on CPUs too.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    for key, value in recipe.items():
        if config.get(key, "auto") == "auto":
            config[key] = value
        elif config[key] != value:
            raise TrainerError(f'{path}: "{key}" is {config[key]}, the recipe says {value}; write "auto" there')
    return config


class Place(NamedTuple):
    """Where a part of a parameter is: elements from ``start`` on are ``flat[offset : offset + length]``."""

    name: str
    shape: tuple[int, ...]
    start: int
    flat: Tensor
    offset: int
    length: int

    def piece(self, flat: Tensor) -> TensorShard:
        """The same place of another flat tensor, such as the optimiser's state."""
        values = flat.detach().reshape(-1)[self.offset : self.offset + self.length]
        return TensorShard(self.name, self.shape, self.start, values)


class DeepSpeed(Engine):
    """Parameters are kept in fp32 (trainer.precision is an autocast around the forward); ZeRO's stage says what is
    spread. DeepSpeed is handed a `Root`, whose parameters are all its own: it overwrites them by rank 0's at its start.
    """

    def __init__(
        self,
        config: str,
        module: nn.Module,
        make_optimizer: MakeOptimizer,
        ignored: Iterable[nn.Parameter] = (),
        **batch,
    ):
        super().__init__(module, **batch)
        settings = load_deepspeed_config(config, **batch)
        # DeepSpeed compiles its CPU collectives with the ninja that pip put beside python, but looks for it on PATH.
        os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
        os.environ.setdefault("LOCAL_RANK", "0")  # a single process needs no launcher, but DeepSpeed insists on it
        if dist.get_rank() == 0 and not torch.cuda.is_available():
            print("DeepSpeed's first start on a CPU compiles for about a minute ...", file=sys.stderr, flush=True)
        self.parameters = trained_parameters(module, ignored)
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        self.root = Root(module, ignored)
        try:
            # apex's kernels are for CUDA, and count steps for a whole group where ZeRO 3 steps by parts of it.
            zero = settings.get("zero_optimization", {})
            apex = zero.get("stage", 0) < 3 and "offload_optimizer" not in zero
            optimizer = make_optimizer(self.parameters.values(), apex=apex)
            self.engine, *_ = deepspeed.initialize(model=self.root, optimizer=optimizer, config=settings)
        except (ValueError, AssertionError, DeepSpeedConfigError) as error:  # pydantic's errors are ValueErrors
            what = " ".join(str(error).split())[:300]
            raise TrainerError(f"DeepSpeed refuses engine.config={config}: {what}") from error
        self.zero = self.engine.optimizer if self.engine.zero_optimization() else None
        self.stage = int(self.engine.zero_optimization_stage())
        self.optimizer = optimizer
        self.forwards_together = self.stage == 3
        self.offloads = bool(
            self.zero and getattr(self.zero, "offload_optimizer" if self.stage == 3 else "cpu_offload")
        )
        if self.stage == 0:
            self.replica = dist.get_rank(), dist.get_world_size()
        self._places = [self._place(name, shapes[name]) for name in self.parameters]
        start_moments(optimizer, {id(place.flat): place.flat for place in self._places}.values())

    def run(self, function, *args, **kwargs):
        # Not the engine's forward: it adds hooks to the outputs that the adaptive weight's extra gradients would set
        # off, and switches autocast off. What it does besides: without this ZeRO 3 forgets all micro-batches but one.
        if self.zero:
            self.zero.clear_backward_seen_flag()
        return self.root(function, *args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)  # divides by gradient_accumulation_steps itself

    def grad_norm(self) -> Tensor:
        if self.stage == 3:
            self.norm = combine_grad_norm_groups(self.zero._get_norm_groups())
        elif self.zero:
            self.norm = self.zero.scaled_global_norm()
        else:  # the gradients are whole and reduced
            self.norm = torch.nn.utils.get_total_norm(self._gradients())
        return self.norm.to(self.engine.device)

    def step(self, lr: float, scale: Tensor | float = 1.0) -> None:
        for group in self.param_groups:
            group["lr"] = lr
        if self.zero:
            # ZeRO divides by (norm + 1e-6) / clip_grad where that is above 1; 0 switches it off.
            self.zero.clip_grad = float((self.norm + 1e-6) * float(scale)) if scale < 1 else 0.0
        else:
            torch._foreach_mul_(self._gradients(), scale)
        self._finish(self.norm)

    def skip(self) -> None:
        if self.zero:
            self._finish(torch.full_like(self.norm, float("inf")))  # which ZeRO takes as a step to be left out
        else:
            self.engine.zero_grad()

    def _finish(self, norm: Tensor) -> None:
        """ZeRO's step, by a norm that it need not take again."""
        if self.stage == 3:
            self.zero._get_norm_groups = lambda: [norm]
        elif self.zero:
            self.zero.scaled_global_norm = lambda norm_type=2: norm
        try:
            self.engine.step()
        finally:
            if self.zero:
                del self.zero.__dict__["_get_norm_groups" if self.stage == 3 else "scaled_global_norm"]

    def weights(self) -> list[TensorShard]:
        return [place.piece(place.flat) for place in self._places]

    def moments(self, key: str) -> list[Tensor]:
        return [place.piece(self.optimizer.state[place.flat][key]).values for place in self._places]

    def resident_bytes(self) -> Memory:
        parameters = list(self.parameters.values())
        if self.stage == 3:
            # Small parameters are gathered after the first step and stay so; the others are empty but in a forward.
            persistent = self.zero.persistent_parameters
            parts = [p.ds_tensor for p in parameters] + self.zero.fp32_partitioned_groups_flat
            held = stored_bytes(parts) + sum(p.ds_numel * p.element_size() for p in persistent)
            gradients = stored_bytes([self.zero.grad_partitions_flat_buffer])
        else:
            masters = self.zero.single_partition_of_fp32_groups if self.zero else []
            held = stored_bytes([*parameters, *masters])
            # ZeRO 2 lets go of what other ranks step as it is reduced.
            gradients = sum(part.nbytes for part in (masters if self.stage == 2 else parameters))
        return Memory(held, gradients, self.optimizer_bytes())

    def sync_weights(self) -> None:
        if self.stage == 3:
            self.zero._partition_all_parameters()  # lets go of what is still gathered of the weights before
            for group in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            if self.zero.persistent_parameters:
                self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)
        elif self.zero:
            self.zero.update_lp_params()

    def _place(self, name: str, shape: tuple[int, ...]) -> "Place":
        parameter = self.parameters[name]
        if self.stage == 0:
            return Place(name, shape, 0, parameter, 0, parameter.numel())
        if self.stage == 3:
            group, offset, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = length * dist.get_rank()  # the last parts are padded, or nothing but padding
            length = max(0, min(length, math.prod(shape) - start))
            return Place(name, shape, start, self.zero.fp32_partitioned_groups_flat[group], offset, length)
        mapping = parameter._hp_mapping  # DeepSpeed's own record of where a parameter's fp32 part is
        partitions = self.zero.single_partition_of_fp32_groups
        if mapping is None:
            return Place(name, shape, 0, partitions[0], 0, 0)
        here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        return Place(name, shape, here.start, partitions[mapping.param_group_index], there.start, here.numel)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]
