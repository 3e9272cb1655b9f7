"""How a run starts: fresh, from a checkpoint, or not at all because it is done. Decided before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch

import data
from data.buckets import OF_IMAGES, OF_TOKENS, Words
from data.loader import ChangedTars
from model_zoo import ModelError
from model_zoo.eval_nets.patch_encoder import checked_encoder
from model_zoo.io.run_layout import run_folder
from model_zoo.io.sharded_tensors import ShardedTensors, TensorShard, whole_tensor
from trainer import TrainerError
from trainer.changes import Change, changes_since, contents_of, read_changes, settings_of
from trainer.checkpoint import find_checkpoint, has_saved, is_saved, load_state
from trainer.config import GeneratorRun, RunConfig, TokenizerRun
from trainer.files import os_errors, write_json
from trainer.init_from import InitRecord, save_init_record
from trainer.model_state import ModelState
from trainer.parallel import World, raise_on_all_ranks, restarting_job, run_on_main
from trainer.recipes import load_run_config, save_config
from trainer.run_folder import RunFolder
from trainer.telemetry import scanning


class Inputs(NamedTuple):
    """tokens: what ``data.train`` must hold, for a generator that learns from token shards. validation: what
    ``data.val`` holds: the number of its samples and a hash; None without it. contents: hashes of the files that
    settings name, see `trainer.changes.contents_of`."""

    tokens: data.TokenSpec | None
    validation: str | None
    contents: dict[str, str]


class StartPlan(NamedTuple):
    """step: the last step that is done. checkpoint: what to resume from, with its small ``state``; None: start fresh.
    reuses_folder: the run's folder already contains this run. done: there is nothing left to train. notes: lines to
    print. changes: of settings, by this resume. inputs: what the run begins with.
    job: see `_job`."""

    step: int
    checkpoint: Path | None
    state: dict
    reuses_folder: bool
    done: bool
    notes: list[str]
    changes: Sequence[Change] = ()
    inputs: Inputs = Inputs(None, None, {})
    job: str | None = None

    def with_changed_tars(self, changed: Sequence[ChangedTars]) -> StartPlan:
        """The same, with these changes of the training data."""
        changes = [Change(self.step, f"the content of the tars of source {name}", *hashes) for name, *hashes in changed]
        return self._replace(changes=[*self.changes, *changes], notes=[*self.notes, *map(str, changes)])

    def record(self, config: RunConfig) -> dict:
        """What the checkpoints of the run tell of its settings, its validation and the files that settings name."""
        changes = [*read_changes(self.state), *self.changes]
        files = {"validation": self.inputs.validation, "contents": self.inputs.contents}
        return {"settings": settings_of(config), "changes": changes, "job": self.job, **files}


class Source(NamedTuple):
    """What to start from. checkpoint: the run's folder, or one of its checkpoints; None: start fresh. restart: the
    launcher may start the run's command again, so the folder may be empty, partial or complete."""

    checkpoint: Path | None = None
    restart: bool = False


class BatchPlan(NamedTuple):
    """Images in a micro-batch of a rank, and micro-batches in a step of a rank."""

    micro_batch_size: int
    micro_batches: int


