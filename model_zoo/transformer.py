"""The autoregressive generator: a Llama-like transformer over the codes of an image in raster order (arXiv 2412.02692,
section 3.3).

Position 0 holds the class, which serves as start token and as condition; position t holds code t - 1 and predicts code
t. So ``logits[:, t]`` depends only on the class, on the grid and on codes 0 to t - 1.

A model with ``config.grids`` knows pictures of several shapes. The rotary embeddings tell where a code is, but not how
wide the picture is: until the first row ends, the codes of all shapes have the same positions. Therefore such a model
has a table with one row for each grid, which is added to the class embedding. The table starts at zero, so that
fine-tuning from a model without it starts from exactly that model (`trainer.init_from`).

Shapes: b images, t positions, w width, h heads, d dimensions of a head, p = d / 2 pairs, v vocabulary.
State-dict names are those of the published checkpoints.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model_zoo.config import TransformerConfig, check_fields, grid_name
from model_zoo.errors import ModelError
from model_zoo.ops.attention import causal_attention
from model_zoo.ops.codebook_parallel import CodebookShard
from model_zoo.ops.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy


def flops_per_token(config: TransformerConfig, grid: Sequence[int] | None = None) -> float:
    """Floating-point operations of a forward pass per token, counting a multiply-add as two. Training needs three times
    as many, since a backward pass costs as much as two forward passes. grid: of the images; None: ``config.grid``.

    ``2 depth (4 w^2 + 3 w hidden) + 4 depth tokens w + 2 w vocabulary + 2 (6 depth + 2) w^2 / tokens``. The terms are
    the matrices of the blocks; the two products of attention, without discount for the causal mask; the head; and the
    modulations, which are computed once per image.
    """
    w, tokens = config.width, math.prod(grid or config.grid)
    matrices = 2 * config.depth * (4 * w**2 + 3 * w * config.hidden) + 2 * w * config.vocabulary
    if config.embedding == "codebook":
        matrices += 2 * config.code_dim * w * (tokens - 1) / tokens
    return matrices + 4 * config.depth * tokens * w + 2 * (6 * config.depth + 2) * w**2 / tokens


class BlockCache(NamedTuple):
    """Cache of one block during sampling: keys and values ``(b, h, t, d)`` of previous positions, and the block's
    modulation ``(b, 6, w)``, which is the same at all positions."""

    keys_bhtd: Tensor
    values_bhtd: Tensor
    modulation_b6w: Tensor


class DecodePosition(NamedTuple):
    """The position to be sampled, as a tensor ``(1,)``; whether it is the first; and how many cached positions
    attention reads, of which ``mask_1t`` selects some (None: all)."""

    position: Tensor
    first: bool
    limit: int
    mask_1t: Tensor | None


class GridPlace(NamedTuple):
    """Where a grid is in the model's tables: its row of ``grid_emb``, and its first position in ``rope_tp2``. tokens:
    the number of its codes."""

    number: int
    start: int
    tokens: int


class Transformer(nn.Module):
    """Predicts the next code from the class and the previous codes.

    shard: this rank's rows of the head, for a vocabulary sharded over ranks. A sharded model computes a loss but no
    logits. Raises ModelError for an invalid configuration.
    """

    def __init__(self, config: TransformerConfig, shard: CodebookShard | None = None):
        super().__init__()
        check_fields(config)
        if config.head_dim % 4:
            raise ModelError(f"model.head_dim={config.head_dim} must be a multiple of 4: pairs by row and by column")
        self.config, self.places = config, _places(config.all_grids)
        # See `model_zoo.conditions`; None: not known.
        self.trained_c: Tensor | None = None
        self.trained_g: Tensor | None = None
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
        self.grid_emb = GridEmbedding(len(config.grids), width) if config.grids else None
        self.register_buffer("rope_tp2", rope_tables(config), persistent=False)
        self._initialize()

    def place(self, grid: Sequence[int] | None = None) -> GridPlace:
        """grid: rows and columns; None: ``config.grid``. Raises ModelError for a grid that the model does not know."""
        grid = tuple(self.config.grid if grid is None else grid)
        if grid not in self.places:
            known = ", ".join(map(grid_name, self.places))
            raise ModelError(f"{grid_name(grid)} is a grid unknown to the generator: it knows {known}")
        return self.places[grid]

    def forward(self, index_bt: Tensor, class_b: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Logits ``(b, t + 1, v)``; ``logits[:, t]`` predicts code t.

        index_bt: the first t codes of each image, t from 0 to one less than the grid has. class_b: classes;
        ``config.classes`` means no class (for guidance). grid: rows and columns of the images; None: ``config.grid``.
        Raises ModelError for too many codes and for an unknown grid.
        """
        place = self.place(grid)
        if index_bt.shape[1] >= place.tokens:
            raise ModelError(f"{index_bt.shape[1]} codes leave nothing to predict of {place.tokens}: leave some out")
        return self.head(self._hidden(index_bt, class_b, place))

    def loss(
        self,
        index_bt: Tensor,
        class_b: Tensor,
        z_weight: float = 0.0,
        impl: str = "auto",
        grid: Sequence[int] | None = None,
    ) -> LinearCrossEntropy:
        """Cross-entropy of all codes of images ``(b, tokens)``, in nats per token, without building the logits.

        z_weight, impl: see `linear_cross_entropy`. grid: of the images; None: ``config.grid``. Raises ModelError for an
        unknown grid, and where it has another number of codes.
        """
        place = self.place(grid)
        if index_bt.shape[1] != place.tokens:
            raise ModelError(
                f"{index_bt.shape[1]} codes per image are not a grid of {grid_name(grid or self.config.grid)}, which "
                f"has {place.tokens}: give the grid of these codes"
            )
        hidden_btw = self._hidden(index_bt[:, :-1], class_b, place)
        return self.head(hidden_btw, index_bt, z_weight=z_weight, impl=impl)

    def _hidden(self, index_bt: Tensor, class_b: Tensor, place: GridPlace) -> Tensor:
        condition_bw = self._condition(class_b, place)
        x_btw = self.dropout(torch.cat([condition_bw[:, None], self.tok_emb(index_bt)], dim=1))
        rope_tp2 = self.rope_tp2[place.start :][: x_btw.shape[1]]
        for block in self.blocks:
            x_btw = block(x_btw, condition_bw, rope_tp2)
        return self.head_nm(x_btw, condition_bw)

    def _condition(self, class_b: Tensor, place: GridPlace) -> Tensor:
        """``(b, w)``: the start token, which also modulates all blocks."""
        condition_bw = self.class_emb(class_b)
        return condition_bw if self.grid_emb is None else self.grid_emb(condition_bw, place.number)

    def new_caches(
        self, images: int, dtype: torch.dtype | None = None, grid: Sequence[int] | None = None
    ) -> list[BlockCache]:
        """Allocates the caches to sample this many images of a grid (None: ``config.grid``) at once. dtype: None means
        the dtype of the weights."""
        config, like, tokens = self.config, self.rope_tp2, self.place(grid).tokens
        dtype = dtype or self.class_emb.embedding_table.weight.dtype
        caches = []
        for _ in range(config.depth):
            keys, values = like.new_zeros(2, images, config.heads, tokens, config.head_dim, dtype=dtype)
            caches.append(BlockCache(keys, values, like.new_zeros(images, 6, config.width, dtype=dtype)))
        return caches

    def next_logits(
        self,
        index_b: Tensor | None,
        class_b: Tensor,
        caches: list[BlockCache],
        at: DecodePosition,
        grid: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits ``(b, v)`` of one position, equal to those of `forward`. Updates ``caches`` in place.

        index_b: the previous code; None at the first position. grid: None: ``config.grid``.
        """
        place = self.place(grid)
        condition_bw = self._condition(class_b, place)
        x_bw = condition_bw if at.first else self.tok_emb(index_b)
        x_b1w, rope_1p2 = self.dropout(x_bw[:, None]), self.rope_tp2[place.start :][at.position]
        for block, cache in zip(self.blocks, caches, strict=True):
            x_b1w = block(x_b1w, condition_bw, rope_1p2, cache, at)
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
    """Embeds classes, ``(b, w)``; the last row of the table means no class."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, class_b: Tensor) -> Tensor:
        return self.embedding_table(class_b)


class GridEmbedding(nn.Module):
    """Adds the embedding of a grid to conditions ``(b, w)``. number: the grid's row. The table starts at zero."""

    def __init__(self, grids: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(grids, width))

    def forward(self, condition_bw: Tensor, number: int) -> Tensor:
        return condition_bw + self.weight[number]


class CodebookEmbedding(nn.Module):
    """Embeds codes as the tokenizer's frozen code vectors followed by a linear layer. The caller must fill
    ``codebook_vd`` from the tokenizer; it is saved in checkpoints."""

    def __init__(self, vocabulary: int, code_dim: int, width: int):
        super().__init__()
        self.register_buffer("codebook_vd", torch.zeros(vocabulary, code_dim))
        self.projection = nn.Linear(code_dim, width)

    def forward(self, index_bt: Tensor) -> Tensor:
        return self.projection(F.embedding(index_bt, self.codebook_vd))


class Block(nn.Module):
    """Attention and feed-forward. The class modulates each: shift and scale after the norm, gate on the output."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width = config.width
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)
        self.feed_forward = FeedForward(width, config.hidden, config.dropout)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        x_btw: Tensor,
        condition_bw: Tensor,
        rope_tp2: Tensor,
        cache: BlockCache | None = None,
        at: DecodePosition | None = None,
    ) -> Tensor:
        if cache is None:
            modulation_b6w = self.ada_lin(condition_bw).unflatten(1, (6, -1))
        else:
            if at.first:
                cache.modulation_b6w.copy_(self.ada_lin(condition_bw).unflatten(1, (6, -1)))
            modulation_b6w = cache.modulation_b6w
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation_b6w[:, :, None].unbind(1)
        attended_btw = self.attention(self.attention_norm(x_btw) * (1 + scale1) + shift1, rope_tp2, cache, at)
        x_btw = x_btw + gate1 * attended_btw
        return x_btw + gate2 * self.feed_forward(self.ffn_norm(x_btw) * (1 + scale2) + shift2)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_btw: Tensor, rope_tp2: Tensor, cache: BlockCache | None, at: DecodePosition | None) -> Tensor:
        q, k, v = self.wqkv(x_btw).unflatten(2, (3, -1, self.head_dim)).unbind(2)
        q, k = rotate(q, rope_tp2), rotate(k, rope_tp2)
        out_bthd = causal_attention(q, k, v) if cache is None else _attend_to_cache(q, k, v, cache, at)
        return self.dropout(self.wo(out_bthd.flatten(2)))


def _attend_to_cache(q_b1hd: Tensor, k_b1hd: Tensor, v_b1hd: Tensor, cache: BlockCache, at: DecodePosition) -> Tensor:
    """Attention of one position to itself and the previous ones; adds its key and value to the cache."""
    cache.keys_bhtd.index_copy_(2, at.position, k_b1hd.transpose(1, 2).to(cache.keys_bhtd.dtype))
    cache.values_bhtd.index_copy_(2, at.position, v_b1hd.transpose(1, 2).to(cache.values_bhtd.dtype))
    keys, values = cache.keys_bhtd[:, :, : at.limit], cache.values_bhtd[:, :, : at.limit]
    q_bh1d = q_b1hd.transpose(1, 2).to(keys.dtype)
    return F.scaled_dot_product_attention(q_bh1d, keys, values, attn_mask=at.mask_1t).transpose(1, 2)


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
    """The final norm, scaled and shifted by the class."""

    def __init__(self, width: int):
        super().__init__()
        self.rmsnorm = nn.RMSNorm(width, eps=1e-5)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_btw: Tensor, condition_bw: Tensor) -> Tensor:
        scale, shift = self.ada_lin(condition_bw).unflatten(1, (2, 1, -1)).unbind(1)
        return self.rmsnorm(x_btw) * (1 + scale) + shift


class Head(nn.Module):
    """Hidden states -> logits; or, if targets are given, the loss without building the logits."""

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
            raise ModelError("a vocabulary sharded over ranks has a loss but no logits: use Transformer.loss")
        return F.linear(hidden_btw, self.weight)


def rope_table(rows: int, columns: int, head_dim: int) -> Tensor:
    """Cosines and sines ``(1 + rows * columns, head_dim / 2, 2)`` of 2-D rotary embeddings (RoPE, arXiv 2104.09864).

    The first half of the pairs rotates with the row, the second with the column, base 10,000. At position 0 (the class)
    both are zero, as in the published models, so its query and key are zero. The last position, that of the last code,
    is never used as input.
    """
    frequencies = 10000.0 ** -(torch.arange(head_dim // 4) / (head_dim // 4))
    row_rcp = (torch.arange(rows)[:, None] * frequencies)[:, None].expand(-1, columns, -1)
    column_rcp = (torch.arange(columns)[:, None] * frequencies)[None].expand(rows, -1, -1)
    angles_tp = torch.cat([row_rcp, column_rcp], dim=-1).flatten(0, 1)
    return F.pad(torch.stack([angles_tp.cos(), angles_tp.sin()], dim=-1), (0, 0, 0, 0, 1, 0))


def rope_tables(config: TransformerConfig) -> Tensor:
    """The tables of all grids of a model, one after another: see `rope_table` and `GridPlace`."""
    return torch.cat([rope_table(*grid, config.head_dim) for grid in config.all_grids])


def _places(grids: Sequence[tuple[int, int]]) -> dict[tuple[int, int], GridPlace]:
    places, start = {}, 0
    for number, grid in enumerate(grids):
        places[grid] = GridPlace(number, start, math.prod(grid))
        start += 1 + math.prod(grid)
    return places


def rotate(x_bthd: Tensor, rope_tp2: Tensor) -> Tensor:
    """Rotates each pair of neighbouring dimensions by its position's angle, in fp32."""
    even, odd = x_bthd.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope_tp2[:, None].unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x_bthd)


# Operations whose results selective checkpointing saves: matrix products and attention. Others are recomputed.
SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def checkpoint_blocks(transformer: Transformer, selective: bool = False) -> None:
    """Discards the activations inside each block and recomputes them in the backward pass (Chen et al., arXiv
    1604.06174). selective: also saves the results of matrix products and attention, so that only cheap operations are
    recomputed."""

    def policy(_, op, *args, **kwargs):
        of_flash = getattr(op, "namespace", "").startswith("flash_attn")
        return CheckpointPolicy.MUST_SAVE if op in SAVED_OPS or of_flash else CheckpointPolicy.PREFER_RECOMPUTE

    options = {"context_fn": partial(create_selective_checkpoint_contexts, policy)} if selective else {}
    for block in transformer.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
