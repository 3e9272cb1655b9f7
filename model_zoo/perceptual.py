"""LPIPS (arXiv 1801.03924) on VGG16, as a frozen loss."""

import warnings
from pathlib import Path

import torch
from torch import nn

from model_zoo import ModelError
from model_zoo.hashing import sha256_of

VGG16_FILE = "vgg16-397923af.pth"
VGG16_URL = f"https://download.pytorch.org/models/{VGG16_FILE}"
SMALLEST_SIDE = 16  # pixels; VGG16 halves four times
VGG16_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"


class Perceptual(nn.Module):
    """LPIPS distance of image pairs, by the `lpips` package (version 0.1 heads, which its wheel carries).

    The VGG16 trunk is torchvision's ImageNet weights, a file that the user supplies; nothing is downloaded.
    The weights are held as non-persistent buffers: they follow `.to(...)`, but no optimizer sees them and no checkpoint
    holds them. The module stays in evaluation mode.

    Args:
        vgg16_weights: path of `vgg16-397923af.pth`; None looks where torch.hub keeps its downloads.

    Raises:
        ModelError: the file is missing or has another hash; in `forward`, shapes that differ or sides under 16 pixels.
    """

    def __init__(self, vgg16_weights: str | None = None):
        super().__init__()
        self.lpips = _frozen(_load_lpips(_checked_vgg16_file(vgg16_weights)))
        self.eval()

    def train(self, mode: bool = True) -> "Perceptual":
        """Stays in evaluation mode, for the heads have dropout; returns self."""
        return super().train(False)

    def forward(self, x_bchw: torch.Tensor, y_bchw: torch.Tensor) -> torch.Tensor:
        """Two batches of RGB images (b, 3, h, w) in [-1, 1] -> the LPIPS of each pair, (b,)."""
        if x_bchw.shape != y_bchw.shape:
            raise ModelError(f"LPIPS compares images of one shape, got {(*x_bchw.shape,)} and {(*y_bchw.shape,)}")
        if min(x_bchw.shape[2:]) < SMALLEST_SIDE:
            raise ModelError(
                f"images of {x_bchw.shape[2]} x {x_bchw.shape[3]} are too small for LPIPS: use sides of at least"
                f" {SMALLEST_SIDE} pixels, or train without it (loss.perceptual.weight=0)"
            )
        return self.lpips(x_bchw, y_bchw).flatten()


def _checked_vgg16_file(vgg16_weights: str | None) -> Path:
    """The path of the VGG16 weights, once the file there is known to be the published one."""
    if vgg16_weights is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_FILE
    else:
        path = Path(vgg16_weights).expanduser()
    if not path.is_file():
        raise ModelError(
            f"LPIPS needs torchvision's VGG16 weights, {VGG16_FILE}, and there is no such file at {path}:"
            f" put it there ({VGG16_URL}), or do without LPIPS by loss.perceptual.weight=0"
        )
    digest = sha256_of(path)
    if digest != VGG16_SHA256:
        raise ModelError(
            f"{path} is not the published {VGG16_FILE}: its sha256 is {digest}, not {VGG16_SHA256};"
            f" fetch it again ({VGG16_URL}), or do without LPIPS by loss.perceptual.weight=0"
        )
    return path


def lpips_on_meta() -> nn.Module:
    """The lpips package's LPIPS(VGG) without values, on the meta device: to be filled, or to count its weights."""
    # Imported here: it brings in plotting and image libraries that runs without LPIPS need not wait for.
    import lpips

    # On the meta device the whole of VGG16 costs neither memory nor the time of a random initialisation.
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
        return lpips.LPIPS(net="vgg", version="0.1", pretrained=False, pnet_rand=True, verbose=False)


def _load_lpips(vgg16_file: Path) -> nn.Module:
    """The lpips package's LPIPS(VGG) with every parameter taken from `vgg16_file` and the package's own heads."""
    import lpips

    model = lpips_on_meta()
    vgg16 = torch.load(vgg16_file, map_location="cpu", weights_only=True)
    # "slice3.10.weight" is torchvision's "features.10.weight": lpips cuts the trunk in slices but keeps the numbers.
    trunk = {name: vgg16["features." + name.split(".", 1)[1]] for name in model.net.state_dict()}
    model.net.load_state_dict(trunk, strict=True, assign=True)

    heads_file = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    heads = torch.load(heads_file, map_location="cpu", weights_only=True)
    model.lins.load_state_dict(
        {name.removeprefix("lin"): head for name, head in heads.items()}, strict=True, assign=True
    )
    return model


def _frozen(model: nn.Module) -> nn.Module:
    """`model` with all its parameters and buffers turned into non-persistent buffers."""
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            delattr(module, name)
            module.register_buffer(name, tensor.detach(), persistent=False)
    return model
