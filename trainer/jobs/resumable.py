"""What jobs share that write a folder or file in parts, and go on where a former one ended."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer import TrainerError

SHOWN = 60  # characters of a setting's two values


@contextlib.contextmanager
def writing(out: Path, option: str = "--out") -> Iterator[None]:
    """What the system refuses becomes a TrainerError of one line; `option` chooses another place."""
    try:
        yield
    except OSError as error:
        raise TrainerError(
            f"cannot write {out}: {error.strerror or error}; mend that, or choose another place with {option}"
        ) from error


def check_same(out: Path, holds: str, former: dict, now: dict, again: Callable[[str, dict], str]) -> None:
    """Raises TrainerError where a job that would go on has other settings than the former one.

    holds: what is in ``out``; again: what to give for the setting of that name, so that it is the former's."""
    for name, value in now.items():
        if former.get(name) != value:
            before, after = (json.dumps(settings.get(name)) for settings in (former, now))
            what = f"{name} {before}, now {after}" if len(before + after) < SHOWN else f"other {name}"
            mend = f"give {again(name, former)} again to go on, or name another place with --out"
            raise TrainerError(f"{out} holds {holds} of other settings ({what}): {mend}")
