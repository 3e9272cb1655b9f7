"""A small random vision transformer of timm in a file, and its features computed by hand."""

from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

ENCODER = "test_vit.r160_in1k"  # 0.3 M parameters, patches of 16 x 16 pixels, 10 x 10 of them in its own size
PATCH, HEADS, BLOCKS = 16, 2, 6
MEAN = STD = 0.5


def random_encoder(seed: int = 0, name: str = ENCODER) -> dict[str, Tensor]:
    """A state dict in which every weight matters, with the classifier that published files hold."""
    generator = torch.Generator().manual_seed(seed)
    state = timm.create_model(name, pretrained=False).state_dict()
    for key, tensor in state.items():
        scale = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        state[key] = scale + 0.3 * torch.randn(tensor.shape, generator=generator) / max(1, tensor[0].numel()) ** 0.25
    return state


def write_encoder(path: Path, seed: int = 0, name: str = ENCODER, change: Callable | None = None) -> Path:
    """The file of a random encoder. change: of its state dict, in place."""
    state = random_encoder(seed, name)
    if change:
        change(state)
    torch.save(state, path) if path.suffix == ".pth" else save_file(state, path)
    return path


def features_by_hand(state: dict[str, Tensor], images_bchw: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch features ``(b, d, rows, columns)`` in float64 of images in [-1, 1]: every layer by its formula."""
    rows, columns = grid
    size = rows * PATCH, columns * PATCH
    resized = F.interpolate(images_bchw.double(), size, mode="bicubic", antialias=True).clamp(-1, 1)
    x = tokens_by_hand(state, resized, grid)[-1]
    return _norm(x, {key: tensor.double() for key, tensor in state.items()}, "norm")[:, 1:].mT.unflatten(2, grid)


def tokens_by_hand(state: dict[str, Tensor], resized: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """Tokens ``(b, 1 + rows x columns, d)`` in float64 before the first block and after each, of pictures that are as
    large as the grid."""
    state = {key: tensor.double() for key, tensor in state.items()}
    normed = ((resized + 1) / 2 - MEAN) / STD
    pieces_bnp = F.unfold(normed, PATCH, stride=PATCH).mT  # channels, then rows and columns of a patch
    x = pieces_bnp @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    first, rest = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    side = round(rest.shape[1] ** 0.5)
    if grid != (side, side):
        # timm interpolates in fp32.
        rest = rest.float().mT.unflatten(2, (side, side))
        rest = F.interpolate(rest, grid, mode="bicubic", antialias=True).flatten(2).mT.double()
    x = torch.cat([(state["cls_token"] + first).expand(len(x), -1, -1), x + rest], dim=1)
    found = [x]
    for number in range(BLOCKS):
        block = {key.removeprefix(f"blocks.{number}."): value for key, value in state.items()}
        x = x + _attention(_norm(x, block, "norm1"), block)
        hidden = _norm(x, block, "norm2") @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"]
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + hidden @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]
        found.append(x)
    return found


def _norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]


def _attention(x: Tensor, block: dict[str, Tensor]) -> Tensor:
    qkv = x @ block["attn.qkv.weight"].T + block["attn.qkv.bias"]
    q, k, v = (part.unflatten(2, (HEADS, -1)).movedim(1, 2) for part in qkv.chunk(3, dim=-1))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).exp()
    mixed = (weights / weights.sum(-1, keepdim=True)) @ v
    return mixed.movedim(1, 2).flatten(2) @ block["attn.proj.weight"].T + block["attn.proj.bias"]
