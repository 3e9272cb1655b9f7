"""Samples the codes of images from a generator, one position at a time.

Shapes: b images, t positions, v vocabulary; n = b, or with guidance n = 2 b: b rows with the class, then the same
rows without it.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.conditions import describe_classes, describe_grids, trained_grids
from model_zoo.config import Sampling, grid_name
from model_zoo.errors import ModelError
from model_zoo.transformer import BlockCache, DecodePosition, Head, Transformer

# Guidance strength as a function of the position, x from 0 at the first code to 1 at the last.
SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "linear": lambda x: x,
    "cosine": lambda x: (1 - torch.cos(math.pi * x)) / 2,
}
BUCKET = 64  # with static shapes, the number of cached positions that attention reads grows in these steps
WARM_UP_STEPS = 3  # before a capture, as PyTorch's documentation recommends


def guidance_scale_t(settings: Sampling, tokens: int) -> Tensor:
    """s_t of each position (see `Sampling`), in fp32 on the CPU."""
    return 1 + (settings.guidance - 1) * SCHEDULES[settings.guidance_schedule](torch.linspace(0, 1, tokens))


def draw(logits_bv: Tensor, uniform_b: Tensor, settings: Sampling) -> Tensor:
    """Samples int64 codes ``(b,)`` by inverse transform sampling in fp64, with temperature, top_k and top_p.

    uniform_b: fp64 random numbers in [0, 1). Codes of probability 0 are never sampled. Among equal logits at the top_p
    boundary the lower codes are kept; at the top_k boundary those that `torch.topk` returns.
    """
    scaled_bv, code_bv = logits_bv.double() / settings.temperature, None
    if 0 < settings.top_k < logits_bv.shape[1]:
        scaled_bv, code_bv = scaled_bv.topk(settings.top_k)
    elif settings.top_p < 1:
        scaled_bv, code_bv = scaled_bv.sort(dim=1, descending=True, stable=True)
    probability_bv = scaled_bv.softmax(dim=1)
    if settings.top_p < 1:
        before_bv = F.pad(probability_bv.cumsum(dim=1)[:, :-1], (1, 0))
        probability_bv = torch.where(before_bv < settings.top_p, probability_bv, 0)
    # A parallel cumsum may vary by rounding where it should be constant, so codes of probability 0 are excluded.
    summed_bv = probability_bv.cumsum(dim=1) * (probability_bv > 0)
    chosen_b1 = (summed_bv > uniform_b[:, None] * summed_bv.amax(dim=1, keepdim=True)).int().argmax(dim=1, keepdim=True)
    return (chosen_b1 if code_bv is None else code_bv.gather(1, chosen_b1))[:, 0]


def uniform(seed: int, tokens: int) -> Tensor:
    """The random numbers of one image, one per code: fp64 in [0, 1). seed: from 0 to below 2^64."""
    import numpy as np  # slow to import, and only sampling needs it

    # Not torch's generator, which on the CPU uses only the lower 32 bits of a seed.
    return torch.from_numpy(np.random.Generator(np.random.Philox(seed)).random(tokens))


def check_conditions(transformer: Transformer, class_b: Tensor, settings: Sampling) -> None:
    """Raises ModelError if these samples would use a row of the class table that was never trained."""
    if (trained_c := transformer.trained_c) is None:
        return
    trained_c, classes = trained_c.cpu(), transformer.config.classes
    trained = describe_classes(trained_c) or "nothing"
    for label in class_b.tolist():
        if not trained_c[label]:
            what = "without a class" if label == classes else f"with class {label}"
            raise ModelError(f"the generator was never trained {what}: choose --classes among {trained}")
    if settings.guidance != 1 and not trained_c[classes] and len(class_b):
        raise ModelError(
            f"guidance {settings.guidance:g} needs a generator that was also trained without a class, by "
            "loss.label_dropout, and this one was not: use guidance 1 (--guidance 1, or sampling.guidance=1)"
        )


def check_grid(transformer: Transformer, grid: tuple[int, int]) -> None:
    """Raises ModelError for a grid that the transformer does not know, or whose embedding was never trained."""
    transformer.place(grid)
    trained = trained_grids(transformer.config, transformer.trained_g)
    if grid not in trained:
        raise ModelError(
            f"the generator was never trained on the grid {grid_name(grid)}: choose among "
            f"{describe_grids(trained) or 'nothing'}"
        )


class SamplerState(NamedTuple):
    """Tensors that keep their addresses across steps and batches, so that captured CUDA graphs can read them."""

    class_n: Tensor
    uniform_bt: Tensor  # fp64 random numbers, one per code
    guidance_t: Tensor
    position: Tensor  # (1,)
    codes_bt: Tensor
    finite_b: Tensor  # whether all logits so far were finite
    caches: list[BlockCache]


def step(
    transformer: Transformer,
    state: SamplerState,
    settings: Sampling,
    dtype: torch.dtype | None,
    grid: tuple[int, int],
    *,
    first: bool,
    limit: int,
    masked: bool,
) -> None:
    """Samples the code at ``state.position``, in place. The position is read from a tensor, so that one captured graph
    or compiled function serves many positions.

    limit: number of cached positions that attention reads. masked: mask those after the current position.
    """
    position, mask_1t = state.position, None
    if masked:
        mask_1t = torch.arange(limit, device=position.device)[None] <= position
    code_b = state.codes_bt.index_select(1, position - (0 if first else 1))[:, 0]
    guided = len(state.class_n) > len(code_b)
    index_n = None if first else torch.cat([code_b, code_b]) if guided else code_b
    # Without autocast's cache of converted weights, whose memory would not outlive a captured graph.
    with torch.autocast(position.device.type, dtype, enabled=dtype is not None, cache_enabled=False):
        at = DecodePosition(position, first, limit, mask_1t)
        logits_nv = transformer.next_logits(index_n, state.class_n, state.caches, at, grid)
    logits_bv = logits_nv.float()
    if guided:
        conditional_bv, unconditional_bv = logits_bv.chunk(2)
        logits_bv = unconditional_bv + state.guidance_t[position] * (conditional_bv - unconditional_bv)
    state.finite_b.logical_and_(logits_bv.isfinite().all(dim=1))
    uniform_b = state.uniform_bt.index_select(1, position)[:, 0]
    state.codes_bt.index_copy_(1, position, draw(logits_bv, uniform_b, settings)[:, None])


class Sampler:
    """Samples codes for up to ``batch_size`` images at once with a KV cache.

    transformer: in eval mode, on its device; its weights may be changed in place between calls.
    dtype: of matrix products (by autocast) and of the cache; None means the dtype of the weights.
    compile: compile the step with torch.compile.
    graphs: on CUDA, capture the steps as CUDA graphs, one per BUCKET positions, and reuse them until the settings or
        the grid change. Capturing does not pay off for few images.

    An image depends only on its class, its seed, the settings and the grid, not on the batch, the order or the number
    of processes: each image has its own random numbers. This holds in exact arithmetic. In floating point the rounding
    of matrix products depends on the batch size (smaller batches are therefore padded), the device, the kernel and,
    with some libraries, the row. A random number within this rounding of the boundary between two codes may select the
    other code, which then changes all later codes.
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
        self.static = self.captures or compile  # few distinct shapes
        self.prepared: tuple[Sampling, tuple[int, int]] | None = None  # settings and grid of the state

    @torch.no_grad()
    def sample(
        self,
        class_b: Tensor,
        seeds: Sequence[int],
        settings: Sampling,
        beat: Callable[[], None] = lambda: None,
        grid: Sequence[int] | None = None,
    ) -> Tensor:
        """Samples codes, int64 ``(b, rows, columns)``, b up to ``batch_size``.

        class_b: classes; ``config.classes`` means no class. seeds: one per image, from 0 to below 2^64. beat: called
        after every position. grid: rows and columns, of ``config.all_grids``; None: ``config.grid``. Raises ModelError
        for bad arguments, for classes, guidance and grids that were never trained, and for logits that are not finite.
        """
        config, images = self.transformer.config, len(class_b)
        if not images == len(seeds) <= self.batch_size:
            raise ModelError(f"{images} classes and {len(seeds)} seeds: give equally many, at most {self.batch_size}")
        if images and not 0 <= int(class_b.min()) <= int(class_b.max()) <= config.classes:
            raise ModelError(f"classes must lie in [0, {config.classes}], where {config.classes} means no class")
        if self.transformer.training:
            raise ModelError("the generator is in training mode and would apply dropout: call eval() first")
        check_conditions(self.transformer, class_b, settings)
        grid = tuple(config.grid if grid is None else grid)
        check_grid(self.transformer, grid)
        tokens = self.transformer.place(grid).tokens
        if (settings, grid) != self.prepared:
            self._begin(settings, grid)
        state = self.state
        class_n = state.class_n.view(-1, self.batch_size)
        class_n[0, :images] = class_b.to(self.device)
        for uniform_t, seed in zip(state.uniform_bt, seeds, strict=False):
            uniform_t.copy_(uniform(seed, tokens))
        state.finite_b.fill_(True)
        for position in range(tokens):
            self._step(position)
            beat()
        if not state.finite_b[:images].all():
            raise ModelError("the generator's logits are not finite: take an earlier checkpoint, or --precision fp32")
        return state.codes_bt[:images].view(images, *grid).clone()

    def _begin(self, settings: Sampling, grid: tuple[int, int]) -> None:
        """Allocates the state for these settings and this grid, after freeing the previous one."""
        self.state, self.graphs, self.prepared = None, {}, None
        config, b, device = self.transformer.config, self.batch_size, self.device
        tokens = self.transformer.place(grid).tokens
        n = b if settings.guidance == 1 else 2 * b
        self.state = SamplerState(
            class_n=torch.full((n,), config.classes, device=device),
            uniform_bt=torch.zeros(b, tokens, dtype=torch.float64, device=device),
            guidance_t=guidance_scale_t(settings, tokens).to(device),
            position=torch.zeros(1, dtype=torch.int64, device=device),
            codes_bt=torch.zeros(b, tokens, dtype=torch.int64, device=device),
            finite_b=torch.ones(b, dtype=torch.bool, device=device),
            caches=self.transformer.new_caches(n, self.dtype, grid),
        )
        self.prepared = settings, grid

    def _step(self, position: int) -> None:
        tokens = self.state.codes_bt.shape[1]
        limit = min(-(-(position + 1) // BUCKET) * BUCKET, tokens) if self.static else position + 1
        self.state.position.fill_(position)
        if not self.captures or position == 0:
            return self._run(position == 0, limit)
        if limit not in self.graphs:
            self.graphs[limit] = self._capture(limit)
        self.graphs[limit].replay()

    def _run(self, first: bool, limit: int) -> None:
        # The first position runs different code, for which compiling does not pay off.
        run = step if first else self.step
        settings, grid = self.prepared
        where = {"first": first, "limit": limit, "masked": self.static}
        run(self.transformer, self.state, settings, self.dtype, grid, **where)

    def _capture(self, limit: int) -> torch.cuda.CUDAGraph:
        """Captures a step as a CUDA graph, after warming up at the current position; results are unaffected."""
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
    """Permanently converts the weights of matrix products, which autocast would convert at every step, to ``dtype``."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear | Head):
            module.to(dtype)
