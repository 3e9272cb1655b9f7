"""Which members of a tar form a sample.

webdataset ends a sample's key at the first dot of a name, so that IMG.0000.png and IMG.0001.png are one sample there.
Here a key ends where a known suffix begins: a dot in a name is a dot in a name.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

from data.samples import ANY_IMAGE, CODES, UNREAD_IMAGES, is_content

# The suffixes that end a key where no source says which it uses. UNREAD_IMAGES: a GIF is a sample that cannot be used,
# and not a member of the picture before it.
KNOWN_SUFFIXES = frozenset((*ANY_IMAGE, *UNREAD_IMAGES, CODES, "txt", "cls", "json"))
METADATA = re.compile(r"__[^/]*__$")  # webdataset's own members
METADATA_FOLDER = re.compile(r"__[^/]*__/")  # or a class, such as __background__, if there are pictures in it

T = TypeVar("T")


class MemberName(NamedTuple):
    """A member's name in parts: KEY.SUFFIX, the suffix in lower case."""

    key: str
    suffix: str
    is_known: bool


class Group(NamedTuple):
    """A sample: its key, and its members as (suffix, value)."""

    key: str
    members: list[tuple[str, T]]


def split_name(path: str, suffixes: frozenset[str] = KNOWN_SUFFIXES) -> MemberName | None:
    """The longest known suffix of a name, or the part behind its last dot; None if it belongs to no sample: a name
    without a suffix, a hidden one, or webdataset's own."""
    folder, slash, name = path.rpartition("/")
    if name.startswith(".") or "." not in name or METADATA.match(path):
        return None
    dot = name.find(".")
    while dot > 0:
        if (suffix := name[dot + 1 :].lower()) in suffixes:
            return MemberName(folder + slash + name[:dot], suffix, True)
        dot = name.find(".", dot + 1)
    stem, _, suffix = name.rpartition(".")
    return MemberName(folder + slash + stem, suffix.lower(), False)


def key_to_first_dot(path: str) -> str:
    """The key by webdataset's rule."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def grouped(members: Iterable[tuple[str, T]], suffixes: frozenset[str] = KNOWN_SUFFIXES) -> Iterator[Group]:
    """The samples of members (name, value): consecutive ones with the same key.

    A member KEY.part.npy, whose suffix is not known, belongs to the sample KEY before or after it.
    """
    for group in _grouped(members, suffixes):
        if not METADATA_FOLDER.match(group.key) or any(map(_is_picture, (suffix for suffix, _ in group.members))):
            yield group


def _is_picture(suffix: str) -> bool:
    return is_content(suffix) or suffix in UNREAD_IMAGES


def _grouped(members: Iterable[tuple[str, T]], suffixes: frozenset[str]) -> Iterator[Group]:
    key, own, waiting = None, [], []  # waiting: members without a known suffix, before the sample they may belong to
    for path, value in members:
        name = split_name(path, suffixes)
        if name is None:
            continue
        if name.is_known and name.key == key:
            own.append((name.suffix, value))
        elif not name.is_known and key is not None and path.startswith(f"{key}."):
            own.append((path[len(key) + 1 :].lower(), value))
        else:
            if key is not None:
                yield Group(key, own)
            key, own = None, []
            if name.is_known:
                first = len(waiting)
                while first and waiting[first - 1][1].startswith(f"{name.key}."):
                    first -= 1
                yield from _unclaimed(waiting[:first])
                own = [(before[len(name.key) + 1 :].lower(), one) for _, before, one in waiting[first:]]
                key, waiting = name.key, []
                own.append((name.suffix, value))
            else:
                if waiting and key_to_first_dot(waiting[0][1]) != key_to_first_dot(path):
                    yield from _unclaimed(waiting)
                    waiting = []
                waiting.append((name, path, value))
    if key is not None:
        yield Group(key, own)
    yield from _unclaimed(waiting)


def _unclaimed(waiting: list[tuple[MemberName, str, T]]) -> Iterator[Group]:
    for key, several in itertools.groupby(waiting, key=lambda one: one[0].key):
        yield Group(key, [(name.suffix, value) for name, _, value in several])
