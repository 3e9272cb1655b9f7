"""Tensors in flat pieces: how any number of processes write a checkpoint together, and any other number reads it.

A checkpoint is a set of tensors by name. Every process writes the pieces that it has, each a stretch of the flattened
tensor, into a file of its own; a reader takes the stretches that it needs out of whatever files hold them. So it does
not matter whether a tensor was cut into rows (FSDP2, a sharded codebook), into parts of a flat buffer (ZeRO), or not at
all, nor by how many processes.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model_zoo.errors import ModelError


class TensorShard(NamedTuple):
    """Elements ``[start, start + len(values))`` of the flattened tensor ``name`` of that shape; ``values`` is 1-D."""

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor

    def share(self, index: int, count: int) -> "TensorShard":
        """The index-th of ``count`` even parts: what one of several holders of the same piece writes."""
        first, last = (len(self.values) * end // count for end in (index, index + 1))
        return self._replace(start=self.start + first, values=self.values[first:last])


def whole(name: str, tensor: Tensor) -> TensorShard:
    """A tensor in one piece."""
    return TensorShard(name, tuple(tensor.shape), 0, tensor.detach().reshape(-1))


def save_shards(file: Path, pieces: Iterable[TensorShard]) -> None:
    """Writes pieces, of different tensors, as safetensors; an empty one is left out. Where they lie is metadata."""
    pieces = [piece for piece in pieces if len(piece.values)]
    tensors = {piece.name: piece.values for piece in pieces}
    if len(tensors) < len(pieces):
        raise ValueError("a file holds one piece of a tensor")
    layout = {piece.name: [piece.start, list(piece.shape)] for piece in pieces}
    save_tensors(file, tensors, {"pieces": json.dumps(layout)})


def save_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes safetensors that others may read, as the umask has it: the library's are their owner's alone."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    mask = os.umask(0o077)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def run_of(source: Path) -> Path:
    """The run's folder, of a checkpoint's folder in it or of itself. (A run too may lie in some ``checkpoints``.)"""
    is_checkpoint = source.parent.name == "checkpoints" and re.fullmatch(r"step_\d+", source.name)
    return source.parent.parent if is_checkpoint else source


class ShardedTensors:
    """The tensors whose pieces lie in the safetensors files of a folder. Reads headers only, until asked for values.

    Raises ModelError for a file that is no such file, and for pieces of one tensor that disagree about its shape.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, list[tuple[int, int, Path]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            for name, (start, shape), length in _layout(path):
                if self._shapes.setdefault(name, tuple(shape)) != tuple(shape):
                    raise ModelError(f"{path} holds {name} of shape {shape}, another file says {self._shapes[name]}")
                self._places.setdefault(name, []).append((start, start + length, path))

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def names(self, prefix: str = "") -> list[str]:
        """Of all tensors whose name begins so."""
        return [name for name in self._shapes if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor. Raises ModelError where there is none of that name."""
        if name not in self._shapes:
            raise ModelError(f"{self.folder} holds no {name}")
        return self._shapes[name]

    def fill(self, piece: TensorShard) -> None:
        """Reads a piece's values into it, in place. Raises ModelError where another shape or less of it was written."""
        if self.shape(piece.name) != piece.shape:
            raise ModelError(
                f"{piece.name} has shape {list(self.shape(piece.name))} in {self.folder}, not {list(piece.shape)}"
            )
        end, stop = piece.start, piece.start + len(piece.values)
        for first, last, path in sorted(self._places[piece.name]):
            if last <= end or first >= stop:
                continue
            if first > end:
                break
            with _opened(path) as file:
                values = file.get_slice(piece.name)[end - first : min(stop, last) - first]
            piece.values[end - piece.start : min(stop, last) - piece.start].copy_(values)
            end = min(stop, last)
        if end < stop:
            raise ModelError(f"{self.folder} is not whole: {piece.name} lacks its elements from {end} on")

    def tensor(self, name: str) -> Tensor:
        """The whole tensor, of the dtype it was written in."""
        shape = self.shape(name)
        with _opened(self._places[name][0][2]) as file:
            dtype = file.get_slice(name)[:0].dtype
        piece = whole(name, torch.empty(shape, dtype=dtype))
        self.fill(piece)
        return piece.values.view(shape)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All whole tensors whose names begin so, by the rest of their names."""
        return {name.removeprefix(prefix): self.tensor(name) for name in self.names(prefix)}


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _layout(path: Path) -> Iterator[tuple[str, tuple[int, list[int]], int]]:
    try:
        with safe_open(path, framework="pt") as file:
            layout = json.loads((file.metadata() or {})["pieces"])
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                (length,), (start, shape) = file.get_slice(name).get_shape(), layout[name]
                yield name, (int(start), [int(side) for side in shape]), length
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        what = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{path} is no part of a checkpoint: {what}") from error
