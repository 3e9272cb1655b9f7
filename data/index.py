"""Index files: where each sample of many tars lies, so that nothing has to be searched for or read twice.

One safetensors file, mapped into memory and read where it is looked at. Its tensors, for S shards and N samples in all:

    names   uint8  (*,)     the shards' names, relative to the root, joined by newlines, in UTF-8
    root    uint8  (*,)     the folder or URL that the names are relative to, as it was when the index was written
    bytes   int64  (S,)     size of each tar
    samples int64  (S,)     samples in each tar
    sha256  uint8  (S, 32)  of each tar's content
    starts  int64  (N,)     first byte of each sample in its tar, headers included
    stops   int64  (N,)     first byte behind each sample
    keys    uint64 (N,)     hash of each sample's key (`key_hash`)
"""

import hashlib
import itertools
import json
import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from data.errors import DataError
from data.storage import is_remote, redacted

INDEX_NAME = "index.safetensors"
DTYPES = {"U8": np.uint8, "I64": np.int64, "U64": np.uint64}
TENSORS = ("names", "root", "bytes", "samples", "sha256", "starts", "stops", "keys")


def key_hash(key: str) -> int:
    """64 bits of a sample's key."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


@dataclass(frozen=True, eq=False)
class Table:
    """A tar's samples: n lies in bytes starts_n[n] to stops_n[n]; keys_n: hashes of the keys; bytes: the tar's size."""

    bytes: int
    starts_n: np.ndarray
    stops_n: np.ndarray
    keys_n: np.ndarray

    def __len__(self):
        return len(self.starts_n)


def common_root(urls: list[str]) -> str:
    """The folder that holds all the paths or URLs, with / at its end; queries do not count."""
    folders = [posixpath.dirname(without_query(url)).split("/") for url in urls]
    shared = [
        names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))
    ]
    return "/".join(shared) + "/" if shared else ""


def without_query(url: str) -> str:
    """A URL without ?query and #fragment; a local path, absolute."""
    return re.split(r"[?#]", url, maxsplit=1)[0] if is_remote(url) else os.path.abspath(url)


def write_index(path: str | Path, urls: list[str], tables: list[Table], digests: list[str]) -> None:
    """Writes the index of these tars; a kill in between leaves the former file whole. Raises DataError."""
    path = Path(path)
    root = common_root(urls)
    names = [without_query(url).removeprefix(root) for url in urls]
    if any("\n" in name for name in names):
        raise DataError("a tar's name holds a line break: rename it")

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
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    try:
        save_file(tensors, unfinished)
        os.chmod(unfinished, 0o666 & ~_umask())  # safetensors lets the owner alone read it
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"cannot write the index {path}: {reason}; name another place") from error
    finally:
        unfinished.unlink(missing_ok=True)


class Index:
    """An index file, opened. Raises DataError for one that is damaged or of another kind."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.tensors = _mapped(self.path)
        self.names = bytes(self.tensors["names"]).decode("utf-8", "surrogateescape").split("\n")
        self.root = bytes(self.tensors["root"]).decode("utf-8", "surrogateescape").strip()
        self.number = {name: number for number, name in enumerate(self.names)}
        self.first = np.concatenate([[0], np.cumsum(self.tensors["samples"])])
        of_shards = {len(self.names), *(len(self.tensors[name]) for name in ("bytes", "samples", "sha256"))}
        of_samples = {int(self.first[-1]), *(len(self.tensors[name]) for name in ("starts", "stops", "keys"))}
        if len(of_shards) > 1 or len(of_samples) > 1 or self.tensors["samples"].min() < 0:
            raise DataError(f"the index {path} is damaged: write it again with `ibq shards check --write-index`")

    def __len__(self):
        return len(self.names)

    def table(self, url: str, root: str) -> Table | None:
        """What the index knows of a tar, or None. root: the common root of all tars that were named with it."""
        number = self.find(url, root)
        if number is None:
            return None
        here = slice(self.first[number], self.first[number + 1])
        return Table(
            int(self.tensors["bytes"][number]),
            self.tensors["starts"][here],
            self.tensors["stops"][here],
            self.tensors["keys"][here],
        )

    def sha256(self, url: str, root: str) -> str | None:
        """The digest of a tar's content when the index was written."""
        number = self.find(url, root)
        return None if number is None else self.tensors["sha256"][number].tobytes().hex()

    def find(self, url: str, root: str) -> int | None:
        """The tar's place in the index: by its name under the index's own folder, under the root that was indexed, or,
        for a set that has moved, under the root that is used now."""
        url = without_query(url)
        for folder in (f"{self.path.absolute().parent}/", self.root, root):
            if folder and url.startswith(folder) and (number := self.number.get(url.removeprefix(folder))) is not None:
                return number
        return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, mapped and not read; safetensors itself copies them for NumPy."""
    damaged = DataError(f"{path} is no index: write it with `ibq shards check --write-index`")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if not 0 < length <= size - 8:
                raise damaged
            header = json.loads(file.read(length))
        content = np.memmap(path, np.uint8, mode="r", offset=8 + length) if size > 8 + length else np.zeros(0, np.uint8)
    except OSError as error:
        raise DataError(f"cannot read the index {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise damaged from error
    tensors = {}
    for name in TENSORS:
        try:
            entry = header[name]
            start, stop = entry["data_offsets"]
            if stop > len(content):
                raise DataError(f"the index {path} is cut off: copy it again, or write it anew")
            tensors[name] = np.asarray(content[start:stop]).view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged from error
    return tensors
