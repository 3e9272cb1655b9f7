"""The adversarial part of tokenizer training: the discriminator's update and the tokenizer's adversarial loss."""

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model_zoo.discriminator import PatchDiscriminator, TokenDiscriminator
from model_zoo.eval_nets.patch_encoder import BlockEncoder
from model_zoo.losses import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, Lecam
from trainer.config import TokenizerRun
from trainer.engines.ddp import DataParallel
from trainer.parallel import World, mean_over_ranks
from trainer.schedules import ramp
from trainer.tasks.base import StepMetrics


class Adversary:
    """The discriminator with its engine, LeCAM's running means, and the losses of both players.

    ``engine`` is None where ``loss.generator.weight`` is 0. ``encoder``: the frozen one of ``discriminator.kind=dino``;
    None for PatchGAN. It is no part of the engine's module, so checkpoints contain only the heads. decoder: the
    tokenizer's, whose last layer the adaptive weight looks at. autocast: returns the recipe's autocast context.
    """

    def __init__(self, config: TokenizerRun, world: World, decoder: nn.Module, make_optimizer, autocast, **batch):
        self.config, self.loss, self.decoder, self.autocast = config, config.loss, decoder, autocast
        self.engine = self.encoder = None
        if self.loss.generator.weight > 0:
            network = self._build(world).to(world.device)
            # Small, so every engine keeps it whole on each rank. Its two forwards before one backward would break under
            # a sharding engine's hooks.
            self.engine = DataParallel(network, make_optimizer(lr=self.lr), **batch)
        self.lecam = Lecam(self.loss.lecam.decay).to(world.device)
        self.last_hidden_bchw: Tensor | None = None  # input of the decoder's last layer
        if self.loss.generator.adaptive:
            decoder.conv_out.register_forward_pre_hook(self._keep_last_hidden)

    def _build(self, world: World) -> nn.Module:
        """The trained network."""
        settings = self.config.discriminator
        if settings.kind == "patchgan":
            return PatchDiscriminator(channels=settings.channels, layers=settings.layers, norm=settings.norm)
        encoder = BlockEncoder(settings.encoder, settings.weights, settings.sha256, settings.size)
        self.encoder = encoder.to(world.device)
        return TokenDiscriminator(encoder.dim, encoder.outputs)

    def logits(self, images_bchw: Tensor) -> Tensor:
        """The discriminator's logits of images in [-1, 1]: ``(b, 1, h', w')`` of PatchGAN, ``(b, n)`` of ``dino``."""
        return self.engine(self.encoder(images_bchw) if self.encoder else images_bchw)

    @property
    def smallest_side(self) -> int:
        """Of a picture, in pixels."""
        if self.engine is None:
            return 0
        return self.encoder.patch if self.encoder else self.engine.module.smallest_side

    @property
    def how_to_need_less(self) -> str:
        """How to make `smallest_side` smaller, for an error message."""
        return "a patch of its encoder" if self.encoder else "fewer discriminator.layers need less"

    @property
    def lr(self) -> float:
        """The discriminator's peak learning rate."""
        optimizer = self.config.optimizer
        return optimizer.lr if optimizer.discriminator_lr is None else optimizer.discriminator_lr

    def learns(self, step: int) -> bool:
        """Whether the discriminator is trained in step ``step`` (from 0)."""
        return self.engine is not None and step >= self.loss.discriminator.start_step

    def weight(self, step: int) -> float:
        """Weight of the tokenizer's adversarial loss in step ``step`` (from 0), before the adaptive factor."""
        start = self.loss.generator.start_step
        start = self.loss.discriminator.start_step if start is None else start
        return self.loss.generator.weight * ramp(step, start, self.loss.generator.ramp_steps)

    def buffers(self) -> dict[str, Tensor]:
        """The discriminator's buffers (BatchNorm's statistics, or singular vectors), by name."""
        return dict(self.engine.module.named_buffers()) if self.engine else {}

    def backward(self, images_bchw: Tensor, fake_bchw: Tensor, scale: float, last: bool, metrics: StepMetrics):
        """Adds one micro-batch's discriminator gradient, times ``scale``; returns the mean logits (real, fake)."""
        with self.autocast():
            if self.encoder or self.config.discriminator.norm == "group":
                logits_real, logits_fake = self.logits(torch.cat([images_bchw, fake_bchw])).chunk(2)
            else:  # separate forwards, so that BatchNorm's statistics never mix real and fake
                logits_real, logits_fake = self.logits(images_bchw), self.logits(fake_bchw)
        logits_real, logits_fake = logits_real.float(), logits_fake.float()
        loss = DISCRIMINATOR_LOSSES[self.loss.discriminator.kind](logits_real, logits_fake)
        metrics.add("loss/discriminator", loss)
        if self.loss.lecam.weight > 0:
            lecam = self.lecam(logits_real, logits_fake)
            metrics.add("loss/lecam", lecam)
            loss = loss + self.loss.lecam.weight * lecam
        self.engine.backward(scale * loss, last=last)
        means = torch.stack([logits_real.detach().mean(), logits_fake.detach().mean()])
        metrics.add("discriminator/logits_real", means[0])
        metrics.add("discriminator/logits_fake", means[1])
        return means

    def after_update(self, logits_mean: Tensor) -> None:
        """Call after each update of the discriminator, with the mean logits (real, fake) of the *global* batch."""
        self.lecam.update(*logits_mean)
        if self.encoder:
            self.engine.module.after_update()

    def generator_loss(self, reconstruction_bchw: Tensor, likelihood: Tensor, weight: float, metrics: StepMetrics):
        """The tokenizer's weighted adversarial loss, played against the frozen discriminator.

        likelihood: the weighted reconstruction losses, which the adaptive weight compares with.
        """
        with frozen(self.engine.module), self.autocast():
            logits_fake = self.logits(reconstruction_bchw).float()
        loss = GENERATOR_LOSSES[self.loss.generator.kind](logits_fake)
        metrics.add("loss/generator", loss)
        if self.loss.generator.adaptive:
            weight = weight * self._adaptive_weight(likelihood, loss, reconstruction_bchw)
        metrics.add("weight/generator", weight)
        return weight * loss

    def describe(self) -> list[str]:
        """The encoder of ``dino`` and its file, for the line that a run starts with."""
        settings = self.config.discriminator
        return [f"discriminator on {settings.encoder} (discriminator.sha256={settings.sha256})"] if self.encoder else []

    def frozen_bytes(self) -> dict[str, int]:
        """Bytes of the encoder, by a name to print."""
        return {f"{self.encoder.title}, of the discriminator": self.encoder.nbytes} if self.encoder else {}

    def _adaptive_weight(self, likelihood: Tensor, generator: Tensor, reconstruction_bchw: Tensor) -> Tensor:
        """VQGAN eq. 7: norm of the reconstruction's gradient / norm of the adversarial one at the last layer, over all
        ranks.

        The layer's weight gradient is computed from its input and its output's gradient. So the backward pass stops at
        the reconstruction, and the weight itself, which an engine may have sharded, is not needed.
        """
        layer = self.decoder.conv_out
        shape = layer.out_channels, layer.in_channels, *layer.kernel_size
        norms = []
        for term in (likelihood, generator):
            (grad_bchw,) = torch.autograd.grad(term, reconstruction_bchw, retain_graph=True)
            grad_bchw = F.pixel_unshuffle(grad_bchw, self.decoder.pixel_shuffle.upscale_factor)
            of_weight = nn.grad.conv2d_weight(self.last_hidden_bchw.float(), shape, grad_bchw, padding=layer.padding)
            norms.append(mean_over_ranks(of_weight).norm())
        return (norms[0] / (norms[1] + 1e-4)).clamp(max=self.loss.generator.adaptive_cap).detach()

    def _keep_last_hidden(self, _, inputs: tuple[Tensor]) -> None:
        self.last_hidden_bchw = inputs[0].detach()


@contextmanager
def frozen(module: nn.Module):
    """Within the context gradients flow through the module, but not into its parameters."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
