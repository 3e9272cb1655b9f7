"""DeepSpeed: ZeRO shards optimizer state (1), gradients (2), parameters (3) over ranks, and can offload to the CPU."""

import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfigError
from torch import Tensor, nn

from model_zoo.io.sharded_tensors import TensorShard
from trainer import TrainerError
from trainer.engines.base import Engine, MakeOptimizer, Memory, Root, trained_parameters
from trainer.engines.deepspeed_internals import release_groups, zero_stage
from trainer.optim import start_moments
from trainer.parallel import before_stop

# DeepSpeed calls PyTorch's collectives by deprecated names, which would print a warning on every rank.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


# Keys that a configuration may have. Other keys were not tested with this trainer, change what the recipe sets, or
# change the memory layout that `deepspeed_internals` reads (round_robin_gradients).
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
    """Reads a JSON file of ds_configs by its name, or the user's by its path, and fills "auto" values from the recipe.

    Raises TrainerError for keys or values that this trainer does not support.
    """
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
        raise TrainerError(
            f'{path} is not a DeepSpeed configuration: it must be a JSON object, and so must its "zero_optimization"'
        )
    for key in ("fp16", "bf16", "bfloat16", "data_types", "torch_autocast", "optimizer", "scheduler"):
        if key in config:
            raise TrainerError(f'{path}: remove "{key}"; set it in the recipe (trainer.precision, optimizer, schedule)')
    for key in [*(config.keys() - set(KEYS)), *(zero.keys() - set(ZERO_KEYS))]:
        raise TrainerError(f'{path}: "{key}" is not supported; remove it')
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise TrainerError(f"{path}: there is no ZeRO stage {stage!r}; use 0, 1, 2 or 3")
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if not isinstance(zero.get(key, {}), dict):
            raise TrainerError(f'{path}: "{key}" must be an object: {{"device": "cpu"}}')
        device = zero.get(key, {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise TrainerError(f'{path}: "{key}" to {device} is not supported: its state could not be saved; use "cpu"')
        if device == "cpu" and stage < least:
            raise TrainerError(f'{path}: "{key}" needs ZeRO stage {least} or above')
    # The task clips by the norm over all parameters, including the codebook, which DeepSpeed does not know. Without
    # this key, DeepSpeed would clip to 1.
    if config.get("gradient_clipping", "auto") != "auto":
        raise TrainerError(f'{path}: write "auto" for "gradient_clipping" and use trainer.gradient_clip_norm')
    config["gradient_clipping"] = 0.0
    # PyTorch's fused Adam updates offloaded state; it is vectorized on CPUs too.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    recipe = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": micro_batch_size * micro_batches * dist.get_world_size(),
    }
    for key, value in recipe.items():
        if config.get(key, "auto") == "auto":
            config[key] = value
        elif config[key] != value:
            raise TrainerError(f'{path}: "{key}" is {config[key]}, but {value} in the recipe; write "auto"')
    return config


class DeepSpeed(Engine):
    """ZeRO stages 0 to 3, as ``config`` says.

    Parameters are kept in fp32; trainer.precision is an autocast around the forward. DeepSpeed is given a `Root` that
    holds only the parameters it may own, because it overwrites all of them by rank 0's when it is initialized.
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
        # DeepSpeed compiles its CPU collectives with the ninja that pip installed beside python, but looks on PATH.
        os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, even for a single process
        if dist.get_rank() == 0 and not torch.cuda.is_available():
            note = "DeepSpeed compiles for about a minute when it first runs on a CPU (longer: `ibq doctor`) ..."
            print(note, file=sys.stderr, flush=True)
        self.parameters = trained_parameters(module, ignored)
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        self.root = Root(module, ignored)
        try:
            # apex's kernels are for CUDA only. They count steps per parameter group, but ZeRO 3 steps parts of a group.
            zero = settings.get("zero_optimization", {})
            apex = zero.get("stage", 0) < 3 and "offload_optimizer" not in zero
            self.optimizer = make_optimizer(self.parameters.values(), apex=apex)
            self.engine, *_ = deepspeed.initialize(model=self.root, optimizer=self.optimizer, config=settings)
        except (ValueError, AssertionError, DeepSpeedConfigError) as error:  # pydantic's errors are ValueErrors
            what = " ".join(str(error).split())[:300]
            raise TrainerError(f"DeepSpeed refuses engine.config={config}: {what}") from error
        before_stop(release_groups)
        self.zero = zero_stage(self.engine, self.parameters)
        stage = int(self.engine.zero_optimization_stage())
        self.forwards_together = stage == 3
        self.offloads = self.zero.offloads
        if stage == 0:
            self.replica = dist.get_rank(), dist.get_world_size()
        self.ranges = [self.zero.locate(name, shapes[name]) for name in self.parameters]
        start_moments(self.optimizer, {id(part.flat): part.flat for part in self.ranges}.values())

    def run(self, function, *args, **kwargs):
        # Not the DeepSpeed engine's forward: it attaches hooks to the outputs, which the adaptive weight's extra
        # gradients would trigger, and it turns autocast off.
        self.zero.before_forward()
        return self.root(function, *args, **kwargs)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)  # divides by gradient_accumulation_steps itself

    def grad_norm(self) -> Tensor:
        self.norm = self.zero.grad_norm()
        return self.norm.to(self.engine.device)

    def step(self, lr: float, scale: Tensor | float = 1.0) -> None:
        for group in self.param_groups:
            group["lr"] = lr
        self.zero.step(self.norm, scale)

    def skip(self) -> None:
        self.zero.skip(self.norm)

    def weights(self) -> list[TensorShard]:
        return [part.of(part.flat) for part in self.ranges]

    def moments(self, key: str) -> list[Tensor]:
        return [part.of(self.optimizer.state[part.flat][key]).values for part in self.ranges]

    def resident_bytes(self) -> Memory:
        return Memory(self.zero.parameter_bytes(), self.zero.gradient_bytes(), self.optimizer_bytes())

    def sync_weights(self) -> None:
        self.zero.sync_weights()
