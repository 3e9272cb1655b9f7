"""Disks that are small, full for a while, or read-only, and logs that a full disk or a kill has damaged."""

import ctypes
import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

WHOLE = '{"step": 1, "loss": 0.5}\n', '{"step": 2, "loss": 0.25}\n'
CUT_OFF = '{"step": 3, "lo'
MS_REMOUNT, MNT_DETACH = 32, 2  # of mount(2) and umount(2)
LIBC = ctypes.CDLL(None, use_errno=True)


def mount(place: Path, size_bytes: int, flags: int = 0) -> int:
    """Mounts a tmpfs; returns 0 or the error number."""
    options = f"size={size_bytes}".encode()
    return LIBC.mount(b"tmpfs", bytes(place), b"tmpfs", flags, options) and ctypes.get_errno()


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """os.open opens no file in the folder for reading and writing, as on a read-only disk; no permission stops root."""
    os_open = os.open

    def open_to_read(path, flags, *mode, dir_fd=None):
        place = Path(path if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path))
        if flags & os.O_RDWR and place.is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return os_open(path, flags, *mode, dir_fd=dir_fd)

    with patch("os.open", open_to_read):
        yield


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """No file of this process can grow beyond this size: a write ends in the middle, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def cut_off_log(path: Path) -> Path:
    """Two lines, and a third one in whose middle its writer ended."""
    path.write_text("".join(WHOLE) + CUT_OFF)
    return path


def glued_log(path: Path) -> Path:
    """Half of step 3 and the whole of step 4 in one line, with whole lines around it."""
    path.write_text("".join(WHOLE) + CUT_OFF + '{"step": 4, "loss": 0.1}\n{"step": 5, "loss": 0.05}\n')
    return path
