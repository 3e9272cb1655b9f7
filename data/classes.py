"""Which number a class has: classes.json, a mapping from names to numbers that packing writes beside tars.

Data sets that are used together must agree on it. Where each numbers the class folders that it happens to have, a class
may have another number in each.
"""

import json
import logging
import os
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path

from data import storage
from data.addresses import is_remote, redacted
from data.errors import DataError, MissingError, UnreadableError
from data.parallel import in_threads
from data.storage import DEFAULT_TIMEOUTS, Timeouts

logger = logging.getLogger(__name__)

CLASSES_NAME = "classes.json"


def read_classes(place: str | Path, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> dict[str, int]:
    """Name -> number of a classes.json, by its path or URL. Raises DataError."""
    return _parsed(_content(str(place), timeouts), redacted(str(place)))


def _content(url: str, timeouts: Timeouts) -> bytes:
    version = storage.version(url, timeouts)
    return storage.read(url, 0, version.bytes, timeouts, version)


def _parsed(content: bytes, path: str) -> dict[str, int]:
    try:
        numbers = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the classes {path} are not JSON ({error}): name a classes.json that packing wrote") from error
    is_mapping = isinstance(numbers, dict) and all(type(number) is int and number >= 0 for number in numbers.values())
    if not is_mapping or not numbers or len(set(numbers.values())) < len(numbers):
        raise DataError(f'the classes {path} must give each name its own number from 0, as in {{"cat": 0, "dog": 1}}')
    return numbers


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. Python itself would take the last of two equal names."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def classes_beside(urls: Iterable[str], timeouts: Timeouts = DEFAULT_TIMEOUTS) -> list[tuple[str, dict[str, int]]]:
    """The place and the content of each classes.json beside tars. Where a server gives no content, or a web page, there
    may be none: this is logged. Raises DataError."""
    folders: dict[str, str] = {}  # with the query of one of their tars, which may be a signature for the folder
    for url in urls:
        path, query = re.fullmatch(r"([^?#]*)(.*)", url, re.DOTALL).groups() if is_remote(url) else (url, "")
        folders.setdefault(posixpath.dirname(path), query)

    def find(folder: str) -> tuple[str, dict[str, int]] | None:
        place = posixpath.join(folder, CLASSES_NAME) + folders[folder]
        if not is_remote(place):
            return (place, read_classes(place, timeouts)) if os.path.isfile(place) else None
        try:
            content = _content(place, timeouts)
            if content.lstrip()[:1] != b"<":
                return redacted(place), _parsed(content, redacted(place))
            problem = f"{redacted(place)} is a web page"
        except MissingError:
            return None
        except UnreadableError as error:
            problem = str(error)
        logger.warning("%s; until it can be read, nothing checks the classes of its tars", problem)
        return None

    return [found for found in in_threads(find, folders, threads=8) if found]


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
