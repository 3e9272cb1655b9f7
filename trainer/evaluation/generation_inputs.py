"""What a generation evaluation compares: samples and a reference, in an .npz or a folder."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.npz import FORM, IMAGES, Npz
from model_zoo.eval_nets.inception import FEATURES
from trainer.evaluation.features import FolderImages, ImageSet, NpzImages
from trainer.jobs.sample_output import RECORD, output_bytes


class Statistics(NamedTuple):
    """Of pooled features, float64."""

    mean_d: Tensor
    covariance_dd: Tensor


class Reference(NamedTuple):
    """images: None if the file holds statistics only. statistics: None if they must be computed from the images."""

    path: Path
    images: ImageSet | None
    statistics: Statistics | None

    def describe_statistics(self) -> str:
        """Where gFID's statistics of the reference come from."""
        if self.statistics:
            return f"mu and sigma stored in {self.path.name}"
        return f"computed from the {self.images.count:,} images of {self.path.name}"


def open_samples(path: Path) -> ImageSet:
    """Raises DataError if there are fewer than two images."""
    images = _open(path)
    if not isinstance(images, FolderImages):
        if not images.count:
            raise DataError(f"{path} holds no {IMAGES}: samples are {FORM}")
        images = NpzImages(images)
    if images.count < 2:
        raise DataError(f"{path} holds 1 image: at least 2 samples are needed, and 50,000 for published results")
    return images


def open_reference(path: Path) -> Reference:
    """Raises DataError if there are neither statistics nor at least two images."""
    opened = _open(path)
    if isinstance(opened, FolderImages):
        reference = Reference(path, opened, None)
    else:
        statistics = None
        if {"mu", "sigma"} <= {*opened.names}:
            statistics = Statistics(*(torch.from_numpy(_statistic(opened, name)).double() for name in ("mu", "sigma")))
        reference = Reference(path, NpzImages(opened) if opened.count else None, statistics)
    if reference.images is None and reference.statistics is None:
        raise DataError(f"{path} is not a reference: it has neither {IMAGES}, images that are {FORM}, nor mu and sigma")
    if reference.statistics is None and reference.images.count < 2:
        raise DataError(f"{path} holds 1 image: a reference needs at least 2, and published ones have 10,000")
    return reference


def _open(path: Path) -> Npz | FolderImages:
    if path.is_file():
        return Npz(path)
    if not path.is_dir():
        raise DataError(f"no such file or folder: {path}")
    images = FolderImages(path)
    if not images.count:
        raise DataError(f"no image in the folder {path}")
    return images


def _statistic(npz: Npz, name: str) -> np.ndarray:
    values, shape = npz.array(name), {"mu": (FEATURES,), "sigma": (FEATURES, FEATURES)}[name]
    if values.shape != shape or values.dtype.kind != "f":
        raise DataError(f"{npz.path}: {name} is {values.dtype} of shape {values.shape}, but must be {shape} floats")
    return values


def sampling_record(samples: Path, sha256: str) -> dict | None:
    """What `ibq sample` recorded of these samples, without the list of classes; None if the record does not exist or
    describes other files. sha256: of the .npz."""
    path = samples / RECORD if samples.is_dir() else samples.with_name(f"{samples.name}.json")
    try:
        record = json.loads(path.read_bytes())
        finished = record["finished"]
        if finished["bytes"] != output_bytes(samples) or (samples.is_file() and finished["sha256"] != sha256):
            return None
        settings = {name: value for name, value in record["settings"].items() if name != "classes"}
        return {"source": record["source"], "checkpoint": record["checkpoint"], **settings}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
