"""One writer for each output: a lock file that names its owner by host, process and time."""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from data.errors import DataError
from data.file_names import fitted
from data.unfinished import NO_FLOCK

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
SETTLE_SECONDS = 0.5  # without flock: until the last of several takers can be seen
POLL_SECONDS = 0.2


def folder_lock(folder: Path) -> Path:
    """The lock file of a folder with one writer."""
    return folder / LOCK_NAME


def file_lock(file: Path) -> Path:
    """The lock file of a single file with one writer."""
    return file.with_name(fitted(".", file.name, LOCK_NAME))


class WriterLock:
    """Makes this process the only writer of something: ``with WriterLock(path, what) as lock: lock.take()``.

    path: the lock file; its folder must exist when `take` is called. what: what is locked, for messages. flock(2)
    releases the lock with the owner's process, however that ends. Where a file system has no flock, the file alone is
    the lock: its owner is gone if its process is (on this machine) or if the user deletes the file (on another one).
    """

    def __init__(self, path: Path, what: str | Path, flock: Callable[[int, int], None] = fcntl.flock):
        self.path, self.what, self.flock = path, what, flock
        self.descriptor: int | None = None
        self.folder: int | None = None  # of the lock file, wherever it is moved
        self.by_flock = True  # whether the file system has it
        self.owner: dict | None = None  # this process, as the file names it

    def __enter__(self) -> "WriterLock":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def take(self, wait_seconds: float = 0.0) -> None:
        """Takes the lock, if it is not taken already, and logs whose lock it takes over. wait_seconds: how long to wait
        for the owner. Raises DataError where another process is the owner, and OSError."""
        deadline = time.monotonic() + wait_seconds
        while self.descriptor is None and (owner := self._try()) is not None:
            if time.monotonic() > deadline:
                fix = "" if self.by_flock and owner.get("flock", True) else f"; if it has ended, delete {self.path}"
                raise DataError(f"{self.what} is being written by {_named(owner)}: wait until it ends, or end it{fix}")
            time.sleep(POLL_SECONDS)

    def hold(self) -> bool:
        """Whether this process still has the lock that it took. A lock file that somebody deleted is made again, unless
        another process has taken the lock meanwhile. Raises OSError."""
        if self.descriptor is not None and not self._is_there(self.folder, self.descriptor):
            self._close()
            self._try()
        return self.descriptor is not None

    def release(self) -> None:
        """Gives the lock up, if it was taken."""
        if self.descriptor is not None:
            if self._is_there(self.folder, self.descriptor) and _read(self.descriptor) == self.owner:
                os.unlink(self.path.name, dir_fd=self.folder)
            self._close()

    def _is_there(self, folder: int, descriptor: int) -> bool:
        """Whether an open lock file still has its name."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path.name, dir_fd=folder))
        except OSError:
            return False

    def _try(self) -> dict | None:
        """Takes the lock or returns its owner."""
        folder, descriptor = os.open(self.path.parent, os.O_PATH | os.O_DIRECTORY), -1
        try:
            descriptor = os.open(self.path.name, os.O_RDWR | os.O_CREAT, 0o666, dir_fd=folder)
            mine = _this_process()
            try:
                self.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return _read(descriptor) or {}
            except OSError as error:
                if error.errno not in NO_FLOCK:
                    raise
                mine["flock"] = self.by_flock = False
            if not self._is_there(folder, descriptor):  # its former owner deleted it meanwhile
                return self._try()
            owner = _read(descriptor)
            # A file alone proves nothing about its owner if that process could not hold it by flock.
            if owner is not None and not (mine["flock"] and owner.get("flock", True)) and not _has_ended(owner):
                return owner
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(mine).encode(), 0)
            if not mine["flock"]:
                time.sleep(SETTLE_SECONDS)
                if (last := _read(descriptor)) != mine:
                    return last or {}
            if owner is not None:
                logger.warning(
                    "the lock of %s is taken over: %s has ended without giving it up", self.what, _named(owner)
                )
            self.owner, self.folder, self.descriptor = mine, folder, descriptor
            folder = descriptor = -1
            # A child that inherited the open file would keep the lock after this process has ended.
            os.register_at_fork(after_in_child=self._close)
            return None
        finally:
            for one in (descriptor, folder):
                if one >= 0:
                    os.close(one)

    def _close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            os.close(self.folder)
            self.descriptor = self.folder = None


def _this_process() -> dict:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "flock": True,
        "place": _place(),
        "started": _started(os.getpid()),
    }


def _place() -> str:
    """Within which a process's number means the same process: this boot of this machine, and the container."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")


def _started(process: int) -> str | None:
    """When a process started, in clock ticks since the machine did; None if there is no such process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


def _has_ended(owner: dict) -> bool:
    return owner.get("place") == _place() and _started(owner.get("process", 0)) != owner.get("started")


def _named(owner: dict) -> str:
    if not {"process", "host", "since"} <= owner.keys():
        return "another process"
    return f"process {owner['process']} on {owner['host']} since {owner['since']}"


def _read(descriptor: int) -> dict | None:
    """The owner that the file names; None if it is empty, an empty dictionary if it is damaged."""
    content = os.pread(descriptor, 65536, 0)
    try:
        found = json.loads(content) if content else None
    except ValueError:
        found = {}
    return found if isinstance(found, dict | None) else {}
