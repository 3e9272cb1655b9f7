"""A run's folder during training: one writer, and what happens when it is moved or deleted meanwhile."""

import os
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from data.classes import CLASSES_NAME
from data.locks import WriterLock, folder_lock
from data.unfinished import remove_unfinished
from trainer.config import RunConfig
from trainer.files import os_errors
from trainer.init_from import FILE as INIT_RECORD
from trainer.parallel import World, run_on_main
from trainer.recipes import save_config

KEPT = INIT_RECORD, CLASSES_NAME  # files beside config.yaml that a resumed run reads
RESTART_SECONDS = 120.0  # how long a restarted process waits for the lock of the one before it


class RunFolder:
    """The folder of a run, which this job alone writes: ``with RunFolder(path, world) as folder: ...``. Its methods are
    for rank 0, unless they say otherwise."""

    def __init__(self, path: Path, world: World):
        self.path, self.world = path, world
        self.resources = ExitStack()
        self.lock: WriterLock | None = None
        self.descriptor: int | None = None  # while the folder is open, no other one gets its number

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        self.resources.close()

    def take(self, wait_seconds: float = 0.0) -> None:
        """Takes the lock of the folder, which must exist, if it is not taken yet, and removes what a killed job left
        unfinished. wait_seconds: for its owner. Raises DataError where another process writes the run, and
        TrainerError."""
        if self.descriptor is not None:
            return
        # A run's own folder cannot be changed by resuming.
        fix = "a run is resumed where it can be written: fix that, or copy the folder (cp -r) and resume the copy"
        with os_errors(f"cannot write the run folder {self.path}", fix):
            self.lock = self.resources.enter_context(WriterLock(folder_lock(self.path), self.path))
            self.lock.take(wait_seconds)
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            self.resources.callback(os.close, self.descriptor)
            remove_unfinished(self.path, "config.yaml", "metrics.jsonl")

    def is_gone(self) -> bool:
        """Whether the path is no longer the folder that was taken, or another process has taken the run since somebody
        deleted its lock; False on other ranks, which did not take it. A lock that is only deleted is made again."""
        if self.descriptor is None:
            return False
        try:
            is_same = os.path.samestat(os.fstat(self.descriptor), self.path.stat())
            return not (is_same and self.lock.hold())
        except (FileNotFoundError, NotADirectoryError):
            return True

    def _kept(self) -> dict[str, bytes]:
        """What another folder needs of the one that was taken, wherever that is now; nothing if it was deleted."""
        kept = {}
        for name in KEPT:
            with suppress(FileNotFoundError), open(os.open(name, os.O_RDONLY, dir_fd=self.descriptor), "rb") as file:
                kept[name] = file.read()
        return kept

    def replace(self, config: RunConfig) -> Path:
        """Makes another folder with the run's configuration, at the same path if nothing else is there now, and takes
        it; all ranks call together. Returns its path. Raises TrainerError."""
        free = (self.path.with_name(f"{self.path.name}{end}") for end in ("", *(f"-{n}" for n in range(2, 100))))

        def make() -> str:
            self.path = next(path for path in free if not path.exists())
            kept = self._kept()
            self.resources.close()
            self.descriptor = None
            with os_errors(f"cannot write the run folder {self.path}", "the steps since the last save are lost"):
                (self.path / "samples").mkdir(parents=True)
                self.take()
                save_config(replace(config, run=str(self.path)), self.path / "config.yaml")
                for name, content in kept.items():
                    (self.path / name).write_bytes(content)
            return str(self.path)

        config.run = run_on_main(self.world, make)
        return Path(config.run)
