"""The dry run: computes what each process of a training run would hold, without data, GPUs or the other processes.

It builds the run's actual task and engines, including the partitioning by DeepSpeed or FSDP2, as one rank of a process
group whose other ranks do not exist (PyTorch's "fake" backend). The tensors have shapes and storage sizes but no memory
(`FakeTensorMode`). The bytes on the rank are then counted tensor by tensor. Each rank is built in a forked process,
because this patches global state.
"""

import multiprocessing
import os
import re
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from data import redacted
from data.buckets import with_batches
from data.errors import DataError
from data.text import printable
from model_zoo import ModelError
from model_zoo.eval_nets.convnext import convnext_on_meta
from model_zoo.eval_nets.lpips import lpips_on_meta
from model_zoo.eval_nets.patch_encoder import BlockEncoder, PatchEncoder
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.quantizers import base as quantizer_base
from trainer import TrainerError
from trainer.config import GeneratorRun, RunConfig, TokenizerRun
from trainer.engines.base import Engine
from trainer.parallel import World
from trainer.recipes import load_recipe
from trainer.start_plan import plan_batch, stream_sizes
from trainer.tasks import adversarial as adversarial_task
from trainer.tasks import make_task
from trainer.tasks import perceptual as perceptual_task
from trainer.tasks import semantic as semantic_task
from trainer.tasks.base import Task

# Set by launchers for real processes; DeepSpeed would use them.
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

NOT_COUNTED = """\
Not included: activations, the parameters that ZeRO 3 and FSDP2 gather for a forward pass, communication buffers (mainly
DeepSpeed's reduce_bucket_size), temporary tensors of the optimizer step, and the memory of CUDA and its libraries.
Train one step on a GPU to measure the total. 1 MB is 10^6 bytes, 1 GB is 10^9 bytes."""


class Held(NamedTuple):
    """Bytes of one network on one rank; ``gradients`` after a backward pass."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    ema: int = 0

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self)


class RankMemory(NamedTuple):
    """What one rank holds.

    networks: bytes by network. offloads: whether part of the main network is kept in CPU memory. fsdp_shard: the ranks
    over which FSDP2 shards the main network. row_shard, row_replicas: the ranks over which the rows of the codebook or
    the head are sharded, and those that hold the same rows. None: there is no such group.
    """

    rank: int
    networks: dict[str, Held]
    offloads: bool
    fsdp_shard: list[int] | None
    row_shard: list[int] | None
    row_replicas: list[int] | None

    @property
    def total(self) -> int:
        """Bytes of all networks."""
        return sum(held.total for held in self.networks.values())


def dry_run(recipe: str, overrides: list[str], processes: int | None = None) -> None:
    """Prints a run's resolved recipe, mesh, batch and memory. Trains nothing and writes nothing.

    processes: number of processes to plan for; None: as many as torchrun started, or one. Under torchrun only rank 0
    prints. Raises a one-line TrainerError or ModelError for settings that do not work with this number of processes.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return
    config = load_recipe(recipe, overrides)
    processes = processes or int(os.environ.get("WORLD_SIZE", 1))
    sys.stdout.write(printable(report(config, processes, measure_ranks(config, processes)), keep="\n"))


def measure_ranks(config: RunConfig, processes: int) -> list[RankMemory]:
    """Plans the first and the last rank. The others are in between: everything is distributed evenly, and a remainder
    gives the first ranks more (rows) or the last ranks less (ends of flat buffers)."""
    plan_batch(config, World(0, processes, torch.device("cpu")))  # fails early, before any process is forked
    if config.engine.kind == "deepspeed":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed chooses when it is imported, here for all forks
        import deepspeed  # noqa: F401
    return _in_forks([(measure_rank, (config, rank, processes)) for rank in sorted({0, processes - 1})])


