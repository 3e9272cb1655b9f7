"""Which conditions of a generator were trained: its classes; having none, which guidance needs; and its grids.

A row of the class table that no image trained gives codes like any other row, so nothing in a sample shows it. A model
therefore keeps ``trained_c``, a bool ``(classes + 1,)``: whether each class was trained and, at the end, no class. A
model with a table of grids also keeps ``trained_g``, a bool for each of ``config.all_grids``.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from model_zoo.config import TransformerConfig, grid_name

NONE = "none"  # stands for no class


def assumed_trained(classes: int, label_dropout: float) -> Tensor:
    """``trained_c`` of a run that did not record it, from the probability of dropping a class."""
    trained_c = torch.full((classes + 1,), label_dropout < 1)
    trained_c[classes] = label_dropout > 0
    return trained_c


def parse_classes(text: str, classes: int) -> list[int]:
    """Distinct classes in order, of text such as ``1,2,7-9`` or ``none``; the number of classes stands for no class.
    Raises ValueError, which names the part that is wrong."""
    chosen = {}
    for part in map(str.strip, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if part == NONE:
            first = last = classes
        elif not first <= last < classes:
            raise ValueError(f"{part!r} is not a class from 0 to {classes - 1}, nor a range such as 0-9")
        chosen.update(dict.fromkeys(range(first, last + 1)))
    return list(chosen)


def describe_classes(trained_c: Tensor) -> str:
    """The text that `parse_classes` reads."""
    *trained, none = trained_c.tolist()
    parts, first = [], None
    for n, has in enumerate([*trained, False]):
        if has and first is None:
            first = n
        elif not has and first is not None:
            parts.append(str(first) if first == n - 1 else f"{first}-{n - 1}")
            first = None
    return ",".join(parts + [NONE] * none)


def trained_from(text: str, classes: int) -> Tensor:
    """``trained_c`` of the text of `describe_classes`. Raises ValueError."""
    trained_c = torch.zeros(classes + 1, dtype=torch.bool)
    trained_c[parse_classes(text, classes) if text else []] = True
    return trained_c


def trained_grids(config: TransformerConfig, trained_g: Tensor | None) -> tuple[tuple[int, int], ...]:
    """The grids (rows, columns) that were trained; all where that is not known."""
    grids = config.all_grids
    return grids if trained_g is None else tuple(grids[n] for n in trained_g.nonzero()[:, 0].tolist())


def describe_grids(grids: Sequence[Sequence[int]]) -> str:
    """Such as ``16x16,12x20``, the text that `trained_grids_from` reads."""
    return ",".join(map(grid_name, grids))


def trained_grids_from(text: str, grids: Sequence[str]) -> Tensor:
    """``trained_g`` of the text of `describe_grids`. grids: ``config.grids``. Raises ValueError."""
    trained = text.split(",") if text else []
    if unknown := [grid for grid in trained if grid not in grids]:
        raise ValueError(f"{unknown[0]!r} is not among the grids {','.join(grids)}")
    return torch.tensor([grid in trained for grid in grids])
