"""The private parts of DeepSpeed that this project reads or replaces.

Tested with DeepSpeed 0.19. tests/unit/trainer/test_deepspeed_internals.py checks that the installed version has them.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from deepspeed.comm.torch import TorchBackend
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor, nn

from model_zoo.io.sharded_tensors import TensorShard
from trainer.engines.base import stored_bytes
from trainer.parallel import forget_groups


class FlatRange(NamedTuple):
    """Where a rank keeps part of a parameter: elements from ``start`` on are ``flat[offset : offset + length]``."""

    name: str
    shape: tuple[int, ...]
    start: int
    flat: Tensor
    offset: int
    length: int

    def of(self, flat: Tensor) -> TensorShard:
        """The same range of another flat tensor, such as an optimizer moment."""
        values = flat.detach().reshape(-1)[self.offset : self.offset + self.length]
        return TensorShard(self.name, self.shape, self.start, values)


class Stage0:
    """ZeRO 0: DeepSpeed averages gradients and shards nothing."""

    offloads = False  # whether the optimizer is in the CPU's memory

    def __init__(self, engine, parameters: dict[str, nn.Parameter]):
        self.engine, self.parameters = engine, parameters

    def before_forward(self) -> None:
        """What DeepSpeed's own forward does first."""

    def grad_norm(self) -> Tensor:
        """Norm of the reduced gradient over all ranks."""
        return torch.nn.utils.get_total_norm(self._gradients())

    def step(self, norm: Tensor, scale: Tensor | float) -> None:
        """Multiplies the gradients, whose norm is ``norm``, by ``scale`` and updates the parameters."""
        torch._foreach_mul_(self._gradients(), scale)
        self.engine.step()

    def skip(self, norm: Tensor) -> None:
        """Clears the gradients without an update."""
        self.engine.zero_grad()

    def locate(self, name: str, shape: tuple[int, ...]) -> FlatRange:
        """This rank's fp32 part of a parameter."""
        parameter = self.parameters[name]
        return FlatRange(name, shape, 0, parameter, 0, parameter.numel())

    def sync_weights(self) -> None:
        """Makes the module compute with what was written to the fp32 parts."""

    def parameter_bytes(self) -> int:
        """Bytes of parameters that this rank holds."""
        return stored_bytes(self.parameters.values())

    def gradient_bytes(self) -> int:
        """Bytes of gradients that this rank holds after a backward."""
        return sum(parameter.nbytes for parameter in self.parameters.values())

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]


class Stage1And2(Stage0):
    """ZeRO 1 and 2: each rank keeps an fp32 partition of all parameters, and its optimizer state."""

    norm_method = "scaled_global_norm"

    def __init__(self, engine, parameters: dict[str, nn.Parameter]):
        super().__init__(engine, parameters)
        self.zero = engine.optimizer

    @property
    def offloads(self) -> bool:
        return bool(self.zero.cpu_offload)

    def before_forward(self) -> None:
        self.zero.clear_backward_seen_flag()  # without it ZeRO 3 keeps the gradient of one micro-batch only

    def grad_norm(self) -> Tensor:
        return self.zero.scaled_global_norm()

    def step(self, norm: Tensor, scale: Tensor | float) -> None:
        # ZeRO divides the gradients by (norm + 1e-6) / clip_grad where that is above 1; 0 turns this off.
        self.zero.clip_grad = float((norm + 1e-6) * float(scale)) if scale < 1 else 0.0
        with self._norm_is(norm):
            self.engine.step()

    def skip(self, norm: Tensor) -> None:
        with self._norm_is(torch.full_like(norm, float("inf"))):  # ZeRO skips a step whose norm is infinite
            self.engine.step()

    @contextmanager
    def _norm_is(self, norm: Tensor) -> Iterator[None]:
        """Within the context ZeRO takes this norm instead of computing it again."""
        setattr(self.zero, self.norm_method, self._constant_norm(norm))
        try:
            yield
        finally:
            delattr(self.zero, self.norm_method)  # the class's method is visible again

    def _constant_norm(self, norm: Tensor):
        return lambda norm_type=2: norm

    def locate(self, name: str, shape: tuple[int, ...]) -> FlatRange:
        partitions = self.zero.single_partition_of_fp32_groups
        mapping = self.parameters[name]._hp_mapping  # DeepSpeed's record of where a parameter's fp32 part is
        if mapping is None:
            return FlatRange(name, shape, 0, partitions[0], 0, 0)
        in_parameter, in_partition = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        flat = partitions[mapping.param_group_index]
        return FlatRange(name, shape, in_parameter.start, flat, in_partition.start, in_parameter.numel)

    def sync_weights(self) -> None:
        self.zero.update_lp_params()

    def parameter_bytes(self) -> int:
        return stored_bytes([*self.parameters.values(), *self.zero.single_partition_of_fp32_groups])

    def gradient_bytes(self) -> int:
        if self.engine.zero_optimization_stage() == 2:  # frees the gradients of other ranks' partitions
            return sum(partition.nbytes for partition in self.zero.single_partition_of_fp32_groups)
        return super().gradient_bytes()


