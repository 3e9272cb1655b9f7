"""FSDP2 (PyTorch's `fully_shard`): shards parameters, gradients and optimizer state by rows over ranks."""

import gc
import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import DataParallelMeshInfo
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from model_zoo.io.sharded_tensors import TensorShard
from trainer import TrainerError
from trainer.config import EngineConfig
from trainer.engines.base import Engine, MakeOptimizer, Root, trained_parameters
from trainer.optim import start_moments
from trainer.parallel import World, before_stop, forget_groups, sum_over_ranks

# The tokenizer returns views, which is safe because no output is changed in place.
warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)


class Fsdp2(Engine):
    """Gathers each element of the module's outermost ModuleLists separately, and the other parameters together.

    gather_dtype: the type in which parameters are gathered for a forward (None: fp32, in which they are stored).
    Gradients are reduced in fp32. With ``config.shard_over`` = s, parameters are sharded over s neighbouring ranks and
    replicated over these groups (hybrid sharding).
    """

    forwards_together = True

    def __init__(
        self,
        config: EngineConfig,
        world: World,
        module: nn.Module,
        make_optimizer: MakeOptimizer,
        ignored: Iterable[nn.Parameter] = (),
        gather_dtype: torch.dtype | None = None,
        **batch,
    ):
        super().__init__(module, **batch)
        shards = config.shard_over or world.size
        if world.size % shards:
            raise TrainerError(f"engine.shard_over={shards} must divide the number of processes, {world.size}")
        copies = world.size // shards
        before_stop(_release_groups)
        if copies > 1:
            mesh = init_device_mesh(world.device.type, (copies, shards), mesh_dim_names=("replicate", "shard"))
            self.replica = mesh.get_local_rank("replicate"), copies
            self.group = mesh.get_group("shard")
        else:
            mesh = init_device_mesh(world.device.type, (shards,), mesh_dim_names=("shard",))
            self.group = mesh.get_group()
        settings = dict(
            mesh=mesh,
            reshard_after_forward=config.reshard,
            mp_policy=MixedPrecisionPolicy(gather_dtype, torch.float32 if gather_dtype else None, None, False),
            offload_policy=CPUOffloadPolicy(world.device.type == "cuda") if config.offload else OffloadPolicy(),
        )
        names = list(trained_parameters(module, ignored))
        self.root = Root(module, ignored)
        for unit in _units(self.root.parts):
            fully_shard(unit, **settings)
        fully_shard(self.root, **settings)
        # The sharded parameters. During a forward the module's attributes are the gathered ones.
        sharded = dict(module.named_parameters())
        self.parameters = {name: sharded[name] for name in names}
        self.optimizer = make_optimizer(self.parameters.values(), apex=False)
        start_moments(self.optimizer, self.parameters.values())
        self.device = world.device
        self.offloads = config.offload

    def run(self, function, *args, **kwargs):
        return self.root(function, *args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss / self.micro_batches).backward()

    def grad_norm(self) -> Tensor:
        norm = torch.nn.utils.get_total_norm(self._gradients()).to(self.device)
        return sum_over_ranks(norm.square(), self.group).sqrt()

    def weights(self) -> list[TensorShard]:
        shards = []
        for name, parameter in self.parameters.items():
            _, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            start = offset[0] * math.prod(parameter.shape[1:]) if parameter.ndim else 0
            shards.append(TensorShard(name, tuple(parameter.shape), start, parameter.to_local().detach().view(-1)))
        return shards

    def sync_weights(self) -> None:
        # Parameters that an evaluation left gathered are outdated.
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _units(module: nn.Module) -> list[nn.Module]:
    """The elements of the outermost ModuleLists below a module."""
    units = []
    for child in module.children():
        units += list(child) if isinstance(child, nn.ModuleList) else _units(child)
    return [unit for unit in units if any(True for _ in unit.parameters())]


def _release_groups() -> None:
    """Drops the references to process groups that FSDP2 keeps for the life of the process, because DTensor caches
    meshes."""
    for found in gc.get_objects():
        if issubclass(type(found), DeviceMesh):
            found._pg_registry.clear()
    forget_groups(DataParallelMeshInfo, Fsdp2)
