"""Checkpoints.

All ranks write into a temporary folder. A manifest lists the files with their hashes. The complete folder is renamed,
and ``latest`` is set to it. A kill, a full disk or a lost rank at any moment leaves the previous checkpoint in use.
"""

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from model_zoo.io.hashing import sha256_of
from model_zoo.io.manifest import MANIFEST, STATE, entry_of, read_manifest, remember, wrong_file
from model_zoo.io.run_layout import checkpoint_step, run_folder
from model_zoo.io.sharded_tensors import TensorShard, save_shards
from trainer import TrainerError
from trainer.branches import BRANCHES, branch, read_branches, with_checkpoint, written_last
from trainer.parallel import World, check_same_on_all_ranks, gather_objects, max_over_ranks, run_on_main


class CheckpointError(TrainerError):
    """A checkpoint could not be written; earlier ones are unchanged."""


class Checkpoints:
    """Writes the checkpoints of a run; all ranks call every method together.

    keep_last: the number of newest checkpoints of the branch to keep (see `trainer.branches`). keep_every_steps:
    checkpoints at its multiples are always kept. continues: the checkpoint that training resumed from.
    asynchronous: a thread writes what `save` copied while training continues; `poll` between steps, or `finish`,
    completes the checkpoint. beat: called repeatedly while waiting for disks, so that the watchdog sees progress.
    """

    def __init__(
        self,
        run: Path,
        world: World,
        *,
        keep_last: int,
        keep_every_steps: int | None = None,
        continues: Path | None = None,
        asynchronous: bool = False,
        beat: Callable[[], None] = lambda: None,
    ):
        self.folder = run / "checkpoints"
        self.world = world
        self.keep_last, self.keep_every_steps = keep_last, keep_every_steps
        self.before = continues.name if continues else None  # of rank 0: the newest checkpoint of the branch
        self.asynchronous, self.beat = asynchronous, beat
        self.writing: _Writing | None = None

    def move_to(self, run: Path) -> None:
        """Saves into another run's folder from now on. A checkpoint that is being written is given up."""
        self.folder, self.writing, self.before = run / "checkpoints", None, None

    def save(self, step: int, state: dict, shards: Iterable[TensorShard]) -> None:
        """Copies this rank's shards and starts to write ``step_XXXXXXXX``, after completing the previous checkpoint.

        state: small JSON-able values (data position, counters), equal on all ranks. Raises CheckpointError.
        """
        self.finish()
        unfinished = self.folder / f"step_{step:08d}.unfinished"
        try:
            _on_main(self.world, lambda: _make_folder(unfinished))
        except CheckpointError as error:
            raise self._refusal(unfinished, error) from error
        copies = [shard._replace(values=shard.values.detach().to("cpu", copy=True)) for shard in shards]
        file = unfinished / f"rank_{self.world.rank:05d}.safetensors"
        self.writing = _Writing(unfinished, {**state, "step": step}, file, copies)
        self.writing.start()
        if not self.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Completes the checkpoint that is being written, if all ranks have written their part. Raises
        CheckpointError."""
        if self.writing and not max_over_ranks(self.world, self.writing.is_alive())[0]:
            self._seal()

    def finish(self) -> None:
        """Waits for the checkpoint that is being written and completes it. Raises CheckpointError.

        Ranks poll instead of blocking in a collective, so that a slow disk of one rank does not time out the others.
        """
        while self.writing:
            self.poll()
            if self.writing:
                self.beat()
                self.writing.join(0.02)

    def _seal(self) -> None:
        writing, self.writing = self.writing, None
        parts = gather_objects((writing.part, writing.error))
        unfinished = writing.unfinished
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(parts) if error]
        try:
            if errors:
                raise CheckpointError(errors[0])
            manifest = dict(part for part, _ in parts)
            _on_main(self.world, lambda: self._complete(unfinished, writing.state, manifest))
        except CheckpointError as error:
            # Frees the space that it took of a full disk; if that fails, the next save removes it.
            _on_main(self.world, lambda: shutil.rmtree(unfinished, ignore_errors=True))
            raise self._refusal(unfinished, error) from error

    def _refusal(self, unfinished: Path, error: CheckpointError) -> CheckpointError:
        fix = "free some space" if "space" in str(error) else "fix that"
        return CheckpointError(
            f"cannot write checkpoint {unfinished.stem} ({error}); earlier ones are untouched: {fix}, "
            f"then `ibq resume {self.folder.parent}`"
        )

    def _complete(self, unfinished: Path, state: dict, files: dict) -> None:
        folder = unfinished.with_suffix("")
        _write_manifest(unfinished, state, files)
        names = [path.name for path in checkpoint_folders(self.folder.parent)]
        record = with_checkpoint(read_branches(self.folder)[0], names, folder.name, self.before)
        _record(self.folder, record)
        replaced = folder.with_suffix(".replaced.unfinished")
        if folder.exists():  # the run was resumed from an earlier step and has reached this one again
            folder.rename(replaced)
        _rename(unfinished, folder)
        _point(self.folder, folder)
        self.before = folder.name
        shutil.rmtree(replaced, ignore_errors=True)
        self._remove_old(branch(record, names, folder.name))

    def _remove_old(self, of_branch: list[str]) -> None:
        """Removes the older checkpoints of the branch. Those of a branch that was left do not count: they must not push
        out the ones of this branch, and go when they are older than all that are kept."""
        if len(of_branch) <= self.keep_last:
            return
        for old in checkpoint_folders(self.folder.parent):
            is_kept = self.keep_every_steps and checkpoint_step(old) % self.keep_every_steps == 0
            if old.name < of_branch[-self.keep_last] and not is_kept:
                shutil.rmtree(old)


class _Writing(threading.Thread):
    """Writes one rank's part of a checkpoint. At the end either ``part`` is set, to (file name, its manifest entry), or
    ``error`` is."""

    def __init__(self, unfinished: Path, state: dict, file: Path, shards: list[TensorShard]):
        super().__init__(name=f"writing {file}", daemon=True)  # a process that ends leaves the checkpoint incomplete
        self.unfinished, self.state, self.file, self.shards = unfinished, state, file, shards
        self.part: tuple[str, dict] | None = None
        self.error: str | None = None

    def run(self) -> None:
        try:
            for shard in self.shards:
                if shard.values.is_floating_point() and not shard.values.isfinite().all():
                    raise CheckpointError(f"{shard.name} is not finite, try a lower optimizer.lr")
            write_part(self.file, self.shards)
            self.part = self.file.name, entry_of(self.file)
        except (OSError, SafetensorError, CheckpointError) as error:
            self.error = getattr(error, "strerror", None) or str(error)
        except Exception as error:  # would end only this thread; reported to all ranks, it fails the save
            self.error = f"{type(error).__name__}: {error}"
        self.shards = []


def write_part(file: Path, shards: list[TensorShard]) -> None:
    """Writes one rank's shards, and returns when they are on the disk."""
    save_shards(file, shards)
    _sync(file)


