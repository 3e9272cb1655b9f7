"""Whether the images of `data.val` are among those that a run was trained on. No bucket is listed, and nothing needs to
exist: a run may be evaluated where its training data are not."""

import functools
import os
from collections.abc import Callable, Iterator

from data.addresses import is_remote
from data.config import DataConfig
from data.folder_reader import is_folder_of_images, tars_in
from data.index import without_query
from data.shards import BUNDLED, LIST_SUFFIX, existing_folder, expand_braces, matching, read_list
from data.source_configs import placed_sources
from data.tar_reader import PIPE

TREE, TARS = "/**", "/*"  # ends of places: all files below a folder, and the tars directly in one


def is_trained_on(config: DataConfig) -> bool:
    """Whether `data.val` and a source have a tar, a zip file or a folder in common: then its images are not held out.
    Raises DataError for a folder or a list that cannot be read."""
    if not (config.train or config.sources):
        return False
    resolve = functools.cache(os.path.realpath)
    trained = {place for one in placed_sources(config) for place in _places(one.root, resolve)}
    validated = set(_places(config.val, resolve))
    return any(holder in trained for place in validated for holder in _holders(place)) or any(
        holder in validated for place in trained for holder in _holders(place)
    )


def _places(spec, resolve: Callable[[str], str]) -> Iterator[str]:
    """The tars, zip files and images that `spec` names, with links resolved, and folders with the end TREE or TARS.
    resolve: `os.path.realpath` of a folder, remembered."""
    spec = os.fspath(spec) if isinstance(spec, os.PathLike) else spec
    if not isinstance(spec, str):
        for part in spec or ():
            yield from _places(part, resolve)
    elif spec.startswith((BUNDLED, PIPE)):
        yield from expand_braces(spec)
    elif is_remote(spec):
        urls = map(without_query, expand_braces(spec))
        yield from (url if url.endswith(".tar") else url.rstrip("/") + TARS for url in urls)
    else:
        yield from _local_places(os.path.expanduser(spec), resolve)


def _local_places(spec: str, resolve: Callable[[str], str]) -> Iterator[str]:
    if os.path.isdir(spec):
        if is_folder_of_images(spec):
            yield resolve(spec) + TREE
        else:
            yield from (_resolved(str(tar), resolve) for tar in tars_in(spec))
    elif os.path.isfile(spec):
        if spec.endswith(LIST_SUFFIX):
            yield from _places(read_list(spec), resolve)
        else:
            yield _resolved(spec, resolve)
    else:
        there = existing_folder(spec)
        for one in (there + rest for rest in expand_braces(spec[len(there) :])):
            found = matching(one)
            for path in found:
                yield from _local_places(path, resolve)
            if not found:
                is_file = one.lower().endswith((".tar", ".zip"))
                yield os.path.realpath(one) + ("" if is_file else TREE)


def _resolved(path: str, resolve: Callable[[str], str]) -> str:
    """`os.path.realpath`, which asks the disk for each folder of each path."""
    folder, name = os.path.split(path)
    return os.path.realpath(path) if os.path.islink(path) else os.path.join(resolve(folder or "."), name)


def _holders(place: str) -> Iterator[str]:
    """The place itself, and all folders that hold what it names."""
    yield place
    folder = os.path.dirname(place)
    yield folder + TARS
    while folder:
        yield folder + TREE
        above = os.path.dirname(folder)
        if above == folder:
            return
        folder = above
