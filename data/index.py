"""Index files: where each sample of many tars lies, so that tars need not be scanned.

An index is one safetensors file, which is memory-mapped. Its tensors, for S shards and N samples in total:

    names   uint8  (*,)     the shards' names, relative to the root, joined by newlines, in UTF-8
    root    uint8  (*,)     the folder or URL that the names are relative to, as it was when the index was written
    bytes   int64  (S,)     size of each tar
    samples int64  (S,)     samples in each tar
    sha256  uint8  (S, 32)  of each tar's content
    starts  int64  (N,)     first byte of each sample in its tar, headers included
    stops   int64  (N,)     first byte after each sample
    keys    uint64 (N,)     hash of each sample's key (`key_hash`)
    sizes   int32  (N, 2)   height and width of each sample's image as it is displayed, in pixels, or rows and columns
                            of a token sample's codes; 0: unknown. Missing in older indexes, and in those of tars
                            whose samples hold both.
    image   uint8  (*,)     suffixes of the images that were measured, joined by commas; missing where any was
"""

import glob
import hashlib
import itertools
import json
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from data.addresses import is_remote, redacted
from data.errors import DataError
from data.unfinished import complete_file, remove_dead

INDEX_NAME = "index.safetensors"
DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "U64": np.uint64}
MOST_HEADER_BYTES = 1 << 16
TENSORS = ("names", "root", "bytes", "samples", "sha256", "starts", "stops", "keys")
OPTIONAL = ("sizes", "image")


def key_hash(key: str) -> int:
    """64 bits of a sample's key."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def key_hashes(keys: Iterable[str]) -> np.ndarray:
    """uint64 hashes of keys, as in an index."""
    return np.array(list(map(key_hash, keys)), np.uint64)


@dataclass(frozen=True, eq=False)
class SampleTable:
    """Where a tar's samples lie: sample n is in bytes starts_n[n] to stops_n[n].

    keys_n: hashes of the keys; bytes: size of the tar; sizes_n2: height and width of each image, or rows and columns of
    its codes, 0 where the header cannot be read; None if nobody has looked. sha256: of the tar, if an index tells it.
    """

    bytes: int
    starts_n: np.ndarray
    stops_n: np.ndarray
    keys_n: np.ndarray
    sizes_n2: np.ndarray | None = None
    sha256: str | None = None

    def __len__(self):
        return len(self.starts_n)


def common_root(urls: list[str]) -> str:
    """The deepest folder that contains all the paths or URLs, with a trailing /; queries are ignored."""
    folders = [posixpath.dirname(without_query(url)).split("/") for url in urls]
    levels = zip(*folders, strict=False)
    shared = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, levels)]
    return "/".join(shared) + "/" if shared else ""


def without_query(url: str) -> str:
    """A URL without ?query and #fragment; a local path, absolute."""
    return re.split(r"[?#]", url, maxsplit=1)[0] if is_remote(url) else os.path.abspath(url)


def write_index(
    path: str | Path,
    urls: list[str],
    tables: list[SampleTable],
    digests: list[str],
    image: Sequence[str] = (),
) -> None:
    """Write the index of these tars. image: the suffixes of images, if they were named.

    If the process is killed, an old index stays intact. Raises DataError."""
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    root = common_root(urls)
    names = [without_query(url).removeprefix(root) for url in urls]
    if any("\n" in name for name in names):
        raise DataError("a tar's name contains a line break: rename it")

    def text(value: str) -> np.ndarray:
        return np.frombuffer(value.encode("utf-8", "surrogateescape") or b" ", np.uint8)

    def joined(name: str, dtype) -> np.ndarray:
        return np.concatenate([getattr(table, name) for table in tables] or [np.zeros(0)]).astype(dtype)

    tensors = {
        "names": text("\n".join(names)),
        "root": text(redacted(root)),
        "bytes": np.array([table.bytes for table in tables], np.int64),
        "samples": np.array([len(table) for table in tables], np.int64),
        "sha256": np.frombuffer(bytes.fromhex("".join(digests)), np.uint8).reshape(-1, 32),
        "starts": joined("starts_n", np.int64),
        "stops": joined("stops_n", np.int64),
        "keys": joined("keys_n", np.uint64),
    }
    if all(table.sizes_n2 is not None for table in tables):
        tensors["sizes"] = joined("sizes_n2", np.int32).reshape(-1, 2)
    if image:
        tensors["image"] = text(",".join(image))
    try:
        remove_dead(path.parent, glob.escape(path.name))
        with complete_file(path) as unfinished:
            unfinished.write_bytes(save(tensors))  # `save_file` makes it readable for the owner only
    except OSError as error:
        raise DataError(f"cannot write the index {path}: {error.strerror}; choose another file") from error


