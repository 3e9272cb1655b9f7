"""Measures a tokenizer's reconstructions by the ``paper`` protocol, next to two baselines without learning.

Any number of processes share the work; each image counts once.
"""

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.evaluation import EvaluationImage
from model_zoo.eval_nets.inception import FEATURES, Inception
from model_zoo.eval_nets.lpips import SMALLEST_SIDE, Perceptual
from model_zoo.eval_nets.weights import WEIGHTS_FILES, checked_weights, weights_path
from model_zoo.quantizers import Quantizer
from model_zoo.tokenizer import Tokenizer
from trainer import TrainerError
from trainer.evaluation.baselines import ColorBaselines
from trainer.evaluation.distribution import GaussianMoments, frechet_distance
from trainer.evaluation.provenance import StageTimer
from trainer.evaluation.reconstruction_report import ImageScore, ReconstructionReport
from trainer.metrics.codebook import USAGE_WINDOW_TOKENS, CodebookUsage, window_usage
from trainer.metrics.image import SSIM_WINDOW, finite_mean, l1, padding, psnr, ssim, to_levels
from trainer.parallel import World, gather_objects, run_on_all_ranks, run_on_main
from trainer.precision import full_precision
from trainer.reports.image_grid import Example, Gallery, merge_galleries
from trainer.reports.measures import MEASURES

PROTOCOL = "paper"  # defined by trainer.metrics.image and docs/metrics.md
# These need no network and cost little, so they are always measured.
PLAIN_MEASURES = ("psnr", "ssim", "l1", "usage", "perplexity")
NETWORKS = {"rfid": "inception", "lpips_vgg": "vgg16", "lpips_alex": "alexnet"}  # measure -> key of WEIGHTS_FILES
SMALLEST = {"rfid": 1, "lpips_vgg": SMALLEST_SIDE["vgg"], "lpips_alex": SMALLEST_SIDE["alex"]}  # pixels


class Networks(NamedTuple):
    """The networks to measure with. lpips: by trunk, ``vgg`` or ``alex``. required: measures that must be available.
    not_measured: measure -> reason."""

    inception: Inception | None = None
    lpips: Mapping[str, Perceptual] = MappingProxyType({})
    required: frozenset[str] = frozenset()
    not_measured: Mapping[str, str] = MappingProxyType({})

    @property
    def smallest_side(self) -> int:
        """Side in pixels of the smallest image that all measures accept."""
        return max([SSIM_WINDOW, *(SMALLEST_SIDE[net] for net in self.lpips)])

    def to(self, device: torch.device) -> "Networks":
        """Moves the networks to the device."""
        for network in filter(None, (self.inception, *self.lpips.values())):
            network.to(device)
        return self

    @property
    def weights_keys(self) -> list[str]:
        """Keys of WEIGHTS_FILES that are in use."""
        return [NETWORKS[measure] for measure in NETWORKS if measure not in self.not_measured]


NO_NETWORKS = Networks()


def load_networks(asked: str, image_size: int | None, image_count: int) -> Networks:
    """Loads the networks that ``--metrics`` asks for, on the CPU.

    asked: ``auto`` (every network whose weights file exists and that accepts such images), ``all``, or a
    comma-separated list of measures. image_size: in pixels, None for original sizes. image_count: an upper bound.
    Raises TrainerError for an unknown name or a measure that is impossible, ModelError for missing or unexpected
    weights files.
    """
    named = {name.strip() for name in asked.split(",")}
    if unknown := named - {"auto", "all", *PLAIN_MEASURES, *NETWORKS}:
        raise TrainerError(
            f"--metrics {asked}: {min(unknown)!r} is unknown: choose auto, all, or a list of "
            f"{', '.join([*NETWORKS, *PLAIN_MEASURES])} (the last five are always measured)"
        )
    if named & {"auto", "all"} and len(named) > 1:
        raise TrainerError(f"--metrics {asked}: auto and all cannot be combined with other names")
    required = frozenset(NETWORKS) if named == {"all"} else frozenset(named & NETWORKS.keys())
    reasons = {}
    for measure, key in NETWORKS.items():
        reason = None
        if named != {"auto"} and measure not in required:
            reason = "not among --metrics"
        elif image_size is not None and image_size < SMALLEST[measure]:
            reason = f"images of {image_size} pixels are too small, it needs at least {SMALLEST[measure]}"
        elif measure == "rfid" and image_count < 2:
            reason = "it needs at least 2 images"
        elif measure not in required and not (path := weights_path(key)).is_file():
            reason = f"{WEIGHTS_FILES[key].file} is not at {path} ({WEIGHTS_FILES[key].url})"
        if reason and measure in required:
            raise TrainerError(f"{MEASURES[measure].title} cannot be measured: {reason}; leave it out of --metrics")
        if reason:
            reasons[measure] = reason
    chosen = [measure for measure in NETWORKS if measure not in reasons]
    for measure in chosen:  # before loading any of them
        checked_weights(NETWORKS[measure])
    return Networks(
        Inception() if "rfid" in chosen else None,
        {net: Perceptual(net=net) for net in ("vgg", "alex") if f"lpips_{net}" in chosen},
        required,
        reasons,
    )


