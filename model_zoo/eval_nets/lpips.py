"""LPIPS (arXiv 1801.03924) with VGG16 or AlexNet, as a frozen training loss and as a metric."""

import warnings
from pathlib import Path

import torch
from torch import nn

from model_zoo.errors import ModelError
from model_zoo.eval_nets.weights import checked_weights, frozen

TRUNKS = {"vgg": "vgg16", "alex": "alexnet"}  # the lpips package's name -> key of WEIGHTS_FILES
# In pixels: VGG16 halves the sides four times; AlexNet has strides of 4, 2 and 2 with windows of 11, 3 and 3.
SMALLEST_SIDE = {"vgg": 16, "alex": 31}


class Perceptual(nn.Module):
    """LPIPS distance of image pairs, computed by the `lpips` package with its version 0.1 heads.

    The trunk uses torchvision's ImageNet weights, a file that the user supplies; nothing is downloaded. The weights are
    non-persistent buffers: they follow `.to(...)`, but are neither optimised nor saved in checkpoints. The module stays
    in evaluation mode.

    Args:
        weights: path of the trunk's file; None uses the default location, see `model_zoo.eval_nets.weights`.
        net: the trunk, ``vgg`` or ``alex``.

    Raises:
        ModelError: if the file is missing or has another hash; in `forward`, for shapes that differ and for sides below
            `SMALLEST_SIDE[net]` pixels.
    """

    def __init__(self, weights: str | None = None, net: str = "vgg"):
        super().__init__()
        self.net = net
        self.lpips = frozen(_load_lpips(net, checked_weights(TRUNKS[net], weights)))
        self.eval()

    def train(self, mode: bool = True) -> "Perceptual":
        """Stays in evaluation mode, since the heads have dropout; returns self."""
        return super().train(False)

    def forward(self, x_bchw: torch.Tensor, y_bchw: torch.Tensor) -> torch.Tensor:
        """LPIPS of each pair of two batches of RGB images (b, 3, h, w) in [-1, 1], as (b,)."""
        if x_bchw.shape != y_bchw.shape:
            raise ModelError(f"LPIPS compares images of equal shape, got {(*x_bchw.shape,)} and {(*y_bchw.shape,)}")
        if min(x_bchw.shape[2:]) < SMALLEST_SIDE[self.net]:
            raise ModelError(
                f"images of {x_bchw.shape[2]} x {x_bchw.shape[3]} are too small for LPIPS ({self.net}): use sides of at"
                f" least {SMALLEST_SIDE[self.net]} pixels"
            )
        return self.lpips(x_bchw, y_bchw).flatten()


def lpips_on_meta(net: str = "vgg") -> nn.Module:
    """The lpips package's LPIPS on the meta device, for loading weights or counting them."""
    # Imported at first use, since lpips imports plotting and image libraries.
    import lpips

    # On the meta device the trunk needs neither memory nor time for a random initialization.
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        return lpips.LPIPS(net=net, version="0.1", pretrained=False, pnet_rand=True, verbose=False)


def _load_lpips(net: str, trunk_file: Path) -> nn.Module:
    """The lpips package's LPIPS with the trunk from `trunk_file` and the package's own heads."""
    import lpips

    model = lpips_on_meta(net)
    published = torch.load(trunk_file, map_location="cpu", weights_only=True)
    # "slice3.10.weight" is torchvision's "features.10.weight": lpips slices the trunk but keeps the numbers.
    trunk = {name: published["features." + name.split(".", 1)[1]] for name in model.net.state_dict()}
    model.net.load_state_dict(trunk, strict=True, assign=True)

    heads_file = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth"
    heads = torch.load(heads_file, map_location="cpu", weights_only=True)
    heads = {name.removeprefix("lin"): head for name, head in heads.items()}
    model.lins.load_state_dict(heads, strict=True, assign=True)
    return model
