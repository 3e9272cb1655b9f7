"""`ibq ARGUMENTS` with random networks: the weights files in $IBQ_WEIGHTS pass for the published ones."""

import sys
from pathlib import Path

import torch
import torchvision
from judging import pass_for_published, write_inception

from model_zoo.eval_nets.weights import WEIGHTS_FILES, weights_path

TRUNKS = {"vgg16": "vgg16", "alexnet": "alexnet"}  # key of WEIGHTS_FILES -> torchvision's model


def write_networks(folder: Path) -> Path:
    """Files like the published ones, under their names, of random weights; of the trunks without their classifiers."""
    write_inception(folder)
    for number, (key, model) in enumerate(TRUNKS.items()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            trunk = getattr(torchvision.models, model)().features
        state = {f"features.{name}": tensor for name, tensor in trunk.state_dict().items()}
        torch.save(state, folder / WEIGHTS_FILES[key].file)
    return folder


def accept_networks() -> None:
    """From here on, in this process, whatever files are in $IBQ_WEIGHTS are the published ones."""
    for key in WEIGHTS_FILES:
        if (path := weights_path(key)).is_file():
            pass_for_published(key, path)


def judge(arguments: list[str]) -> None:
    """`ibq ARGUMENTS` with these networks."""
    from tools.cli import main

    accept_networks()
    main(arguments)


if __name__ == "__main__":
    judge(sys.argv[1:])