def is_index(path: Path) -> bool:
    """Whether a file has the header of an index; its content may be damaged. Raises OSError."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            return set(TENSORS) <= json.loads(file.read(min(length, MOST_HEADER_BYTES))).keys()
        except (ValueError, AttributeError):
            return False


class Index:
    """An open index file. Raises DataError for a damaged file and for one that is not an index."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.tensors = _mapped(self.path)
        self.names = bytes(self.tensors["names"]).decode("utf-8", "surrogateescape").split("\n")
        self.root = bytes(self.tensors["root"]).decode("utf-8", "surrogateescape").strip()
        self.number = {name: number for number, name in enumerate(self.names)}
        self.first = np.concatenate([[0], np.cumsum(self.tensors["samples"])])
        of_shards = {len(self.names), *(len(self.tensors[name]) for name in ("bytes", "samples", "sha256"))}
        of_samples = {
            int(self.first[-1]),
            *(len(self.tensors[name]) for name in ("starts", "stops", "keys", "sizes") if name in self.tensors),
        }
        if len(of_shards) > 1 or len(of_samples) > 1 or self.tensors["samples"].min() < 0:
            raise DataError(f"the index {path} is damaged: write it again with `ibq shards check --write-index`")

    def __len__(self):
        return len(self.names)

    def table(self, url: str, root: str, image: Sequence[str] = ()) -> SampleTable | None:
        """A tar's table, or None if the tar is not in the index. root: the common root of all tars in use. image: the
        suffixes of the reader's images, if it names any: sizes of images with another suffix are left out."""
        number = self.find(url, root)
        if number is None:
            return None
        samples = slice(self.first[number], self.first[number + 1])
        starts_n, stops_n, keys_n = (self.tensors[name][samples] for name in ("starts", "stops", "keys"))
        measured = bytes(self.tensors["image"]).decode().split(",") if "image" in self.tensors else image
        # The first suffix is that of nearly all images; training notices another size of the rest (`check_bucket`).
        is_same = not image or image[0] == measured[0]
        sizes_n2 = self.tensors["sizes"][samples] if "sizes" in self.tensors and is_same else None
        sha256 = self.tensors["sha256"][number].tobytes().hex()
        return SampleTable(int(self.tensors["bytes"][number]), starts_n, stops_n, keys_n, sizes_n2, sha256)

    def sha256(self, url: str, root: str) -> str | None:
        """The SHA-256 of a tar's content when the index was written, or None."""
        number = self.find(url, root)
        return None if number is None else self.tensors["sha256"][number].tobytes().hex()

    def find(self, url: str, root: str) -> int | None:
        """The tar's number in the index, or None. The tar is looked up by its name relative to the index's own folder,
        the root that was indexed, and, for tars that have moved, the root in use."""
        url = without_query(url)
        for folder in (f"{self.path.absolute().parent}/", self.root, root):
            if folder and url.startswith(folder) and (number := self.number.get(url.removeprefix(folder))) is not None:
                return number
        return None


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """The memory-mapped tensors of a safetensors file; safetensors itself would copy them for NumPy."""
    tensors = {}
    try:
        file = np.memmap(path, np.uint8, mode="r")
        header_bytes = int.from_bytes(file[:8].tobytes(), "little")
        header, content = json.loads(file[8 : 8 + header_bytes].tobytes()), file[8 + header_bytes :]
        for name in (*TENSORS, *(name for name in OPTIONAL if name in header)):
            entry = header[name]
            start, stop = entry["data_offsets"]
            if stop > len(content):
                raise DataError(f"the index {path} is cut off: copy it again, or write it again")
            tensors[name] = np.asarray(content[start:stop]).view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except OSError as error:
        raise DataError(f"cannot read the index {path}: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not an index: write one with `ibq shards check --write-index`") from error
    return tensors
