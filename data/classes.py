"""Which number a class has: classes.json, a mapping from names to numbers that packing writes beside tars.

Data sets that are used together must agree on it. Where each numbers the class folders that it happens to have, a class
may have another number in each.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from data.addresses import is_remote
from data.errors import DataError

CLASSES_NAME = "classes.json"


def read_classes(path: str | Path) -> dict[str, int]:
    """Name -> number of a classes.json. Raises DataError."""
    try:
        numbers = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"cannot read the classes {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"the classes {path} are not JSON: name a classes.json that packing wrote") from error
    is_mapping = isinstance(numbers, dict) and all(type(number) is int and number >= 0 for number in numbers.values())
    if not is_mapping or not numbers or len(set(numbers.values())) < len(numbers):
        raise DataError(f'the classes {path} must give each name its own number from 0, as in {{"cat": 0, "dog": 1}}')
    return numbers


def classes_beside(urls: Iterable[str]) -> list[tuple[str, dict[str, int]]]:
    """The path and the content of each classes.json beside local tars. Raises DataError."""
    folders = dict.fromkeys(os.path.dirname(url) for url in urls if not is_remote(url))
    paths = [os.path.join(folder, CLASSES_NAME) for folder in folders]
    return [(path, read_classes(path)) for path in paths if os.path.isfile(path)]


def merged_classes(parts: Iterable[tuple[str, dict[str, int]]]) -> dict[str, int] | None:
    """All names and numbers of the parts (what messages call one, name -> number); None if there is no part.

    Raises DataError if two parts give a class different numbers, or a number different classes.
    """
    numbers: dict[str, int] = {}
    first_with: dict[int, tuple[str, str]] = {}  # number -> the class, and the part that has it
    for part, classes in parts:
        for name, number in classes.items():
            other, where = first_with.setdefault(number, (name, part))
            if other != name:
                raise _disagree(f"class {number} is {name} in {part}, and {other} in {where}")
            if numbers.setdefault(name, number) != number:
                where = first_with[numbers[name]][1]
                raise _disagree(f"{name} is class {number} in {part}, and {numbers[name]} in {where}")
    return numbers or None


def _disagree(what: str) -> DataError:
    fix = "pack (or tokenize) one of them again with --classes and the classes.json of the other"
    return DataError(f"{what}: {fix}, or number folders of images by data.classes")