def checkpoint_folders(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted(path for path in folders if checkpoint_step(path) is not None and path.is_dir())


def is_saved(source: Path) -> bool:
    """Whether there is anything to resume from: False for a run's folder that was never saved. Raises TrainerError if
    the folder of checkpoints is a link to nothing, such as a disk that is not mounted."""
    if run_folder(source) != source:
        return True
    if (folder := source / "checkpoints").is_symlink() and not folder.exists():
        raise TrainerError(f"{folder} is a link to nothing ({os.readlink(folder)}): mount or repair it")
    return bool(checkpoint_folders(source)) or (folder / "latest").exists()


def find_checkpoint(source: Path, world: World) -> tuple[Path, list[str]]:
    """Returns the checkpoint to resume from, and what was wrong with newer ones; all ranks call together.

    source: a run's folder, which means the checkpoint that ``latest`` names or, if that is damaged, the newest intact
    one before it; or one checkpoint's folder, which has no replacement. Raises TrainerError if there is no intact one.
    """
    if (run := run_folder(source)) != source:
        if wrong := damage(source, world):
            raise TrainerError(f"{source} cannot be resumed from: {wrong}; `ibq resume {run}` uses another")
        return source, []
    candidates, left, wrong = run_on_main(world, lambda: _candidates(source))
    passed_over, notes = [], [wrong] if wrong else []
    for folder in candidates:
        wrong = damage(folder, world)
        if wrong is None:
            return folder, notes + passed_over
        passed_over.append(f"{folder.name} is passed over: {wrong}")
    if not passed_over:
        raise TrainerError(
            f"{source} has no finished checkpoint: delete {source / 'checkpoints'}, then `ibq resume {source}` starts "
            "the run from step 1"
        )
    more = f"; and {len(passed_over) - 3} more" if len(passed_over) > 3 else ""
    other = f"; {left[0]} is of a branch that was left: `ibq resume {left[0]}` continues that" if left else ""
    raise TrainerError(f"{source} has no complete checkpoint: {'; '.join(passed_over[:3])}{more}{other}")


def has_saved(run: Path, job: str) -> bool:
    """Whether a checkpoint of the run's present branch is of this job."""
    for folder in _candidates(run).branch:
        with suppress(TrainerError):  # a damaged one, which `find_checkpoint` reports
            if load_state(folder).get("job") == job:
                return True
    return False


class _Candidates(NamedTuple):
    """Checkpoints, newest first. left: those of branches that were left. wrong: with the record of the branches."""

    branch: list[Path]
    left: list[Path]
    wrong: str | None


def _candidates(run: Path) -> _Candidates:
    """What may be resumed from: the checkpoint that ``latest`` names, or the one that was written last if it names
    none, and those that it continues."""
    folder = run / "checkpoints"
    names = [path.name for path in checkpoint_folders(run)]
    pointer = folder / "latest"
    named = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    record, wrong = read_branches(folder)
    is_named = bool(re.fullmatch(r"step_\d+", named))
    if not is_named:
        if not names:
            return _Candidates([], [], None)
        named = written_last(record, names)
    found = branch(record, names, named)  # with the named one even if it is missing, to be reported as such
    left = [folder / name for name in names[::-1] if name not in found]
    if left and not is_named:
        wrong = f"{pointer} names no checkpoint: this is {named}, which was written last"
    return _Candidates([folder / name for name in found[::-1]], left, wrong)


def damage(folder: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, or None; all ranks call together. Compares every file's hash with the manifest.
    The ranks share the files, and none of them reads these again when it reads weights (see `manifest.check`).

    Raises TrainerError where nodes have different checkpoints at this path: no rank alone could tell."""
    try:
        files = run_on_main(world, lambda: read_manifest(folder))
    except TrainerError as error:
        return str(error)
    manifest = folder / MANIFEST
    found = f"manifest {sha256_of(manifest)[:16]}" if manifest.is_file() else "no manifest"
    check_same_on_all_ranks(f"the checkpoint {folder}", found)
    # Nodes may have copies of their own: then those of each copy share its files.
    copies = gather_objects(_copy_of(folder))
    sharing = [rank for rank, copy in enumerate(copies) if copy == copies[world.rank]]
    mine = sorted(files.items())[sharing.index(world.rank) :: len(sharing)]
    wrong = [wrong_file(folder / name, entry) for name, entry in mine]
    found = [wrong for of_rank in gather_objects([w for w in wrong if w]) for wrong in of_rank]
    if found:
        return found[0]
    remember(folder, files)
    return None


def _copy_of(folder: Path) -> tuple | None:
    """What is equal on all nodes that see the same files, and differs for copies of them."""
    try:
        status = (folder / MANIFEST).stat()
    except OSError:
        return None
    return status.st_ino, status.st_ctime_ns


def load_state(folder: Path) -> dict:
    """The ``state`` that `Checkpoints.save` was given, with the step. Raises TrainerError if the file is damaged."""
    try:
        return {**json.loads((folder / STATE).read_text())}
    except (OSError, ValueError, TypeError) as error:
        raise TrainerError(f"{folder / STATE} is damaged") from error


def _make_folder(unfinished: Path) -> None:
    for left_over in unfinished.parent.glob("step_*.unfinished"):
        shutil.rmtree(left_over)
    unfinished.parent.mkdir(exist_ok=True)  # but not the run's folder, without which nothing can be resumed
    unfinished.mkdir()


def _write_manifest(unfinished: Path, state: dict, files: dict) -> None:
    (unfinished / STATE).write_text(json.dumps(state))
    _sync(unfinished / STATE)
    files = {**files, STATE: entry_of(unfinished / STATE)}
    for name, entry in files.items():  # whether what other nodes wrote is visible here
        if (size := (unfinished / name).stat().st_size) != entry["bytes"]:
            raise CheckpointError(f"{name} has {size} bytes instead of {entry['bytes']}")
    (unfinished / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
    _sync(unfinished / MANIFEST)
    _sync(unfinished)


def _rename(unfinished: Path, folder: Path) -> None:
    unfinished.rename(folder)
    _sync(folder.parent)


def _point(checkpoints: Path, folder: Path) -> None:
    _write_whole(checkpoints / "latest", folder.name)


def _record(checkpoints: Path, record: dict) -> None:
    _write_whole(checkpoints / BRANCHES, json.dumps(record, indent=1))


def _write_whole(file: Path, text: str) -> None:
    temporary = file.with_name(f"{file.name}.unfinished")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(file)
    _sync(file.parent)


def _on_main(world: World, action) -> None:
    """`run_on_main` for an action on files: its OSError becomes a CheckpointError on all ranks."""

    def guarded() -> str | None:
        try:
            action()
        except (OSError, CheckpointError) as error:
            return getattr(error, "strerror", None) or str(error)
        return None

    if wrong := run_on_main(world, guarded):
        raise CheckpointError(wrong)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
