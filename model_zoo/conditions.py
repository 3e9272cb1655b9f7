"""Which conditions of a generator were trained: its classes, and having none, which guidance needs.

A row of the class table that no image trained gives codes like any other row, so nothing in a sample shows it. A model
therefore keeps ``trained_c``, a bool ``(classes + 1,)``: whether each class was trained and, at the end, no class.
"""

import re

import torch
from torch import Tensor

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
