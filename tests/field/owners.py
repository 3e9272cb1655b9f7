"""Lock files of owners that live, that have ended, and on other machines; and file systems without flock."""

import errno
import json
import os
from pathlib import Path

from data.locks import _this_process


def lock_of(path: Path, **changes) -> Path:
    """The lock file as this process would write it, with changes; nobody holds it by flock."""
    path.write_text(json.dumps({**_this_process(), **changes}))
    return path


ENDED = {"process": 2**22 + 1}  # above the kernel's largest number of a process
REUSED_NUMBER = {"process": os.getpid(), "started": "1"}  # a process that has the number now
OTHER_MACHINE = {**ENDED, "host": "node-7", "place": "another boot"}  # its process is not one of this machine


def no_flock(descriptor: int, operation: int) -> None:
    """flock(2) of a file system that has none."""
    raise OSError(errno.ENOSYS, "Function not implemented")
