"""Disks that are full for a while, and logs that a full disk or a kill has damaged."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WHOLE = '{"step": 1, "loss": 0.5}\n', '{"step": 2, "loss": 0.25}\n'
CUT_OFF = '{"step": 3, "lo'


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
