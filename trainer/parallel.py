"""Processes: who we are among them, the device, and the few collectives that training needs."""

import itertools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data import DataError
from model_zoo import ModelError
from model_zoo.ops.codebook_parallel import CodebookShard
from trainer import TrainerError

# A collective's own limit lies so far above `trainer.timeout_seconds` that the watchdog, which tells more, is first.
PATIENCE_SECONDS = 60.0


class World(NamedTuple):
    """This process among all: rank, size, device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_world(device: str = "auto", timeout_seconds: float = 1800.0) -> World:
    """Joins the processes that torchrun or the deepspeed launcher started; alone, a world of one.

    timeout_seconds: how long a rank may wait for another.
    """
    _check_restarts()
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainerError("trainer.device=cuda, but no CUDA device can be used here; `ibq doctor` says more")
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise TrainerError(
                f"process {local_rank} of this machine has no GPU of its own: "
                f"{torch.cuda.device_count()} GPUs are visible; start at most that many processes on it"
            )
        torch.cuda.set_device(local_rank)
    else:
        # DeepSpeed chooses its accelerator at import; without this it may settle on another one than we did.
        os.environ["DS_ACCELERATOR"] = "cpu"
    if "RANK" in os.environ:
        _meet("nccl" if use_cuda else "gloo", _patience(timeout_seconds))
    else:
        dist.init_process_group("nccl" if use_cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    where = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), where)


def _check_restarts() -> None:
    """Raises TrainerError where torchrun would start processes again on several nodes in vain.

    In the agents' shared store the processes meet under the number of their attempt. Where one of them fails, its agent
    counts an attempt, but the other agents see a change of membership, which they do not count.
    """
    if (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
        and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    ):
        raise TrainerError(
            "--max-restarts on several nodes needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment: "
            "without it the processes that are started again never meet"
        )


_meetings = itertools.count()


def _meet(backend: str, patience: timedelta) -> None:
    """Joins the process group. In torchrun's own store, which outlives the processes, those that it starts again meet
    under the number of their attempt, and of their meeting, where they have met and parted before: they would find the
    addresses of the dead there, and call them in vain."""
    where = {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, where["rank"], where["world_size"] = next(dist.rendezvous("env://", timeout=patience))
        store.set_timeout(patience)
        attempt = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}_meeting_{next(_meetings)}"
        where["store"] = dist.PrefixStore(attempt, store)
    dist.init_process_group(backend, timeout=patience, **where)


def _patience(timeout_seconds: float) -> timedelta:
    return timedelta(seconds=timeout_seconds + PATIENCE_SECONDS)


def stop_world() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class RowGroups(NamedTuple):
    """Who shares the rows of a codebook, or of a generator's head, with this rank: ``shard`` names its own (None: all
    of them), ``replicas`` are the ranks that hold the same ones (None: all ranks)."""

    shard: CodebookShard | None
    replicas: dist.ProcessGroup | None


def row_groups(world: World, key: str, parallel: int, rows: int, timeout_seconds: float = 1800.0) -> RowGroups:
    """Spreads ``rows`` over each ``parallel`` ranks that follow one another; all ranks call it. key: what the recipe
    calls ``parallel``.

    Neighbours share the rows, so that what they tell each other stays within a node where it can.
    """
    if parallel == 1:
        return RowGroups(None, None)
    if world.size % parallel:
        raise TrainerError(
            f"{key}={parallel} must divide the number of processes, {world.size}: start a multiple of {parallel}, or "
            f"choose another {key}"
        )
    if rows < parallel:
        raise TrainerError(f"{rows} codes cannot be spread over {key}={parallel} processes")
    groups = {}
    # Every rank makes every group, in the same order.
    for ranks in [range(first, first + parallel) for first in range(0, world.size, parallel)]:
        group = dist.new_group(list(ranks), timeout=_patience(timeout_seconds))
        if world.rank in ranks:
            groups["shard"] = CodebookShard.even(rows, group)
    for ranks in [range(first, world.size, parallel) for first in range(parallel)]:
        group = dist.new_group(list(ranks), timeout=_patience(timeout_seconds))
        if world.rank in ranks:
            groups["replicas"] = group
    return RowGroups(**groups)


def mean_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The mean of equally shaped tensors over the ranks of a group (None: all), in place."""
    if (size := dist.get_world_size(group)) > 1:
        dist.all_reduce(tensor, group=group)
        tensor /= size
    return tensor


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over the ranks of a group (None: all), in place."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def any_rank(world: World, *flags: bool) -> list[bool]:
    """Which of the flags are set on any rank; all ranks call together."""
    if world.size == 1:
        return list(flags)
    tensor = torch.tensor(flags, dtype=torch.int32, device=world.device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


def gather_objects(value) -> list:
    """Every rank's small JSON-able value, on every rank, in order of rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_on_all_ranks(message: str | None) -> None:
    """Raises the first rank's message that is not None as a TrainerError, on every rank; all call together."""
    for found in gather_objects(message):
        if found is not None:
            raise TrainerError(found)


def as_trainer_error(action: Callable):
    """What the action gives; its mistakes are TrainerErrors, which all ranks can be told of."""
    try:
        return action()
    except (DataError, ModelError) as error:
        raise TrainerError(str(error)) from error


def run_on_all_ranks(action: Callable):
    """What the action gives on this rank, unless it fails on any: then the first rank's mistake, on every rank."""
    result = message = None
    try:
        result = as_trainer_error(action)
    except TrainerError as error:
        message = str(error)
    raise_on_all_ranks(message)
    return result


def run_on_main(world: World, action):
    """Runs ``action`` on rank 0 alone and gives its result to all; its TrainerError reaches all ranks too,
    so that bad input ends every process at once instead of leaving the others to wait."""
    message = [None, None]
    if world.is_main:
        try:
            message[0] = action()
        except TrainerError as error:
            message[1] = str(error)
    dist.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise TrainerError(message[1])
    return message[0]
