"""Training a tokenizer: reconstruction, quantizer and adversarial losses, generator and discriminator apart."""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.utils import make_grid

import data
from data import Batch, EvaluationImage
from model_zoo import ModelError
from model_zoo.autoencoder import checkpoint_activations
from model_zoo.discriminator import PatchDiscriminator
from model_zoo.eval_nets.lpips import SMALLEST_SIDE, Perceptual
from model_zoo.io.weights import Weights, check_names
from model_zoo.losses import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    Lecam,
    entropy_penalty,
    quantizer_loss,
)
from model_zoo.ops import fastest_impl
from model_zoo.quantizers import Quantized
from model_zoo.tokenizer import Tokenizer, TokenizerOutput
from trainer import TrainerError
from trainer.config import TokenizerRun
from trainer.ema import Ema
from trainer.engines import Engine, Replicated, Rows
from trainer.init_from import InitRecord, load_init_weights
from trainer.metrics.codebook import CodebookHealth, CodebookUsage, gaussian_distance, moments
from trainer.metrics.image import psnr
from trainer.parallel import World, mean_over_ranks, raise_on_all_ranks, row_groups, sum_over_ranks
from trainer.precision import LossScale
from trainer.schedules import ramp
from trainer.tasks.base import Means, Step, Task, Validation

# What init_from.freeze keeps as it is -> what the names of its parameters begin with.
FROZEN = {"encoder": ("encoder.", "quant_conv.", "quantize."), "decoder": ("decoder.", "post_quant_conv.")}
ROUNDING = 1e-12  # of the squared mean: features in fp32 that vary by less do not vary
PICTURES = 8  # validation images whose reconstructions are shown as training goes


