"""One row of `ibq bench sample` or `ibq bench train-ar`. Runs in a fresh process.

The reference is imported from a checkout of its project; this project contains none of its code.

Shapes: b images, t positions, v codes of the vocabulary; n = b, or 2 b with guidance, the unconditional half last.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.config import Sampling, TransformerConfig
from model_zoo.sampler import Sampler, draw, guidance_scale_t, keep_products_in, uniform
from model_zoo.transformer import Transformer, checkpoint_blocks
from tools.bench.generator import REFERENCE_NAMES
from tools.bench.measure import load_reference, now, peak_bytes, reset_peak
from trainer.config import OptimizerConfig
from trainer.optim import adam, decay_groups
from trainer.throughput import matmul_rate

WEIGHT_DECAY = 0.05  # of the published configurations and of our recipes


class Measured(NamedTuple):
    """One batch of images or one training step: wall seconds of the fastest repeat, and CPU seconds over all threads.

    extra_bytes: the peak over all repeats minus weights and, in training, moments and gradients. process_bytes: the
    peak. operations_per_second: of a plain matrix product in the row's dtype.
    """

    seconds: float
    processor_seconds: float
    extra_bytes: int
    process_bytes: int
    operations_per_second: float


# ------------------------------------------------------------------------------------------------------------- sampling


def sample(
    *,
    impl: str,
    model: dict,
    dtype: str,
    batch_size: int,
    guidance: float,
    device: str,
    threads: int | None,
    repeats: int,
    reference: str | None,
) -> Measured:
    """Samples batches of whole images' codes. All weights are normal(0, 0.02^2), the head's too; no top-k, no top-p.

    One batch before the repeats captures graphs and compiles.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    config, settings = TransformerConfig(**model), Sampling(guidance=guidance)
    with torch.device(device):
        generator = published_generator(reference, config) if impl == "reference" else Transformer(config)
    for parameter in generator.eval().parameters():
        nn.init.normal_(parameter, std=0.02)
    class_b = torch.arange(batch_size, device=device) % config.classes
    autocast = None if dtype == "float32" else getattr(torch, dtype)
    if impl == "reference":
        run = published_sampling(load_reference(reference, *REFERENCE_NAMES), generator, class_b, guidance)
    else:
        if autocast:
            keep_products_in(generator, autocast)
        seeds = range(batch_size)
        if impl == "uncached":
            run = partial(sample_uncached, generator, class_b, seeds, settings, autocast)
        else:
            graphs, compiled = impl != "cached-eager", impl == "compiled"
            sampler = Sampler(generator, batch_size, autocast, compile=compiled, graphs=graphs)
            run = partial(sampler.sample, class_b, seeds, settings)
    return _measured(run, device, dtype, repeats)


@torch.no_grad()
def sample_uncached(
    transformer: Transformer, class_b: Tensor, seeds: Sequence[int], settings: Sampling, dtype: torch.dtype | None
) -> Tensor:
    """The codes ``(b, tokens)`` of `Sampler.sample`, by one forward over all previous codes for each new code.

    The head computes the logits of the last position only.
    """
    config, device = transformer.config, class_b.device
    uniform_bt = torch.stack([uniform(seed, config.tokens) for seed in seeds]).to(device)
    guidance_t = guidance_scale_t(settings, config.tokens).to(device)
    guided = settings.guidance != 1
    class_n = torch.cat([class_b, torch.full_like(class_b, config.classes)]) if guided else class_b
    index_bt = class_b.new_empty(len(class_b), 0)
    last_alone = transformer.head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -1:],))
    for position in range(config.tokens):
        index_nt = torch.cat([index_bt, index_bt]) if guided else index_bt
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits_bv = transformer(index_nt, class_n)[:, 0].float()
        if guided:
            conditional_bv, unconditional_bv = logits_bv.chunk(2)
            logits_bv = unconditional_bv + guidance_t[position] * (conditional_bv - unconditional_bv)
        code_b = draw(logits_bv, uniform_bt[:, position], settings)
        index_bt = torch.cat([index_bt, code_b[:, None]], dim=1)
    last_alone.remove()
    return index_bt


