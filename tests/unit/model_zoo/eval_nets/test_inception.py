import copy

import numpy as np
import pytest
import skimage.data
import torch
from model_checks import refused
from random_networks import accepted, write_inception
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from model_zoo.eval_nets.inception import FEATURES, SIDE, Inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = write_inception(tmp_path_factory.mktemp("inception"))
    with accepted(path.parent):
        yield path


@pytest.fixture(scope="module")
def inception(weights) -> Inception:
    return Inception(weights)


def photographs(height: int, width: int) -> torch.Tensor:
    """Two uint8 pictures (2, 3, height, width)."""
    whole = [skimage.data.astronaut(), skimage.data.coffee()]
    return torch.stack([torch.from_numpy(p[:height, :width].copy()).permute(2, 0, 1) for p in whole])


@pytest.fixture(scope="module")
def extractor(weights) -> FeatureExtractorInceptionV3:
    return FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )


@pytest.mark.parametrize(("height", "width"), [(64, 48), (320, 400)])
def test_adm_equals_torch_fidelitys_own_extractor_bit_for_bit(inception, extractor, height, width):
    levels_bchw = photographs(height, width)
    features = inception.adm(levels_bchw)
    pool_nd, logits_nk = extractor(levels_bchw)
    assert features.pool_nd.shape == (2, FEATURES) and features.logits_nk.shape == (2, 1008)
    assert features.pool_nd.std() > 0.01  # the weights here tell pictures apart
    assert torch.equal(features.pool_nd, pool_nd) and torch.equal(features.logits_nk, logits_nk)


def resized_by_hand(unit_bchw: torch.Tensor) -> torch.Tensor:
    """Bilinear with half-pixel centres and without antialias, as two products with matrices in float64."""

    def matrix(size: int) -> torch.Tensor:
        place_o = np.clip((np.arange(SIDE) + 0.5) * size / SIDE - 0.5, 0, size - 1)
        low_o = np.floor(place_o).astype(int)
        weights_oi = np.zeros((SIDE, size))
        np.add.at(weights_oi, (np.arange(SIDE), low_o), 1 - (place_o - low_o))
        np.add.at(weights_oi, (np.arange(SIDE), np.minimum(low_o + 1, size - 1)), place_o - low_o)
        return torch.from_numpy(weights_oi)

    return matrix(unit_bchw.shape[2]) @ unit_bchw.double() @ matrix(unit_bchw.shape[3]).T


@pytest.mark.parametrize(("height", "width"), [(64, 48), (320, 400)])
def test_paper_equals_a_computation_in_float64(inception, extractor, height, width):
    generator = torch.Generator().manual_seed(0)
    unit_bchw = (photographs(height, width)[:1] / 255 + 0.01 * torch.rand(1, generator=generator)).clamp(0, 1)
    features = inception.paper(unit_bchw)
    float64_network = copy.deepcopy(extractor).double()
    hidden = 2 * resized_by_hand(unit_bchw) - 1
    for name, module in float64_network.named_children():  # one by one, without the extractor's own resize
        if name != "fc":
            hidden = module(hidden)
    pool_nd = hidden.flatten(1)
    torch.testing.assert_close(features.pool_nd.double(), pool_nd, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.logits_nk.double(), pool_nd @ float64_network.fc.weight.T, rtol=1e-3, atol=1e-3)


def test_the_protocols_differ(inception):
    levels_bchw = photographs(64, 64)[:1]
    difference = inception.adm(levels_bchw).pool_nd - inception.paper(levels_bchw / 255).pool_nd
    assert difference.abs().max() > 0.01


def test_frozen_and_drawing_no_random_numbers(weights):
    state = torch.get_rng_state()
    inception = Inception(weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(inception.parameters()) and not inception.state_dict()
    inception.train()
    assert not any(module.training for module in inception.modules())


def test_a_missing_file_is_one_line(tmp_path):
    assert "does not exist" in refused(Inception, tmp_path / "inception.pth")
