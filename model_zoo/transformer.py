"""The autoregressive generator: a Llama-like transformer over an image's codes, row by row (arXiv 2412.02692, 3.3).

Position 0 holds the class, which is start token and condition at once; position t holds code t - 1 and predicts code t.
So ``logits[:, t]`` depends on the class and on codes 0 to t - 1 alone.

Shapes: b images, t positions, w width, h heads, d numbers in a head, p pairs of them, v codes of the vocabulary.
State-dict names are those of the published checkpoints.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model_zoo.config import TransformerConfig, check_fields
from model_zoo.errors import ModelError
from model_zoo.io.load import load_model
from model_zoo.ops import CodebookShard, LinearCrossEntropy, linear_cross_entropy
from model_zoo.ops.attention import causal_attention


def flops_per_token(config: TransformerConfig) -> float:
    """Floating-point operations of a forward, per token; a multiply and an add count as two. Training takes three times
    as many (the backward pass twice a forward's).

    ``2 depth (4 w^2 + 3 w hidden) + 4 depth tokens w + 2 w vocabulary + 2 (6 depth + 2) w^2 / tokens``: the blocks'
    matrices; products of queries and keys and of weights and values, the whole square, although half of it is masked;
    the head; and the modulations, which an image needs once.
    """
    w, tokens = config.width, config.tokens
    matrices = 2 * config.depth * (4 * w**2 + 3 * w * config.hidden) + 2 * w * config.vocabulary
    if config.embedding == "codebook":
        matrices += 2 * config.code_dim * w * (tokens - 1) / tokens
    return matrices + 4 * config.depth * tokens * w + 2 * (6 * config.depth + 2) * w**2 / tokens


class Past(NamedTuple):
    """What a block keeps while an image is generated: keys and values ``(b, h, t, d)`` of the positions before, and its
    modulation ``(b, 6, w)``, which is the same at all of them."""

    keys_bhtd: Tensor
    values_bhtd: Tensor
    modulation_b6w: Tensor


class Now(NamedTuple):
    """Where generating is: the position, as a tensor ``(1,)``; whether it is the first; and how many positions of
    `Past` are looked at, which of them by ``mask_1t`` (None: all)."""

    position: Tensor
    first: bool
    limit: int
    mask_1t: Tensor | None


class Transformer(nn.Module):
    """Codes before and a class -> logits of the next code.

    shard: the head's rows that are here, where the vocabulary is spread over ranks; there is a loss then, and no
    logits. Raises ModelError for a configuration that makes no model.
    """

    def __init__(self, config: TransformerConfig, shard: CodebookShard | None = None):
        super().__init__()
        check_fields(config)
        if config.head_dim % 4:
            raise ModelError(f"model.head_dim={config.head_dim} must be a multiple of 4: pairs by row and by column")
        if len(config.grid) != 2:
            raise ModelError(f"model.grid={config.grid} must be rows and columns")
        self.config = config
        width = config.width
        if config.embedding == "codebook":
            self.tok_emb = CodebookEmbedding(config.vocabulary, config.code_dim, width)
        else:
            self.tok_emb = nn.Embedding(config.vocabulary, width)
        self.class_emb = ClassEmbedding(config.classes, width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(width)
        self.head = Head(width, config.vocabulary, shard)
        self.register_buffer("rope_tp2", rope_table(*config.grid, config.head_dim), persistent=False)
        self._initialize()

    def forward(self, index_bt: Tensor, class_b: Tensor) -> Tensor:
        """Logits ``(b, t + 1, v)``; ``logits[:, t]`` predicts code t.

        index_bt: the first codes of images, in rows; fewer than all, down to none. class_b: classes, or
        ``config.classes`` for no class (guidance). Raises ModelError.
        """
        if index_bt.shape[1] >= self.config.tokens:
            raise ModelError(
                f"{index_bt.shape[1]} codes leave nothing to predict of {self.config.tokens}: leave some out"
            )
        return self.head(self._hidden(index_bt, class_b))

    def loss(self, index_bt: Tensor, class_b: Tensor, z_weight: float = 0.0, impl: str = "auto") -> LinearCrossEntropy:
        """Cross-entropy of whole images' codes ``(b, tokens)``, nats per token; no logits are built. z_weight, impl:
        see `linear_cross_entropy`."""
        hidden_btw = self._hidden(index_bt[:, :-1], class_b)
        return self.head(hidden_btw, index_bt, z_weight=z_weight, impl=impl)

    def _hidden(self, index_bt: Tensor, class_b: Tensor) -> Tensor:
        condition_bw = self.class_emb(class_b)
        x_btw = self.dropout(torch.cat([condition_bw[:, None], self.tok_emb(index_bt)], dim=1))
        rope_tp2 = self.rope_tp2[: x_btw.shape[1]]
        for block in self.blocks:
            x_btw = block(x_btw, condition_bw, rope_tp2)
        return self.head_nm(x_btw, condition_bw)

    def new_pasts(self, images: int, dtype: torch.dtype | None = None) -> list[Past]:
        """Room for generating so many images at once; dtype: None: the weights'."""
        config, like = self.config, self.rope_tp2
        dtype = dtype or self.class_emb.embedding_table.weight.dtype
        pasts = []
        for _ in range(config.depth):
            keys, values = like.new_zeros(2, images, config.heads, config.tokens, config.head_dim, dtype=dtype)
            pasts.append(Past(keys, values, like.new_zeros(images, 6, config.width, dtype=dtype)))
        return pasts

    def next_logits(self, index_b: Tensor | None, class_b: Tensor, pasts: list[Past], now: Now) -> Tensor:
        """Logits ``(b, v)`` of the code at one position, from the code before it (None at the first position) and from
        ``pasts``, which are filled in place. The same as `forward`'s at that position."""
        condition_bw = self.class_emb(class_b)
        x_bw = condition_bw if now.first else self.tok_emb(index_b)
        x_b1w, rope_1p2 = self.dropout(x_bw[:, None]), self.rope_tp2[now.position]
        for block, past in zip(self.blocks, pasts, strict=True):
            x_b1w = block(x_b1w, condition_bw, rope_1p2, past, now)
        return self.head(self.head_nm(x_b1w, condition_bw))[:, 0]

    @torch.no_grad()
    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        gates = 2 * self.config.width
        for block in self.blocks:
            block.ada_lin[1].weight[:gates] *= self.config.gate_init
            block.ada_lin[1].weight[gates:] *= 0.5
        self.head_nm.ada_lin[1].weight *= 0.5
        nn.init.zeros_(self.head.weight)


class ClassEmbedding(nn.Module):
    """Class -> ``(b, w)``; the last row is that of no class."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, class_b: Tensor) -> Tensor:
        return self.embedding_table(class_b)


class CodebookEmbedding(nn.Module):
    """Codes -> the tokenizer's code vectors, which are not trained, through a linear layer. ``codebook_vd`` is to be
    filled by whoever has the tokenizer, and is part of checkpoints."""

    def __init__(self, vocabulary: int, code_dim: int, width: int):
        super().__init__()
        self.register_buffer("codebook_vd", torch.zeros(vocabulary, code_dim))
        self.projection = nn.Linear(code_dim, width)

    def forward(self, index_bt: Tensor) -> Tensor:
        return self.projection(F.embedding(index_bt, self.codebook_vd))


class Block(nn.Module):
    """Attention and feed-forward, each normalised, shifted and scaled before and gated behind by the class."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width = config.width
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)
        self.feed_forward = FeedForward(width, config.hidden, config.dropout)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x_btw: Tensor, condition_bw: Tensor, rope_tp2: Tensor, past: Past | None = None, now: Now | None = None
    ) -> Tensor:
        if past is None:
            modulation_b6w = self.ada_lin(condition_bw).unflatten(1, (6, -1))
        else:
            if now.first:
                past.modulation_b6w.copy_(self.ada_lin(condition_bw).unflatten(1, (6, -1)))
            modulation_b6w = past.modulation_b6w
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation_b6w[:, :, None].unbind(1)
        attended_btw = self.attention(self.attention_norm(x_btw) * (1 + scale1) + shift1, rope_tp2, past, now)
        x_btw = x_btw + gate1 * attended_btw
        return x_btw + gate2 * self.feed_forward(self.ffn_norm(x_btw) * (1 + scale2) + shift2)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_btw: Tensor, rope_tp2: Tensor, past: Past | None, now: Now | None) -> Tensor:
        q, k, v = self.wqkv(x_btw).unflatten(2, (3, -1, self.head_dim)).unbind(2)
        q, k = rotate(q, rope_tp2), rotate(k, rope_tp2)
        out_bthd = causal_attention(q, k, v) if past is None else _attend_to_past(q, k, v, past, now)
        return self.dropout(self.wo(out_bthd.flatten(2)))