class Reconstruction(NamedTuple):
    """A batch of images of one size and their reconstructions, which have that size too."""

    keys: list[str]
    positions: list[int]  # in the set
    images_bchw: Tensor  # float32 in [-1, 1]
    reconstruction_bchw: Tensor  # float32, not clamped
    index_bhw: Tensor  # of the padded images if padding was needed


def reconstruct_images(
    tokenizer: Tokenizer,
    images: Iterable[EvaluationImage],
    *,
    batch_size: int,
    device: torch.device | str,
    timer: StageTimer | None = None,
) -> Iterator[Reconstruction]:
    """Reconstructs images in order, in fp32 whatever the precision of training. The tokenizer must be on ``device``.

    A batch holds consecutive images of equal size from one block of ``batch_size`` positions of the set, so batches and
    their results do not depend on the process that computes them. Images whose sides are not multiples of the
    downsampling factor are padded with mid-grey, the smaller half at the top and the left; the reconstruction is
    cropped to the image. Raises TrainerError for a reconstruction that is not finite.
    """
    timer = timer or StageTimer(device)

    def batch_key(image: EvaluationImage) -> tuple:
        return image.index // batch_size, *image.image_chw.shape

    for _, group in itertools.groupby(timer.iterate("decode", images), key=batch_key):
        batch = list(group)
        with timer.stage("model"), full_precision(torch.device(device).type):
            levels_bchw = torch.stack([torch.as_tensor(image.image_chw) for image in batch]).to(device)
            images_bchw = (levels_bchw.double() / 127.5 - 1).float()
            height, width = images_bchw.shape[-2:]
            pad = padding(height, width, tokenizer.downsampling_factor)
            index_bhw = tokenizer.tokenize(F.pad(images_bchw, pad))
            padded_bchw = tokenizer.detokenize(index_bhw).float()
            reconstruction_bchw = padded_bchw[..., pad.top : pad.top + height, pad.left : pad.left + width]
        if not padded_bchw.isfinite().all():  # before anything clamps it, which would make infinity 1
            raise TrainerError(
                f"the reconstruction of {batch[0].key}, or of an image in its batch, is not finite: the weights have "
                "diverged; use an earlier checkpoint"
            )
        keys, positions = [image.key for image in batch], [image.index for image in batch]
        yield Reconstruction(keys, positions, images_bchw, reconstruction_bchw, index_bhw)


class _Row(NamedTuple):
    """One image's results. scores: fields of `ImageScore`. codes: flat, in the smallest type that holds them."""

    position: int
    scores: dict
    mean_color_psnr: float
    codes: np.ndarray


