"""The branches of a run: which checkpoint each of its checkpoints continues.

Resuming from an earlier checkpoint begins a new branch. The later checkpoints of the branch that was left stay in the
folder. A file beside the checkpoints records the predecessor of each of them. It is no part of the checkpoints, because
the branch of a checkpoint must be known when that one is damaged or gone.
"""

import json
from itertools import pairwise
from pathlib import Path

BRANCHES = "branches.json"  # name of a checkpoint -> name of the one that it continues, or null


def read_branches(checkpoints: Path) -> tuple[dict[str, str | None], str | None]:
    """The record, and what is wrong with it, or None. A damaged or missing one (of an earlier version) is empty."""
    file = checkpoints / BRANCHES
    try:
        record = json.loads(file.read_bytes())
        if not isinstance(record, dict) or not all(_is_earlier(before, name) for name, before in record.items()):
            raise ValueError("no record of branches")
        return record, None
    except (FileNotFoundError, NotADirectoryError):
        return {}, None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        return {}, f"{file} cannot be read ({reason}): all checkpoints are taken for one branch"


def with_checkpoint(record: dict, names: list[str], new: str, before: str | None) -> dict[str, str | None]:
    """The record after ``new``, which continues ``before``, is written.

    names: those of the existing checkpoints, in order. Others are left out of the record. Those that the record does
    not know continue the one before them in order.
    """
    chain = {later: earlier for earlier, later in pairwise([None, *names])} | record
    # A new checkpoint may replace one of a branch that was left; it is no part of that branch.
    gone = {name: chain.pop(name) for name in set(chain) - set(names) | ({new} & set(chain))}
    for name, earlier in chain.items():
        while earlier in gone:
            earlier = gone[earlier]
        chain[name] = earlier
    while before in gone:
        before = gone[before]
    return chain | {new: before}


def written_last(record: dict, names: list[str]) -> str:
    """The existing checkpoint that was written last: `with_checkpoint` puts it at the end of the record."""
    last = next(reversed(record), None)
    while last is not None and last not in names:  # it was not completed, or is gone
        last = record.get(last)
    return names[-1] if last is None else last


def branch(record: dict, names: list[str], last: str) -> list[str]:
    """The existing checkpoints that led to ``last``, and that one, in order. A checkpoint that the record does not know
    continues the one before it in order."""
    found = [last]
    while last is not None:
        earlier = max((name for name in names if name < last), default=None)
        last = record.get(last, earlier)
        if last in names:
            found.insert(0, last)
    return found


def _is_earlier(before, name: str) -> bool:
    """Whether a checkpoint can continue another, so that following a record comes to an end."""
    return before is None or (isinstance(before, str) and before < name)