def _attend_to_past(q_b1hd: Tensor, k_b1hd: Tensor, v_b1hd: Tensor, past: Past, now: Now) -> Tensor:
    """Attention of one position over itself and those before, whose keys and values it joins."""
    past.keys_bhtd.index_copy_(2, now.position, k_b1hd.transpose(1, 2).to(past.keys_bhtd.dtype))
    past.values_bhtd.index_copy_(2, now.position, v_b1hd.transpose(1, 2).to(past.values_bhtd.dtype))
    keys, values = past.keys_bhtd[:, :, : now.limit], past.values_bhtd[:, :, : now.limit]
    q_bh1d = q_b1hd.transpose(1, 2).to(keys.dtype)
    return F.scaled_dot_product_attention(q_bh1d, keys, values, attn_mask=now.mask_1t).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_btw: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x_btw)) * self.w3(x_btw)))


class HeadNorm(nn.Module):
    """The last norm, scaled and shifted by the class."""

    def __init__(self, width: int):
        super().__init__()
        self.rmsnorm = nn.RMSNorm(width, eps=1e-5)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_btw: Tensor, condition_bw: Tensor) -> Tensor:
        scale, shift = self.ada_lin(condition_bw).unflatten(1, (2, 1, -1)).unbind(1)
        return self.rmsnorm(x_btw) * (1 + scale) + shift