# ------------------------------------------------------------------------------------------------------------- training


def train(
    *,
    impl: str,
    model: dict,
    dtype: str,
    micro_batch: int,
    device: str,
    threads: int | None,
    repeats: int,
    reference: str | None,
) -> Measured:
    """Training steps on random codes, with dropout: forward, loss, backward, AdamW. Weights and moments are fp32.

    Two warm-up steps: the first allocates the moments and compiles.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = TransformerConfig(**model)
    with torch.device(device):
        index_bt = torch.randint(config.vocabulary, (micro_batch, config.tokens))
        class_b = torch.randint(config.classes, (micro_batch,))
        generator = published_generator(reference, config) if impl == "reference" else Transformer(config)
    generator.train()
    parameters = list(generator.parameters())
    if impl == "reference":
        optimizer = published_optimizer(parameters)
    else:
        optimizer = adam(parameters, 1e-4, OptimizerConfig(weight_decay=WEIGHT_DECAY))
    if impl == "compiled":
        for block in generator.blocks:
            block.compile()
    elif impl in ("checkpointed", "selective"):
        checkpoint_blocks(generator, selective=impl == "selective")

    def loss() -> Tensor:
        if impl == "reference":
            return published_loss(generator, index_bt, class_b)
        if impl == "dense":
            return F.cross_entropy(generator(index_bt[:, :-1], class_b).flatten(0, 1), index_bt.flatten())
        return generator.loss(index_bt, class_b).loss

    def run() -> None:
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    run()
    gradients = sum(parameter.nbytes for parameter in parameters)
    return _measured(run, device, dtype, repeats, gradients)


# ------------------------------------------------------------------------------------------------------------ reference


def published_generator(path: str, config: TransformerConfig) -> nn.Module:
    """The reference's generator of the same size, with the settings of its configurations."""
    return load_reference(path, *REFERENCE_NAMES).GPT(
        vocab_size=config.vocabulary,
        block_size=config.tokens,
        n_layer=config.depth,
        n_head=config.heads,
        n_embd=config.width,
        cond_dim=config.width,
        resid_dropout_p=config.dropout,
        ffn_dropout_p=config.dropout,
        token_drop=config.dropout,
        class_num=config.classes,
        alng=config.gate_init,
    )


def published_sampling(
    module: ModuleType, generator: nn.Module, class_b: Tensor, guidance: float
) -> Callable[[], Tensor]:
    """Samples as the reference's evaluation scripts do: no top-k (0; None samples nothing), no top-p, one class."""
    class_b = torch.full_like(class_b, int(class_b[0]))
    none_b = torch.full_like(class_b, generator.class_emb.num_classes)
    class_n1 = (torch.cat([class_b, none_b]) if guidance > 1 else class_b)[:, None]
    steps = generator.config.block_size
    return partial(module.sample_IBQ, class_n1, generator, steps, top_k=0, top_p=1.0, cfg_scale=guidance)


def published_loss(generator: nn.Module, index_bt: Tensor, class_b: Tensor) -> Tensor:
    """The loss of the reference's training step."""
    logits_btv, _ = generator((index_bt[:, :-1], class_b[:, None]))
    return F.cross_entropy(logits_btv.flatten(0, 1), index_bt.flatten())


def published_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The reference's optimizer: AdamW, not fused, without weight decay of one-dimensional parameters."""
    groups = decay_groups(parameters, OptimizerConfig(weight_decay=WEIGHT_DECAY))
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)


# ------------------------------------------------------------------------------------------------------------ measuring


def _measured(run: Callable, device: str, dtype: str, repeats: int, gradients: int = 0) -> Measured:
    """gradients: bytes not counted as extra memory."""

    def timed() -> tuple[float, float]:
        start, processor = now(device), time.process_time()
        run()
        return now(device) - start, time.process_time() - processor

    rate = matmul_rate(torch.device(device), getattr(torch, dtype))
    reset_peak(device)
    before = peak_bytes(device)
    timed()
    seconds, processor = min(timed() for _ in range(repeats))
    in_all = peak_bytes(device)
    return Measured(seconds, processor, max(0, in_all - before - gradients), in_all, rate)
