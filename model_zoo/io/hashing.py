"""Hashes of files and of weights."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


_known: set[tuple] = set()  # files whose hash this process knows: path, size, time of the last change, hash


def remember_sha256(file: Path, sha256: str) -> None:
    """Records that a file has this hash, until it changes. A missing file is not recorded."""
    if (key := _key(file, sha256)) is not None:
        _known.add(key)


def is_known_sha256(file: Path, sha256: str) -> bool:
    """Whether `remember_sha256` recorded this hash and the file has not changed since."""
    return _key(file, sha256) in _known


def _key(file: Path, sha256: str) -> tuple | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return file.absolute(), status.st_size, status.st_mtime_ns, status.st_ino, sha256


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of tensors on the CPU and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
