"""Generator training: cross-entropy of the next code, from token shards or from images tokenized during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import data
from model_zoo import ModelError, load_tokenizer
from model_zoo.conditions import assumed_trained
from model_zoo.config import grid_name
from model_zoo.io.run_layout import checkpoint_step
from model_zoo.io.weights import TRAINED, TRAINED_G
from model_zoo.sampler import Sampler
from model_zoo.transformer import Transformer, checkpoint_blocks, flops_per_token
from trainer import TrainerError
from trainer.config import GeneratorRun
from trainer.engines.row_sharded import RowSharded
from trainer.init_from import InitRecord
from trainer.loading import check_together
from trainer.metrics.codebook import CodebookUsage
from trainer.model_state import ModelState, Network
from trainer.parallel import World, check_same_on_all_ranks, row_groups, run_on_all_ranks, sum_over_ranks
from trainer.precision import LossScale, autocast_dtype
from trainer.start_plan import token_spec
from trainer.tasks.base import PICTURES, Step, StepMetrics, Task, Validation, row_of_pictures
from trainer.tasks.initialization import load_initial_generator
from trainer.throughput import matmul_rate


class Codes(NamedTuple):
    """A micro-batch: row-major codes ``(b, rows * columns)`` of one grid and classes ``(b,)``; ``model.classes`` means
    no class. grid: rows and columns."""

    index_bt: Tensor
    class_b: Tensor
    grid: tuple[int, int]


class GeneratorTask(Task):
    """Trains a transformer. If the head's rows are sharded over ranks, the head has a separate engine."""

    config: GeneratorRun

    def __init__(self, config: GeneratorRun, world: World, micro_batch_size: int, micro_batches: int):
        self.config, self.world = config, world
        vocabulary, timeout_seconds = config.model.vocabulary, config.trainer.timeout_seconds
        self.groups = row_groups(world, "vocabulary_parallel", config.vocabulary_parallel, vocabulary, timeout_seconds)
        torch.manual_seed(config.seed)  # the same weights on every rank
        self.transformer = Transformer(config.model, self.groups.shard).to(world.device)
        self.transformer.trained_c = torch.zeros(config.model.classes + 1, dtype=torch.bool, device=world.device)
        self.grids = config.model.all_grids
        if config.model.grids:
            self.transformer.trained_g = torch.zeros(len(self.grids), dtype=torch.bool, device=world.device)
        self.tokenizer = None
        if config.tokenizer.source is not None:
            check_together(world, config.tokenizer.source)
            self.tokenizer = load_tokenizer(config.tokenizer.source).to(world.device).requires_grad_(False)
            config.tokenizer.fingerprint = config.tokenizer.fingerprint or self.tokenizer.fingerprint()
            if config.model.embedding == "codebook" and self._fits():
                codes_v = torch.arange(config.model.vocabulary, device=world.device)
                self.transformer.tok_emb.codebook_vd.copy_(self.tokenizer.quantize.vectors(codes_v))
        if config.trainer.activation_checkpointing:
            checkpoint_blocks(self.transformer, selective=config.trainer.activation_checkpointing == "selective")
        self.batch = dict(micro_batch_size=micro_batch_size, micro_batches=micro_batches)
        trained = self._build_engines()
        self.state = ModelState(
            trained,
            {},
            averaged=list(trained),
            ema_decay=config.ema.decay,
            loss_scales={"generator": LossScale(config.trainer.precision == "fp16")},
            buffers=self._buffers,
            is_main=world.is_main,
            optional={
                TRAINED: assumed_trained(config.model.classes, config.loss.label_dropout),
                TRAINED_G: torch.ones(len(self.grids), dtype=torch.bool),
            },
        )
        if config.trainer.compile:
            for block in self.transformer.blocks:
                block.compile()
        self.rate: float | None = None  # of a plain matrix product, for MFU
        self.trained_images, self.trained_tokens, self.trained_flops = 0, 0, 0.0  # since `speed` was read

    def _build_engines(self) -> dict[str, Network]:
        """Returns the networks; the head has a separate engine if its rows are sharded. Sets ``parameters``."""
        model, head = self.config.model, self.transformer.head
        self.parameters = sum(p.numel() for p in self.transformer.parameters())
        if self.groups.shard is None:
            return {"generator": Network(self.build_main_engine(self.transformer, ignored=[]), "generator")}
        self.parameters += model.vocabulary * model.width - head.weight.numel()
        main = self.build_main_engine(self.transformer, ignored=[head.weight])
        rows = RowSharded(head, self.make_adam(), model.vocabulary, self.groups, **self.batch)
        return {"generator": Network(main, "generator"), "head": Network(rows, "generator", "head.")}

    def check_settings(self) -> None:
        """Raises TrainerError if recipe, tokenizer and images do not fit each other."""
        config, model = self.config, self.config.model
        if config.tokenizer.source is None:
            for setting, needs in (
                ("data.content=images", config.data.content == "images"),
                ("model.embedding=codebook", model.embedding == "codebook"),
            ):
                if needs:
                    raise TrainerError(f"{setting} needs a tokenizer: give tokenizer.source=RUN")
        if self.tokenizer is None:
            return
        source, codes = config.tokenizer.source, self.tokenizer.config.codebook_size
        if codes != model.vocabulary:
            raise TrainerError(f"model.vocabulary={model.vocabulary}, but the tokenizer {source} has {codes} codes")
        if not self._fits():
            dim = self.tokenizer.config.code_dim
            raise TrainerError(f"model.code_dim={model.code_dim}, but the codes of {source} have {dim} dimensions")
        if (found := self.tokenizer.fingerprint()) != config.tokenizer.fingerprint:
            raise TrainerError(
                f"the tokenizer {source} ({found}) did not make these codes ({config.tokenizer.fingerprint} did): give "
                "the right one with tokenizer.source=RUN, or tokenizer.source=RUN/checkpoints/step_NNNNNNNN if RUN was "
                "trained on since"
            )
        if config.data.content == "images":
            self._check_sizes(data.image_sizes(config.data))

    def _check_sizes(self, sizes: list[data.Size]) -> None:
        """Raises TrainerError unless images of these sizes have grids that the model knows."""
        config, factor = self.config, self.tokenizer.downsampling_factor
        buckets = config.data.buckets or config.data.pixels
        for size in sizes:
            if any(side % factor for side in size):
                what = f"bucket {size}" if buckets else f"data.image_size={size.height}"
                raise TrainerError(
                    f"{what} must be a multiple of {factor}: {config.tokenizer.source} makes a code of "
                    f"{factor} x {factor} pixels"
                )
        made = list(dict.fromkeys(map(self._grid_of, sizes)))
        unknown = [grid_name(grid) for grid in made if grid not in self.grids]
        if unknown and buckets:
            grids = ",".join(map(grid_name, dict.fromkeys([*self.grids, *made])))
            raise TrainerError(
                f"the buckets give grids of {', '.join(unknown)} codes with {config.tokenizer.source}, which the "
                f"generator does not know: set model.grids=[{grids}]"
            )
        if unknown:
            (rows, columns), side = made[0], config.data.image_size
            raise TrainerError(
                f"data.image_size={side} gives a grid of {unknown[0]} codes with {config.tokenizer.source}, but "
                f"model.grid={config.model.grid}: set model.grid=[{rows},{columns}]"
            )

    def _grid_of(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the codes of images of ``(height, width)``."""
        height, width = size
        return height // self.tokenizer.downsampling_factor, width // self.tokenizer.downsampling_factor

    def _fits(self) -> bool:
        """Whether the tokenizer's codebook has the shape that model.embedding=codebook needs."""
        codes = self.tokenizer.config.codebook_size, self.tokenizer.config.code_dim
        return self.config.model.embedding != "codebook" or codes == tuple(self.transformer.tok_emb.codebook_vd.shape)

    def check(self) -> None:
        """Also checks the classes of validation images, so that a run does not fail at its first validation."""
        if self.tokenizer is not None:
            found = f"fingerprint {self.tokenizer.fingerprint()}"
            check_same_on_all_ranks(f"tokenizer.source={self.config.tokenizer.source}", found)
        super().check()

        def check_labels() -> None:
            for image in self._validation_images():
                if wrong := self._wrong_label(image.label):
                    raise TrainerError(f"data.val: {image.key} {wrong}")

        if self.config.data.val is not None:
            run_on_all_ranks(check_labels)

    def describe(self) -> list[str]:
        model = self.config.model
        grids = " or ".join(map(grid_name, self.grids))
        spread = f", head over {self.config.vocabulary_parallel}" if self.groups.shard else ""
        return [f"{grids} of {model.vocabulary} codes, {model.classes} classes{spread}"]

    def notes(self) -> list[str]:
        source = self.config.tokenizer.source
        if source is None or checkpoint_step(Path(source)) is not None or not (Path(source) / "checkpoints").is_dir():
            return []
        return [
            f"tokenizer.source={source} names no step: if that run is trained on, this one cannot be resumed with it. "
            f"Name {source}/checkpoints/step_NNNNNNNN, which its trainer.keep_last must keep, or an export "
            f"(`ibq checkpoint export {source} --out FOLDER`)"
        ]

    def check_batch(self, batch: data.Batch) -> None:
        for info in batch.infos:
            if wrong := self._wrong_label(info.label):
                raise TrainerError(f"{info.key} in {info.shard} {wrong}")

    def _wrong_label(self, label: int | None) -> str | None:
        """Returns why a label cannot be trained on, or None."""
        classes = self.config.model.classes
        if self.config.loss.label_dropout == 1:
            return None
        if label is None:
            return "has no class: give one in its .cls, or train without classes (loss.label_dropout=1)"
        if label >= classes:
            return f"has class {label}, but model.classes={classes}: it must be above all classes"
        return None

    def inputs(self, batch: data.Batch) -> Codes:
        if self.config.data.content == "images":
            return self._codes(*self._tokenized(batch.values), batch.labels)
        index_bt = batch.values.to(self.world.device, non_blocking=True).long()
        return self._codes(index_bt, tuple(batch.grid), batch.labels)

    def step(self, micro_batches: list[Codes], step: int) -> Step:
        """One optimizer step. Each image's class is dropped with probability ``loss.label_dropout``."""
        config, loss = self.config, self.config.loss
        metrics = StepMetrics(len(micro_batches))
        loss_scale = self.state.loss_scales["generator"]
        used_c = torch.zeros_like(self.transformer.trained_c)
        for i, (index_bt, class_b, grid) in enumerate(micro_batches):
            dropped_b = torch.rand(len(class_b), device=class_b.device) < loss.label_dropout
            class_b = class_b.masked_fill(dropped_b, config.model.classes)
            used_c[class_b] = True
            with self.autocast():
                out = self.main_engine.run(self.transformer.loss, index_bt, class_b, loss.z_weight, loss.impl, grid)
            self.main_engine.backward(loss_scale.value * out.loss, last=i == len(micro_batches) - 1)
            metrics.add("loss/total", out.loss)
            metrics.add("loss/cross_entropy", out.cross_entropy)
            if len(self.grids) > 1:  # all micro-batches of a step have one grid, on all ranks
                metrics.add(f"loss/cross_entropy/{grid_name(grid)}", out.cross_entropy)
            if loss.z_weight:
                metrics.add("loss/z", out.z)
            self._count(index_bt, grid)
        lr = self.learning_rate_factor(step) * config.optimizer.lr
        engines = [network.engine for network in self.state.trained.values()]
        if self.update("generator", engines, "loss/total", lr, step, metrics):
            self.transformer.trained_c |= used_c
            if self.transformer.trained_g is not None:
                self.transformer.trained_g[self.grids.index(micro_batches[0].grid)] = True
            if self.state.ema:
                self.state.ema.update(step)
        return metrics.result()

    def scalars(self, step: int) -> dict[str, float]:
        self._share_trained_classes()  # called before each checkpoint
        return super().scalars(step)

    def _share_trained_classes(self) -> None:
        """Adds what other ranks have trained to ``trained_c``; all ranks call together."""
        ranks_c = self.transformer.trained_c.long()
        sum_over_ranks(ranks_c)
        self.transformer.trained_c.copy_(ranks_c > 0)

    @torch.no_grad()
    def validate(self, beat: Callable[[], None]) -> Validation:
        """Cross-entropy in nats per code, with several grids also by grid, and the entropy of the code frequencies on
        the same images: the loss of a model that knows only the frequencies. Samples pictures if the recipe names a
        tokenizer."""
        config, world = self.config, self.world
        self._share_trained_classes()
        # Of each grid: the sum over codes, and the number of codes.
        sums_g2 = torch.zeros(len(self.grids), 2, dtype=torch.float64, device=world.device)
        usage = CodebookUsage(config.model.vocabulary, world.device)
        with self.evaluation():
            for codes, counts in self._validation_steps(beat):
                beat()
                with self.autocast():
                    loss = self.transformer.loss
                    out = self.main_engine.run(loss, codes.index_bt, codes.class_b, 0.0, config.loss.impl, codes.grid)
                if counts:
                    tokens = codes.index_bt.numel()
                    of_batch = torch.stack([tokens * out.cross_entropy.double(), sums_g2.new_tensor(tokens)])
                    sums_g2[self.grids.index(codes.grid)] += of_batch
                    usage.update(codes.index_bt)
            try:
                pictures, notes = self._pictures(beat), []
            except ModelError as error:  # raised on all ranks that sample
                pictures, notes = {}, [f"no pictures were sampled: {error}"]
        sum_over_ranks(sums_g2)
        total, tokens = sums_g2.sum(dim=0).tolist()
        if not tokens:
            return Validation({}, pictures, notes)
        scalars = {"val/loss": total / tokens, "val/unigram_entropy": math.log(usage.merged().perplexity())}
        if len(self.grids) > 1:
            of_grids = zip(self.grids, sums_g2.tolist(), strict=True)
            scalars |= {f"val/loss/{grid_name(grid)}": one / count for grid, (one, count) in of_grids if count}
        return Validation(scalars, pictures, notes)

    def _validation_steps(self, beat: Callable[[], None]) -> Iterator[tuple[Codes, bool]]:
        """Validation batches, and whether they count (see `in_lockstep`). Ranks that share the rows of a head compute
        on batches of one grid at the same time, since they exchange features."""
        if self.groups.shard is None or len(self.grids) == 1:
            yield from self.in_lockstep(self._validation_batches(), self._filler(self.grids[0]))
            return
        of_grids: dict[tuple[int, int], list[Codes]] = {grid: [] for grid in self.grids}
        for codes in self._validation_batches():
            beat()
            of_grids[codes.grid].append(codes)
        for grid, batches in of_grids.items():
            yield from self.in_lockstep(batches, self._filler(grid))

    def _filler(self, grid: tuple[int, int]) -> Codes:
        """One image that counts for nothing."""
        zeros_bt = torch.zeros(1, math.prod(grid), dtype=torch.long, device=self.world.device)
        return Codes(zeros_bt, zeros_bt[:, 0], grid)

    def _validation_images(self) -> Iterator[data.EvaluationToken | data.EvaluationImage]:
        config = self.config
        tokens = token_spec(config) if config.data.content == "tokens" else None
        return self.validation_images(tokens, **data.validation_sizes(replace(config.data, val_image_size=None)))

    def _validation_batches(self) -> Iterator[Codes]:
        """Micro-batches of validation images, each of one size. A sharded head needs equally many tokens on its ranks:
        one image each."""
        of_tokens = self.config.data.content == "tokens"
        most = 1 if self.groups.shard else self.batch["micro_batch_size"]
        images = self._validation_images()
        for batch in data.in_batches(images, most, lambda one: one.grid if of_tokens else one.image_chw.shape):
            labels = [image.label for image in batch]
            if of_tokens:
                index_bt = torch.stack([image.index_t for image in batch]).to(self.world.device)
                yield self._codes(index_bt, tuple(batch[0].grid), labels)
            else:
                yield self._codes(*self._tokenized(torch.stack([image.image_chw for image in batch])), labels)

    def _tokenized(self, images_bchw: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokenizes uint8 images to codes ``(b, tokens)`` of a grid."""
        index_bhw = self.tokenizer.tokenize(images_bchw.to(self.world.device).float() / 127.5 - 1)
        return index_bhw.flatten(1), self._grid_of(images_bchw.shape[2:])

    def _codes(self, index_bt: Tensor, grid: tuple[int, int], labels: list[int | None]) -> Codes:
        none, without = self.config.model.classes, self.config.loss.label_dropout == 1
        labels = [none if without else label for label in labels]
        return Codes(index_bt, torch.tensor(labels, device=self.world.device), grid)

    def _pictures(self, beat: Callable[[], None]) -> dict[str, Tensor]:
        """Samples the same classes at each validation, once all were trained. If a forward is a collective, all ranks
        sample."""
        if self.tokenizer is None or self.groups.shard or not (self.forwards_together or self.world.is_main):
            return {}
        trained = self.transformer.trained_c[:-1].nonzero()[:, 0]
        class_b = torch.full((PICTURES,), self.config.model.classes, device=self.world.device)
        if len(trained):
            class_b = trained[torch.arange(PICTURES) * max(1, len(trained) // PICTURES) % len(trained)]
        sampler = Sampler(self.transformer, PICTURES, dtype=autocast_dtype(self.config.trainer.precision), graphs=False)
        with self.autocast():
            index_bhw = self.main_engine.run(sampler.sample, class_b, list(range(PICTURES)), self.config.sampling, beat)
        images_bchw = self.tokenizer.detokenize(index_bhw).clamp(-1, 1)
        return {"samples": row_of_pictures(images_bchw).cpu()} if self.world.is_main else {}

    def speed(self, images_per_second: float) -> dict[str, float]:
        """Also tokens per second and MFU: three times the operations of a forward pass (`flops_per_token`), relative to
        the rate of a plain matrix product, which is measured at the first call. Both are of the steps since the latest
        call."""
        if self.rate is None:
            self.rate = matmul_rate(self.world.device, autocast_dtype(self.config.trainer.precision) or torch.float32)
        tokens_per_image = self.trained_tokens / self.trained_images
        tokens_per_second = images_per_second * tokens_per_image
        mfu = 3 * self.trained_flops / self.trained_tokens * tokens_per_second / (self.rate * self.world.size)
        self.trained_images, self.trained_tokens, self.trained_flops = 0, 0, 0.0
        return {"images_per_second": images_per_second, "tokens_per_second": tokens_per_second, "mfu": mfu}

    def _count(self, index_bt: Tensor, grid: tuple[int, int]) -> None:
        self.trained_images += len(index_bt)
        self.trained_tokens += index_bt.numel()
        self.trained_flops += index_bt.numel() * flops_per_token(self.config.model, grid)

    def frozen_bytes(self) -> dict[str, int]:
        if self.tokenizer is None:
            return {}
        return {"tokenizer, frozen": sum(weight.nbytes for weight in self.tokenizer.parameters())}

    def _buffers(self) -> dict[str, Tensor]:
        """The trained classes and grids, and the codebook of model.embedding=codebook, which a checkpoint has among the
        trained weights and in the EMA."""
        trained = {TRAINED: self.transformer.trained_c}
        if self.transformer.trained_g is not None:
            trained[TRAINED_G] = self.transformer.trained_g
        if self.config.model.embedding != "codebook":
            return trained
        codebook_vd = self.transformer.tok_emb.codebook_vd
        buffers = trained | {"generator/tok_emb.codebook_vd": codebook_vd}
        # safetensors refuses two tensors that share memory.
        return buffers | ({"generator_ema/tok_emb.codebook_vd": codebook_vd.clone()} if self.state.ema else {})

    def load_initial_weights(self) -> InitRecord | None:
        if self.config.init_from.source is None:
            return None
        return load_initial_generator(self.config, self.world, self.state, self.transformer)
