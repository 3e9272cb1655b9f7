"""What the commands that use trained models share: the device, the processes, what belongs to a checkpoint, and the
check of a job that continues a former one."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.config import DataConfig
from data.locks import WriterLock
from data.parallel import cores
from model_zoo.io.load import is_standalone
from model_zoo.io.manifest import STATE
from model_zoo.io.run_layout import run_folder
from trainer import TrainerError
from trainer.checkpoint import load_state
from trainer.config import RunConfig
from trainer.files import writing
from trainer.parallel import World, run_on_main, start_world, stop_world
from trainer.recipes import leaves, load_run_config
from trainer.same_settings import check_same_start

TIMEOUT_SECONDS = 7 * 86400.0  # until a process stops waiting for the slowest one
# What to do where a file that a rank has written is not there at the end.
SHARED_DISK = (
    "put --out on a disk that all nodes share and that nothing else removes files from, and run the command again"
)
SHOWN = 60  # characters: longer settings are not shown in an error message


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU if there is one. Raises TrainerError for a device that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise TrainerError(f"--device {name} is unknown: choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainerError("--device cuda: this machine has 0 GPUs; choose auto or cpu")
    return torch.device(name)


@contextlib.contextmanager
def job_world(device: str, **options) -> Iterator[World]:
    """The process group of a command that any number of processes run together. options: of the command; JSON-able,
    and equal in all processes. Raises TrainerError where they are not."""
    choose_device(device)
    try:
        world = start_world(device, TIMEOUT_SECONDS)
        check_same_start(world, {f"--{name.replace('_', '-')}": value for name, value in options.items()})
        yield world
    finally:
        stop_world()


@contextlib.contextmanager
def sole_writer(lock: Path, what: Path, option: str = "--out") -> Iterator[None]:
    """Holds the lock of an output, which an option of the command names. Creates the lock's folder. Raises DataError
    where another process writes the output, and TrainerError where it cannot be written."""
    with WriterLock(lock, what) as held:
        with writing(what, option):
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.take()
        yield


@contextlib.contextmanager
def one_writer(world: World, lock: Path, what: Path, option: str = "--out") -> Iterator[None]:
    """`sole_writer` on rank 0; all ranks call together. Raises TrainerError."""
    with contextlib.ExitStack() as resources:
        run_on_main(world, lambda: resources.enter_context(sole_writer(lock, what, option)))
        yield


def data_config(checkpoint: Path) -> DataConfig | None:
    """The ``data`` section that the checkpoint was trained with; None if it belongs to no run. Raises TrainerError."""
    if is_standalone(checkpoint):
        return None
    path = run_folder(checkpoint) / "config.yaml"
    try:
        section = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(path).data)
        return OmegaConf.to_object(_as_recorded(section, checkpoint, "data."))
    except OmegaConfBaseException as error:
        raise TrainerError(f"the data section of {path}: {str(error).splitlines()[0]}") from error


def run_config(checkpoint: Path) -> RunConfig:
    """All settings that the checkpoint of a run was trained with. Raises TrainerError."""
    config = load_run_config(run_folder(checkpoint), [])
    return OmegaConf.to_object(_as_recorded(OmegaConf.structured(config), checkpoint))


def _as_recorded(node: DictConfig, checkpoint: Path, section: str = "") -> DictConfig:
    """Settings of the run's config.yaml, replaced by those in the checkpoint: a resume writes config.yaml before it
    writes a checkpoint, if it ever does. Checkpoints of earlier versions have none. section: prefix of the node's keys.
    """
    settings = load_state(checkpoint).get("settings") or {} if (checkpoint / STATE).exists() else {}
    recorded = OmegaConf.create()
    for key in leaves(node):
        if section + key in settings:
            OmegaConf.update(recorded, key, settings[section + key])
    return OmegaConf.merge(node, recorded)


def threads_per_process() -> int:
    """This machine's cores divided among its processes."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def decode_threads() -> int:
    """The number of threads with which an evaluation decodes images: at most 8 per process."""
    return min(8, threads_per_process())


def read_record(path: Path, keys: set[str], error: Exception) -> dict | None:
    """What a former job wrote of itself: a JSON object with at least these keys; None if there is no file. Raises the
    error for anything else."""
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict) or not keys <= record.keys():
        raise error
    return record


def check_same_settings(
    out: Path, contents: str, former: dict, current: dict, how_to_repeat: Callable[[str, dict], str]
) -> None:
    """Raises TrainerError if a setting differs from that of the job that began the output.

    contents: what ``out`` holds. how_to_repeat: the option or words that set the setting of that name to its former
    value.
    """
    for name, value in current.items():
        if former.get(name) != value:
            before, after = (json.dumps(settings.get(name)) for settings in (former, current))
            what = f"{name} {before}, now {after}" if len(before + after) < SHOWN else f"other {name}"
            raise TrainerError(
                f"{out} holds {contents} of other settings ({what}): give {how_to_repeat(name, former)} again to "
                "continue, or name another path with --out"
            )
