"""The process group: rank, size and device of this process, and the collectives that training needs."""

import functools
import gc
import itertools
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data import DataError
from model_zoo import ModelError
from model_zoo.ops.codebook_parallel import CodebookShard
from trainer import TrainerError
from trainer.watchdog import end_with_launcher

# Until training begins, collectives time out this much later than `trainer.timeout_seconds`.
COLLECTIVE_MARGIN_SECONDS = 60.0


class World(NamedTuple):
    """Rank of this process, number of processes, and this process's device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_world(device: str = "auto", timeout_seconds: float = 1800.0) -> World:
    """Joins the process group of the processes that torchrun or the deepspeed launcher started; without a launcher, a
    group of one.

    timeout_seconds: how long a rank may wait for another. Raises TrainerError.
    """
    end_with_launcher()
    _check_restarts()
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainerError("trainer.device=cuda, but no CUDA device can be used here: run `ibq doctor` for details")
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise TrainerError(
                f"process {local_rank} of this machine has no GPU: "
                f"{torch.cuda.device_count()} GPUs are visible; start at most that many processes on it"
            )
        torch.cuda.set_device(local_rank)
    else:
        # DeepSpeed chooses its accelerator when it is imported, and could choose another one.
        os.environ["DS_ACCELERATOR"] = "cpu"
    # PyTorch's compiler imports this module when the first optimizer is made. Its default arguments are the process
    # group that exists at that moment, and would keep that group, and gloo's threads, after `stop_world`.
    import_module("torch.distributed.nn.functional")

    backend = "nccl" if use_cuda else "gloo"
    if backend == "gloo":
        # Gloo connects the ranks when it makes a group. Without a barrier after that, a rank could end with an
        # error while another is still connecting to it, which would then report a closed connection instead.
        os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    if "RANK" in os.environ:
        timeout = _collective_timeout(timeout_seconds)
        store, rank, world_size = _rendezvous()
        store.set_timeout(timeout)
        store = dist.PrefixStore(_key_prefix(next(_rendezvous_count)), store)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    where = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), where)


def _check_restarts() -> None:
    """Raises TrainerError where torchrun could not restart processes on several nodes.

    The processes rendezvous in the agents' shared store under the number of their attempt. When a process fails, its
    agent counts an attempt, but the other agents see a membership change, which they do not count. The environment
    variable makes a dynamic rendezvous (c10d) share no store. A static rendezvous, torchrun's default, shares one
    whatever the variable is, and tells the other agents nothing: they go on waiting in the former attempt.
    """
    if (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
        and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    ):
        if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1":  # it is set, so the rendezvous must be static
            raise TrainerError(
                "--max-restarts on several nodes does not work with torchrun's static rendezvous, its default, which "
                "restarts no other node: add --rdzv-backend c10d --rdzv-endpoint HOST:29400, or use --max-restarts 0"
            )
        raise TrainerError(
            "--max-restarts on several nodes needs --rdzv-backend c10d, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in "
            "torchrun's environment: otherwise restarted processes never find each other"
        )


def restarting_job() -> str | None:
    """A name of torchrun's job, equal in all its attempts and on all its nodes; None unless torchrun restarts failed
    processes. (Their attempts are not counted alike on all nodes: see `_key_prefix`.)"""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) == 0:
        return None
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none":
        return name
    # torchrun without --standalone or --rdzv-id: rank 0's agent names the job, by its process and when that began.
    parent = os.getppid()
    began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {parent} {began}"


_rendezvous_count = itertools.count()


@functools.cache
def _rendezvous() -> tuple[dist.Store, int, int]:
    """(store, rank, number of processes). One store serves all groups of a process: another server at the same port
    would not be ready when the first ranks connect to it."""
    return next(dist.rendezvous("env://"))


def _key_prefix(group: int) -> str:
    """Prefix of a group's keys in the store, equal on all ranks. group: how many groups this process joined before.

    A store of torchrun's agent outlives the processes, so it still holds the addresses of processes that ended: the
    prefix then contains the number of the attempt. Otherwise each attempt has a new store, and the number must be left
    out: agents on several nodes do not agree on it. One counts a failure where another, which notices first that the
    failed node rejoins, does not.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if shared else 0
    return f"attempt_{attempt}_group_{group}"


def _collective_timeout(timeout_seconds: float) -> timedelta:
    return timedelta(seconds=timeout_seconds + COLLECTIVE_MARGIN_SECONDS)


def leave_hangs_to_watchdog() -> None:
    """From now on no collective times out; all ranks call together. The watchdog ends ranks that hang, and does not
    count the time in which they were suspended; a collective would."""
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in list(dist.distributed_c10d._world.pg_map):
        set_timeout(timedelta(days=365), group)


_before_stop: set[Callable[[], None]] = set()


