"""Distance of images by the logits of ConvNeXt-S (arXiv 2201.03545), a frozen training loss.

Source: 1d-tokenizer's perceptual loss (arXiv 2406.07550), which uses it alone with weight 0.1, or beside LPIPS with the
weights 1 and 0.1.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.errors import ModelError
from model_zoo.eval_nets.shapes import grid_of_equal_area
from model_zoo.eval_nets.weights import WEIGHTS_FILES, checked_file, frozen

SIDE = 224  # pixels of the side of a square picture, as in training
STRIDE = 32  # pixels of a cell of the network's last layers
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's, of ImageNet


class ConvNextDistance(nn.Module):
    """Mean squared difference of the 1,000 logits of two batches of images.

    The network is torchvision's, with its ImageNet weights, a file that the user supplies; nothing is downloaded. The
    weights are non-persistent buffers: they follow `.to(...)`, but are neither optimised nor saved in checkpoints. The
    module stays in evaluation mode.

    Call it with autocast disabled, as the published code does: a difference of logits loses most of the bits of half
    precision.

    Args:
        weights: path of the file; None uses the default location, see `model_zoo.eval_nets.weights`.

    Raises:
        ModelError: if the file is missing or has another hash; in `forward`, for shapes that differ.
    """

    def __init__(self, weights: str | None = None):
        super().__init__()
        file, _ = checked_file(WEIGHTS_FILES["convnext_small"], weights, "loss.perceptual.convnext_weights=FILE")
        network = convnext_on_meta()
        state = torch.load(file, map_location="cpu", weights_only=True)
        network.load_state_dict(state, strict=True, assign=True)
        self.network = frozen(network)
        self.register_buffer("mean_c11", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std_c11", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "ConvNextDistance":
        """Stays in evaluation mode, without stochastic depth; returns self."""
        return super().train(False)

    def forward(self, reconstruction_bchw: Tensor, images_bchw: Tensor) -> Tensor:
        """The distance of each pair of RGB images in [-1, 1], as (b,). Gradients flow to the reconstruction alone."""
        if reconstruction_bchw.shape != images_bchw.shape:
            shapes = (*reconstruction_bchw.shape,), (*images_bchw.shape,)
            raise ModelError(f"ConvNeXt compares images of equal shape, got {shapes[0]} and {shapes[1]}")
        with torch.no_grad():
            target_bk = self.logits(images_bchw)
        return (self.logits(reconstruction_bchw) - target_bk).square().mean(dim=1)

    def logits(self, images_bchw: Tensor) -> Tensor:
        """Logits (b, 1000) of images in [-1, 1], resized to an area of 224 x 224 pixels.

        The published code takes square pictures only. Pictures of other shapes keep their aspect as far as the
        network's stride allows.
        """
        rows, columns = grid_of_equal_area(SIDE // STRIDE, *images_bchw.shape[2:])
        size = rows * STRIDE, columns * STRIDE
        resized = F.interpolate(images_bchw, size, mode="bilinear", antialias=True)
        return self.network((resized / 2 + 0.5 - self.mean_c11) / self.std_c11)


def convnext_on_meta() -> nn.Module:
    """torchvision's ConvNeXt-S on the meta device, for loading weights or counting them."""
    from torchvision.models import convnext_small  # slow to import

    with torch.device("meta"):
        return convnext_small().eval()
