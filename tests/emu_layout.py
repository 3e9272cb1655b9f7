"""The folder of Emu3.5's tokenizer: keys and forward pass by the description of the layout, without our model.

Weights are random numbers by key, as in golden/make_published.py.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from golden.make_published import random_numbers, weight_of
from torch import Tensor

PARAMETERS = 455_336_963  # of the full size; published as 455M
FULL = {
    "ddconfig": {
        "double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 256,
        "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 4, "attn_resolutions": [16], "dropout": 0.0,
    },
    "n_embed": 131072, "embed_dim": 256, "beta": 0.25, "use_entropy_loss": True, "cosine_similarity": False,
    "entropy_temperature": 0.01, "sample_minimization_weight": 1.0, "batch_maximization_weight": 1.0,
}  # fmt: skip
FACTOR = 4
SMALL = {
    **FULL,
    "ddconfig": {
        **FULL["ddconfig"], "z_channels": 16, "resolution": 64, "ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 2,
    },
    "n_embed": 64, "embed_dim": 8,
}  # fmt: skip


def changed(about: dict, **changes) -> dict:
    """A configuration with other values by key; ``ddconfig__ch`` is ``ch`` in ``ddconfig``; ``...`` removes a key."""
    about = copy.deepcopy(about)
    for key, value in changes.items():
        *groups, last = key.split("__")
        keys = about[groups[0]] if groups else about
        if value is ...:
            del keys[last]
        else:
            keys[last] = value
    return about


def write_emu(folder: Path, about: dict = SMALL, state: dict[str, Tensor] | None = None, plain: bool = False) -> Path:
    """Writes the folder. state: of model.ckpt, `state_of` if it is not given; under ``state_dict`` unless ``plain``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(about))
    state = state_of(about) if state is None else state
    torch.save(state if plain else {"state_dict": state}, folder / "model.ckpt")
    return folder


def state_of(about: dict) -> dict[str, Tensor]:
    return {key: weight_of(key, shape) for key, shape in shapes_of(about).items()}


def pictures(height: int, width: int) -> Tensor:
    """Two, in [-1, 1]."""
    return torch.tensor(random_numbers(f"{height} x {width}", (2, 3, height, width)), dtype=torch.float32).tanh()


# ------------------------------------------------------------------------------------------------------------- the keys


