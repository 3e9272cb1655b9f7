"""Frozen vision transformers: their patch features, which the semantic term of tokenizer training aims at, and the
features of several blocks, on which the discriminator `dino` is built."""

import math
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.config import DISCRIMINATOR_ENCODERS, ENCODERS
from model_zoo.errors import ModelError
from model_zoo.eval_nets.shapes import grid_of_equal_area
from model_zoo.eval_nets.weights import WeightsFile, checked_file, frozen
from model_zoo.io.weights import check_weights

# What files hold and `patch_encoder_on_meta` has not: classifiers, poolings, DINOv2's token of masked patches.
NOT_USED = ("head.", "fc_norm.", "attn_pool.", "mask_token")


class Use(NamedTuple):
    """What a section of a recipe uses an encoder for. encoders: those to choose from. key: the setting that turns it
    on. without: how to train without it."""

    encoders: dict[str, str | None]
    key: str
    without: str


# By section.
USES = {
    "loss.semantic": Use(ENCODERS, "loss.semantic", "train without the semantic term: loss.semantic.weight=0"),
    "discriminator": Use(
        DISCRIMINATOR_ENCODERS, "discriminator.kind=dino", "train with PatchGAN: discriminator.kind=patchgan"
    ),
}


class PatchEncoder(nn.Module):
    """A vision transformer of `timm` (DINOv2, arXiv 2304.07193; SigLIP 2, arXiv 2502.14786) that gives the features of
    patches: the last layer's tokens after its norm, without class and register tokens.

    The user supplies the weights; nothing is downloaded. They are non-persistent buffers: they follow `.to(...)`, but
    are neither optimised nor saved in checkpoints.

    Args:
        name: of `ENCODERS`; timm's name.
        weights: path of the file; None uses the default location, see `encoder_file`.
        sha256: the file's expected hash; None accepts every file that fits.
        size: side in pixels of the square picture that has as many patches as each picture gets; None: the size that
            the encoder was trained with last.

    Raises:
        ModelError: if timm is not installed, the file is missing or has another hash, or holds the weights of another
            encoder; if ``size`` is no multiple of the patch.
    """

    section = "loss.semantic"  # of the recipe: messages name its keys

    def __init__(self, name: str, weights: str | None = None, sha256: str | None = None, size: int | None = None):
        super().__init__()
        self._describe(name, patch_encoder_on_meta(name, self.section), size)
        path = checked_encoder(name, weights, sha256, self.section)[0]
        self.vit.load_state_dict(_read(path, name, self.vit, self.section), strict=True, assign=True)
        frozen(self.vit)
        self.eval()

    @classmethod
    def on_meta(cls, name: str, size: int | None = None) -> "PatchEncoder":
        """The encoder without values, for counting its bytes."""
        encoder = cls.__new__(cls)
        nn.Module.__init__(encoder)
        encoder._describe(name, patch_encoder_on_meta(name, cls.section), size)
        frozen(encoder.vit)
        return encoder

    def _describe(self, name: str, vit: nn.Module, size: int | None) -> None:
        self.name, self.vit = name, vit
        settings, (self.patch, _) = vit.pretrained_cfg, vit.patch_embed.patch_size
        size = settings["input_size"][1] if size is None else size
        if size % self.patch:
            raise ModelError(f"{self.section}.size={size} must be a multiple of {self.patch}, the patch of {name}")
        self.side, self.dim = size // self.patch, vit.embed_dim
        self.register_buffer("mean_c11", torch.tensor(settings["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std_c11", torch.tensor(settings["std"]).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "PatchEncoder":
        """Stays in evaluation mode; returns self."""
        return super().train(False)

    @property
    def title(self) -> str:
        """Name and number of parameters."""
        millions = sum(tensor.numel() for tensor in self.vit.buffers()) / 1e6
        return f"{self.name.partition('.')[0]}, {millions:.1f} M parameters, frozen"

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(tensor.nbytes for tensor in self.vit.buffers())

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture: about ``side²`` patches, in the picture's aspect as far as whole
        patches allow."""
        return grid_of_equal_area(self.side, height, width)

    @torch.no_grad()
    def forward(self, images_bchw: Tensor) -> Tensor:
        """Features ``(b, dim, rows, columns)`` of images in [-1, 1]."""
        rows, columns = self.grid(*images_bchw.shape[2:])
        size = rows * self.patch, columns * self.patch
        # As the encoders' own preprocessing. A bicubic kernel overshoots at edges.
        resized = F.interpolate(images_bchw, size, mode="bicubic", antialias=True).clamp(-1, 1)
        tokens_bnd = self.vit.forward_features((resized / 2 + 0.5 - self.mean_c11) / self.std_c11)
        return tokens_bnd[:, self.vit.num_prefix_tokens :].mT.unflatten(2, (rows, columns))


class BlockEncoder(PatchEncoder):
    """The same transformers for the discriminator: gives the tokens of several blocks, and gradients flow through it to
    the images.

    The tokens are read before the first block and after each quarter of the blocks (of 12: after 3, 6, 9 and 12), and
    the class token is added to each, as in StyleGAN-T (arXiv 2301.09515) and in VAR's tokenizer (vaex, DinoDisc). They
    are not normed.
    """

    section = "discriminator"
    outputs = 5  # of `forward`

    def _describe(self, name: str, vit: nn.Module, size: int | None) -> None:
        super()._describe(name, vit, size)
        if self.side < 3:
            raise ModelError(
                f"{self.section}.size={self.side * self.patch} must be at least {3 * self.patch}, 3 patches of {name}"
            )
        self.last_blocks = {math.ceil(len(vit.blocks) * quarter / 4) for quarter in (1, 2, 3, 4)}  # from 1

    def forward(self, images_bchw: Tensor) -> list[Tensor]:
        """Tokens ``(b, dim, rows x columns)``, five times, of images in [-1, 1]. Values outside are not clamped, so
        that they get a gradient."""
        rows, columns = self.grid(*images_bchw.shape[2:])
        size = rows * self.patch, columns * self.patch
        # Bilinear, because a bicubic kernel would overshoot at edges.
        resized = F.interpolate(images_bchw, size, mode="bilinear", antialias=True)
        vit = self.vit
        x_bnd = vit.patch_embed((resized / 2 + 0.5 - self.mean_c11) / self.std_c11)
        x_bnd = vit.norm_pre(vit._pos_embed(x_bnd))
        found = [x_bnd]
        for number, block in enumerate(vit.blocks, start=1):
            x_bnd = block(x_bnd)
            if number in self.last_blocks:
                found.append(x_bnd)
        return [(tokens_bnd[:, vit.num_prefix_tokens :] + tokens_bnd[:, :1]).mT for tokens_bnd in found]


def patch_encoder_on_meta(name: str, section: str = "loss.semantic") -> nn.Module:
    """timm's transformer on the meta device, without classifier and pooling. Its position embedding is interpolated to
    the grid of each picture. Raises ModelError if timm is not installed."""
    try:
        import timm  # optional, and slow to import
    except ImportError as error:
        raise ModelError(
            f"{section}.encoder={name} needs timm, which cannot be imported ({_first_line(error)}): "
            f"pip install 'ibq[semantic]', or {USES[section].without}"
        ) from error
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False, num_classes=0, global_pool="", dynamic_img_size=True).eval()


def encoder_file(name: str, section: str = "loss.semantic") -> WeightsFile:
    """The published file of an encoder. Its hash is not known here: the hub's name does not hold it."""
    meta = USES[section].encoders[name]
    return WeightsFile(
        f"{name}.safetensors",
        None,
        f"https://huggingface.co/timm/{name}, its model.safetensors{f'; {meta}' if meta else ''}",
        USES[section].key,
        (meta.rpartition("/")[2],) if meta else (),
    )


def checked_encoder(
    name: str, weights: str | None, sha256: str | None, section: str = "loss.semantic"
) -> tuple[Path, str]:
    """Path and SHA-256 of an encoder's file. Raises ModelError if it is missing or has not the given hash."""
    path, found = checked_file(encoder_file(name, section), weights, f"{section}.weights=FILE")
    if sha256 is not None and found != sha256.lower():
        raise ModelError(
            f"{path} is not the encoder of this run: its sha256 is {found}, and {section}.sha256={sha256}: name "
            f"the file that has it with {section}.weights=FILE"
        )
    return path, found


def _read(path: Path, name: str, vit: nn.Module, section: str) -> dict[str, Tensor]:
    """The encoder's weights in fp32. Raises ModelError where the file holds others."""
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
        raise ModelError(
            f"{path} holds no weights that can be read ({_first_line(error)}): download it again"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ModelError(f"{path} holds no weights by name: save the state dict alone, or download the published file")
    tensors = {key: tensor for key, tensor in found.items() if not key.startswith(NOT_USED)}
    try:
        check_weights(tensors, vit.state_dict(), f"{path} does not hold the weights of {name}: it")
    except ModelError:
        known = USES[section].encoders
        other = next((other for other in known if other != name and _fits(tensors, other)), None)
        if other is None:
            raise
        raise ModelError(
            f"{path} holds the weights of {other}, not of {name}: name another file, or give {section}.encoder={other}"
        ) from None
    return {key: tensor.float() for key, tensor in tensors.items()}


def _fits(tensors: dict[str, Tensor], name: str) -> bool:
    expected = patch_encoder_on_meta(name).state_dict()
    return {key: tensor.shape for key, tensor in tensors.items()} == {key: t.shape for key, t in expected.items()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
