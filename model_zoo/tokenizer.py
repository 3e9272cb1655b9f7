"""The image tokenizer: encoder, quantizer, decoder."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model_zoo.autoencoder import Decoder, Encoder
from model_zoo.config import TokenizerConfig, check_fields
from model_zoo.errors import ModelError
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.quantizers.base import Quantized
from model_zoo.quantizers.registry import QUANTIZERS


class TokenizerOutput(NamedTuple):
    """reconstruction_bchw: in about [-1, 1], not clamped. quantized: codes and the quantizer's loss terms."""

    reconstruction_bchw: Tensor
    quantized: Quantized


class Tokenizer(nn.Module):
    """Images ``(b, 3, H, W)`` in [-1, 1] <-> codes ``(b, H/f, W/f)``, f = ``downsampling_factor``.

    State-dict names are those of the published checkpoints (VQGAN's).

    shard: this rank's rows of a codebook sharded over ranks; see `model_zoo.quantizers.CodebookQuantizer`.
    """

    def __init__(self, config: TokenizerConfig, shard: CodebookShard | None = None):
        super().__init__()
        if config.quantizer not in QUANTIZERS:
            raise ModelError(f"unknown model.quantizer {config.quantizer!r}: choose one of {', '.join(QUANTIZERS)}")
        check_fields(config)
        if not config.channel_multipliers:
            raise ModelError("model.channel_multipliers=[] must have at least 1 level")
        self.config = config
        self.downsampling_factor = config.patch_size * 2 ** (len(config.channel_multipliers) - 1)
        shape = dict(
            channels=config.channels,
            channel_multipliers=list(config.channel_multipliers),
            num_res_blocks=config.num_res_blocks,
            attention_factors=list(config.attention_factors),
            latent_channels=config.latent_channels,
            patch_size=config.patch_size,
            local=config.local,
        )
        self.encoder = Encoder(**shape)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_dim, 1)
        self.quantize = QUANTIZERS[config.quantizer](config, shard)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_channels, 1)
        self.decoder = Decoder(**shape)

    def encode(self, images_bchw: Tensor) -> Tensor:
        """Images -> features ``z_bdhw`` before quantization."""
        return self.quant_conv(self.encoder(images_bchw))

    def decode(self, quantized_bdhw: Tensor) -> Tensor:
        """Code vectors -> images, not clamped."""
        return self.decoder(self.post_quant_conv(quantized_bdhw))

    def forward(self, images_bchw: Tensor, entropy_temperature: float | None = None) -> TokenizerOutput:
        """Forward pass for training. With ``entropy_temperature`` the quantizer's entropy terms are computed too."""
        quantized = self.quantize(self.encode(images_bchw), entropy_temperature)
        return TokenizerOutput(self.decode(quantized.quantized_bdhw), quantized)

    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the mapping from images to codes: a hash of the names, shapes and fp32
        values of encoder and codebook, and the quantizer's settings. The decoder is not included."""
        digest = hashlib.sha256(self.quantize.settings().encode())
        ignored = {f"quantize.{name}" for name in self.quantize.without_effect_on_codes}
        for name, tensor in sorted(self.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.", "quantize.")) and name not in ignored:
                values = tensor.detach().float().cpu().contiguous()
                digest.update(f"{name} {list(values.shape)}\n".encode())
                digest.update(values.numpy().astype("<f4", copy=False).tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def tokenize(self, images_bchw: Tensor) -> Tensor:
        """Images in [-1, 1] -> int64 codes ``(b, h, w)``."""
        return self.quantize.tokenize(self.encode(images_bchw))

    @torch.no_grad()
    def detokenize(self, index_bhw: Tensor) -> Tensor:
        """Codes -> images, not clamped. Raises ModelError for a code outside the codebook."""
        if index_bhw.numel() and not 0 <= int(index_bhw.min()) <= int(index_bhw.max()) < self.config.codebook_size:
            raise ModelError(f"codes must lie in [0, {self.config.codebook_size})")
        return self.decode(self.quantize.lookup(index_bhw))