class Head(nn.Module):
    """Hidden states -> logits; or, where targets are given, their loss without the logits."""

    def __init__(self, width: int, vocabulary: int, shard: CodebookShard | None):
        super().__init__()
        if shard is not None:
            shard.check(vocabulary)
        self.shard = shard
        self.weight = nn.Parameter(torch.empty(vocabulary if shard is None else shard.stop - shard.start, width))

    def forward(self, hidden_btw: Tensor, target_bt: Tensor | None = None, **options) -> Tensor | LinearCrossEntropy:
        if target_bt is not None:
            hidden_nw, target_n = hidden_btw.flatten(0, 1), target_bt.flatten()
            return linear_cross_entropy(hidden_nw, self.weight, target_n, shard=self.shard, **options)
        if self.shard is not None:
            raise ModelError("a vocabulary that is spread over ranks gives a loss, and no logits")
        return F.linear(hidden_btw, self.weight)


def rope_table(rows: int, columns: int, head_dim: int) -> Tensor:
    """Cosines and sines ``(1 + rows * columns, head_dim / 2, 2)`` of 2-D rotary embeddings (RoPE, arXiv 2104.09864):
    the first half of the pairs turns with the row, the second with the column, base 10,000. Those of position 0, the
    class, are all zero, as in the published models, so that its query and key vanish. The last position is that of the
    last code, behind which nothing is predicted."""
    frequencies = 10000.0 ** -(torch.arange(head_dim // 4) / (head_dim // 4))
    row_rcp = (torch.arange(rows)[:, None] * frequencies)[:, None].expand(-1, columns, -1)
    column_rcp = (torch.arange(columns)[:, None] * frequencies)[None].expand(rows, -1, -1)
    angles_tp = torch.cat([row_rcp, column_rcp], dim=-1).flatten(0, 1)
    return F.pad(torch.stack([angles_tp.cos(), angles_tp.sin()], dim=-1), (0, 0, 0, 0, 1, 0))


def rotate(x_bthd: Tensor, rope_tp2: Tensor) -> Tensor:
    """Turns each pair of neighbouring numbers by its position's angle, in fp32."""
    even, odd = x_bthd.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope_tp2[:, None].unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x_bthd)


# What selective checkpointing keeps: results of matrix products and of attention. All else is computed again.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def checkpoint_blocks(transformer: Transformer, selective: bool = False) -> None:
    """From now on the blocks keep only their inputs for the backward pass, which computes the rest again (Chen et al.,
    arXiv 1604.06174). selective: products and attention are kept too, and only what is cheap is computed again."""

    def policy(_, op, *args, **kwargs):
        of_flash = getattr(op, "namespace", "").startswith("flash_attn")
        return CheckpointPolicy.MUST_SAVE if op in KEPT or of_flash else CheckpointPolicy.PREFER_RECOMPUTE

    options = {"context_fn": partial(create_selective_checkpoint_contexts, policy)} if selective else {}
    for block in transformer.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)


def load_generator(source: str | Path, weights: str = "ema") -> Transformer:
    """A trained or published generator, in eval mode on the CPU, in fp32.

    source, weights: see `model_zoo.io.load.read_weights`: a run, a published ``.ckpt``, whose images are taken to have
    16 x 16 codes, an export, or a name on the model hub.
    Raises ModelError where the source, a checkpoint in it, or the asked weights are missing.
    """

    def build(config: TransformerConfig) -> Transformer:
        with torch.device("meta"):  # large ones take long to initialise, in vain
            transformer = Transformer(config)
        transformer.rope_tp2 = rope_table(*config.grid, config.head_dim)  # is in no checkpoint
        return transformer

    return load_model(source, weights, "generator", TransformerConfig, build, assign=True).float()
