"""What tests of measures share: an Inception file with random weights that passes for the published one; one thread."""

import hashlib
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch_fidelity import feature_extractor_inceptionv3

from model_zoo.eval_nets.weights import WEIGHTS_FILES


@contextmanager
def one_thread():
    """With more threads convolutions add up in another order, and round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def write_inception(folder: Path, seed: int = 0) -> Path:
    """A file like torch-fidelity's, under its name, of weights whose features neither vanish nor grow."""

    class Unfilled(feature_extractor_inceptionv3.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    with (
        torch.device("meta"),
        patch.object(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {}),
    ):
        state = Unfilled("unfilled", ["2048"]).state_dict()
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
    path = folder / WEIGHTS_FILES["inception"].file
    torch.save(state, path)
    return path


def pass_for_published(key: str, path: Path) -> None:
    """From here on, in this process, the file of `WEIGHTS_FILES[key]` is the one at `path`."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    WEIGHTS_FILES[key] = WEIGHTS_FILES[key]._replace(sha256=digest)
