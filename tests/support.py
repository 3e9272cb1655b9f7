"""What tests of the trainer share: tiny models and their runs, pictures, worlds of one process, and comparisons."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import skimage.metrics
import torch
from model_checks import TOKENIZER, random_transformer, write_run
from omegaconf import OmegaConf
from torch import Tensor, nn

from model_zoo import Tokenizer, Transformer, TransformerConfig
from trainer.config import GeneratorRun, TokenizerRun, TrainerConfig
from trainer.ema import Ema
from trainer.engines.base import Engine
from trainer.parallel import World, start_world, stop_world
from trainer.start_plan import plan_batch
from trainer.tasks.tokenizer import TokenizerTask

# Images of 16 x 16, 4 x 4 tokens. Entropy at a temperature that leaves it a gradient.
TOKENIZER_RUN = dict(
    trainer__max_steps=20,
    trainer__global_batch_size=8,
    trainer__precision="fp32",
    model=replace(TOKENIZER, codebook_size=24, code_dim=6, channels=16, latent_channels=12, codebook_init_std=0.5),
    discriminator__channels=8,
    discriminator__layers=2,
    discriminator__norm="group",
    loss__perceptual__weight=0.0,
    loss__entropy__temperature=0.5,
    optimizer__lr=1e-3,
    optimizer__epsilon=1e-3,
    ema__decay=0.9,
)
GENERATOR = TransformerConfig(vocabulary=32, classes=6, grid=[2, 3], depth=1, heads=2, head_dim=8, dropout=0.0)


def tokenizer_run(**changes) -> TokenizerRun:
    """TOKENIZER_RUN with changes, each by its key with ``__`` for a dot."""
    config = OmegaConf.structured(TokenizerRun)
    for key, value in {**TOKENIZER_RUN, **changes}.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    return OmegaConf.to_object(config)


def tokenizer_task(world: World, **changes) -> TokenizerTask:
    config = tokenizer_run(**changes)
    return TokenizerTask(config, world, *plan_batch(config, world))


@contextmanager
def single_process() -> Iterator[None]:
    """This process is not one of several ranks."""
    with pytest.MonkeyPatch.context() as environment:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            environment.delenv(name, raising=False)
        environment.setenv("DS_ACCELERATOR", "cpu")  # start_world sets it; so it is taken back afterwards
        yield


@contextmanager
def single_world() -> Iterator[World]:
    """A process group of this process alone."""
    with single_process():
        try:
            yield start_world("cpu")
        finally:
            stop_world()


def generator_of(seed: int = 0, **changes) -> Transformer:
    """Random weights, also of the head, which would start at zero; changes: of GENERATOR."""
    return random_transformer(replace(GENERATOR, **changes), seed)


def generator_run(model: TransformerConfig = GENERATOR) -> GeneratorRun:
    return GeneratorRun(model=model, trainer=TrainerConfig(max_steps=4, global_batch_size=2))


def write_tokenizer_run(run: Path, tokenizer: Tokenizer) -> Path:
    return write_run(run, replace(tokenizer_run(), model=tokenizer.config), tokenizer_ema=tokenizer)


def write_generator_run(run: Path, generator: Transformer, tokenizer: Path | None = None) -> Path:
    """tokenizer: the run that it names."""
    config = generator_run(generator.config)
    config.tokenizer.source = str(tokenizer) if tokenizer else None
    return write_run(run, config, generator=generator)


def images(seed: int = 0, count: int = 8) -> Tensor:
    """uint8 (count, 3, 16, 16) of noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)


def photograph(number: int, height: int, width: int) -> Tensor:
    """uint8 (3, height, width) cut out of one of four real photographs."""
    whole = [skimage.data.astronaut, skimage.data.coffee, skimage.data.chelsea, skimage.data.rocket][number % 4]()
    return torch.from_numpy(whole[40 : 40 + height, 150 : 150 + width].copy()).permute(2, 0, 1)


def as_float(levels: Tensor) -> Tensor:
    """uint8 to float32 from -1 to 1."""
    return levels.float() / 127.5 - 1


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def averages(ema: Ema, engine: Engine) -> dict[str, Tensor]:
    """A copy of the running averages of an engine's weights."""
    return {shard.name: shard.values.view(shard.shape).clone() for shard in ema.shards(engine)}


def frechet_distance_by_hand(x_nd: Tensor, y_md: Tensor) -> float:
    """Of few pictures: with centred features X and Y over the roots of n - 1 and m - 1, covariances are X^T X and
    Y^T Y, and the trace of the root of their product is the sum of the singular values of X Y^T, of n x m numbers."""
    x_nd, y_md = x_nd.double().numpy(), y_md.double().numpy()
    shift_d = x_nd.mean(axis=0) - y_md.mean(axis=0)
    x_nd, y_md = ((f - f.mean(axis=0)) / np.sqrt(len(f) - 1) for f in (x_nd, y_md))
    root = np.linalg.svd(x_nd @ y_md.T, compute_uv=False).sum()
    return float(shift_d @ shift_d + (x_nd**2).sum() + (y_md**2).sum() - 2 * root)


def paper_levels(image_chw: Tensor) -> np.ndarray:
    """The protocol `paper` written out for one image, in numpy: float [0, 1] pixels, height x width x channel."""
    unit = (np.clip(image_chw.numpy(), np.float32(-1), np.float32(1)) + np.float32(1)) / np.float32(2)
    return ((unit * np.float32(255)).astype(np.uint8).astype(np.float64) / 255).transpose(1, 2, 0)


def psnr_and_ssim_by_hand(x_chw: Tensor, y_chw: Tensor, **options) -> tuple[float, float]:
    """By scikit-image; options: of its SSIM."""
    x_hwc, y_hwc = paper_levels(x_chw), paper_levels(y_chw)
    psnr = skimage.metrics.peak_signal_noise_ratio(x_hwc, y_hwc, data_range=1)
    return psnr, skimage.metrics.structural_similarity(x_hwc, y_hwc, data_range=1, channel_axis=-1, **options)


def gradients(module):
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def watch(engine, look):
    """Calls ``look()`` just before each update of the engine; returns the list of what it gave."""
    seen, step = [], engine.step

    def watched(*arguments):
        seen.append(look())
        return step(*arguments)

    engine.step = watched
    return seen
