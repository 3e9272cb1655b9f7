"""Training a tokenizer: reconstruction, quantizer and adversarial losses, generator and discriminator apart."""

from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model_zoo import ModelError
from model_zoo.discriminator import PatchDiscriminator
from model_zoo.losses import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    Lecam,
    entropy_penalty,
    quantizer_loss,
)
from model_zoo.ops import fastest_impl
from model_zoo.perceptual import SMALLEST_SIDE, Perceptual
from model_zoo.tokenizer import CODEBOOK, Tokenizer, TokenizerOutput, load_weights
from trainer import TrainerError
from trainer.config import Config
from trainer.ema import Ema
from trainer.engines import Codebook, Replicated, build_engine, clip_scale
from trainer.metrics.codebook import CodebookHealth, gaussian_distance, moments
from trainer.parallel import World, codebook_groups, mean_over_ranks, sum_over_ranks
from trainer.schedules import learning_rate_factor, ramp


class TokenizerTask:
    """Owns the models, their engines, the EMA and LeCAM's means: everything that a checkpoint must hold but data."""

    def __init__(self, config: Config, world: World, micro_batch_size: int, micro_batches: int):
        self.config = config
        self.world = world
        loss = config.loss
        self.groups = codebook_groups(world, config.codebook_parallel, config.model.codebook_size)
        torch.manual_seed(config.seed)  # the same weights on every rank
        self.tokenizer = Tokenizer(config.model, self.groups.shard).to(world.device)
        self.tokenizer.quantize.impl = config.trainer.quantizer_impl
        self.perceptual = None
        if loss.perceptual.weight > 0:
            self.perceptual = Perceptual(loss.perceptual.vgg16_weights).to(world.device)
        batch = dict(micro_batch_size=micro_batch_size, micro_batches=micro_batches)
        # The codebook has an engine of its own, the rest of the tokenizer the recipe's.
        codes = self.tokenizer.quantize.embedding.weight
        rest = [p for p in self.tokenizer.parameters() if p is not codes]
        self.generator = build_engine(config.engine, self.tokenizer, self._adam(rest, config.optimizer.lr), **batch)
        adam = self._adam([codes], config.optimizer.lr)
        self.codebook = Codebook(self.tokenizer.quantize, adam, config.model.codebook_size, self.groups, **batch)
        self.discriminator = None
        if loss.generator.weight > 0:
            network = PatchDiscriminator(
                channels=config.discriminator.channels,
                layers=config.discriminator.layers,
                norm=config.discriminator.norm,
            ).to(world.device)
            # Small, so replicated under every engine; and hooks of a sharding engine would break its two forwards.
            adam = self._adam(network.parameters(), self.discriminator_lr)
            self.discriminator = Replicated(network, adam, **batch)
        self.lecam = Lecam(loss.lecam.decay).to(world.device)
        self.ema = Ema(self.tokenizer, config.ema.decay) if config.ema.decay > 0 else None
        tokens = (config.data.image_size // self.tokenizer.downsampling_factor) ** 2
        self.health = CodebookHealth(
            config.model.codebook_size, max(1, tokens) * config.trainer.global_batch_size, world.device
        )
        self.feature_moments: Tensor | None = None  # of this rank's features in the last step
        # The quantizer that has no soft assignment (VQ) has no entropy; asking for it would log zeros.
        self.entropy_temperature = None
        if loss.entropy.weight > 0 and self.tokenizer.quantize.soft_assignment:
            self.entropy_temperature = loss.entropy.temperature
        if config.trainer.compile:
            self.tokenizer.compile()
            if self.discriminator:
                self.discriminator.module.compile()

    def check(self) -> None:
        """Raises TrainerError for images that do not divide into tokens or are too small for a network here, and for
        an implementation of the quantizer that cannot be had."""
        data, factor = self.config.data, self.tokenizer.downsampling_factor
        for key, side in (("image_size", data.image_size), ("val_image_size", data.val_image_size)):
            if side is not None and side % factor:
                raise TrainerError(f"data.{key}={side} must be a multiple of {factor}, the pixels of a token's side")
        least = {
            "the discriminator (fewer discriminator.layers need less)": (
                self.discriminator.module.smallest_side if self.discriminator else 0
            ),
            "LPIPS (loss.perceptual.weight=0 does without)": SMALLEST_SIDE if self.perceptual else 0,
        }
        for network, side in least.items():
            if data.image_size < side:
                raise TrainerError(f"data.image_size={data.image_size} must be at least {side} for {network}")
        quantizer, impl = self.tokenizer.quantize, self.config.trainer.quantizer_impl
        if impl != "auto" and not quantizer.soft_assignment:
            raise TrainerError(f"trainer.quantizer_impl={impl} is for ibq: {self.config.model.quantizer} has one only")
        try:  # whether it is there and takes this codebook: a token tells
            with torch.no_grad():
                quantizer.assign(quantizer.embedding.weight.new_zeros(1, self.config.model.code_dim), None)
        except ModelError as error:
            raise TrainerError(f"trainer.quantizer_impl={impl}: {error}") from error

    def impl(self) -> str:
        """Which implementation of index backpropagation the training batches meet."""
        if self.config.trainer.quantizer_impl != "auto":
            return self.config.trainer.quantizer_impl
        codes_kd, side = self.tokenizer.quantize.embedding.weight, self.config.data.image_size
        tokens = self.generator.micro_batch_size * (side // self.tokenizer.downsampling_factor) ** 2
        return fastest_impl(codes_kd.new_empty(tokens, codes_kd.shape[1]), codes_kd, self.groups.shard)

    @property
    def discriminator_lr(self) -> float:
        optimizer = self.config.optimizer
        return optimizer.lr if optimizer.discriminator_lr is None else optimizer.discriminator_lr

    def _adam(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=lr, fused=self.world.device.type == "cuda", **self._adam_settings())

    def _adam_settings(self) -> dict:
        optimizer = self.config.optimizer
        return dict(betas=tuple(optimizer.betas), eps=optimizer.epsilon, weight_decay=optimizer.weight_decay)

    def step(self, micro_batches: list[Tensor], step: int) -> dict[str, Tensor | float]:
        """One optimiser step of both networks on this rank's uint8 micro-batches ``(b, 3, h, w)``; scalars to log.

        The discriminator is updated first, on detached reconstructions; the generator then plays against the updated,
        frozen one. With a single micro-batch one forward of the generator serves both. With several (gradient
        accumulation) a first pass without gradients makes all the reconstructions for the discriminator and the mean
        code assignment of the whole batch, so that a step does not depend on how its batch is cut. (Two things do:
        BatchNorm in the discriminator, and the adaptive weight, which is taken anew for every micro-batch.)
        """
        config = self.config
        loss_config = config.loss
        scalars = Means(1 / len(micro_batches))
        factor = learning_rate_factor(config.schedule, step, config.trainer.max_steps)
        discriminator_on = self.discriminator is not None and step >= loss_config.discriminator.start_step
        generator_start = loss_config.generator.start_step
        if generator_start is None:
            generator_start = loss_config.discriminator.start_step
        adversarial = loss_config.generator.weight * ramp(step, generator_start, loss_config.generator.ramp_steps)
        single = len(micro_batches) == 1
        micro_batches = [images_bchw.float() / 127.5 - 1 for images_bchw in micro_batches]

        # Pass 1: reconstructions; the discriminator learns.
        average_k = 0.0
        logits_mean = torch.zeros(2, device=self.world.device)
        for i, images_bchw in enumerate(micro_batches):
            if not single and not discriminator_on and self.entropy_temperature is None:
                break
            with torch.set_grad_enabled(single):
                output = self._generate(images_bchw)
            if self.entropy_temperature is not None:
                average_k = average_k + output.quantized.average_probability_k.detach() / len(micro_batches)
            if discriminator_on:
                last = i == len(micro_batches) - 1
                logits_mean += self._discriminator_backward(images_bchw, output, last, scalars) / len(micro_batches)
        if self.entropy_temperature is not None:
            # A shard's average is that of all its group's tokens already.
            average_k = mean_over_ranks(average_k, self.groups.replicas)
        if discriminator_on:
            scalars.set("lr/discriminator", factor * self.discriminator_lr)
            norm = self.discriminator.grad_norm()
            scalars.set("grad_norm/discriminator", norm)
            self.discriminator.step(factor * self.discriminator_lr, clip_scale(norm, config.trainer.gradient_clip_norm))
            self.lecam.update(*mean_over_ranks(logits_mean))

        # Pass 2: the generator learns, against the updated discriminator.
        self.feature_moments = 0
        for i, images_bchw in enumerate(micro_batches):
            if not single:
                output = self._generate(images_bchw)
            loss = self._generator_loss(images_bchw, output, average_k, adversarial, scalars)
            self.generator.backward(loss, last=i == len(micro_batches) - 1)
            self.health.update(output.quantized.index_bhw, step)
            self.feature_moments = self.feature_moments + moments(output.quantized.features_nd)
        scalars.set("lr/generator", factor * config.optimizer.lr)
        norm = torch.stack([self.generator.grad_norm(), self.codebook.grad_norm()]).norm()
        scalars.set("grad_norm/generator", norm)
        for engine in (self.generator, self.codebook):
            engine.step(factor * config.optimizer.lr, clip_scale(norm, config.trainer.gradient_clip_norm))
        if self.ema:
            self.ema.update(self.tokenizer, step)
        return scalars.values

    def read_health(self, step: int) -> dict[str, float]:
        """The codebook's health after step ``step`` (from 0); all ranks call together."""
        features = sum_over_ranks(self.feature_moments)
        codes = moments(self.tokenizer.quantize.embedding.weight)
        if self.groups.shard:
            codes = sum_over_ranks(codes, self.groups.shard.group)
        return {**self.health.read(step), "feature_distance": gaussian_distance(features, codes)}

    def _autocast(self):
        bf16 = self.config.trainer.precision == "bf16"
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=bf16)

    def _generate(self, images_bchw: Tensor) -> TokenizerOutput:
        with self._autocast():
            output = self.tokenizer(images_bchw, self.entropy_temperature)
        return output._replace(reconstruction_bchw=output.reconstruction_bchw.float())

    def _discriminator_backward(self, images_bchw: Tensor, output: TokenizerOutput, last: bool, scalars) -> Tensor:
        """Adds one micro-batch's discriminator gradient; returns the mean logits (real, fake)."""
        config = self.config.loss
        fake_bchw = output.reconstruction_bchw.detach()
        discriminator = self.discriminator
        with self._autocast():
            if self.config.discriminator.norm == "group":
                logits_real, logits_fake = discriminator(torch.cat([images_bchw, fake_bchw])).chunk(2)
            else:  # BatchNorm: apart, so that the statistics of real and fake never mix
                logits_real, logits_fake = discriminator(images_bchw), discriminator(fake_bchw)
        logits_real, logits_fake = logits_real.float(), logits_fake.float()
        loss = DISCRIMINATOR_LOSSES[config.discriminator.kind](logits_real, logits_fake)
        scalars.add("loss/discriminator", loss)
        if config.lecam.weight > 0:
            lecam = self.lecam(logits_real, logits_fake)
            scalars.add("loss/lecam", lecam)
            loss = loss + config.lecam.weight * lecam
        discriminator.backward(loss, last=last)
        means = torch.stack([logits_real.detach().mean(), logits_fake.detach().mean()])
        scalars.add("discriminator/logits_real", means[0])
        scalars.add("discriminator/logits_fake", means[1])
        return means

    def _generator_loss(self, images_bchw, output: TokenizerOutput, average_k, adversarial: float, scalars) -> Tensor:
        """All of the generator's terms on one micro-batch, weighed and summed; each is logged unweighed."""
        config = self.config.loss
        reconstruction_bchw, quantized = output
        reconstruction = (reconstruction_bchw - images_bchw).abs().mean()
        scalars.add("loss/reconstruction", reconstruction)
        likelihood = config.reconstruction.weight * reconstruction
        if self.perceptual:
            with self._autocast():
                perceptual = self.perceptual(reconstruction_bchw, images_bchw).float().mean()
            scalars.add("loss/perceptual", perceptual)
            likelihood = likelihood + config.perceptual.weight * perceptual
        loss = likelihood

        for name in ("double_quantization", "commitment", "codebook", "sample_entropy"):
            if getattr(quantized, name) is not None:
                scalars.add(f"loss/{name}", getattr(quantized, name))
        loss = loss + config.quantizer.weight * quantizer_loss(quantized, config.quantizer)
        if self.entropy_temperature is not None:
            entropy = entropy_penalty(quantized, average_k, config.entropy)
            scalars.add("loss/average_entropy", entropy.average_entropy)
            loss = loss + config.entropy.weight * entropy.loss

        if adversarial > 0:
            with frozen(self.discriminator.module), self._autocast():
                logits_fake = self.discriminator(reconstruction_bchw).float()
            generator = GENERATOR_LOSSES[config.generator.kind](logits_fake)
            scalars.add("loss/generator", generator)
            if config.generator.adaptive:
                adversarial = adversarial * self._adaptive_weight(likelihood, generator)
            scalars.add("weight/generator", adversarial)
            loss = loss + adversarial * generator
        scalars.add("loss/total", loss)
        return loss

    def _adaptive_weight(self, likelihood: Tensor, generator: Tensor) -> Tensor:
        """VQGAN eq. 7: |grad of reconstruction| / |grad of the adversarial term| at the last layer, over all ranks."""
        last_layer = self.tokenizer.last_layer
        norms = [
            mean_over_ranks(torch.autograd.grad(term, last_layer, retain_graph=True)[0]).norm()
            for term in (likelihood, generator)
        ]
        return (norms[0] / (norms[1] + 1e-4)).clamp(max=self.config.loss.generator.adaptive_cap).detach()

    @contextmanager
    def evaluation(self):
        """The tokenizer in eval mode with EMA weights where there are any; training weights are back afterwards."""
        raw = {name: value.clone() for name, value in self.tokenizer.state_dict().items()} if self.ema else None
        if self.ema:
            self.tokenizer.load_state_dict(self.ema.state_dict())
        self.tokenizer.eval()
        try:
            yield self.tokenizer
        finally:
            self.tokenizer.train()
            if raw:
                self.tokenizer.load_state_dict(raw)

    def save(self, folder: Path) -> None:
        """All ranks write this task's part of a checkpoint into an existing folder."""
        states = {"tokenizer": self.tokenizer.state_dict()}
        if self.ema:
            states["tokenizer_ema"] = dict(self.ema.state_dict())
        for name, state in states.items():
            self.codebook.save_rows(folder, name, {CODEBOOK: state.pop(CODEBOOK)})
            if self.world.is_main:
                save_file({k: v.contiguous() for k, v in state.items()}, folder / f"{name}.safetensors")
        if self.world.is_main:
            save_file(self.lecam.state_dict(), folder / "lecam.safetensors")
            save_file(self.health.state_dict(), folder / "codebook_health.safetensors")
            if self.discriminator:
                save_file(self.discriminator.module.state_dict(), folder / "discriminator.safetensors")
        for name, engine in self._engines().items():
            (folder / name).mkdir(exist_ok=True)
            engine.save(folder / name)

    def load(self, folder: Path) -> None:
        """All ranks restore what `save` wrote, with whatever number of ranks to a codebook."""
        codes = (*self.codebook.rows, self.config.model.codebook_size)
        self.tokenizer.load_state_dict(load_weights(folder, "tokenizer", *codes))
        self.lecam.load_state_dict(load_file(folder / "lecam.safetensors"))
        self.health.load_state_dict(load_file(folder / "codebook_health.safetensors"))
        if self.ema:
            self.ema.load_state_dict(load_weights(folder, "tokenizer_ema", *codes))
        if self.discriminator:
            self.discriminator.module.load_state_dict(load_file(folder / "discriminator.safetensors"))
        for name, engine in self._engines().items():
            engine.load(folder / name)
            for group in engine.param_groups:  # the recipe's, as the rate is, and not those that were saved
                group.update(self._adam_settings())

    def _engines(self) -> dict:
        engines = {"generator": self.generator, "codebook": self.codebook, "discriminator": self.discriminator}
        return {name: engine for name, engine in engines.items() if engine}


class Means:
    """Scalars of one step; ``add`` averages over micro-batches and keeps them on the device."""

    def __init__(self, share: float):
        self.share = share
        self.values: dict[str, Tensor | float] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        value = value.detach() if isinstance(value, Tensor) else value
        self.values[name] = self.values.get(name, 0.0) + self.share * value

    def set(self, name: str, value: Tensor | float) -> None:
        self.values[name] = value


@contextmanager
def frozen(module: nn.Module):
    """Gradients flow through the module, none into it."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
