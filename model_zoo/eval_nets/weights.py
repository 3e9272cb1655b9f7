"""Weights files of the evaluation networks, and freezing of models.

The user supplies these files; nothing is downloaded. Each file has one location and is verified by its SHA-256, so that
metrics are only ever computed with the published weights.
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
    """A published file: its name, hash, source, purpose, and other names under which it is published. A hash of None is
    not known: every file is accepted."""

    file: str
    sha256: str | None
    url: str
    purpose: str
    other_names: tuple[str, ...] = ()


WEIGHTS_FILES = {
    "vgg16": WeightsFile(
        "vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "LPIPS (VGG), as a training loss and as a metric",
    ),
    "alexnet": WeightsFile(
        "alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "LPIPS (AlexNet), as a metric",
    ),
    # The hash agrees with the digits in the name and with what several public repositories record of this file.
    "convnext_small": WeightsFile(
        "convnext_small-0c510722.pth",
        "0c510722adfd92966a2bd72b92f785ca05966bbac03cafe2f7a90b1f54bfab9a",
        "https://download.pytorch.org/models/convnext_small-0c510722.pth",
        "loss.perceptual.kind=convnext and lpips+convnext",
    ),
    "inception": WeightsFile(
        "weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "rFID, gFID, Inception score, precision and recall",
        ("pt_inception-2015-12-05-6726825d.pth",),  # pytorch-fid's name for the same content
    ),
}


def weights_path(key: str, path: str | Path | None = None) -> Path:
    """Location of the file `WEIGHTS_FILES[key]`; see `location`."""
    return location(WEIGHTS_FILES[key], path)


def location(wanted: WeightsFile, path: str | Path | None = None) -> Path:
    """Location of a file: `path` if given, else the folder $IBQ_WEIGHTS if set, else torch.hub's download folder. The
    file need not exist."""
    if path is not None:
        return Path(path).expanduser()
    folder = os.environ.get(WEIGHTS_FOLDER)
    folder = Path(folder).expanduser() if folder else Path(torch.hub.get_dir(), "checkpoints")
    names = wanted.file, *wanted.other_names
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def checked_weights(key: str, path: str | Path | None = None) -> Path:
    """Path of the file `WEIGHTS_FILES[key]`; see `checked_file`."""
    return checked_file(WEIGHTS_FILES[key], path)[0]


def checked_file(wanted: WeightsFile, path: str | Path | None = None, setting: str | None = None) -> tuple[Path, str]:
    """Path and SHA-256 of a weights file, after verifying its hash. setting: the key that names its path, to mention.
    Raises ModelError if the file is missing or has another hash."""
    place = location(wanted, path)
    if not place.is_file():
        named = f" or named with {setting}" if setting else ""
        raise ModelError(
            f"{place} does not exist: {wanted.file}, for {wanted.purpose}, must be put there ({wanted.url}){named}, or "
            f"its folder set in {WEIGHTS_FOLDER}"
        )
    try:
        found = file_sha256(place)
    except OSError as error:
        raise ModelError(f"cannot read {place}: {error.strerror}") from error
    if wanted.sha256 not in (None, found):
        raise ModelError(
            f"{place} is not the published {wanted.file}: its sha256 is {found}, not {wanted.sha256}; download it "
            f"again ({wanted.url}), or set another folder in {WEIGHTS_FOLDER}"
        )
    return place, found


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, cached within the process until the file changes."""
    status = path.stat()
    return _sha256(path.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _sha256(path: Path, size_bytes: int, modified_ns: int) -> str:
    return sha256_of(path)


def frozen(model: nn.Module) -> nn.Module:
    """Turns all parameters and buffers of `model` into non-persistent buffers, and returns it.

    Buffers follow `.to(...)`, but are neither optimised nor saved in checkpoints.
    """
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            delattr(module, name)
            module.register_buffer(name, tensor.detach(), persistent=False)
    return model
