"""Draws images' codes from a generator, one position after another.

Shapes: b images, t positions, v codes of the vocabulary; n = b, or with guidance 2 b: the same images without a class
behind those with it.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.config import Sampling
from model_zoo.errors import ModelError
from model_zoo.transformer import Head, Now, Past, Transformer

# Share of the guidance over the way through an image, x from 0 at the first code to 1 at the last.
SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "linear": lambda x: x,
    "cosine": lambda x: (1 - torch.cos(math.pi * x)) / 2,
}
BUCKET = 64  # positions by which the part of the cache that static steps look at grows
WARM_UP_STEPS = 3  # before a capture, as PyTorch's documentation has it


def guidance_scale_t(settings: Sampling, tokens: int) -> Tensor:
    """s_t of each position (see `Sampling`), fp32 on the CPU."""
    return 1 + (settings.guidance - 1) * SCHEDULES[settings.guidance_schedule](torch.linspace(0, 1, tokens))


def draw(logits_bv: Tensor, uniform_b: Tensor, settings: Sampling) -> Tensor:
    """int64 codes ``(b,)`` by the inverse distribution function at fp64 numbers in [0, 1), with temperature, top_k and
    top_p of the settings; in fp64. Codes of probability 0 are never drawn. Of equal logits at the edge of top_p the
    lower codes stay; at that of top_k those that `torch.topk` takes."""
    scaled_bv, code_bv = logits_bv.double() / settings.temperature, None
    if 0 < settings.top_k < logits_bv.shape[1]:
        scaled_bv, code_bv = scaled_bv.topk(settings.top_k)
    elif settings.top_p < 1:
        scaled_bv, code_bv = scaled_bv.sort(dim=1, descending=True, stable=True)
    probability_bv = scaled_bv.softmax(dim=1)
    if settings.top_p < 1:
        before_bv = F.pad(probability_bv.cumsum(dim=1)[:, :-1], (1, 0))
        probability_bv = torch.where(before_bv < settings.top_p, probability_bv, 0)
    # A parallel sum need not rise evenly where it should stay the same: codes of probability 0 are taken out of it.
    summed_bv = probability_bv.cumsum(dim=1) * (probability_bv > 0)
    chosen_b1 = (summed_bv > uniform_b[:, None] * summed_bv.amax(dim=1, keepdim=True)).int().argmax(dim=1, keepdim=True)
    return (chosen_b1 if code_bv is None else code_bv.gather(1, chosen_b1))[:, 0]


def uniform(seed: int, tokens: int) -> Tensor:
    """An image's random numbers, one for each code: fp64 in [0, 1), of a seed from 0 to below 2^64."""
    # Not torch's, which on the CPU looks at the lower 32 bits of a seed alone.
    return torch.from_numpy(np.random.Generator(np.random.Philox(seed)).random(tokens))


class State(NamedTuple):
    """What stays in its place from step to step and from batch to batch, so that a captured graph finds it."""

    class_n: Tensor
    uniform_bt: Tensor  # fp64; a code is drawn at each
    guidance_t: Tensor
    position: Tensor  # (1,)
    codes_bt: Tensor
    finite_b: Tensor  # whether all logits were
    pasts: list[Past]


def step(
    transformer: Transformer,
    state: State,
    settings: Sampling,
    dtype: torch.dtype | None,
    *,
    first: bool,
    limit: int,
    masked: bool,
) -> None:
    """Draws the code at ``state.position``, in place. limit: how many positions of the cache are looked at; masked:
    those behind the position are left out. Where it is, is read from tensors, so that the same step serves many."""
    position, mask_1t = state.position, None
    if masked:
        mask_1t = torch.arange(limit, device=position.device)[None] <= position
    code_b = state.codes_bt.index_select(1, position - (0 if first else 1))[:, 0]
    guided = len(state.class_n) > len(code_b)
    index_n = None if first else torch.cat([code_b, code_b]) if guided else code_b
    # Without its cache of cast weights, which would not outlive a captured graph.
    with torch.autocast(position.device.type, dtype, enabled=dtype is not None, cache_enabled=False):
        logits_nv = transformer.next_logits(index_n, state.class_n, state.pasts, Now(position, first, limit, mask_1t))
    logits_bv = logits_nv.float()
    if guided:
        conditional_bv, unconditional_bv = logits_bv.chunk(2)
        logits_bv = unconditional_bv + state.guidance_t[position] * (conditional_bv - unconditional_bv)
    state.finite_b.logical_and_(logits_bv.isfinite().all(dim=1))
    uniform_b = state.uniform_bt.index_select(1, position)[:, 0]
    state.codes_bt.index_copy_(1, position, draw(logits_bv, uniform_b, settings)[:, None])


