"""The Inception network for FID, Inception score, precision and recall: TensorFlow's of 2015, as implemented in
torch-fidelity (`inception-v3-compat`), with the two preprocessing protocols of the literature.

The protocols give different features for the same images: never compare numbers of one with those of the other.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.eval_nets.weights import checked_weights, frozen

SIDE = 299  # height and width of the network's input, in pixels
FEATURES = 2048


class InceptionFeatures(NamedTuple):
    """pool_nd: float32 (n, 2048), the last pooling layer. logits_nk: float32 (n, 1008), without bias."""

    pool_nd: Tensor
    logits_nk: Tensor


class Inception(nn.Module):
    """Features of RGB images. Frozen: its weights are non-persistent buffers, and it stays in evaluation mode.

    Call both methods with autocast and TF32 disabled (`trainer.precision.full_precision`); they compute in fp32.

    Args:
        weights: path of the weights file; None uses the default location, see `model_zoo.eval_nets.weights`.

    Raises:
        ModelError: if the file is missing or has another hash.
    """

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        path = checked_weights("inception", weights)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        with torch.random.fork_rng(devices=[]):  # the constructor draws random weights before it loads the file
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        *trunk, head = frozen(network).children()  # modules in order of its forward, which supports one protocol only
        self.trunk, self.head = nn.Sequential(*trunk), head
        self.eval()

    def train(self, mode: bool = True) -> "Inception":
        """Stays in evaluation mode, so that its batch norms keep their statistics; returns self."""
        return super().train(False)

    def paper(self, unit_bchw: Tensor) -> InceptionFeatures:
        """Protocol `paper` (tokenizers): float32 (b, 3, h, w) in [0, 1], not rounded; bilinear with half-pixel centres.

        Source: pytorch-fid, which the published rFIDs used.
        """
        resized_bchw = F.interpolate(unit_bchw, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return self._features(2 * resized_bchw - 1)

    def adm(self, levels_bchw: Tensor) -> InceptionFeatures:
        """Protocol `adm` (generators): uint8 (b, 3, h, w); TensorFlow 1's bilinear resize, without half-pixel centres.

        Source: the graph of ADM's evaluator (arXiv 2105.05233).
        """
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        resized_bchw = interpolate_bilinear_2d_like_tensorflow1x(
            levels_bchw.float(), size=(SIDE, SIDE), align_corners=False
        )
        return self._features((resized_bchw - 128) / 128)

    def _features(self, prepared_bchw: Tensor) -> InceptionFeatures:
        pool_nd = self.trunk(prepared_bchw).flatten(1)
        return InceptionFeatures(pool_nd, pool_nd.mm(self.head.weight.T))