class _Scorer:
    """One process's part of an evaluation: accumulates scores, codes, moments and example images of batches."""

    def __init__(self, tokenizer: Tokenizer, networks: Networks, image_count: int, seed: int, timer: StageTimer):
        self.networks, self.timer = networks, timer
        codebook_size = tokenizer.config.codebook_size
        self.baselines = ColorBaselines(
            tokenizer.downsampling_factor, codebook_size, image_count=image_count, seed=seed
        )
        self.code_type = np.min_scalar_type(codebook_size - 1)
        self.moments = [GaussianMoments(FEATURES, timer.device) for _ in range(2)] if networks.inception else []
        self.positions: list[int] = []
        self.scores: list[dict] = []  # fields of `ImageScore`
        self.codes: list[np.ndarray] = []
        self.skipped: list[str] = []
        self.gallery = Gallery()

    def update(self, batch: Reconstruction) -> None:
        x_bchw, y_bchw = batch.images_bchw, batch.reconstruction_bchw.clamp(-1, 1)
        smallest = self.networks.smallest_side
        if min(x_bchw.shape[-2:]) < smallest:
            self.skipped += [f"{key}: smaller than {smallest} x {smallest} pixels" for key in batch.keys]
            return
        with self.timer.stage("metrics"):
            values = {
                "key": batch.keys,
                "psnr": psnr(x_bchw, y_bchw).tolist(),
                "ssim": ssim(x_bchw, y_bchw).tolist(),
                "l1": l1(x_bchw, y_bchw).tolist(),
            }
        with full_precision(x_bchw.device.type):
            for net, perceptual in self.networks.lpips.items():
                with self.timer.stage(f"lpips_{net}"):
                    values[f"lpips_{net}"] = perceptual(x_bchw, y_bchw).tolist()
            for moments, images_bchw in zip(self.moments, (x_bchw, y_bchw), strict=False):
                with self.timer.stage("inception"):
                    moments.update(self.networks.inception.paper((images_bchw + 1) / 2).pool_nd)
        with self.timer.stage("baselines"):  # on the same uint8 levels as PSNR
            levels_bchw, reconstructed_bchw = to_levels(x_bchw), to_levels(y_bchw)
            self.baselines.update(levels_bchw, batch.positions)
        self.positions += batch.positions
        self.scores += [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        self.codes += list(batch.index_bhw.flatten(1).cpu().numpy().astype(self.code_type))
        lpips = values.get("lpips_vgg") or values.get("lpips_alex") or [None] * len(batch.keys)
        columns = batch.keys, values["psnr"], levels_bchw, reconstructed_bchw, batch.positions, lpips
        self.gallery.add(
            Example(key, decibels, original_chw, reconstruction_chw, position=position, lpips=distance)
            for key, decibels, original_chw, reconstruction_chw, position, distance in zip(*columns, strict=True)
        )

    def rows(self, palette_k3: np.ndarray | None) -> list[_Row]:
        """This process's results."""
        for scores, decibels in zip(self.scores, self.baselines.palette_psnr(palette_k3), strict=True):
            scores["palette_psnr"] = decibels
        columns = self.positions, self.scores, self.baselines.mean_color_psnr(), self.codes
        return [_Row(*row) for row in zip(*columns, strict=True)]


def evaluate_reconstruction(
    tokenizer: Tokenizer,
    images: Iterable[EvaluationImage],
    *,
    world: World,
    batch_size: int,
    networks: Networks = NO_NETWORKS,
    seed: int = 0,
    timer: StageTimer | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ReconstructionReport | None:
    """Scores a tokenizer (on the world's device, in eval mode) and both baselines. All processes call it together, each
    with its own share of the images, which may be empty. Returns None on all ranks but 0.

    ``images`` may list unreadable images in ``skipped``, as `data.EvaluationImages` does. An image that is too small
    for one measure is left out of all. seed: of the palette. on_progress: called on rank 0 with the approximate number
    of finished images and the total (0 if unknown).
    Raises TrainerError if there is no image, or too few for a required measure.
    """
    timer = timer or StageTimer(world.device)
    image_count = sum(gather_objects(operator.length_hint(images)))
    scorer = _Scorer(tokenizer, networks, image_count, seed, timer)

    def score_own_images() -> None:
        for batch in reconstruct_images(tokenizer, images, batch_size=batch_size, device=world.device, timer=timer):
            scorer.update(batch)
            if world.is_main:
                done = world.size * len(scorer.positions)
                on_progress(min(done, image_count) if image_count else done, image_count)

    run_on_all_ranks(score_own_images)
    skipped = sorted(itertools.chain(*gather_objects(scorer.skipped + describe_skipped(images))))
    count = sum(gather_objects(len(scorer.positions)))
    if not count:
        raise TrainerError(
            f"no image to evaluate{first_reason(skipped)}: give a folder, a tar or an image file with readable images"
        )
    if count < 2 and "rfid" in networks.required:
        raise TrainerError("rFID needs at least 2 readable images, not 1: leave it out of --metrics")
    with timer.stage("baselines"):
        fitted = itertools.chain(*gather_objects(scorer.baselines.fitted()))
        palette_k3 = run_on_main(world, lambda: scorer.baselines.fit(fitted))
        own_rows = scorer.rows(palette_k3)
    rows = sorted(itertools.chain(*gather_objects(own_rows)), key=operator.attrgetter("position"))
    galleries = gather_objects(scorer.gallery.examples)
    rfid = None
    if scorer.moments:
        with timer.stage("inception"):
            moments = [own.merged() for own in scorer.moments]
            rfid = run_on_main(world, lambda: _frechet_distance(*moments)) if count > 1 else None
    if not world.is_main:
        return None
    return _make_report(tokenizer, scorer, rows, rfid, palette_k3, galleries, skipped)


def _frechet_distance(first: GaussianMoments, second: GaussianMoments) -> float:
    return frechet_distance(first.mean(), first.covariance(), second.mean(), second.covariance())


def _usage(quantizer: Quantizer, index_n: np.ndarray) -> dict[str, float | None]:
    """The report's usage of codes, or of groups of their bits, and None for the other of the two."""
    usage = CodebookUsage(quantizer.counted_codes)
    counted = quantizer.counted(torch.from_numpy(index_n.astype(np.int64)))
    usage.update(counted)
    entries_per_window = USAGE_WINDOW_TOKENS * len(quantizer.counted_sizes)  # a token counts once for each group
    measured = {
        "usage": usage.usage(),
        "usage_65536": window_usage(counted.flatten().numpy(), quantizer.counted_codes, entries_per_window),
        "perplexity": usage.perplexity(),
    }
    of_groups = {f"group_{name}": value for name, value in measured.items()}
    if quantizer.counts_groups:
        return {**dict.fromkeys(measured), **of_groups}
    return {**measured, **dict.fromkeys(of_groups)}


def _make_report(
    tokenizer: Tokenizer,
    scorer: _Scorer,
    rows: list[_Row],
    rfid: float | None,
    palette_k3: np.ndarray | None,
    galleries: list[dict[str, list[Example]]],
    skipped: list[str],
) -> ReconstructionReport:
    """rows, galleries: of all processes."""
    quantizer = tokenizer.quantize
    scores = [ImageScore(**row.scores) for row in rows]
    decibels = finite_mean(score.psnr for score in scores)
    mean_color = finite_mean(row.mean_color_psnr for row in rows)
    palette = finite_mean(score.palette_psnr for score in scores)
    index_n = np.concatenate([row.codes for row in rows])

    def mean(name: str) -> float | None:
        values = [getattr(score, name) for score in scores]
        return None if None in values else math.fsum(values) / len(values)

    def with_palette(example: Example) -> Example:
        return example._replace(palette_chw=scorer.baselines.draw_palette(example.original_chw, palette_k3))

    not_measured = dict(scorer.networks.not_measured)
    if scorer.networks.inception and rfid is None:
        not_measured["rfid"] = "it needs at least 2 images"
    return ReconstructionReport(
        psnr=decibels.mean,
        ssim=mean("ssim"),
        l1=mean("l1"),
        **_usage(quantizer, index_n),
        baseline_mean_color_psnr=mean_color.mean,
        baseline_palette_psnr=palette.mean,
        rfid=rfid,
        lpips_vgg=mean("lpips_vgg"),
        lpips_alex=mean("lpips_alex"),
        image_count=len(scores),
        token_count=len(index_n),
        infinite_psnr_count=decibels.infinite_count,
        baseline_mean_color_infinite_count=mean_color.infinite_count,
        baseline_palette_infinite_count=palette.infinite_count,
        codebook_size=tokenizer.config.codebook_size,
        counted_codes=quantizer.counted_codes,
        downsampling_factor=tokenizer.downsampling_factor,
        protocol=PROTOCOL,
        not_measured=not_measured,
        skipped=skipped,
        images=scores,
        examples={name: list(map(with_palette, chosen)) for name, chosen in merge_galleries(galleries).items()},
    )


def describe_skipped(images: Iterable[EvaluationImage]) -> list[str]:
    """The images that `data.EvaluationImages` left out in its latest pass, with reasons; empty for other iterables."""
    return [
        f"{skipped.source}{'' if skipped.source.endswith(skipped.key) else f', {skipped.key}'}: {skipped.reason}"
        for skipped in getattr(images, "skipped", [])
    ]


def first_reason(skipped: list[str]) -> str:
    """For an error message: how many images were skipped and why the first, in parentheses; empty if none was."""
    return f" ({len(skipped)} skipped, the first: {skipped[0]})" if skipped else ""
