"""Checkpoint files of sharded tensors, written and read by any number of processes.

A checkpoint is a set of named tensors. Each process writes the shards that it holds, contiguous ranges of the flattened
tensors, into its own safetensors file. A reader collects the ranges that it needs from all files. Writers and readers
may therefore shard tensors differently: by rows (FSDP2, a sharded codebook), as ranges of a flat buffer (ZeRO), or not
at all.
"""

import json
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model_zoo.errors import ModelError

LAYOUT_KEY = "pieces"  # of a file's metadata; part of the checkpoint format


class TensorShard(NamedTuple):
    """Elements ``[start, start + len(values))`` of a flattened tensor, given its name and shape; ``values`` is 1-D."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor

    def part(self, index: int, count: int) -> "TensorShard":
        """The index-th of ``count`` equal parts. Replicas that hold the same shard each write one part."""
        first, last = (len(self.values) * end // count for end in (index, index + 1))
        return self._replace(start=self.start + first, values=self.values[first:last])


def whole_tensor(name: str, tensor: Tensor) -> TensorShard:
    """The shard that is the whole tensor."""
    return TensorShard(name, tuple(tensor.shape), 0, tensor.detach().reshape(-1))


def save_shards(file: Path, shards: Iterable[TensorShard]) -> None:
    """Writes shards of different tensors as safetensors, with their positions as metadata. Empty shards are omitted."""
    shards = [shard for shard in shards if len(shard.values)]
    tensors = {shard.name: shard.values for shard in shards}
    if len(tensors) < len(shards):
        raise ValueError("a file can hold only one shard of a tensor")
    layout = {shard.name: [shard.start, list(shard.shape)] for shard in shards}
    save_tensors(file, tensors, {LAYOUT_KEY: json.dumps(layout)})


def save_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file with the permissions of the umask; the library's own files are readable by the owner
    only."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    mask = os.umask(0o077)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


class ShardedTensors:
    """The tensors whose shards are stored in the safetensors files of a folder. Only headers are read up front.

    Raises ModelError for a file of another format, and if files disagree about the shape of a tensor.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        # Opening a file parses its whole header. The bound keeps the files of many ranks below the limit of open files.
        self._open = lru_cache(maxsize=64)(partial(safe_open, framework="pt"))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._ranges: dict[str, list[tuple[int, int, Path]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            for name, (start, shape), length in _layout(path):
                if self._shapes.setdefault(name, tuple(shape)) != tuple(shape):
                    raise ModelError(f"{path} holds {name} of shape {shape}, another file says {self._shapes[name]}")
                self._ranges.setdefault(name, []).append((start, start + length, path))

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def names(self, prefix: str = "") -> list[str]:
        """Names of all tensors that start with ``prefix``."""
        return [name for name in self._shapes if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor. Raises ModelError if there is no tensor of that name."""
        if name not in self._shapes:
            raise ModelError(f"{self.folder} holds no {name}")
        return self._shapes[name]

    def fill(self, shard: TensorShard) -> None:
        """Reads the shard's values, in place. Raises ModelError if the tensor was written with another shape, or if
        some of these elements were not written."""
        if self.shape(shard.name) != shard.shape:
            raise ModelError(
                f"{shard.name} has shape {list(self.shape(shard.name))} in {self.folder}, not {list(shard.shape)}"
            )
        end, stop = shard.start, shard.start + len(shard.values)
        for first, last, path in sorted(self._ranges[shard.name]):
            if last <= end or first >= stop:
                continue
            if first > end:
                break
            values = self._read(path, shard.name, end - first, min(stop, last) - first)
            shard.values[end - shard.start : min(stop, last) - shard.start].copy_(values)
            end = min(stop, last)
        if end < stop:
            raise ModelError(f"{self.folder} is incomplete: {shard.name} lacks its elements from {end} on")

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, in the dtype in which it was written."""
        shape = self.shape(name)
        dtype = self._read(self._ranges[name][0][2], name, 0, 0).dtype
        shard = whole_tensor(name, torch.empty(shape, dtype=dtype))
        self.fill(shard)
        return shard.values.view(shape)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose names start with ``prefix``, by the rest of their names."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.names(prefix)}

    def _read(self, path: Path, name: str, first: int, last: int) -> Tensor:
        """Elements ``[first, last)`` of the shard of a tensor that a file holds."""
        try:
            return self._open(path).get_slice(name)[first:last]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _layout(path: Path) -> Iterator[tuple[str, tuple[int, list[int]], int]]:
    try:
        with safe_open(path, framework="pt") as file:
            layout = json.loads((file.metadata() or {})[LAYOUT_KEY])
            for name in file.keys():  # noqa: SIM118 (not a dict)
                (length,), (start, shape) = file.get_slice(name).get_shape(), layout[name]
                yield name, (int(start), [int(side) for side in shape]), length
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{path} is not a file of a checkpoint: {what}") from error
