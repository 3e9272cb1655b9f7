"""Tokenizer training: reconstruction, quantizer and adversarial losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

import data
from model_zoo import ModelError, Tokenizer
from model_zoo.autoencoder import checkpoint_activations
from model_zoo.losses import entropy_penalty, quantizer_loss
from model_zoo.ops.index_backprop import fastest_impl
from model_zoo.quantizers.base import CodebookQuantizer, Quantized
from model_zoo.tokenizer import TokenizerOutput
from trainer import TrainerError
from trainer.config import TokenizerRun
from trainer.init_from import InitRecord
from trainer.metrics.codebook import CodebookHealth, CodebookUsage, gaussian_distance, moments
from trainer.metrics.image import psnr
from trainer.model_state import ModelState, Network
from trainer.parallel import World, mean_over_ranks, row_groups, sum_over_ranks
from trainer.precision import LossScale
from trainer.tasks.adversarial import Adversary
from trainer.tasks.base import PICTURES, Step, StepMetrics, Task, Validation, row_of_pictures
from trainer.tasks.building import build_engines
from trainer.tasks.gradient_balance import GradientBalance, unmeasurable
from trainer.tasks.initialization import load_initial_weights, place_codes_among_features, read_codes
from trainer.tasks.perceptual import PerceptualTerms
from trainer.tasks.semantic import SemanticTerm


class TokenizerTask(Task):
    """Trains encoder, quantizer and decoder against a discriminator. `build_engines` describes their engines."""

    config: TokenizerRun

    def __init__(self, config: TokenizerRun, world: World, micro_batch_size: int, micro_batches: int):
        self.config, self.world = config, world
        self.batch = dict(micro_batch_size=micro_batch_size, micro_batches=micro_batches)
        codes, timeout_seconds = config.model.codebook_size, config.trainer.timeout_seconds
        self.groups = row_groups(world, "codebook_parallel", config.codebook_parallel, codes, timeout_seconds)
        torch.manual_seed(config.seed)  # the same weights on every rank
        self.tokenizer = Tokenizer(config.model, self.groups.shard).to(world.device)
        rows = self.tokenizer.quantize.row_parameters()
        whole_rows = sum((codes - len(row)) * row[0].numel() for row in rows)  # those of other ranks
        # Before ZeRO 3 takes the parameters apart.
        self.parameters = sum(p.numel() for p in self.tokenizer.parameters()) + whole_rows
        if self.tokenizer.quantize.impl is not None:
            self.tokenizer.quantize.impl = config.trainer.quantizer_impl
        self.perceptual = PerceptualTerms(config.loss.perceptual, world, self.autocast)
        if config.trainer.activation_checkpointing:
            checkpoint_activations(self.tokenizer)
        self.codes_frozen = config.init_from.freeze == "encoder"
        trained, frozen, self.codebook = build_engines(self, self.tokenizer)
        self.adversary = Adversary(config, world, self.tokenizer.decoder, self.make_adam, self.autocast, **self.batch)
        # After the discriminator, whose initial weights it therefore does not change.
        code_dim, make = config.model.code_dim, self.make_adam
        self.semantic = SemanticTerm(config.loss.semantic, world, code_dim, make, self.autocast, **self.batch)
        averaged = list(trained)  # without head and discriminator
        if self.semantic.engine:
            trained["semantic_head"] = Network(self.semantic.engine, "semantic_head")
        self.trained = [network.engine for network in trained.values()]  # updated together
        if self.adversary.engine:
            trained["discriminator"] = Network(self.adversary.engine, "discriminator")
        fp16 = config.trainer.precision == "fp16"
        self.state = ModelState(
            trained,
            frozen,
            averaged=averaged,
            ema_decay=config.ema.decay,
            loss_scales={name: LossScale(fp16) for name in ("tokenizer", "discriminator")},
            buffers=self._buffers,
            is_main=world.is_main,
        )
        self.sizes = data.image_sizes(config.data)
        # With buckets, a step of each has about as many tokens as one of the smallest.
        self.tokens_per_step = config.trainer.global_batch_size * max(1, self._tokens_of(self.sizes[0]))
        start_steps = self.tokenizer.quantize.start_updates
        if start_steps:
            start_steps += config.schedule.warmup_steps  # updates are small until then
        sizes = self.tokenizer.quantize.counted_sizes
        self.health = CodebookHealth(sizes, self.tokens_per_step, world.device, start_steps)
        self.counted_prefix = "group_" if self.tokenizer.quantize.counts_groups else ""  # of names of scalars
        self.feature_moments: Tensor | float = 0.0  # of this rank's features in the last step
        self.entropy_temperature = None  # None: the quantizer computes no entropies
        if config.loss.entropy.weight > 0 and self.tokenizer.quantize.has_entropy and not self.codes_frozen:
            self.entropy_temperature = config.loss.entropy.temperature
        self.unmeasurable = unmeasurable(config, self.main_engine)
        self.balance = None if self.unmeasurable else GradientBalance(config.trainer, self.tokenizer, self.groups)
        if config.trainer.compile:
            networks = [self.tokenizer.encoder, self.tokenizer.decoder] if self.codes_frozen else [self.tokenizer]
            if self.adversary.engine:
                networks.append(self.adversary.engine.module)
            for network in networks:
                network.compile()

    def _tokens_of(self, size: data.Size) -> int:
        factor = self.tokenizer.downsampling_factor
        return (size.height // factor) * (size.width // factor)

    def check(self) -> None:
        """Raises TrainerError for image sizes that do not fit the networks, and for an implementation of the quantizer
        that is not available."""
        self.check_settings()
        quantizer, impl = self.tokenizer.quantize, self.config.trainer.quantizer_impl
        if impl != "auto" and quantizer.impl is None:
            raise TrainerError(f"trainer.quantizer_impl={impl} is only for model.quantizer=ibq: use auto")
        try:  # quantizes one token, which fails if the implementation is missing or refuses this codebook
            with torch.no_grad():
                quantizer.assign(torch.zeros(1, self.config.model.code_dim, device=self.world.device), None)
        except ModelError as error:
            raise TrainerError(f"trainer.quantizer_impl={impl}: {error}") from error

    def check_settings(self) -> None:
        """Raises TrainerError for image sizes that do not divide into tokens or are too small for a network, and for
        restarts of all codes in every step."""
        if self.config.trainer.log_gradient_balance and self.unmeasurable:
            raise TrainerError(f"trainer.log_gradient_balance=true {self.unmeasurable}")
        settings, factor = self.config.data, self.tokenizer.downsampling_factor
        for side in settings.pixels:
            if side % (8 * factor):
                raise TrainerError(
                    f"data.pixels: {side} must be a multiple of {8 * factor}, 8 times the {factor} pixels of a token's "
                    "side"
                )
        has_buckets = bool(settings.buckets or settings.pixels)
        named = {f"bucket {size}" if has_buckets else f"data.image_size={size.height}": size for size in self.sizes}
        validated = {} if settings.val_image_size is None else {"data.val_image_size": settings.val_image_size}
        sides = {name: math.gcd(*size) for name, size in named.items()}
        for name, side in (sides | {f"{name}={side}": side for name, side in validated.items()}).items():
            if side % factor:
                raise TrainerError(f"{name} must be a multiple of {factor}, the pixels of a token's side")
        model = self.config.model
        mean = self.tokens_per_step / model.codebook_size
        if model.restart_below > mean and not self.codes_frozen:
            raise TrainerError(
                f"model.restart_below={model.restart_below:g} is above the {mean:.4g} tokens that choose a code on "
                f"average (a step has {self.tokens_per_step:,} tokens for {model.codebook_size:,} codes), so that "
                f"nearly every code would restart in each step: give {mean / 4:.4g} or less"
            )
        least = {
            f"the discriminator ({self.adversary.how_to_need_less})": self.adversary.smallest_side,
            "LPIPS (loss.perceptual.weight=0 trains without it)": self.perceptual.smallest_side,
        }
        for network, side in least.items():
            for name, size in named.items():
                if min(size) < side:
                    raise TrainerError(f"{name} must be at least {side} for {network}")

    def impl(self) -> str:
        """The implementation of index backpropagation that training uses."""
        if self.config.trainer.quantizer_impl != "auto":
            return self.config.trainer.quantizer_impl
        codes_kd = self.tokenizer.quantize.embedding.weight
        tokens = self.batch["micro_batch_size"] * self._tokens_of(self.sizes[0])
        return fastest_impl(codes_kd.new_empty(tokens, codes_kd.shape[1]), codes_kd, self.groups.shard)

    def step(self, micro_batches: list[Tensor], step: int) -> Step:
        """One optimizer step of both networks on this rank's uint8 micro-batches ``(b, 3, h, w)``.

        The discriminator is updated first, on detached reconstructions. The tokenizer then plays against the updated,
        frozen discriminator. With a single micro-batch, one forward pass of the tokenizer serves both. With several
        (gradient accumulation), a first pass without gradients computes all reconstructions for the discriminator and
        the mean code assignment of the whole batch, so that a step does not depend on how the batch is split. Two
        things do depend on it: BatchNorm in the discriminator, and the adaptive weight, which is computed per
        micro-batch.

        A network whose loss or gradient is not finite on any rank is not updated on any rank.
        """
        metrics = StepMetrics(len(micro_batches))
        self.tokenizer.quantize.anneal(step / self.config.trainer.max_steps)
        micro_batches = [images_bchw.float() / 127.5 - 1 for images_bchw in micro_batches]
        # Every forward changes BatchNorm's statistics; they are restored where the step is skipped.
        buffers = self.adversary.buffers()
        before = {name: buffer.clone() for name, buffer in buffers.items()}

        output, average_k, discriminator_updated = self._train_discriminator(micro_batches, step, metrics)
        updated = self._train_tokenizer(micro_batches, output, average_k, step, metrics)
        if updated:
            self.tokenizer.quantize.after_step()
            if self.state.ema:
                self.state.ema.update(step)
        if not (discriminator_updated and updated):
            for name, buffer in buffers.items():
                buffer.copy_(before[name])
        return metrics.result()

    def _train_discriminator(self, micro_batches: list[Tensor], step: int, metrics: StepMetrics):
        """The first pass. Returns the tokenizer's output with its graph (of a single micro-batch; else None), the mean
        code assignment of the global batch, and False where the discriminator's update was skipped."""
        single, learns = len(micro_batches) == 1, self.adversary.learns(step)
        output, average_k = None, 0.0
        logits_mean = torch.zeros(2, device=self.world.device)
        for i, images_bchw in enumerate(micro_batches):
            if not single and not learns and self.entropy_temperature is None:
                break
            with torch.set_grad_enabled(single):
                output = self._forward(images_bchw)
            if self.entropy_temperature is not None:
                average_k = average_k + output.quantized.average_probability_k.detach() / len(micro_batches)
            if learns:
                fake_bchw, last = output.reconstruction_bchw.detach(), i == len(micro_batches) - 1
                scale = self.state.loss_scales["discriminator"].value
                logits = self.adversary.backward(images_bchw, fake_bchw, scale, last, metrics)
                logits_mean += logits / len(micro_batches)
        if self.entropy_temperature is not None:
            # The average of a shard already covers all tokens of its group.
            average_k = mean_over_ranks(average_k, self.groups.replicas)
        updated = True
        if learns:
            engines, lr = [self.adversary.engine], self.learning_rate_factor(step) * self.adversary.lr
            updated = self.update("discriminator", engines, "loss/discriminator", lr, step, metrics)
            if updated:
                self.adversary.after_update(mean_over_ranks(logits_mean))
        return (output if single else None), average_k, updated

    def _train_tokenizer(self, micro_batches: list[Tensor], output, average_k, step: int, metrics: StepMetrics) -> bool:
        """The second pass, against the updated discriminator. Returns whether the tokenizer was updated."""
        adversarial_weight = self.adversary.weight(step)
        self.feature_moments = 0.0
        for i, images_bchw in enumerate(micro_batches):
            out = output or self._forward(images_bchw)
            loss, terms = self._loss(images_bchw, out, average_k, adversarial_weight, metrics)
            if i == 0 and self.balance:
                self.balance.measure(terms, step, self.state.loss_scales["tokenizer"].value, metrics)
            last = i == len(micro_batches) - 1
            self.main_engine.backward(self.state.loss_scales["tokenizer"].value * loss, last=last)
            self.health.update(self.tokenizer.quantize.counted(out.quantized.index_bhw), step)
            self.feature_moments = self.feature_moments + moments(out.quantized.features_nd)
        lr = self.learning_rate_factor(step) * self.config.optimizer.lr
        return self.update("tokenizer", self.trained, "loss/total", lr, step, metrics)

    def _loss(self, images_bchw, output: TokenizerOutput, average_k, adversarial_weight: float, metrics):
        """The tokenizer's loss on one micro-batch, and its weighted terms by name; logs them without weights."""
        config = self.config.loss
        reconstruction_bchw, quantized = output
        reconstruction = (reconstruction_bchw - images_bchw).abs().mean()
        metrics.add("loss/reconstruction", reconstruction)
        if len(self.sizes) > 1:
            metrics.add(f"loss/reconstruction/{data.Size(*images_bchw.shape[2:])}", reconstruction)
        terms = {"reconstruction": config.reconstruction.weight * reconstruction}
        terms |= self.perceptual.weighted(reconstruction_bchw, images_bchw, metrics)
        likelihood = sum(terms.values())

        for name in ("double_quantization", "commitment", "codebook", "sample_entropy"):
            if getattr(quantized, name) is not None:
                metrics.add(f"loss/{name}", getattr(quantized, name))
        if not self.codes_frozen:
            terms["quantizer"] = config.quantizer.weight * quantizer_loss(quantized, config.quantizer)
        if self.entropy_temperature is not None:
            entropy = entropy_penalty(quantized, average_k, config.entropy)
            metrics.add("loss/average_entropy", entropy.average_entropy)
            terms["entropy"] = config.entropy.weight * entropy.loss
        if self.semantic.engine:
            terms["semantic"] = self.semantic.loss(images_bchw, quantized.quantized_bdhw, metrics)
        if adversarial_weight > 0:
            terms["generator"] = self.adversary.generator_loss(
                reconstruction_bchw, likelihood, adversarial_weight, metrics
            )
        loss = sum(terms.values())
        metrics.add("loss/total", loss)
        return loss, terms

    def _forward(self, images_bchw: Tensor) -> TokenizerOutput:
        with self.autocast():
            if self.codes_frozen:
                output = self.main_engine.run(self._from_frozen_codes, images_bchw)
            else:
                output = self.main_engine(images_bchw, self.entropy_temperature)
        reconstruction_bchw = output.reconstruction_bchw.float()
        # A new tensor, because sharding engines attach hooks to their outputs, which the adaptive weight's extra
        # gradients would trigger.
        return output._replace(reconstruction_bchw=reconstruction_bchw.view_as(reconstruction_bchw))

    def _from_frozen_codes(self, images_bchw: Tensor) -> TokenizerOutput:
        """The tokenizer's forward pass with a graph that starts at the code vectors, computed as at inference."""
        with torch.no_grad():
            features_bdhw = self.tokenizer.encode(images_bchw).float()
            index_bhw = self.tokenizer.quantize.tokenize(features_bdhw)
            codes_bdhw = self.tokenizer.quantize.lookup(index_bhw)
            features_nd = self.tokenizer.quantize.prepare(features_bdhw.movedim(1, -1).flatten(0, 2))
            distance = F.mse_loss(features_nd, codes_bdhw.movedim(1, -1).flatten(0, 2))
        quantized = Quantized(codes_bdhw, index_bhw, None, distance, None, features_nd=features_nd)
        return TokenizerOutput(self.tokenizer.decode(codes_bdhw), quantized)

    @torch.no_grad()
    def scalars(self, step: int) -> dict[str, float]:
        """The codebook's health, and the values that the quantizer logs."""
        quantizer = self.tokenizer.quantize
        health = {f"{self.counted_prefix}{name}": value for name, value in self.health.read(step).items()}
        health |= quantizer.scalars()
        if self.codebook:
            codes = moments(quantizer.codes())
            if self.groups.shard:
                codes = sum_over_ranks(codes, self.groups.shard.group)
            health["feature_distance"] = gaussian_distance(sum_over_ranks(self.feature_moments), codes)
        return {f"codebook/{name}": value for name, value in health.items()}

    @property
    def alarm(self) -> str | None:
        return None if self.codes_frozen else self.health.alarm  # frozen codes: low usage only means narrow data

    @torch.no_grad()
    def reconstruct(self, images_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns codes ``(b, h, w)`` and reconstructions in [-1, 1], NaN where not finite, of images in [-1, 1]. If
        `forwards_together`, all ranks must call equally often."""

        def both() -> tuple[Tensor, Tensor]:
            index_bhw = self.tokenizer.tokenize(images_bchw)
            return index_bhw, self.tokenizer.detokenize(index_bhw)

        with self.autocast():  # an engine may gather the weights in half precision
            index_bhw, reconstruction_bchw = self.main_engine.run(both)
        found_bchw = reconstruction_bchw.float()
        # Clamping would make infinity 1.
        return index_bhw, found_bchw.clamp(-1, 1).masked_fill(~found_bchw.isfinite(), math.nan)

    @torch.no_grad()
    def validate(self, beat: Callable[[], None]) -> Validation:
        """PSNR, L1 and usage on validation images, each counted once, with buckets also PSNR by bucket; pictures of the
        first few."""
        world, side = self.world, self.config.data.val_image_size
        sizes = self.sizes if side is None else [data.Size(side, side)]
        # Of each size: PSNR, L1, number of images.
        sums_s3 = torch.zeros(len(sizes), 3, dtype=torch.float64, device=world.device)
        usage = CodebookUsage(self.tokenizer.quantize.counted_codes, world.device)
        pictures = []
        grey = data.EvaluationImage("", torch.full((3, *sizes[0]), 127, dtype=torch.uint8), -1)
        with self.evaluation():
            for image, counts in self.in_lockstep(self.validation_images(), grey):
                beat()
                original = image.image_chw[None].to(world.device).float() / 127.5 - 1
                index_bhw, reconstruction = self.reconstruct(original)
                if not counts:
                    continue
                usage.update(self.tokenizer.quantize.counted(index_bhw))
                error = (reconstruction - original).abs().mean().double()
                decibels = psnr(reconstruction, original)[0].double().masked_fill(error.isnan(), math.nan)
                number = sizes.index(data.Size(*original.shape[2:]))
                sums_s3[number] += torch.stack([decibels, error, error.new_ones(())])
                if len(pictures) < PICTURES:
                    pictures.append(torch.cat([original[0], reconstruction[0]], dim=1).cpu())
        sum_over_ranks(sums_s3)
        usage = usage.merged()
        total = sums_s3.sum(0)
        notes = self.validation_notes()
        if not total[2] > 0:
            return Validation({}, {}, notes)
        drawn = {"reconstructions": row_of_pictures(pictures)} if pictures else {}
        psnr_mean, l1_mean = (total[:2] / total[2]).tolist()
        scalars = {"val/psnr": psnr_mean, "val/l1": l1_mean, f"val/{self.counted_prefix}usage": usage.usage()}
        if len(sizes) > 1:
            of_size = zip(sizes, sums_s3.tolist(), strict=True)
            scalars |= {f"val/psnr/{size}": decibels / count for size, (decibels, _, count) in of_size if count}
        return Validation(scalars, drawn, notes)

    def describe(self) -> list[str]:
        model, init_from = self.config.model, self.config.init_from
        learns = self.tokenizer.quantize.impl and not self.codes_frozen
        rule = model.quantizer + (f" {self.impl()}" if learns else "")
        spread = f", codebook over {self.config.codebook_parallel}" if self.config.codebook_parallel > 1 else ""
        frozen = [f"{init_from.freeze} frozen"] if init_from.freeze else []
        codes = f"{model.codebook_size} codes of {model.code_dim} ({rule}{spread})"
        return [codes, *frozen, *self.semantic.describe(), *self.adversary.describe()]

    def load_initial_weights(self) -> InitRecord | None:
        if self.config.init_from.source is None:
            read_codes(self.tokenizer.quantize, self.world)
            return None
        discriminator = self.adversary.engine.module if self.adversary.engine else None
        return load_initial_weights(self.config, self.world, self.state, discriminator)

    def init_from_data(self, micro_batches: Iterable[Tensor]) -> None:
        quantizer, replicas = self.tokenizer.quantize, self.groups.replicas
        places = self.config.model.codebook_init == "features" and isinstance(quantizer, CodebookQuantizer)
        if not places or self.config.init_from.source:
            return

        def encode(images_bchw: Tensor) -> Tensor:
            with self.autocast():
                return self.main_engine.run(self.tokenizer.encode, images_bchw.float() / 127.5 - 1)

        place_codes_among_features(quantizer, self.state, encode, micro_batches, replicas, self.world.device)

    def inputs(self, batch: data.Batch) -> Tensor:
        return batch.values.to(self.world.device, non_blocking=True)

    def frozen_bytes(self) -> dict[str, int]:
        sizes = self.perceptual.frozen_bytes() | self.semantic.frozen_bytes() | self.adversary.frozen_bytes()
        for name, network in self.state.frozen.items():
            # The table of some quantizers is never trained by the optimizer, also where the decoder is frozen.
            title = f"{self.config.init_from.freeze}, frozen"
            if name == "codebook" and not self.codes_frozen:
                title = "codebook, moving averages" if self.tokenizer.quantize.moves_codes else "codebook, frozen"
            sizes[title] = sizes.get(title, 0) + sum(shard.values.nbytes for shard in network.engine.weights())
        if statistics := self.tokenizer.quantize.statistics():
            sizes["statistics of the codes"] = sum(value.nbytes for value in statistics.values())
        return sizes

    def _buffers(self) -> dict[str, Tensor]:
        """LeCAM's means, the codebook's counts, the quantizer's statistics and the discriminator's buffers."""
        buffers = {f"lecam/{name}": value for name, value in self.adversary.lecam.named_buffers()}
        buffers |= {f"codebook_health/{name}": value for name, value in self.health.state_dict().items()}
        buffers |= {f"quantizer/{name}": value for name, value in self.tokenizer.quantize.statistics().items()}
        return buffers | {f"discriminator/{name}": value for name, value in self.adversary.buffers().items()}