def before_stop(action: Callable[[], None]) -> None:
    """`stop_world` calls the action once, before it destroys the process groups: for whoever keeps references to them
    that outlive training."""
    _before_stop.add(action)


def forget_groups(*classes: type) -> None:
    """Sets attributes that are process groups to None, in all objects of these classes. For `before_stop`, where a
    library keeps objects that refer to a group for the life of the process."""
    for found in gc.get_objects():
        if issubclass(type(found), classes):
            for name, value in list(vars(found).items()):
                if isinstance(value, dist.ProcessGroup):
                    setattr(found, name, None)
                elif isinstance(value, list) and any(isinstance(group, dist.ProcessGroup) for group in value):
                    setattr(found, name, [])


def stop_world() -> None:
    """Destroys the process groups, if there are any, and ends gloo's threads.

    `destroy_process_group` drops PyTorch's references to a group; gloo joins its threads when the last reference is
    gone. A thread that outlives this call may free the tensors of the last collective while the interpreter finalizes:
    it waits for the GIL, CPython ends it, and the process aborts although the run finished (pytorch/pytorch#190489).
    """
    if dist.is_initialized():
        while _before_stop:
            _before_stop.pop()()
        gc.collect()  # models that refer to a group are part of reference cycles
        dist.destroy_process_group()


class RowGroups(NamedTuple):
    """How the rows of a codebook, or of a generator's head, are distributed. shard: this rank's rows (None: all rows).
    replicas: the ranks that hold the same rows (None: all ranks)."""

    shard: CodebookShard | None
    replicas: dist.ProcessGroup | None


def row_groups(world: World, key: str, parallel: int, rows: int, timeout_seconds: float = 1800.0) -> RowGroups:
    """Shards ``rows`` over every ``parallel`` consecutive ranks; all ranks call together. key: the recipe's name for
    ``parallel``. Raises TrainerError.

    Consecutive ranks form a group, so that its traffic stays within a node where possible.
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
    timeout = _collective_timeout(timeout_seconds)
    shards = [list(range(first, first + parallel)) for first in range(0, world.size, parallel)]
    replicas = [list(range(first, world.size, parallel)) for first in range(parallel)]
    # Every rank creates every group, in the same order, and gets the one that it is in.
    shard, _ = dist.new_subgroups_by_enumeration(shards, timeout)
    own_replicas, _ = dist.new_subgroups_by_enumeration(replicas, timeout)
    return RowGroups(CodebookShard.even(rows, shard), own_replicas)


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


def max_over_ranks(world: World, *numbers: int) -> list[int]:
    """The largest of each number, or whether any rank has set a flag; all ranks call together."""
    if world.size == 1:
        return list(map(int, numbers))
    tensor = torch.tensor(numbers, dtype=torch.int32, device=world.device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def gather_objects(value) -> list:
    """Gathers a small JSON-able value of every rank, in order of rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_on_all_ranks(message: str | None) -> None:
    """Raises the first message of any rank as a TrainerError on every rank; all ranks call together."""
    for found in gather_objects(message):
        if found is not None:
            raise TrainerError(found)


def check_same_on_all_ranks(what: str, found: str) -> None:
    """Raises TrainerError on every rank where the ranks find different things; all ranks call together. what: what the
    user named. found: what this rank finds, with a number or hash that differs where the things do."""
    ranks: dict[str, list[int]] = {}
    for rank, of_rank in enumerate(gather_objects(found)):
        ranks.setdefault(of_rank, []).append(rank)
    if len(ranks) > 1:
        ways = "; ".join(f"{one} on rank {listed(of_one)}" for one, of_one in ranks.items())
        raise TrainerError(f"{what} is not the same for all processes: {ways}; give all nodes the same files")


def listed(numbers: list[int]) -> str:
    """Ranks, for a message."""
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown} and {len(numbers) - 8} more" if len(numbers) > 8 else shown


def _attempt(action: Callable) -> list:
    """[result, None], or [None, message] where the action raises an error that the user can fix."""
    try:
        return [action(), None]
    except (DataError, ModelError, TrainerError) as error:
        return [None, str(error)]


def run_on_all_ranks(action: Callable):
    """Runs an action on every rank and returns this rank's result. If it raises a TrainerError, DataError or ModelError
    on any rank, all ranks raise the first rank's as a TrainerError."""
    result, message = _attempt(action)
    raise_on_all_ranks(message)
    return result


def run_on_main(world: World, action: Callable):
    """Runs an action on rank 0 and returns its result on all ranks. If it raises a TrainerError, DataError or
    ModelError, all ranks raise it as a TrainerError, so that bad input ends every process instead of leaving the others
    waiting."""
    outcome = _attempt(action) if world.is_main else [None, None]
    dist.broadcast_object_list(outcome, src=0)
    result, message = outcome
    if message is not None:
        raise TrainerError(message)
    return result
