"""One row of `ibq bench sample` or `ibq bench train-ar`, measured in a process of its own.

The reference is imported from a checkout of its project; nothing of it is kept here.

Shapes: b images, t positions, v codes of the vocabulary; n = b, or with guidance 2 b, those without a class behind.
"""

import importlib.util
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo import ModelError
from model_zoo.config import Sampling, TransformerConfig
from model_zoo.sampler import Sampler, draw, guidance_scale_t, keep_products_in, uniform
from model_zoo.transformer import Transformer, checkpoint_blocks
from tools.bench import quantizer as bench_quantizer
from tools.bench.common import answer, now, peak_bytes, reset_peak
from tools.bench.quantizer import Machine
from trainer.config import OptimizerConfig
from trainer.optim import adam
from trainer.throughput import matmul_rate

REFERENCE_NAMES = ("GPT", "sample_IBQ")
WEIGHT_DECAY = 0.05  # the published configurations' and our recipes'


class Measured(NamedTuple):
    """Of the fastest repeat, a batch of images or a training step: seconds, and those of all processors together.

    extra_bytes: the peak in all repeats minus weights and, in training, moments and gradients; process_bytes: the peak
    in all. operations_per_second: of a plain matrix product in the row's type.
    """

    seconds: float
    processor_seconds: float
    extra_bytes: int
    process_bytes: int
    operations_per_second: float


def machine(device: str, threads: int | None, reference: str | None) -> Machine:
    """Raises ModelError where ``device`` is not there or the reference cannot be imported."""
    if reference is not None:
        published(reference)
    return bench_quantizer.machine(device, threads, None)


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
    """Batches of whole images' codes. All weights are normal(0, 0.02^2), the head's too; no top-k, no top-p.

    A batch more goes before the repeats, in which graphs are captured and code is compiled.
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
        run = published_sampling(published(reference), generator, class_b, guidance)
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
    """Codes ``(b, tokens)``, those of `Sampler.sample`, by a forward over all codes so far for each new one.

    The head is spared all positions but the last, whose logits alone are needed.
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

    Two steps go before: the first makes the moments and compiles.
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


def published(path: str) -> ModuleType:
    """The reference's module at ``path``; ModelError where it cannot be had."""
    spec = importlib.util.spec_from_file_location("ibq_bench_reference", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ModelError(f"--reference: {path} needs the package {error.name}: install it here") from None
    if missing := [name for name in REFERENCE_NAMES if not hasattr(module, name)]:
        raise ModelError(f"--reference: {path} has no {missing[0]}: check out TencentARC/SEED-Voken's main")
    return module


def published_generator(path: str, config: TransformerConfig) -> nn.Module:
    """The reference's of the same sizes, with the settings of its configurations."""
    return published(path).GPT(
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
    """As its evaluation scripts sample: no top-k (0; None would draw nothing), no top-p, one class for the batch."""
    class_b = torch.full_like(class_b, int(class_b[0]))
    none_b = torch.full_like(class_b, generator.class_emb.num_classes)
    class_n1 = (torch.cat([class_b, none_b]) if guidance > 1 else class_b)[:, None]
    steps = generator.config.block_size
    return partial(module.sample_IBQ, class_n1, generator, steps, top_k=0, top_p=1.0, cfg_scale=guidance)


def published_loss(generator: nn.Module, index_bt: Tensor, class_b: Tensor) -> Tensor:
    """Of its training step."""
    logits_btv, _ = generator((index_bt[:, :-1], class_b[:, None]))
    return F.cross_entropy(logits_btv.flatten(0, 1), index_bt.flatten())


def published_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """As it configures its own: PyTorch's AdamW, not the fused one, without decay of what has one dimension."""
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [dict(params=matrices, weight_decay=WEIGHT_DECAY), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))


# ------------------------------------------------------------------------------------------------------------ measuring


def _measured(run: Callable, device: str, dtype: str, repeats: int, gradients: int = 0) -> Measured:
    """gradients: bytes that are no extra."""

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


def main() -> None:
    """The process of a row."""
    answer(machine, sample, train)
