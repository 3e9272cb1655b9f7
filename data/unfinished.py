"""Files that appear under their names only when they are complete.

Until then their content is in a temporary file beside them. flock(2) shows whether its writer still lives: a process
that is killed removes nothing, but gives up its locks.
"""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from data.file_names import fitted

SUFFIX = ".unfinished"
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of file systems without flock


def unfinished(path: Path) -> Path:
    """The temporary file next to ``path`` that holds its content until it is complete. Each process has its own."""
    return path.with_name(fitted(".", path.name, f".{socket.gethostname()}-{os.getpid()}{SUFFIX}"))


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path, and renames that file to ``path`` at the end of the context; after an error it is
    removed. Where ``path`` is a link, the file that it names is replaced and the link stays. Raises OSError."""
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = unfinished(path)
    with open(temporary, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
        try:
            file.truncate(0)
            yield temporary
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def remove_unfinished(folder: Path, *names: str) -> None:
    """Removes what killed jobs left of files of these names, which may be patterns. Only for their one writer. Raises
    OSError."""
    for path in _temporary(folder, names):
        path.unlink()


def remove_dead(folder: Path, *names: str) -> None:
    """Like `remove_unfinished`, for files that many processes may write: those of live processes stay. Without flock
    all stay. Raises OSError."""
    remove_abandoned(_temporary(folder, names))


def _temporary(folder: Path, names: Iterable[str]) -> list[Path]:
    return [path for name in names for path in folder.glob(f".{name}.*{SUFFIX}")]


def remove_abandoned(paths: Iterable[Path]) -> None:
    """Removes those of the files that no live process has locked. Raises OSError."""
    for path in paths:
        try:
            with locked_file(path, wait=False) as abandoned:
                if abandoned is not None:
                    path.unlink()
        except OSError as error:
            # Whether its writer lives cannot be known, or it belongs to another user, whose own jobs remove it.
            if error.errno not in (*NO_FLOCK, errno.EACCES, errno.EPERM):
                raise


@contextlib.contextmanager
def locked_file(path: Path, wait: bool = True) -> Iterator[BinaryIO | None]:
    """The file, created if missing and locked for this process until the block or the process ends.

    With wait=False: None if another process holds the lock.
    """
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                acquired = True
            except BlockingIOError:
                acquired = False
            # The previous holder may have renamed or removed the file, and another process may have created a new one.
            if not acquired or _is_at(file, path):
                yield file if acquired else None
                return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