def attended(dd: dict) -> list[bool]:
    """Of each level, finest first, whether it has attention: the resolution is halved from level to level."""
    return [dd["resolution"] // 2**level in dd["attn_resolutions"] for level in range(len(dd["ch_mult"]))]


def shapes_of(about: dict) -> dict[str, tuple[int, ...]]:
    """Shapes by key of model.ckpt."""
    dd, shapes = about["ddconfig"], {}
    widths, last = [dd["ch"] * multiplier for multiplier in dd["ch_mult"]], len(dd["ch_mult"]) - 1

    def convolution(key, inputs, outputs, side):
        shapes[f"{key}.weight"], shapes[f"{key}.bias"] = (outputs, inputs, side, side), (outputs,)

    def norm(key, width):
        shapes[f"{key}.weight"] = shapes[f"{key}.bias"] = (width,)

    def block(key, inputs, outputs):
        norm(f"{key}.norm1", inputs)
        convolution(f"{key}.conv1", inputs, outputs, 3)
        norm(f"{key}.norm2", outputs)
        convolution(f"{key}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            convolution(f"{key}.nin_shortcut", inputs, outputs, 1)

    def attention(key, width):
        norm(f"{key}.norm", width)
        for name in ("q", "k", "v", "proj_out"):
            convolution(f"{key}.{name}", width, width, 1)

    def level(key, inputs, outputs, blocks, has_attention):
        for index in range(blocks):
            block(f"{key}.block.{index}", inputs if index == 0 else outputs, outputs)
            if has_attention:
                attention(f"{key}.attn.{index}", outputs)

    for side in ("encoder", "decoder"):
        block(f"{side}.mid.block_1", widths[-1], widths[-1])
        attention(f"{side}.mid.attn_1", widths[-1])
        block(f"{side}.mid.block_2", widths[-1], widths[-1])
    convolution("encoder.conv_in", 3, dd["ch"], 3)
    convolution("decoder.conv_in", dd["z_channels"], widths[-1], 3)
    for i, has_attention in enumerate(attended(dd)):
        level(f"encoder.down.{i}", widths[i - 1] if i else dd["ch"], widths[i], dd["num_res_blocks"], has_attention)
        inputs = widths[min(i + 1, last)]
        level(f"decoder.up.{i}", inputs, widths[i], dd["num_res_blocks"] + 1, has_attention)
        if i != last:
            convolution(f"encoder.down.{i}.downsample.conv", widths[i], widths[i], 3)
        if i != 0:
            convolution(f"decoder.up.{i}.upsample.conv", widths[i], widths[i], 3)
    norm("encoder.norm_out", widths[-1])
    convolution("encoder.conv_out", widths[-1], dd["z_channels"], 3)
    norm("decoder.norm_out", widths[0])
    convolution("decoder.conv_out", widths[0], 3, 3)
    convolution("quant_conv", dd["z_channels"], about["embed_dim"], 1)
    convolution("post_quant_conv", about["embed_dim"], dd["z_channels"], 1)
    shapes["quantize.embedding.weight"] = (about["n_embed"], about["embed_dim"])
    return shapes


# ---------------------------------------------------------------------------------------------------- the computation


class Forward:
    """The published computation in float64, by the keys of a state dict."""

    def __init__(self, about: dict, state: dict[str, Tensor]):
        self.about, self.dd = about, about["ddconfig"]
        self.state = {key: tensor.double() for key, tensor in state.items()}

    def encode(self, images_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (b, h, w), and the logits (b, h, w, codes) that they are the largest of."""
        h, levels = self._convolution("encoder.conv_in", images_bchw.double()), attended(self.dd)
        for i, has_attention in enumerate(levels):
            h = self._level(f"encoder.down.{i}", h, self.dd["num_res_blocks"], has_attention)
            if i != len(levels) - 1:  # padded at the bottom and at the right only
                h = self._convolution(f"encoder.down.{i}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2, padding=0)
        h = self._head("encoder", self._middle("encoder", h))
        z_bdhw = self._convolution("quant_conv", h, padding=0)
        if self.about.get("l2_normalize"):
            z_bdhw = z_bdhw / z_bdhw.norm(dim=1, keepdim=True)
        logits_bhwk = torch.einsum("bdhw,kd->bhwk", z_bdhw, self._codes())
        return logits_bhwk.argmax(dim=3), logits_bhwk

    def decode(self, index_bhw: Tensor) -> Tensor:
        h = self._convolution("post_quant_conv", self._codes()[index_bhw].permute(0, 3, 1, 2), padding=0)
        h, levels = self._middle("decoder", self._convolution("decoder.conv_in", h)), attended(self.dd)
        for i in reversed(range(len(levels))):
            h = self._level(f"decoder.up.{i}", h, self.dd["num_res_blocks"] + 1, levels[i])
            if i != 0:
                doubled = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                h = self._convolution(f"decoder.up.{i}.upsample.conv", doubled)
        return self._head("decoder", h)

    def _codes(self) -> Tensor:
        codes_kd = self.state["quantize.embedding.weight"]
        return codes_kd / codes_kd.norm(dim=1, keepdim=True) if self.about.get("l2_normalize") else codes_kd

    def _convolution(self, key: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        return F.conv2d(x, self.state[f"{key}.weight"], self.state[f"{key}.bias"], stride, padding)

    def _norm(self, key: str, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        groups = x.reshape(b, 32, -1)
        mean, variance = groups.mean(dim=2, keepdim=True), groups.var(dim=2, correction=0, keepdim=True)
        plain = ((groups - mean) / (variance + 1e-6).sqrt()).reshape(b, c, h, w)
        return plain * self.state[f"{key}.weight"][:, None, None] + self.state[f"{key}.bias"][:, None, None]

    def _head(self, side: str, x: Tensor) -> Tensor:
        return self._convolution(f"{side}.conv_out", swish(self._norm(f"{side}.norm_out", x)))

    def _block(self, key: str, x: Tensor) -> Tensor:
        h = self._convolution(f"{key}.conv1", swish(self._norm(f"{key}.norm1", x)))
        h = self._convolution(f"{key}.conv2", swish(self._norm(f"{key}.norm2", h)))
        changes_width = self.state[f"{key}.conv1.weight"].shape[0] != self.state[f"{key}.conv1.weight"].shape[1]
        return h + (self._convolution(f"{key}.nin_shortcut", x, padding=0) if changes_width else x)

    def _attention(self, key: str, x: Tensor) -> Tensor:
        normed = self._norm(f"{key}.norm", x)
        q, k, v = (self._convolution(f"{key}.{name}", normed, padding=0).flatten(2) for name in "qkv")
        weights_bnm = torch.softmax(q.transpose(1, 2) @ k / x.shape[1] ** 0.5, dim=2)
        attended_bcn = v @ weights_bnm.transpose(1, 2)
        return x + self._convolution(f"{key}.proj_out", attended_bcn.reshape(x.shape), padding=0)

    def _middle(self, side: str, x: Tensor) -> Tensor:
        h = self._attention(f"{side}.mid.attn_1", self._block(f"{side}.mid.block_1", x))
        return self._block(f"{side}.mid.block_2", h)

    def _level(self, key: str, x: Tensor, blocks: int, has_attention: bool) -> Tensor:
        for index in range(blocks):
            x = self._block(f"{key}.block.{index}", x)
            if has_attention:
                x = self._attention(f"{key}.attn.{index}", x)
        return x


def swish(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))
