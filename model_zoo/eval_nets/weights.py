"""The networks that judge pictures: their weights, which the user supplies as files, and how they are frozen.

No package carries these weights, and nothing here downloads them. Each file is looked for in one place and is known by
its SHA-256, so that a figure never comes from other weights than the published ones.
"""

import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from model_zoo.errors import ModelError
from model_zoo.io.hashing import sha256_of

WEIGHTS_FOLDER = "IBQ_WEIGHTS"  # environment variable


class WeightsFile(NamedTuple):
    """A published file: its name, hash and source, what needs it, and other names under which it is published."""

    file: str
    sha256: str
    url: str
    purpose: str
    other_names: tuple[str, ...] = ()


WEIGHTS_FILES = {
    "vgg16": WeightsFile(
        "vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "LPIPS (VGG), as a training loss and as a measure",
    ),
    "alexnet": WeightsFile(
        "alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "LPIPS (AlexNet), as a measure",
    ),
    "inception": WeightsFile(
        "weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "rFID, gFID, Inception score, precision and recall",
        ("pt_inception-2015-12-05-6726825d.pth",),  # pytorch-fid's, the same content
    ),
}


def weights_path(key: str, path: str | Path | None = None) -> Path:
    """Where the file of `WEIGHTS_FILES[key]` is looked for: at `path`, else in the folder $IBQ_WEIGHTS, else where
    torch.hub keeps its downloads. It need not be there."""
    if path is not None:
        return Path(path).expanduser()
    folder = os.environ.get(WEIGHTS_FOLDER)
    folder = Path(folder).expanduser() if folder else Path(torch.hub.get_dir(), "checkpoints")
    names = WEIGHTS_FILES[key].file, *WEIGHTS_FILES[key].other_names
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def checked_weights(key: str, path: str | Path | None = None) -> Path:
    """The path of a weights file, once the file there is known to be the published one.

    Raises ModelError where it is missing or has another hash.
    """
    wanted, place = WEIGHTS_FILES[key], weights_path(key, path)
    if not place.is_file():
        raise ModelError(
            f"no such file at {place}: {wanted.file}, for {wanted.purpose}, must be put there ({wanted.url}), or its "
            f"folder named by {WEIGHTS_FOLDER}"
        )
    try:
        found = file_sha256(place)
    except OSError as error:
        raise ModelError(f"cannot read {place}: {error.strerror}") from error
    if found != wanted.sha256:
        raise ModelError(
            f"{place} is not the published {wanted.file}: its sha256 is {found}, not {wanted.sha256}; fetch it again "
            f"({wanted.url}), or name another folder by {WEIGHTS_FOLDER}"
        )
    return place


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, computed once a process for as long as the file does not change."""
    status = path.stat()
    return _sha256(path.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _sha256(path: Path, size_bytes: int, modified_ns: int) -> str:
    return sha256_of(path)


def frozen(model: nn.Module) -> nn.Module:
    """`model` with all its parameters and buffers turned into non-persistent buffers.

    They follow `.to(...)`, but no optimizer sees them and no checkpoint holds them.
    """
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            delattr(module, name)
            module.register_buffer(name, tensor.detach(), persistent=False)
    return model