def measure_rank(config: RunConfig, rank: int, processes: int) -> RankMemory:
    """Builds the task as that rank and counts what it holds. Patches this process permanently: see `_patch`."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = World(rank, processes, torch.device("cpu"))
    _patch(config)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        task = make_task(config, world, *plan_batch(config, world))
        task.check_settings()
        return RankMemory(
            rank,
            networks_held(task),
            task.main_engine.offloads,
            _ranks(getattr(task.main_engine, "group", None)),
            _ranks(task.groups.shard and task.groups.shard.group),
            _ranks(task.groups.replicas),
        )


def networks_held(task: Task) -> dict[str, Held]:
    """The bytes that this rank holds of each network of a task."""
    ema = task.state.ema

    def held(engine: Engine) -> Held:
        averages = ema.shards(engine) if ema and engine in ema.engines else []
        return Held(*engine.resident_bytes(), sum(shard.values.nbytes for shard in averages))

    networks = {name: held(network.engine) for name, network in task.state.trained.items()}
    return networks | {name: Held(count) for name, count in task.frozen_bytes().items()}


def _ranks(group: dist.ProcessGroup | None) -> list[int] | None:
    return None if group is None else dist.get_process_group_ranks(group)


def _patch(config: RunConfig) -> None:
    """Replaces functions that need the values of tensors, other ranks, a compiler or files."""
    # Modules are built on their final device, so `to` has nothing to do; it would fail for FakeTensors.
    nn.Module._apply = lambda self, function, recurse=True: self
    quantizer_base.initial_codes = lambda start, stop, codebook_size, code_dim, std: torch.empty(stop - start, code_dim)
    CodebookShard.check = lambda self, codes: None  # communicates with the other ranks
    if isinstance(config, GeneratorRun):
        if config.data.content == "images" or config.model.embedding == "codebook":
            raise TrainerError(
                "--dry-run cannot count a tokenizer: remove data.content=images and model.embedding=codebook"
            )
        config.tokenizer.source = None  # used only for pictures, and may not exist yet
    else:
        _patch_frozen_networks(config)
    if config.engine.kind == "fsdp2":
        from trainer.engines import fsdp2

        # These compute the rows of each rank from tensors whose values they need.
        fsdp2.init_device_mesh = _with_values(fsdp2.init_device_mesh)
        fsdp2.compute_local_shape_and_global_offset = _with_values(fsdp2.compute_local_shape_and_global_offset)
    if config.engine.kind == "deepspeed":
        from trainer.engines.deepspeed_internals import disable_shared_memory_collectives

        disable_shared_memory_collectives()


def _patch_frozen_networks(config: TokenizerRun) -> None:
    """Replaces networks that read files by ones without values. Only those that the recipe uses are built."""
    perceptual, semantic, discriminator = config.loss.perceptual, config.loss.semantic, config.discriminator
    if perceptual.weight > 0 and "lpips" in perceptual.kind:
        lpips = lpips_on_meta()
        perceptual_task.Perceptual = lambda vgg16_weights: lpips
    if perceptual.weight > 0 and "convnext" in perceptual.kind:
        convnext = convnext_on_meta()
        perceptual_task.ConvNextDistance = lambda convnext_weights: convnext
    if semantic.weight > 0:
        encoder = PatchEncoder.on_meta(semantic.encoder, semantic.size)
        semantic_task.PatchEncoder = lambda name, weights, sha256, size: encoder
    if config.loss.generator.weight > 0 and discriminator.kind == "dino":
        blocks = BlockEncoder.on_meta(discriminator.encoder, discriminator.size)
        adversarial_task.BlockEncoder = lambda name, weights, sha256, size: blocks


def _with_values(function: Callable) -> Callable:
    @wraps(function)
    def call(*args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


def _in_forks(calls: list[tuple[Callable, tuple]]) -> list:
    """Runs each call in a forked process and returns the results. Raises the first exception of a call."""
    context = multiprocessing.get_context("fork")
    started = []
    for function, arguments in calls:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_fork, args=(theirs, function, arguments))
        process.start()
        theirs.close()
        started.append((process, ours))
    results = []
    for process, connection in started:
        try:
            results.append(connection.recv())
        except EOFError:
            results.append(RuntimeError("a process of the dry run was killed"))
        process.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _fork(connection, function: Callable, arguments: tuple) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)  # DeepSpeed prints a banner, PyTorch warns about FakeTensors
    for stream in (1, 2):
        os.dup2(silence, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    os.environ |= {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": ""}
    try:
        result = function(*arguments)
    except (DataError, TrainerError, ModelError) as error:
        result = type(error)(str(error))
    except Exception:
        result = RuntimeError(f"the dry run failed\n{traceback.format_exc()}")
    connection.send(result)


# ------------------------------------------------------------------------------------------------ what is printed


def report(config: RunConfig, processes: int, plans: list[RankMemory]) -> str:
    """The printed text: recipe, mesh and batch, memory."""
    settings = OmegaConf.to_yaml(OmegaConf.structured(config)).rstrip()
    parts = [
        re.sub(r"[a-z][a-z0-9+.-]*://[^\s'\"]+", lambda url: redacted(url[0]), settings),  # URLs may contain secrets
        _aligned(_mesh(config, processes, plans[0])),
        _memory(plans),
        _offloaded(config, plans[0]) + NOT_COUNTED,
    ]
    return "\n\n".join(parts) + "\n"


def _mesh(config: RunConfig, processes: int, plan: RankMemory) -> list[list[str]]:
    micro_batch_size, micro_batches = plan_batch(config, World(0, processes, torch.device("cpu")))
    lines = [
        ["processes", f"{processes} (the launcher decides which of them share a machine)"],
        ["data parallel", f"{processes}: each process trains on different images"],
        [
            "batch",
            f"{config.trainer.global_batch_size} images per step = {processes} processes x {micro_batches} "
            f"micro-batch{'es, accumulated,' if micro_batches > 1 else ''} x {micro_batch_size} images",
        ],
    ]
    sizes, words = stream_sizes(config)
    if len(sizes) > 1 or config.data.buckets or config.data.pixels:
        buckets = with_batches(sizes, config.trainer.global_batch_size)
        batches = ", ".join(f"{bucket.batch} x {bucket.name}" for bucket in buckets)
        lines.append([f"{words.one}s", f"{batches} in a step"])
    engine = config.engine
    main = next(iter(plan.networks))
    if engine.kind == "deepspeed":
        lines.append([main, f"deepspeed {engine.config} over {processes}"])
    elif engine.kind == "ddp":
        lines.append([main, f"a full copy on each of {processes}"])
    else:
        shards = len(plan.fsdp_shard)
        lines.append([main, f"fsdp2: {shards} shards x {processes // shards} replicas"])
        lines.append(["  shards", _groups(plan.fsdp_shard, processes, step=shards)])
        if shards < processes:
            lines.append(["  replicas", _groups(list(range(0, processes, shards)), processes, step=1)])
    rows = "head" if isinstance(config, GeneratorRun) else "codebook"
    if plan.row_shard is not None:
        shards = len(plan.row_shard)
        lines.append([rows, f"{shards} shards x {len(plan.row_replicas)} replicas"])
        lines.append(["  shards", _groups(plan.row_shard, processes, step=shards)])
        lines.append(["  replicas", _groups(plan.row_replicas, processes, step=1)])
    elif rows in plan.networks:
        lines.append([rows, f"1 shard x {processes} replicas"])
    whole = [name for name in ("semantic_head", "discriminator") if name in plan.networks]
    return lines + [[name, f"a full copy on each of {processes}"] for name in whole]


def _groups(first: list[int], processes: int, step: int) -> str:
    """The first and the last group of ranks, as text."""
    number = processes // len(first)
    last = [rank + step * (number - 1) for rank in first]
    shown = [_span(group) for group in ([first] if number == 1 else [first, last])]
    return "ranks " + (" ... " if number > 2 else " and ").join(shown)


def _span(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"{ranks[0]}"
    stride = ranks[1] - ranks[0]
    every = f" by {stride}" if stride > 1 else ""
    return f"{ranks[0]}-{ranks[-1]}{every}"


def _memory(plans: list[RankMemory]) -> str:
    held = {name: [plan.networks[name] for plan in plans] for name in plans[0].networks}
    held["total of a rank"] = [Held(*map(sum, zip(*plan.networks.values(), strict=True))) for plan in plans]
    rows = [["", "parameters", "gradients", "optimizer", "EMA", "total"]]
    for name, on_ranks in held.items():
        rows.append([name, *map(_range, zip(*on_ranks, strict=True)), _range([one.total for one in on_ranks])])
    worst = max(plans, key=lambda plan: plan.total)
    ranks = " and ".join(str(plan.rank) for plan in plans)
    title = f"Memory of rank {ranks}" + ("; other ranks are in between" if len(plans) > 1 else "")
    return f"{title}\n{_aligned(rows, right=True)}\nmaximum: rank {worst.rank} with {_size(worst.total)}"


def _range(values) -> str:
    low, high = _size(min(values)), _size(max(values))
    if low == high:
        return low
    number, unit = low.split(" ") if " " in low else (low, "")
    return f"{number}-{high}" if high.endswith(unit) and unit else f"{low}-{high}"


def _size(count: int) -> str:
    if count == 0:
        return "0"
    return f"{count / 1e9:.3f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _aligned(rows: list[list[str]], right: bool = False) -> str:
    """Aligns columns. right: right-aligns all columns but the first, for numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        words = [
            word.rjust(w) if right and i else word.ljust(w) for i, (word, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(words).rstrip())
    return "\n".join(lines)


def _offloaded(config: RunConfig, plan: RankMemory) -> str:
    """What an engine with offloading keeps in CPU memory, as text; empty for other engines."""
    if not plan.offloads:
        return ""
    main = next(iter(plan.networks))
    if config.engine.kind == "fsdp2":
        return f"The {main}'s parameters, gradients and optimizer state are in CPU memory (engine.offload).\n"
    held = "optimizer state and fp32 master weights, and with offload_param its parameters,"
    return f"The {main}'s {held} are in CPU memory.\n"