class Sampler:
    """Draws codes for up to ``batch_size`` images at once, with the keys and values of former positions kept.

    transformer: in eval mode, on its device; its weights may change between calls, in place. dtype: of products, by
    autocast, and of what is kept; None: the weights'. compile: by torch.compile. graphs: on CUDA the steps are
    captured, one graph for each BUCKET positions; leave them out for few images. What was captured serves for as long
    as the settings stay the same.

    An image depends on its class, its seed and the settings alone: each has random numbers of its own, whatever the
    batch, the order, or the number of processes. That is so in exact arithmetic. In floating point a matrix product
    rounds otherwise at another batch size (hence smaller batches are filled up), on another device or kernel, and, with
    some libraries, in another row; a code whose neighbour's edge lies within that rounding may then turn out otherwise,
    and all codes after it.
    """

    def __init__(
        self,
        transformer: Transformer,
        batch_size: int,
        dtype: torch.dtype | None = None,
        compile: bool = False,
        graphs: bool = True,
    ):
        if batch_size < 1:
            raise ModelError(f"the batch size {batch_size} must be at least 1")
        self.transformer, self.batch_size, self.dtype = transformer, batch_size, dtype
        self.step = torch.compile(step, fullgraph=True) if compile else step
        self.device = transformer.rope_tp2.device
        self.captures = graphs and self.device.type == "cuda"
        self.static = self.captures or compile  # steps of few shapes
        self.settings: Sampling | None = None

    @torch.no_grad()
    def sample(
        self,
        class_b: Tensor,
        seeds: Sequence[int],
        settings: Sampling,
        beat: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Codes int64 ``(b, rows, columns)`` of images of these classes (``config.classes``: of none), b up to
        ``batch_size``; seeds: one for each image, from 0 to below 2^64. beat: called after every position. Raises
        ModelError."""
        config, images = self.transformer.config, len(class_b)
        if not images == len(seeds) <= self.batch_size:
            raise ModelError(f"{images} classes and {len(seeds)} seeds: give as many, up to {self.batch_size}")
        if images and not 0 <= int(class_b.min()) <= int(class_b.max()) <= config.classes:
            raise ModelError(f"classes must lie in [0, {config.classes}], where {config.classes} stands for none")
        if self.transformer.training:
            raise ModelError("sampling would drop out: put the generator into eval mode first")
        if settings != self.settings:
            self._begin(settings)
        state = self.state
        class_n = state.class_n.view(-1, self.batch_size)
        class_n[0, :images] = class_b.to(self.device)
        for uniform_t, seed in zip(state.uniform_bt, seeds, strict=False):
            uniform_t.copy_(uniform(seed, config.tokens))
        state.finite_b.fill_(True)
        for position in range(config.tokens):
            self._step(position)
            beat()
        if not state.finite_b[:images].all():
            raise ModelError("the generator's logits are not finite: take an earlier checkpoint, or --precision fp32")
        return state.codes_bt[:images].view(images, *config.grid).clone()

    def _begin(self, settings: Sampling) -> None:
        """Makes room; what was made for other settings is given back before."""
        self.state, self.graphs, self.settings = None, {}, None
        config, b, device = self.transformer.config, self.batch_size, self.device
        n = b if settings.guidance == 1 else 2 * b
        self.state = State(
            class_n=torch.full((n,), config.classes, device=device),
            uniform_bt=torch.zeros(b, config.tokens, dtype=torch.float64, device=device),
            guidance_t=guidance_scale_t(settings, config.tokens).to(device),
            position=torch.zeros(1, dtype=torch.int64, device=device),
            codes_bt=torch.zeros(b, config.tokens, dtype=torch.int64, device=device),
            finite_b=torch.ones(b, dtype=torch.bool, device=device),
            pasts=self.transformer.new_pasts(n, self.dtype),
        )
        self.settings = settings

    def _step(self, position: int) -> None:
        tokens = self.transformer.config.tokens
        limit = min(-(-(position + 1) // BUCKET) * BUCKET, tokens) if self.static else position + 1
        self.state.position.fill_(position)
        if not self.captures or position == 0:
            return self._run(position == 0, limit)
        if limit not in self.graphs:
            self.graphs[limit] = self._capture(limit)
        self.graphs[limit].replay()

    def _run(self, first: bool, limit: int) -> None:
        where = {"first": first, "limit": limit, "masked": self.static}
        run = step if first else self.step  # the first is a program of its own, for which compiling does not pay
        run(self.transformer, self.state, self.settings, self.dtype, **where)

    def _capture(self, limit: int) -> torch.cuda.CUDAGraph:
        """The graph of a step, warmed up at the present position, which it leaves as it was."""
        stream, now = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                self._run(False, limit)
        now.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((made.pool() for made in self.graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            self._run(False, limit)
        return graph


def keep_products_in(transformer: Transformer, dtype: torch.dtype) -> None:
    """Turns, for good, the weights that autocast would turn into that dtype at each step: those of products."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear | Head):
            module.to(dtype)
