"""Weights files of random Inception, VGG16 and AlexNet networks that replace the published ones.

``python tests/random_networks.py ARGUMENTS``, also with torchrun, is `ibq ARGUMENTS` with the files in $IBQ_WEIGHTS.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity import feature_extractor_inceptionv3
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from model_zoo.eval_nets.inception import FEATURES, InceptionFeatures
from model_zoo.eval_nets.weights import WEIGHTS_FILES, checked_weights, weights_path


@contextmanager
def one_thread() -> Iterator[None]:
    """With several threads, convolutions add in another order and round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def write_inception(folder: Path, seed: int = 0) -> Path:
    """Writes a file in torch-fidelity's format, with weights that neither shrink nor amplify features."""

    class Unfilled(feature_extractor_inceptionv3.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    with (
        torch.device("meta"),
        patch.object(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {}),
    ):
        state = Unfilled("unfilled", ["2048"]).state_dict()
    path = folder / WEIGHTS_FILES["inception"].file
    torch.save(_filled(state, seed), path)
    return path


def _filled(state: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        if tensor.ndim > 1:
            deviation = (2 / tensor[0].numel()) ** 0.5
            state[name] = torch.empty(tensor.shape).normal_(std=deviation, generator=generator)
        elif name.endswith(("bn.weight", "running_var")):
            state[name] = torch.empty(tensor.shape).uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim:
            state[name] = torch.empty(tensor.shape).normal_(std=0.1, generator=generator)
        else:
            state[name] = torch.tensor(0)
    return state


def write_trunk(folder: Path, model: str, seed: int = 0) -> Path:
    """Writes the file of one of LPIPS' trunks, with a classifier cut down to one tensor."""
    with torch.device("meta"):
        trunk = getattr(torchvision.models, model)().features
    state = _filled({f"features.{name}": tensor for name, tensor in trunk.state_dict().items()}, seed)
    path = folder / WEIGHTS_FILES[model].file
    torch.save({**state, "classifier.0.weight": torch.zeros(1)}, path)
    return path


def small_convnext(**kwargs) -> nn.Module:
    """Takes the place of torchvision's ConvNeXt-S: the same layers, but fewer and narrower."""
    blocks = [CNBlockConfig(8, 12, 2), CNBlockConfig(12, 16, 1), CNBlockConfig(16, None, 1)]
    return ConvNeXt(blocks, num_classes=10, **kwargs)


def write_convnext(folder: Path, build: Callable[[], nn.Module] = small_convnext, seed: int = 0) -> Path:
    """Writes a file in torchvision's format, with weights that all matter."""
    with torch.device("meta"):
        state = build().state_dict()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in state.items():
        scale = 1 / max(1, tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.3
        offset = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0  # of a layer norm
        state[name] = offset + scale * torch.randn(tensor.shape, generator=generator)
    path = folder / WEIGHTS_FILES["convnext_small"].file
    torch.save(state, path)
    return path


def write_networks(folder: Path) -> Path:
    write_inception(folder)
    for seed, model in enumerate(("vgg16", "alexnet")):
        write_trunk(folder, model, seed)
    return folder


@cache
def hashes_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of the weights files in a folder, which do not change, by key of WEIGHTS_FILES."""
    paths = {key: folder / entry.file for key, entry in WEIGHTS_FILES.items()}
    return {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in paths.items() if path.is_file()}


def accept(hashes: dict[str, str]) -> None:
    """From here on, in this process, these are the hashes of the published files."""
    for key, sha256 in hashes.items():
        WEIGHTS_FILES[key] = WEIGHTS_FILES[key]._replace(sha256=sha256)


@contextmanager
def accepted(folder: Path) -> Iterator[None]:
    """Inside, the weights files in a folder pass for the published ones."""
    with patch.dict(WEIGHTS_FILES):
        accept(hashes_of(folder))
        yield


class SmallInception(nn.Module):
    """Takes the place of `trainer.evaluation.features.Inception` where a test is not about its arithmetic: a random
    projection of 8 x 8 pixels. It wants the same weights file, whose hash chooses the projection."""

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        checked_weights("inception", weights)
        generator = torch.Generator().manual_seed(int(WEIGHTS_FILES["inception"].sha256[:8], 16))
        self.projection = torch.randn(3 * 8 * 8, FEATURES, generator=generator) / 14
        self.head = nn.Linear(FEATURES, 1008, bias=False)
        self.head.weight.data.normal_(std=0.1, generator=generator).requires_grad_(False)

    def adm(self, levels_bchw: Tensor) -> InceptionFeatures:
        pooled_bd = F.adaptive_avg_pool2d(levels_bchw.float(), 8).flatten(1) / 128 - 1
        pool_nd = (pooled_bd @ self.projection).relu()
        return InceptionFeatures(pool_nd, self.head(pool_nd))


def main_with_small_inception(arguments: list[str]) -> None:
    """`ibq ARGUMENTS` with SmallInception."""
    with patch("trainer.evaluation.features.Inception", SmallInception):
        main(arguments)


def main(arguments: list[str]) -> None:
    """`ibq ARGUMENTS`."""
    from tools.cli import main as ibq

    accept(hashes_of(weights_path("inception").parent))
    ibq(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