class Stage3(Stage1And2):
    """ZeRO 3: parameters are partitioned too, and gathered for a forward or backward."""

    norm_method = "_get_norm_groups"

    @property
    def offloads(self) -> bool:
        return bool(self.zero.offload_optimizer)

    def grad_norm(self) -> Tensor:
        return combine_grad_norm_groups(self.zero._get_norm_groups())

    def _constant_norm(self, norm: Tensor):
        return lambda: [norm]

    def locate(self, name: str, shape: tuple[int, ...]) -> FlatRange:
        group, offset, length = self.zero.grad_position[self.zero.get_param_id(self.parameters[name])]
        start = length * dist.get_rank()
        length = max(0, min(length, math.prod(shape) - start))  # the last ranks' parts end with padding
        return FlatRange(name, shape, start, self.zero.fp32_partitioned_groups_flat[group], offset, length)

    def sync_weights(self) -> None:
        self.zero._partition_all_parameters()  # frees what is still gathered of the former weights
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def parameter_bytes(self) -> int:
        # Small parameters stay gathered after the first step; the others are gathered within a forward only.
        parts = [p.ds_tensor for p in self.parameters.values()] + self.zero.fp32_partitioned_groups_flat
        return stored_bytes(parts) + sum(p.ds_numel * p.element_size() for p in self.zero.persistent_parameters)

    def gradient_bytes(self) -> int:
        return stored_bytes([self.zero.grad_partitions_flat_buffer])


def zero_stage(engine, parameters: dict[str, nn.Parameter]) -> Stage0:
    """The adapter for the ZeRO stage of a DeepSpeed engine."""
    kinds = {0: Stage0, 1: Stage1And2, 2: Stage1And2, 3: Stage3}
    return kinds[int(engine.zero_optimization_stage())](engine, parameters)


def disable_shared_memory_collectives() -> None:
    """DeepSpeed compiles its CPU collectives when it is initialized; a process group without peers does not need them.
    (As an attribute, ``deepspeed.comm.torch`` is PyTorch.)"""
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def release_groups() -> None:
    """Drops the references to process groups that DeepSpeed keeps for the life of the process: a global, default
    arguments, its engines and optimizers, and the parameters of these."""
    groups._WORLD_GROUP = None
    for function in (TorchBackend.barrier, TorchBackend.monitored_barrier):
        defaults = function.__defaults__ or ()
        function.__defaults__ = tuple(None if isinstance(value, dist.ProcessGroup) else value for value in defaults)
    optimizers = DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3
    forget_groups(DeepSpeedEngine, *optimizers, DeepSpeedZeRoOffload, Init, nn.Parameter)
