"""The Inception network behind FID, Inception score, precision and recall: TensorFlow's of 2015, as torch-fidelity has
it (`inception-v3-compat`), with the two ways in which the literature feeds it.

The same pictures have other features by the other way: never compare the two.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.eval_nets.weights import checked_weights, frozen

SIDE = 299  # pixels that the network sees
FEATURES = 2048


class InceptionFeatures(NamedTuple):
    """pool_nd: float32 (n, 2048), the last pooling's; logits_nk: float32 (n, 1008), without bias."""

    pool_nd: Tensor
    logits_nk: Tensor


class Inception(nn.Module):
    """Features of RGB images. Frozen: its weights are non-persistent buffers and it stays in evaluation mode.

    Both methods compute in fp32; switch autocast and TF32 off around them (`trainer.precision.full_precision`).

    Args:
        weights: path of the weights' file; None looks where `model_zoo.eval_nets.weights` says.

    Raises:
        ModelError: the file is missing or has another hash.
    """

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        path = checked_weights("inception", weights)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        with torch.random.fork_rng(devices=[]):  # it draws weights before it loads the file, strictly
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        *trunk, head = frozen(network).children()  # in the order of its forward, which resizes by one protocol alone
        self.trunk, self.head = nn.Sequential(*trunk), head
        self.eval()

    def train(self, mode: bool = True) -> "Inception":
        """Stays in evaluation mode, for the statistics of its normalisations; returns self."""
        return super().train(False)

    def paper(self, unit_bchw: Tensor) -> InceptionFeatures:
        """Protocol `paper` (tokenizers): float32 (b, 3, h, w) in [0, 1], not rounded; bilinear with half-pixel centres.

        Source: pytorch-fid's network, which the published rFIDs used.
        """
        resized_bchw = F.interpolate(unit_bchw, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return self._features(2 * resized_bchw - 1)

    def adm(self, levels_bchw: Tensor) -> InceptionFeatures:
        """Protocol `adm` (generators): uint8 (b, 3, h, w); TensorFlow 1's bilinear resize, without half-pixel centres.

        Source: ADM's evaluator (arXiv 2105.05233), whose graph begins so.
        """
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        resized_bchw = interpolate_bilinear_2d_like_tensorflow1x(
            levels_bchw.float(), size=(SIDE, SIDE), align_corners=False
        )
        return self._features((resized_bchw - 128) / 128)

    def _features(self, prepared_bchw: Tensor) -> InceptionFeatures:
        pool_nd = self.trunk(prepared_bchw).flatten(1)
        return InceptionFeatures(pool_nd, pool_nd.mm(self.head.weight.T))