class TokenizerTask(Task):
    """Owns the models, their engines, the EMA and LeCAM's means."""

    MODELS: ClassVar = {
        "generator": ("tokenizer", ""),
        "codebook": ("tokenizer", "quantize."),
        "held": ("tokenizer", ""),
        "discriminator": ("discriminator", ""),
    }
    config: TokenizerRun

    def __init__(self, config: TokenizerRun, world: World, micro_batch_size: int, micro_batches: int):
        self.config = config
        self.world = world
        loss = config.loss
        codes, patience = config.model.codebook_size, config.trainer.timeout_seconds
        self.groups = row_groups(world, "codebook_parallel", config.codebook_parallel, codes, patience)
        torch.manual_seed(config.seed)  # the same weights on every rank
        self.tokenizer = Tokenizer(config.model, self.groups.shard).to(world.device)
        quantizer = self.tokenizer.quantize
        if quantizer.impl is not None:
            quantizer.impl = config.trainer.quantizer_impl
        self.perceptual = None
        if loss.perceptual.weight > 0:
            try:
                self.perceptual = Perceptual(loss.perceptual.vgg16_weights).to(world.device)
            except ModelError as error:
                raise ModelError(f"{error}; loss.perceptual.weight=0 does without") from error
        if config.trainer.activation_checkpointing:
            checkpoint_activations(self.tokenizer)
        self.batch = dict(micro_batch_size=micro_batch_size, micro_batches=micro_batches)
        # The codebook, where there is one, has an engine of its own, the rest of the tokenizer the recipe's.
        codebook = list(quantizer.parameters())
        rest = sum(p.numel() for p in self.tokenizer.parameters()) - sum(p.numel() for p in codebook)
        # Before they are spread.
        self.parameters = rest + (config.model.codebook_size * config.model.code_dim if codebook else 0)
        # What is frozen is no sharding engine's. It lies whole on every rank (the codebook by rows), without optimiser.
        names = FROZEN.get(config.init_from.freeze, ())
        held = [p.requires_grad_(False) for name, p in self.tokenizer.named_parameters() if name.startswith(names)]
        self.codes_frozen = config.init_from.freeze == "encoder"
        self.generator = self.build_generator(self.tokenizer, ignored=[*codebook, *held])
        self.codebook = None
        if codebook:
            adam = None if self.codes_frozen else self.make_adam()
            self.codebook = Rows(quantizer, adam, config.model.codebook_size, self.groups, **self.batch)
        self.held = None
        if held:
            learning = [p for p in self.tokenizer.parameters() if p.requires_grad]
            self.held = Replicated(self.tokenizer, None, [*codebook, *learning], **self.batch)
        self.trained = [self.generator] + ([self.codebook] if self.codebook and not self.codes_frozen else [])
        self.discriminator = None
        if loss.generator.weight > 0:
            network = PatchDiscriminator(
                channels=config.discriminator.channels,
                layers=config.discriminator.layers,
                norm=config.discriminator.norm,
            ).to(world.device)
            # Small, so replicated under every engine; and hooks of a sharding engine would break its two forwards.
            self.discriminator = Replicated(network, self.make_adam(lr=self.discriminator_lr), **self.batch)
        fp16 = config.trainer.precision == "fp16"
        self.loss_scales = {name: LossScale(fp16) for name in ("generator", "discriminator")}
        self.lecam = Lecam(loss.lecam.decay).to(world.device)
        self.ema = Ema(self.trained, config.ema.decay) if config.ema.decay > 0 else None
        tokens = (config.data.image_size // self.tokenizer.downsampling_factor) ** 2
        self.health = CodebookHealth(
            config.model.codebook_size, max(1, tokens) * config.trainer.global_batch_size, world.device
        )
        self.feature_moments: Tensor | None = None  # of this rank's features in the last step
        self.entropy_temperature = None  # a quantizer without entropies is not asked for them
        if loss.entropy.weight > 0 and quantizer.has_entropy and not self.codes_frozen:
            self.entropy_temperature = loss.entropy.temperature
        if config.trainer.compile:
            for module in (self.tokenizer.encoder, self.tokenizer.decoder) if self.codes_frozen else (self.tokenizer,):
                module.compile()
            if self.discriminator:
                self.discriminator.module.compile()
        self.last_hidden_bchw: Tensor | None = None  # what the last layer was last given
        if loss.generator.adaptive:
            self.tokenizer.decoder.conv_out.register_forward_pre_hook(self._keep_last_hidden)

    def check(self) -> None:
        """Raises TrainerError for images that do not divide into tokens or are too small for a network here, and for
        an implementation of the quantizer that cannot be had."""
        self.check_settings()
        quantizer, impl = self.tokenizer.quantize, self.config.trainer.quantizer_impl
        if impl != "auto" and quantizer.impl is None:
            raise TrainerError(f"trainer.quantizer_impl={impl} is for ibq: {self.config.model.quantizer} has one only")
        try:  # whether it is there and takes this codebook: a token tells
            with torch.no_grad():
                quantizer.assign(torch.zeros(1, self.config.model.code_dim, device=self.world.device), None)
        except ModelError as error:
            raise TrainerError(f"trainer.quantizer_impl={impl}: {error}") from error

    def check_settings(self) -> None:
        """Raises TrainerError for images that do not divide into tokens or are too small for a network here."""
        data, factor = self.config.data, self.tokenizer.downsampling_factor
        for key, side in (("image_size", data.image_size), ("val_image_size", data.val_image_size)):
            if side is not None and side % factor:
                raise TrainerError(f"data.{key}={side} must be a multiple of {factor}, the pixels of a token's side")
        least = {
            "the discriminator (fewer discriminator.layers need less)": (
                self.discriminator.module.smallest_side if self.discriminator else 0
            ),
            "LPIPS (loss.perceptual.weight=0 does without)": SMALLEST_SIDE["vgg"] if self.perceptual else 0,
        }
        for network, side in least.items():
            if data.image_size < side:
                raise TrainerError(f"data.image_size={data.image_size} must be at least {side} for {network}")

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

    def step(self, micro_batches: list[Tensor], step: int) -> Step:
        """One optimiser step of both networks on this rank's uint8 micro-batches ``(b, 3, h, w)``.

        The discriminator is updated first, on detached reconstructions; the generator then plays against the updated,
        frozen one. With a single micro-batch one forward of the generator serves both. With several (gradient
        accumulation) a first pass without gradients makes all the reconstructions for the discriminator and the mean
        code assignment of the whole batch, so that a step does not depend on how its batch is cut. (Two things do:
        BatchNorm in the discriminator, and the adaptive weight, which is taken anew for every micro-batch.)

        A network whose loss or gradient is not finite on any rank is left as it was, on all of them.
        """
        config = self.config
        loss_config = config.loss
        scalars = Means(1 / len(micro_batches))
        bad: list[str] = []
        learned = True
        factor = self.learning_rate_factor(step)
        discriminator_on = self.discriminator is not None and step >= loss_config.discriminator.start_step
        generator_start = loss_config.generator.start_step
        if generator_start is None:
            generator_start = loss_config.discriminator.start_step
        adversarial = loss_config.generator.weight * ramp(step, generator_start, loss_config.generator.ramp_steps)
        single = len(micro_batches) == 1
        self.tokenizer.quantize.anneal(step / config.trainer.max_steps)
        micro_batches = [images_bchw.float() / 127.5 - 1 for images_bchw in micro_batches]

        # BatchNorm's statistics take in what every forward sees, also that of a step that is left out.
        buffers = list(self.discriminator.module.buffers()) if self.discriminator else []
        kept = [buffer.clone() for buffer in buffers]

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
            lr = factor * self.discriminator_lr
            learned = self.update("discriminator", [self.discriminator], "loss/discriminator", lr, step, scalars, bad)
            if learned:
                self.lecam.update(*mean_over_ranks(logits_mean))

        # Pass 2: the generator learns, against the updated discriminator.
        self.feature_moments = 0
        for i, images_bchw in enumerate(micro_batches):
            if not single:
                output = self._generate(images_bchw)
            loss = self._generator_loss(images_bchw, output, average_k, adversarial, scalars)
            self.generator.backward(self.loss_scales["generator"].value * loss, last=i == len(micro_batches) - 1)
            self.health.update(output.quantized.index_bhw, step)
            self.feature_moments = self.feature_moments + moments(output.quantized.features_nd)
        updated = self.update("generator", self.trained, "loss/total", factor * config.optimizer.lr, step, scalars, bad)
        if updated and self.ema:
            self.ema.update(step)
        if not (learned and updated):
            for buffer, before in zip(buffers, kept, strict=True):
                buffer.copy_(before)
        return Step(scalars.values, bad)

    def scalars(self, step: int) -> dict[str, float]:
        """The codebook's health."""
        health = self.health.read(step)
        if self.codebook:
            codes = moments(self.tokenizer.quantize.embedding.weight)
            if self.groups.shard:
                codes = sum_over_ranks(codes, self.groups.shard.group)
            health["feature_distance"] = gaussian_distance(sum_over_ranks(self.feature_moments), codes)
        return {f"codebook/{name}": value for name, value in health.items()}

    @property
    def alarm(self) -> str | None:
        return None if self.codes_frozen else self.health.alarm  # few codes then mean narrow data

    def _generate(self, images_bchw: Tensor) -> TokenizerOutput:
        with self.autocast():
            if self.codes_frozen:
                output = self.generator.run(self._from_frozen_codes, images_bchw)
            else:
                output = self.generator(images_bchw, self.entropy_temperature)
        reconstruction_bchw = output.reconstruction_bchw.float()
        # A tensor of our own: sharding engines hang hooks on their outputs, which the adaptive weight must not set off.
        return output._replace(reconstruction_bchw=reconstruction_bchw.view_as(reconstruction_bchw))

    def _from_frozen_codes(self, images_bchw: Tensor) -> TokenizerOutput:
        """The tokenizer's forward with a graph that begins at the code vectors; they are those of inference."""
        with torch.no_grad():
            features_bdhw = self.tokenizer.encode(images_bchw).float()
            index_bhw = self.tokenizer.quantize.tokenize(features_bdhw)
            codes_bdhw = self.tokenizer.quantize.lookup(index_bhw)
            distance = F.mse_loss(features_bdhw, codes_bdhw)
        features_nd = features_bdhw.movedim(1, -1).flatten(0, 2)
        quantized = Quantized(codes_bdhw, index_bhw, None, distance, None, features_nd=features_nd)
        return TokenizerOutput(self.tokenizer.decode(codes_bdhw), quantized)

    def _discriminator_backward(self, images_bchw: Tensor, output: TokenizerOutput, last: bool, scalars) -> Tensor:
        """Adds one micro-batch's discriminator gradient; returns the mean logits (real, fake)."""
        config = self.config.loss
        fake_bchw = output.reconstruction_bchw.detach()
        discriminator = self.discriminator
        with self.autocast():
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
        discriminator.backward(self.loss_scales["discriminator"].value * loss, last=last)
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
            with self.autocast():
                perceptual = self.perceptual(reconstruction_bchw, images_bchw).float().mean()
            scalars.add("loss/perceptual", perceptual)
            likelihood = likelihood + config.perceptual.weight * perceptual
        loss = likelihood

        for name in ("double_quantization", "commitment", "codebook", "sample_entropy"):
            if getattr(quantized, name) is not None:
                scalars.add(f"loss/{name}", getattr(quantized, name))
        if not self.codes_frozen:
            loss = loss + config.quantizer.weight * quantizer_loss(quantized, config.quantizer)
        if self.entropy_temperature is not None:
            entropy = entropy_penalty(quantized, average_k, config.entropy)
            scalars.add("loss/average_entropy", entropy.average_entropy)
            loss = loss + config.entropy.weight * entropy.loss

        if adversarial > 0:
            with frozen(self.discriminator.module), self.autocast():
                logits_fake = self.discriminator(reconstruction_bchw).float()
            generator = GENERATOR_LOSSES[config.generator.kind](logits_fake)
            scalars.add("loss/generator", generator)
            if config.generator.adaptive:
                adversarial = adversarial * self._adaptive_weight(likelihood, generator, reconstruction_bchw)
            scalars.add("weight/generator", adversarial)
            loss = loss + adversarial * generator
        scalars.add("loss/total", loss)
        return loss

    def _adaptive_weight(self, likelihood: Tensor, generator: Tensor, reconstruction_bchw: Tensor) -> Tensor:
        """VQGAN eq. 7: |grad of reconstruction| / |grad of the adversarial term| at the last layer, over all ranks.

        The layer's gradient is made of what it was given and of the gradient of what it gave: nothing below the
        reconstruction is gone through, and no engine need have the weight at hand.
        """
        layer, decoder = self.tokenizer.decoder.conv_out, self.tokenizer.decoder
        shape = layer.out_channels, layer.in_channels, *layer.kernel_size
        norms = []
        for term in (likelihood, generator):
            (grad_bchw,) = torch.autograd.grad(term, reconstruction_bchw, retain_graph=True)
            grad_bchw = F.pixel_unshuffle(grad_bchw, decoder.pixel_shuffle.upscale_factor)
            of_weight = nn.grad.conv2d_weight(self.last_hidden_bchw.float(), shape, grad_bchw, padding=layer.padding)
            norms.append(mean_over_ranks(of_weight).norm())
        return (norms[0] / (norms[1] + 1e-4)).clamp(max=self.config.loss.generator.adaptive_cap).detach()

    def _keep_last_hidden(self, _, inputs: tuple[Tensor]) -> None:
        self.last_hidden_bchw = inputs[0].detach()

    @torch.no_grad()
    def reconstruct(self, images_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """(codes ``(b, h, w)``, reconstructions in [-1, 1]) of images in [-1, 1]. Where `forwards_together` says so,
        all ranks must call as often as each other."""

        def both() -> tuple[Tensor, Tensor]:
            index_bhw = self.tokenizer.tokenize(images_bchw)
            return index_bhw, self.tokenizer.detokenize(index_bhw)

        with self.autocast():  # an engine may gather the weights in half precision
            index_bhw, reconstruction_bchw = self.generator.run(both)
        return index_bhw, reconstruction_bchw.float().clamp(-1, 1)

    @torch.no_grad()
    def validate(self, beat: Callable[[], None]) -> Validation:
        """PSNR, L1 and usage on validation images, each counted once; pictures of the first few."""
        config, world = self.config, self.world
        sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        usage = CodebookUsage(config.model.codebook_size, world.device)
        pictures = []
        side = config.data.val_image_size or config.data.image_size
        grey = EvaluationImage("", torch.full((3, side, side), 127, dtype=torch.uint8), -1)
        with self.evaluation():
            images = data.evaluation_images(
                config.data.val,
                image_size=side,
                resize=config.data.resize,
                shard=(world.rank, world.size),
                access=data.access_of(config.data),
            )
            here = range(world.rank, config.trainer.validation_images, world.size)
            images = (image for _, image in zip(here, images, strict=False))
            for image, counts in self.in_step(images, grey):
                beat()
                original = image.image_chw[None].to(world.device).float() / 127.5 - 1
                index_bhw, reconstruction = self.reconstruct(original)
                if not counts:
                    continue
                usage.update(index_bhw)
                sums += torch.stack(
                    [
                        psnr(reconstruction, original)[0].double(),
                        (reconstruction - original).abs().mean().double(),
                        sums.new_ones(()),
                    ]
                )
                if len(pictures) < PICTURES:
                    pictures.append(torch.cat([original[0], reconstruction[0]], dim=1).cpu())
        sum_over_ranks(sums)
        usage = usage.merged()
        if not sums[2] > 0:
            return Validation({}, {}, [])
        drawn = {}
        if pictures:
            grid = make_grid(torch.stack(pictures) / 2 + 0.5, nrow=PICTURES, padding=2, pad_value=1)
            drawn["reconstructions"] = (grid * 255).to(torch.uint8)
        psnr_mean, l1_mean = (sums[:2] / sums[2]).tolist()
        return Validation({"val/psnr": psnr_mean, "val/l1": l1_mean, "val/usage": usage.usage()}, drawn, [])

    def describe(self) -> list[str]:
        model, init_from = self.config.model, self.config.init_from
        learns = self.tokenizer.quantize.impl and not self.codes_frozen
        rule = model.quantizer + (f" {self.impl()}" if learns else "")
        spread = f", codebook over {self.config.codebook_parallel}" if self.config.codebook_parallel > 1 else ""
        begun = [f"begun from {init_from.source} ({init_from.weights})"] if init_from.source else []
        frozen = [f"{init_from.freeze} frozen"] if init_from.freeze else []
        return [f"{model.codebook_size} codes of {model.code_dim} ({rule}{spread})", *begun, *frozen]

    def begin(self) -> InitRecord | None:
        if self.config.init_from.source is None:
            return None
        failed = None
        try:
            weights, fingerprint = load_init_weights(self.config)
        except TrainerError as error:
            failed = str(error)
        raise_on_all_ranks(failed)
        self.fill("tokenizer", weights.tensors)
        return InitRecord(weights.origin, fingerprint, self.config.init_from.freeze, self._begin_discriminator(weights))

    @torch.no_grad()
    def fit(self, micro_batches: Iterable[Tensor]) -> None:
        """``model.codebook_init=features``: the last bias of the encoder takes away the features' mean, then the codes
        are placed among the features. Both are those of the whole global batch."""
        model, quantizer = self.config.model, self.tokenizer.quantize
        if model.codebook_init != "features" or not self.codebook or self.config.init_from.source:
            return
        sums = torch.zeros(model.code_dim + 1, model.code_dim + 1, dtype=torch.float64, device=self.world.device)
        for images_bchw in micro_batches:
            with self.autocast():
                z_bdhw = self.generator.run(self.tokenizer.encode, images_bchw.float() / 127.5 - 1)
            z_nd = z_bdhw.movedim(1, -1).flatten(0, 2).double()
            z_nd = F.pad(z_nd, (0, 1), value=1.0)
            sums += z_nd.T @ z_nd
        sum_over_ranks(sums)
        mean_d = sums[-1, :-1] / sums[-1, -1]
        covariance_dd = sums[:-1, :-1] / sums[-1, -1] - mean_d.outer(mean_d)
        if not covariance_dd.isfinite().all():  # the same on all ranks
            raise TrainerError(
                "features of the first step's images are not finite: use model.codebook_init=normal, or under "
                "trainer.precision=fp16 another precision"
            )
        for piece in self.generator.weights():
            if piece.name == "quant_conv.bias":  # in CPU memory where the engine offloads
                piece.values.sub_(mean_d[piece.start : piece.start + len(piece.values)].to(piece.values))
        if covariance_dd.trace() > ROUNDING * mean_d.square().sum():
            quantizer.place_among(covariance_dd)
        # Processors may differ in the last bits, copies of a code must not.
        dist.broadcast(quantizer.embedding.weight.data, group=self.groups.replicas, group_src=0)
        self.generator.publish()
        if self.ema:
            self.ema.begin()

    def _begin_discriminator(self, weights: Weights) -> str:
        """Takes the source's discriminator, if it can be had; says whether, and why not."""
        if not self.discriminator:
            return "none"
        network = self.discriminator.module
        if not self.config.init_from.discriminator:
            return "anew (init_from.discriminator=false)"
        if weights.discriminator is None:
            return "anew (the source has none)"
        try:
            check_names(weights.discriminator, network.state_dict(), "the source's")
        except ModelError as error:
            return f"anew ({error})"
        network.load_state_dict(weights.discriminator)
        return "the source's"

    def inputs(self, batch: Batch) -> Tensor:
        return batch.values.to(self.world.device, non_blocking=True)

    def frozen_bytes(self) -> dict[str, int]:
        sizes = {"LPIPS, frozen": sum(p.nbytes for p in self.perceptual.parameters())} if self.perceptual else {}
        if held := [piece for part in self.held_parts().values() for piece in part.weights()]:
            sizes[f"{self.config.init_from.freeze}, frozen"] = sum(piece.values.nbytes for piece in held)
        return sizes

    def buffers(self) -> dict[str, Tensor]:
        """LeCAM's means, the codebook's counts, BatchNorm's statistics."""
        buffers = {f"lecam/{name}": value for name, value in self.lecam.named_buffers()}
        buffers |= {f"codebook_health/{name}": value for name, value in self.health.state_dict().items()}
        if self.discriminator:
            of_module = self.discriminator.module.named_buffers()
            buffers |= {f"discriminator/{name}": value for name, value in of_module}
        return buffers

    def engines(self) -> dict[str, Engine]:
        codebook = None if self.codes_frozen else self.codebook
        engines = {"generator": self.generator, "codebook": codebook, "discriminator": self.discriminator}
        return {name: engine for name, engine in engines.items() if engine}

    def held_parts(self) -> dict[str, Engine]:
        parts = {"held": self.held, "codebook": self.codebook if self.codes_frozen else None}
        return {name: part for name, part in parts.items() if part}


@contextmanager
def frozen(module: nn.Module):
    """Gradients flow through the module, none into it."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
