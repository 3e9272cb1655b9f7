"""The PatchGAN discriminator (arXiv 1611.07004) in VQGAN's form, and heads on the tokens of a frozen transformer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class SpectralConv1d(nn.Conv1d):
    """A convolution whose weight is divided by its largest singular value (arXiv 1802.05957), which power iteration
    estimates.

    torch's own parametrization iterates in every forward pass. Here `iterate` does it, once per update of the weight.
    So a step depends neither on the number of forward passes nor on how the batch is split.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("u", F.normalize(torch.randn(self.out_channels), dim=0))  # the left singular vector
        for _ in range(15):
            self.iterate()

    @torch.no_grad()
    def iterate(self) -> None:
        """One power iteration."""
        matrix = self.weight.flatten(1)
        self.u.copy_(F.normalize(matrix @ F.normalize(matrix.mT @ self.u, dim=0), dim=0))

    def forward(self, x_bdn: Tensor) -> Tensor:
        with torch.autocast(x_bdn.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            v = F.normalize(matrix.detach().mT @ self.u, dim=0)
            weight = self.weight / (self.u @ matrix @ v)
        return self._conv_forward(x_bdn, weight, self.bias)


def _spectral_block(dim: int, kernel: int) -> nn.Sequential:
    convolution = SpectralConv1d(dim, dim, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(convolution, group_norm(dim, eps=1e-5), nn.LeakyReLU(0.2))


class TokenHead(nn.Module):
    """Tokens ``(b, dim, n)``, in the order of reading -> a logit for each, ``(b, n)``."""

    def __init__(self, dim: int):
        super().__init__()
        self.point, self.neighbours = _spectral_block(dim, 1), _spectral_block(dim, 9)
        self.logit = SpectralConv1d(dim, 1, 1)

    def forward(self, tokens_bdn: Tensor) -> Tensor:
        x_bdn = self.point(tokens_bdn)
        x_bdn = (x_bdn + self.neighbours(x_bdn)) / 2**0.5
        return self.logit(x_bdn).squeeze(1)


class TokenDiscriminator(nn.Module):
    """One head for each of several blocks of a frozen transformer, as in StyleGAN-T (arXiv 2301.09515), without its
    condition, and in vaex (DinoDisc), the trainer of VAR's tokenizer.

    A head is a convolution over the tokens with a kernel of 1, one with a kernel of 9 and a residual, and one to a
    logit. They are circular and have spectral norm; the first two are followed by a norm and LeakyReLU. Five heads of
    384 dimensions have 7.4 M parameters. What differs: the norm is group norm (a choice in vaex), so that images are
    independent, where StyleGAN-T has batch norm over 8 images. There is no augmentation (DiffAugment) and no crop.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = nn.ModuleList(TokenHead(dim) for _ in range(heads))

    def forward(self, tokens: list[Tensor]) -> Tensor:
        """Tokens ``(b, dim, n)`` of each block -> logits ``(b, heads x n)``, high for real."""
        return torch.cat([head(tokens_bdn) for head, tokens_bdn in zip(self.heads, tokens, strict=True)], dim=1)

    def after_update(self) -> None:
        """Call once after each update of the weights."""
        for module in self.modules():
            if isinstance(module, SpectralConv1d):
                module.iterate()
