"""The PatchGAN discriminator (arXiv 1611.07004) in VQGAN's form."""

import torch
from torch import nn

from model_zoo.autoencoder import group_norm
from model_zoo.errors import ModelError

NORMS = {"batch": nn.BatchNorm2d, "group": lambda channels: group_norm(channels, eps=1e-5)}


class PatchDiscriminator(nn.Module):
    """Classifies overlapping patches: images (b, 3, h, w) -> logits (b, 1, h', w'), high for real.

    With the defaults the receptive field of a logit is 70 x 70 pixels, and there are 2,765,633 parameters.
    Published weights (`loss.discriminator.main.N.*`) load into `norm="batch"` by name.

    `norm="batch"`: real and fake images need separate forward passes, so that their batch statistics do not mix. Both
    forward passes precede the single backward pass, so a data-parallel wrapper must not broadcast the running
    statistics in between.
    `norm="group"`: images are independent, so one forward pass can take real and fake images together.

    Args:
        channels: width of the first convolution; it doubles with each layer, up to 8 times.
        layers: convolutions of stride 2.
        norm: "batch" (as published) or "group".

    Raises:
        ModelError: for an unknown `norm`; in `forward`, for images too small to produce one logit.
    """

    def __init__(self, *, channels: int = 64, layers: int = 3, norm: str = "batch"):
        super().__init__()
        if norm not in NORMS:
            raise ModelError(f"unknown discriminator norm {norm!r}: choose one of {', '.join(NORMS)}")
        # Each stride-2 convolution halves a side (rounding down); each of the last two shortens it by one pixel.
        self.smallest_side = 3 * 2**layers

        widths = [channels * min(2**layer, 8) for layer in range(layers + 1)]
        main = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for layer in range(1, layers + 1):
            stride = 1 if layer == layers else 2
            main += [
                nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=False),
                NORMS[norm](widths[layer]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        main.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*main)
        self.main.apply(self._initialize)

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        """Convolution weights normal(0, 0.02) with torch's default bias; norm weights normal(1, 0.02), biases 0."""
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)

    def forward(self, images_bchw: torch.Tensor) -> torch.Tensor:
        height, width = images_bchw.shape[2:]
        if min(height, width) < self.smallest_side:
            raise ModelError(
                f"images of {height} x {width} are too small for this discriminator, which needs sides of at least"
                f" {self.smallest_side} pixels: use larger images or fewer discriminator layers"
            )
        return self.main(images_bchw)