def plan_batch(config: RunConfig, world: World) -> BatchPlan:
    """How the global batch is split. Raises TrainerError where it cannot be split evenly; DataError for a bucket or a
    grid whose batch cannot be."""
    total, micro = config.trainer.global_batch_size, config.trainer.micro_batch_size
    if total % world.size:
        raise TrainerError(f"trainer.global_batch_size={total} must be a multiple of the {world.size} processes")
    share = total // world.size
    micro = micro or share
    if share % micro:
        raise TrainerError(
            f"trainer.micro_batch_size={micro} must divide the {share} images that each of {world.size} processes "
            f"takes of trainer.global_batch_size={total}"
        )
    sizes, words = stream_sizes(config)
    data.check_batches(sizes, total, world.size, share // micro, words)
    return BatchPlan(micro, share // micro)


def check_inputs(config: RunConfig, source: Source) -> Inputs:
    """Finds a folder that is taken, a mistyped path and damaged tars before anything slow starts. Sets
    ``loss.semantic.sha256`` and ``discriminator.sha256``, so that the run keeps them. Raises TrainerError, ModelError
    or DataError."""
    if source.checkpoint is None:
        _check_is_no_run(Path(config.run))
    if config.data.train is None and not config.data.sources:
        raise TrainerError(
            "data.train must be given: a folder of tars, a tar, or a pattern such as data.train='tars/{00..99}.tar'"
        )
    if isinstance(config, TokenizerRun):
        _check_encoders(config)
    tokens = None
    if isinstance(config, GeneratorRun) and config.data.content == "tokens":
        config.tokenizer.fingerprint = config.tokenizer.fingerprint or data.token_header(config.data).tokenizer
        tokens = token_spec(config)
    with scanning() as progress:
        # A resumed run checks its training data later: its checkpoint says what the data must be (see TrainStream).
        validation = data.check(config.data, train=source.checkpoint is None, progress=progress, tokens=tokens)
    _class_numbers(config, resumes=source.checkpoint is not None)
    return Inputs(tokens, validation, contents_of(config))


def _check_encoders(config: TokenizerRun) -> None:
    """Checks the files of the frozen encoders that the run uses, and sets their hashes. Raises ModelError."""
    semantic, discriminator = config.loss.semantic, config.discriminator
    if semantic.weight > 0:
        semantic.sha256 = checked_encoder(semantic.encoder, semantic.weights, semantic.sha256)[1]
    if discriminator.kind == "dino" and config.loss.generator.weight > 0:
        file = discriminator.encoder, discriminator.weights, discriminator.sha256
        discriminator.sha256 = checked_encoder(*file, section="discriminator")[1]


class StreamSizes(NamedTuple):
    """Sizes of images in pixels, or grids of codes, by ascending area; and what messages call them."""

    sizes: list[data.Size]
    words: Words


def stream_sizes(config: RunConfig) -> StreamSizes:
    """What a step may hold. Raises DataError or ModelError."""
    if isinstance(config, GeneratorRun) and config.data.content == "tokens":
        return StreamSizes(data.grid_sizes(token_spec(config).grids), OF_TOKENS)
    return StreamSizes(data.image_sizes(config.data), OF_IMAGES)


def token_spec(config: GeneratorRun) -> data.TokenSpec:
    """What the token shards of a run must hold. Raises ModelError for grids that contradict each other."""
    return data.TokenSpec(config.tokenizer.fingerprint, config.model.vocabulary, config.model.all_grids)


def plan_start(config: RunConfig, source: Source, world: World, inputs: Inputs) -> StartPlan:
    """Decides how the run starts; all ranks call together and get the same plan. Raises TrainerError."""
    job = run_on_main(world, lambda: _job(source))
    fresh = StartPlan(0, None, {"data": None}, False, False, [], inputs=inputs, job=job)
    if source.checkpoint is None:
        return fresh
    # Rank 0 alone looks at the folder: another node's view of a shared disk may be older.
    if source.restart and not run_on_main(world, lambda: _holds_run(config)):
        return fresh
    if run_on_main(world, lambda: not is_saved(source.checkpoint)):
        changes = run_on_main(world, lambda: _changes({"step": 0}, config, inputs))
        notes = [f"{config.run} has no checkpoint yet: it starts from step 1"]
        return fresh._replace(reuses_folder=True, notes=[*notes, *map(str, changes)], changes=changes)
    run = run_folder(source.checkpoint)
    # The launcher has started this command again: the branch that began at the named checkpoint continues.
    again = run_on_main(world, lambda: job is not None and has_saved(run, job))
    checkpoint, notes = find_checkpoint(run if again else source.checkpoint, world)
    if again and run != source.checkpoint:
        notes = [f"this job has resumed from {source.checkpoint.name} before: it continues from there", *notes]
    state = run_on_main(world, lambda: _load_state(checkpoint))
    step = state["step"]
    changes = run_on_main(world, lambda: _changes(state, config, inputs))
    done = step >= config.trainer.max_steps
    if done and not (source.restart or again):
        raise TrainerError(f"{config.run} is at step {step} already; train longer with trainer.max_steps={2 * step}")
    return StartPlan(step, checkpoint, state, True, done, [*notes, *map(str, changes)], changes, inputs, job)


def _job(source: Source) -> str | None:
    """Names torchrun's job and what it was to start from, so that a start can tell the checkpoints that an earlier
    attempt of the job has saved; None unless torchrun restarts failed processes."""
    job, start = restarting_job(), source.checkpoint
    is_named = start is not None and run_folder(start) != start
    return None if job is None else f"{job} from {start.name if is_named else 'the newest'}"


def restore(plan: StartPlan, models: ModelState, world: World) -> None:
    """Loads the plan's checkpoint. Raises TrainerError on all ranks where the checkpoint does not fit the models."""
    failed = None
    try:
        files = ShardedTensors(plan.checkpoint)
        models.load(files, plan.state["task"])
        if plan.state["world_size"] == world.size:
            restore_random_state(files, world)
    except ModelError as error:
        failed = f"cannot resume from {plan.checkpoint}: it was written with other settings ({error})"
    raise_on_all_ranks(failed)


def open_folder(folder: RunFolder, config: RunConfig, plan: StartPlan, init_from: InitRecord | None) -> None:
    """Creates the run's folder, where it is new, and writes the configuration and what the weights start from. Raises
    TrainerError where the folder holds another run or cannot be written."""
    run = folder.path
    with _folder_errors(run):
        run.mkdir(parents=True, exist_ok=True)
        folder.take()
        if not plan.reuses_folder:
            _check_is_no_run(run)  # again: another job may have begun one meanwhile
        (run / "samples").mkdir(exist_ok=True)
        save_config(config, run / "config.yaml")
        if plan.reuses_folder and not plan.checkpoint and (metrics := run / "metrics.jsonl").exists():
            metrics.replace(run / "metrics.old.jsonl")  # its steps are trained again
        if classes := _class_numbers(config, resumes=plan.reuses_folder):
            write_json(run / data.CLASSES_NAME, classes)
    if init_from:
        save_init_record(run, init_from)


def _class_numbers(config: RunConfig, resumes: bool) -> dict[str, int] | None:
    """The number of each class that a generator learns, those that its run began with included; None if nothing tells
    it. Raises DataError where the data disagree."""
    if not isinstance(config, GeneratorRun) or config.loss.label_dropout == 1:
        return None
    saved = Path(config.run) / data.CLASSES_NAME
    return data.class_numbers(config.data, str(saved) if resumes and saved.is_file() else None)


def _folder_errors(run: Path) -> AbstractContextManager[None]:
    return os_errors(f"cannot write the run folder {run}", "choose another with run=FOLDER")


def _check_is_no_run(run: Path) -> None:
    """Raises TrainerError where the folder of a new run holds one already."""
    with _folder_errors(run):
        if (run / "config.yaml").exists() or (run / "checkpoints").exists():
            raise TrainerError(
                f"{run} already holds a run: resume it (`ibq resume {run}`) or choose another run=FOLDER"
            )


def _holds_run(config: RunConfig) -> bool:
    """Whether the run's folder holds a run with exactly these settings. Raises TrainerError where it holds another."""
    run = Path(config.run)
    if (run / "config.yaml").is_file():
        saved = load_run_config(run, [])
        if isinstance(saved, GeneratorRun) and isinstance(config, GeneratorRun) and not config.tokenizer.fingerprint:
            saved.tokenizer.fingerprint = None  # not known yet where the tokenizer determines it
        if saved == config:
            return True
    _check_is_no_run(run)
    return False


def _changes(state: dict, config: RunConfig, inputs: Inputs) -> list[Change]:
    """Compares with the settings in the checkpoint or, if an earlier version wrote it, in the run's folder. Also
    compares the content of files: curves of other validation images would otherwise look like the same curve, and
    another list of keys like the same data."""
    before = state.get("settings") or settings_of(load_run_config(config.run, []))
    changes = changes_since(before, config, state["step"])
    now = {**inputs.contents, "the content of data.val": inputs.validation}
    former = {**state.get("contents", {}), "the content of data.val": state.get("validation")}
    for name, found in now.items():
        if found is not None and former.get(name) not in (None, found):
            changes.append(Change(state["step"], name, former[name], found))
    return changes


def _load_state(checkpoint: Path) -> dict:
    state = load_state(checkpoint)
    if not {"step", "data", "task", "world_size"} <= state.keys():
        raise TrainerError(
            f"{checkpoint / 'state.json'} was written by another version of ibq: its run cannot be resumed"
        )
    return state


# ------------------------------------------------------------------------------- random number generators of every rank


def seed_everything(seed: int, step: int, world: World) -> None:
    """Seeds this rank's generators. Each rank, and each step that a run starts or resumes from, gets another stream."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + world.rank & (1 << 63) - 1)


def random_state(world: World) -> list[TensorShard]:
    """The state of this rank's generators, as tensors of a checkpoint."""
    return [whole_tensor(name, state) for name, state in _states(world).items()]


def restore_random_state(files: ShardedTensors, world: World) -> None:
    """Restores what `random_state` returned with the same number of ranks."""
    for name in _states(world):
        if name not in files:  # saved by a run without a GPU
            continue
        state = files.tensor(name)
        if "/cuda/" in name:
            torch.cuda.set_rng_state(state, world.device)
        else:
            torch.set_rng_state(state)


def _states(world: World) -> dict[str, torch.Tensor]:
    states = {f"random/cpu/{world.rank}": torch.get_rng_state()}
    if world.device.type == "cuda":
        states[f"random/cuda/{world.rank}"] = torch.cuda.get_rng_state(world.device)
    return states
