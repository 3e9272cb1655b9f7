"""Makes published.npz: keys, shapes and outputs of the published code's own networks, small, with weights by a rule.

    python tests/golden/make_published.py CHECKOUT

CHECKOUT: a clone of TencentARC/SEED-Voken, of which nothing is kept but numbers. The weights are not in the file: both
sides compute each from its key (`weight_of`).
"""

import hashlib
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

FILE = Path(__file__).with_name("published.npz")
AUTOENCODER = {
    "ch": 32,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "z_channels": 16,
    "double_z": False,
    "dropout": 0.0,
}
CODES, CODE_DIM, SIDE = 64, 8, 32
TRANSFORMER = {"vocab_size": CODES, "block_size": 256, "n_layer": 3, "n_head": 2, "n_embd": 128, "cond_dim": 128}
CLASSES, POSITIONS = 5, [0, 1, 2, 17, 40]
MARGIN = 1e-4  # between the best and the second-best code's logit: no rounding may decide a code


def random_numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal, the same everywhere and for ever: RandomState's streams are frozen."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return np.random.RandomState(seed).standard_normal(shape)


def weight_of(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A key's weights: matrices and kernels keep the size of what goes through them, norms are near the identity."""
    if key.endswith("num_updates"):
        return torch.tensor(-1, dtype=torch.int)
    if key.endswith("decay"):
        return torch.tensor(0.999)
    if key.endswith("num_batches_tracked"):
        return torch.tensor(7)
    numbers = random_numbers(key, shape)
    if len(shape) > 1:
        numbers = numbers / np.prod(shape[1:]) ** 0.5
    elif key.endswith(("weight", "running_var")):
        numbers = 1 + 0.1 * numbers
    else:
        numbers = 0.1 * numbers
    return torch.tensor(numbers, dtype=torch.float32)


def images() -> torch.Tensor:
    """Two, in [-1, 1]."""
    return torch.tensor(np.tanh(random_numbers("two images", (2, 3, SIDE, SIDE))), dtype=torch.float32)


def codes() -> torch.Tensor:
    """The first of three images."""
    return torch.tensor(np.abs(random_numbers("codes", (3, max(POSITIONS)))) * 1000, dtype=torch.int64) % CODES


def classes() -> torch.Tensor:
    """Of the three images; the last has none."""
    return torch.tensor([0, 3, CLASSES])


def published_modules(checkout: str) -> tuple[nn.Module, nn.Module]:
    """(tokenizer, generator) with the names of the published Lightning modules."""
    sys.path.insert(0, checkout)
    from src.IBQ.modules.diffusionmodules.model import Decoder, Encoder
    from src.IBQ.modules.discriminator.model import NLayerDiscriminator
    from src.IBQ.modules.ema import LitEma
    from src.IBQ.modules.losses import lpips
    from src.IBQ.modules.transformer.llama import GPT
    from src.IBQ.modules.vqvae.quantize import IndexPropagationQuantize

    def tokenizer() -> nn.Module:
        module = nn.Module()
        module.encoder, module.decoder = Encoder(**AUTOENCODER), Decoder(**AUTOENCODER)
        module.loss = nn.Module()
        vgg16 = lpips.models.vgg16
        with (  # its weights are left out here
            mock.patch.object(lpips.models, "vgg16", lambda pretrained: vgg16()),
            mock.patch.object(lpips.LPIPS, "load_from_pretrained"),
        ):
            module.loss.perceptual_loss = lpips.LPIPS()
        module.loss.discriminator = NLayerDiscriminator()
        module.quantize = IndexPropagationQuantize(CODES, CODE_DIM, use_entropy_loss=True)
        module.quant_conv = nn.Conv2d(AUTOENCODER["z_channels"], CODE_DIM, 1)
        module.post_quant_conv = nn.Conv2d(CODE_DIM, AUTOENCODER["z_channels"], 1)
        return module

    alone = tokenizer()
    alone.model_ema = LitEma(alone)
    generator = nn.Module()
    generator.first_stage_model = tokenizer()
    generator.transformer = GPT(**TRANSFORMER, class_num=CLASSES)
    return alone.eval(), generator.eval()


@torch.no_grad()
def outputs_of_tokenizer(tokenizer: nn.Module) -> dict[str, np.ndarray]:
    features = tokenizer.quant_conv(tokenizer.encoder(images()))
    quantized, _, (_, _, index) = tokenizer.quantize(features)
    logits = torch.einsum("bdhw,kd->bhwk", features, tokenizer.quantize.embedding.weight).flatten(0, 2)
    best = logits.topk(2, dim=1).values
    if (gap := float((best[:, 0] - best[:, 1]).min())) < MARGIN:
        raise SystemExit(f"two codes are but {gap:.1e} apart: change a size or the rule")
    reconstruction = tokenizer.decoder(tokenizer.post_quant_conv(quantized))
    return {
        "features": features,
        "index": index.view(len(features), *features.shape[2:]),
        "reconstruction": reconstruction,
    }


@torch.no_grad()
def main(checkout: str) -> None:
    torch.manual_seed(0)
    tokenizer, generator = published_modules(checkout)
    arrays = {}
    for name, module in {"tokenizer": tokenizer, "generator": generator}.items():
        shapes = {key: list(tensor.shape) for key, tensor in module.state_dict().items()}
        arrays[f"{name}_keys"] = np.array(json.dumps(shapes))
        module.load_state_dict({key: weight_of(key, tuple(shape)) for key, shape in shapes.items()})
    raw = outputs_of_tokenizer(tokenizer)
    tokenizer.model_ema.copy_to(tokenizer)
    averaged = outputs_of_tokenizer(tokenizer)
    arrays |= {f"raw_{name}": value for name, value in raw.items()}
    arrays |= {f"ema_{name}": value for name, value in averaged.items()}
    logits, _ = generator.transformer((codes(), classes()[:, None]))
    arrays["logits"] = logits[:, POSITIONS]
    np.savez_compressed(FILE, **{name: np.asarray(value) for name, value in arrays.items()})
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
