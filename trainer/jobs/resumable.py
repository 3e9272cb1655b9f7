"""What jobs share that write their output in parts and, when started again, write the missing parts only."""

import json
from collections.abc import Callable
from pathlib import Path

from trainer import TrainerError

SHOWN = 60  # characters: longer values are not shown in the message


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
