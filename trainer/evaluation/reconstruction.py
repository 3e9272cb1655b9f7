"""Measures a tokenizer's reconstructions by the `paper` protocol, beside two baselines that learn nothing.

Any number of processes do it together, and each picture counts once."""

import contextlib
import itertools
import math
import operator
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data import EvaluationImage
from model_zoo.eval_nets.inception import FEATURES, Inception
from model_zoo.eval_nets.lpips import SMALLEST_SIDE, Perceptual
from model_zoo.eval_nets.weights import WEIGHTS_FILES, checked_weights, weights_path
from trainer import TrainerError, metrics
from trainer.evaluation.distribution import GaussianMoments, frechet_distance
from trainer.evaluation.reference_results import MEASURES
from trainer.parallel import World, gather_objects, run_on_all_ranks, run_on_main
from trainer.precision import full_precision
from trainer.reports.image_grid import Example, Gallery, merged

PROTOCOL = "paper"  # trainer.metrics.image and docs/metrics.md say what it is

# What is measured without any network costs next to nothing, and so is always measured.
PLAIN_MEASURES = ("psnr", "ssim", "l1", "usage", "perplexity")
NETWORKS = {"rfid": "inception", "lpips_vgg": "vgg16", "lpips_alex": "alexnet"}  # measure -> key of WEIGHTS_FILES
SMALLEST = {"rfid": 1, "lpips_vgg": SMALLEST_SIDE["vgg"], "lpips_alex": SMALLEST_SIDE["alex"]}  # pixels


class ReconstructingTokenizer(Protocol):
    """What is asked of a tokenizer: `model_zoo.Tokenizer`, in eval mode, and whatever else does the same."""

    downsampling_factor: int

    @property
    def config(self): ...  # with codebook_size

    def tokenize(self, images_bchw: Tensor) -> Tensor: ...

    def detokenize(self, index_bhw: Tensor) -> Tensor: ...


class Networks(NamedTuple):
    """The networks to measure with. lpips: by their trunk, ``vgg`` or ``alex``. required: measures that must be there.
    not_measured: measure -> why."""

    inception: Inception | None = None
    lpips: Mapping[str, Perceptual] = MappingProxyType({})
    required: frozenset[str] = frozenset()
    not_measured: Mapping[str, str] = MappingProxyType({})

    @property
    def smallest_side(self) -> int:
        """Pixels of the smallest picture that all measures can take."""
        return max([metrics.SSIM_WINDOW, *(SMALLEST_SIDE[net] for net in self.lpips)])


NO_NETWORKS = Networks()


class Reconstruction(NamedTuple):
    """A batch of equally large pictures and what the tokenizer made of them, all of the pictures' own size."""

    keys: list[str]
    places: list[int]  # in the set
    images_bchw: Tensor  # float32 in [-1, 1]
    reconstruction_bchw: Tensor  # float32, not clamped
    index_bhw: Tensor  # of the padded pictures where padding was needed


class ImageScore(NamedTuple):
    """lpips_vgg, lpips_alex: None where they were not measured."""

    key: str
    psnr: float
    ssim: float
    l1: float
    palette_psnr: float
    lpips_vgg: float | None = None
    lpips_alex: float | None = None


@dataclass(frozen=True)
class ReconstructionReport:
    """Means over images (never over batches). PSNR in dB, its mean over the images where it is finite.

    l1: mean |x - y| on pictures in [-1, 1]. usage: distinct codes over the whole set / codebook size; usage_65536: the
    same in each whole window of 65,536 tokens in the set's order, mean over the windows, None without one. rfid,
    lpips_vgg, lpips_alex: None where not_measured says why.
    """

    psnr: float
    ssim: float
    l1: float
    usage: float
    perplexity: float
    baseline_mean_color_psnr: float
    baseline_palette_psnr: float
    rfid: float | None
    lpips_vgg: float | None
    lpips_alex: float | None
    usage_65536: float | None
    image_count: int
    token_count: int
    infinite_psnr_count: int  # images reconstructed without any error: left out of psnr
    baseline_mean_color_infinite_count: int
    baseline_palette_infinite_count: int
    codebook_size: int
    downsampling_factor: int
    protocol: str
    not_measured: dict[str, str]  # measure -> why
    skipped: list[str]  # pictures left out, each with the reason
    images: list[ImageScore] = field(repr=False)
    examples: dict[str, list[Example]] = field(repr=False)  # by name of `trainer.reports.image_grid.ORDERS`

    def to_json(self) -> dict:
        """Plain numbers for report.json; without the pictures, and null for infinity, which JSON has not."""
        plain = {name: value for name, value in vars(self).items() if name != "examples"}
        plain["images"] = [{k: _jsonable(v) for k, v in score._asdict().items()} for score in self.images]
        return {name: _jsonable(value) for name, value in plain.items()}


class Clock:
    """Seconds of each part of the work. On CUDA the end of a part waits for the device, which costs nothing where, as
    here, the next part needs what it has made, or the processor is about to wait for it anyway."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.seconds: dict[str, float] = defaultdict(float)
        self.began = time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - began

    def waiting(self, name: str, values: Iterable) -> Iterator:
        """The same values; the time until each is there is of that part."""
        values, end = iter(values), object()
        while True:
            with self.part(name):
                value = next(values, end)
            if value is end:
                return
            yield value

    def read(self) -> dict[str, float]:
        """All parts, the rest, and the total; thousandths of seconds."""
        total = time.perf_counter() - self.began
        parts = {**self.seconds, "rest": total - sum(self.seconds.values()), "total": total}
        return {name: round(seconds, 3) for name, seconds in parts.items()}


def reconstruct_images(
    tokenizer: ReconstructingTokenizer,
    images: Iterable[EvaluationImage],
    *,
    batch_size: int,
    device: torch.device | str,
    clock: Clock | None = None,
) -> Iterator[Reconstruction]:
    """Reconstructs pictures in order. fp32, whatever the run trained with; the tokenizer must be on `device`.

    A batch is of equally large neighbours out of `batch_size` places of the set. So it is the same whichever process
    has it, and so are its numbers. Pictures whose sides f does not divide are padded with mid-grey, the smaller half at
    top and left, and the reconstruction is cut back.
    """
    clock = clock or Clock(device)

    def block(image: EvaluationImage) -> tuple:
        return image.index // batch_size, *image.image_chw.shape

    for _, group in itertools.groupby(clock.waiting("decode", images), key=block):
        batch = list(group)
        with clock.part("model"), full_precision(torch.device(device).type):
            levels_bchw = torch.stack([torch.as_tensor(image.image_chw) for image in batch]).to(device)
            images_bchw = (levels_bchw.double() / 127.5 - 1).float()
            height, width = images_bchw.shape[-2:]
            pad = metrics.padding(height, width, tokenizer.downsampling_factor)
            index_bhw = tokenizer.tokenize(F.pad(images_bchw, (pad.left, pad.right, pad.top, pad.bottom)))
            padded_bchw = tokenizer.detokenize(index_bhw).float()
            reconstruction_bchw = padded_bchw[..., pad.top : pad.top + height, pad.left : pad.left + width]
        keys, places = [image.key for image in batch], [image.index for image in batch]
        yield Reconstruction(keys, places, images_bchw, reconstruction_bchw, index_bhw)


class _Judge:
    """One process's part of an evaluation: takes batches; keeps numbers, codes, sums, moments and a few pictures."""

    def __init__(
        self, tokenizer: ReconstructingTokenizer, networks: Networks, image_count: int, seed: int, clock: Clock
    ):
        self.networks, self.clock = networks, clock
        codebook_size = tokenizer.config.codebook_size
        self.baselines = metrics.ColorBaselines(
            tokenizer.downsampling_factor, codebook_size, image_count=image_count, seed=seed
        )
        self.code_type = np.min_scalar_type(codebook_size - 1)
        self.moments = [GaussianMoments(FEATURES, clock.device) for _ in range(2)] if networks.inception else []
        self.places: list[int] = []
        self.scores: list[dict] = []  # fields of `ImageScore`
        self.codes: list[np.ndarray] = []
        self.skipped: list[str] = []
        self.gallery = Gallery()

    def take(self, batch: Reconstruction) -> None:
        x_bchw, y_bchw = batch.images_bchw, batch.reconstruction_bchw.clamp(-1, 1)
        smallest = self.networks.smallest_side
        if min(x_bchw.shape[-2:]) < smallest:
            self.skipped += [f"{key}: smaller than {smallest} x {smallest} pixels" for key in batch.keys]
            return
        if not y_bchw.isfinite().all():
            raise TrainerError(
                f"the reconstruction of {batch.keys[0]} or a picture beside it is not finite: these weights have "
                "diverged; evaluate an earlier checkpoint"
            )
        with self.clock.part("metrics"):
            values = {
                "key": batch.keys,
                "psnr": metrics.psnr(x_bchw, y_bchw).tolist(),
                "ssim": metrics.ssim(x_bchw, y_bchw).tolist(),
                "l1": metrics.l1(x_bchw, y_bchw).tolist(),
            }
        with full_precision(x_bchw.device.type):
            for net, perceptual in self.networks.lpips.items():
                with self.clock.part(f"lpips_{net}"):
                    values[f"lpips_{net}"] = perceptual(x_bchw, y_bchw).tolist()
            for moments, pictures_bchw in zip(self.moments, (x_bchw, y_bchw), strict=False):
                with self.clock.part("inception"):
                    moments.update(self.networks.inception.paper((pictures_bchw + 1) / 2).pool_nd)
        with self.clock.part("baselines"):  # which see the levels that PSNR sees
            levels_bchw, reconstructed_bchw = metrics.to_levels(x_bchw), metrics.to_levels(y_bchw)
            self.baselines.update(levels_bchw, batch.places)
        self.places += batch.places
        self.scores += [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        self.codes += list(batch.index_bhw.flatten(1).cpu().numpy().astype(self.code_type))
        lpips = values.get("lpips_vgg") or values.get("lpips_alex") or [None] * len(batch.keys)
        columns = batch.keys, values["psnr"], levels_bchw, reconstructed_bchw, batch.places, lpips
        self.gallery.offer(
            Example(key, psnr, original_chw, reconstruction_chw, place=place, lpips=distance)
            for key, psnr, original_chw, reconstruction_chw, place, distance in zip(*columns, strict=True)
        )


def evaluate_reconstruction(
    tokenizer: ReconstructingTokenizer,
    images: Iterable[EvaluationImage],
    *,
    world: World,
    batch_size: int,
    networks: Networks = NO_NETWORKS,
    seed: int = 0,
    clock: Clock | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ReconstructionReport | None:
    """Scores a tokenizer (on the world's device, in eval mode) by the `paper` protocol, with both baselines. All
    processes call it, each with its own pictures or none; None on all but the first.

    `images` may list the pictures that it could not read in `skipped`, as `data.EvaluationImages` does. A picture that
    is too small for one of the measures is left out of all. `seed` is the palette's. `on_progress` hears on the first
    process about how many pictures are done, of how many (0: unknown).
    Raises TrainerError where there is no picture at all, or too few for a measure that is required.
    """
    clock = clock or Clock(world.device)
    image_count = sum(gather_objects(operator.length_hint(images)))
    judge = _Judge(tokenizer, networks, image_count, seed, clock)

    def take_all() -> None:
        batches = reconstruct_images(tokenizer, images, batch_size=batch_size, device=world.device, clock=clock)
        for batch in batches:
            judge.take(batch)
            if world.is_main:
                done = world.size * len(judge.places)
                on_progress(min(done, image_count) if image_count else done, image_count)

    run_on_all_ranks(take_all)
    skipped = sorted(itertools.chain(*gather_objects(judge.skipped + tell_skipped(images))))
    count = sum(gather_objects(len(judge.places)))
    if not count:
        raise TrainerError(
            f"no picture to evaluate{first_reason(skipped)}: give a folder, a tar or an image file that holds some"
        )
    if count < 2 and "rfid" in networks.required:
        raise TrainerError("rFID needs at least 2 readable pictures, not 1: leave it out of --metrics")
    with clock.part("baselines"):
        fitted = itertools.chain(*gather_objects(judge.baselines.fitted()))
        palette_k3 = run_on_main(world, lambda: judge.baselines.fit(fitted))
        mean_color_psnr = judge.baselines.mean_color_psnr()
        for score, psnr in zip(judge.scores, judge.baselines.palette_psnr(palette_k3), strict=True):
            score["palette_psnr"] = psnr
    own = list(zip(judge.places, judge.scores, mean_color_psnr, judge.codes, strict=True))
    rows = sorted(itertools.chain(*gather_objects(own)), key=operator.itemgetter(0))
    galleries = gather_objects(judge.gallery.examples)
    rfid = None
    if judge.moments:
        with clock.part("inception"):
            moments = [part.merged() for part in judge.moments]
            rfid = run_on_main(world, lambda: _frechet(*moments)) if count > 1 else None
    if not world.is_main:
        return None
    return _summed_up(tokenizer, judge, rows, rfid, palette_k3, galleries, skipped)


def _frechet(first: GaussianMoments, second: GaussianMoments) -> float:
    return frechet_distance(first.mean(), first.covariance(), second.mean(), second.covariance())


def _summed_up(
    tokenizer: ReconstructingTokenizer,
    judge: _Judge,
    rows: list[tuple],
    rfid: float | None,
    palette_k3: np.ndarray,
    galleries: list[dict[str, list[Example]]],
    skipped: list[str],
) -> ReconstructionReport:
    """The report of all processes' rows (place, fields of `ImageScore`, PSNR of the mean colour, codes), in order."""
    codebook_size = tokenizer.config.codebook_size
    scores = [ImageScore(**score) for _, score, _, _ in rows]
    psnr = metrics.finite_mean(score.psnr for score in scores)
    mean_color = metrics.finite_mean(value for _, _, value, _ in rows)
    palette = metrics.finite_mean(score.palette_psnr for score in scores)
    index_n = np.concatenate([codes for _, _, _, codes in rows])
    usage = metrics.CodebookUsage(codebook_size)
    usage.update(torch.from_numpy(index_n.astype(np.int64)))

    def mean(name: str) -> float | None:
        values = [getattr(score, name) for score in scores]
        return None if None in values else math.fsum(values) / len(values)

    not_measured = dict(judge.networks.not_measured)
    if judge.networks.inception and rfid is None:
        not_measured["rfid"] = "one picture has no covariance"
    return ReconstructionReport(
        psnr=psnr.mean,
        ssim=mean("ssim"),
        l1=mean("l1"),
        usage=usage.usage(),
        perplexity=usage.perplexity(),
        baseline_mean_color_psnr=mean_color.mean,
        baseline_palette_psnr=palette.mean,
        rfid=rfid,
        lpips_vgg=mean("lpips_vgg"),
        lpips_alex=mean("lpips_alex"),
        usage_65536=metrics.window_usage(index_n, codebook_size),
        image_count=len(scores),
        token_count=usage.token_count(),
        infinite_psnr_count=psnr.infinite_count,
        baseline_mean_color_infinite_count=mean_color.infinite_count,
        baseline_palette_infinite_count=palette.infinite_count,
        codebook_size=codebook_size,
        downsampling_factor=tokenizer.downsampling_factor,
        protocol=PROTOCOL,
        not_measured=not_measured,
        skipped=skipped,
        images=scores,
        examples={
            name: [
                example._replace(
                    mean_color_chw=judge.baselines.draw_mean_color(example.original_chw),
                    palette_chw=judge.baselines.draw_palette(example.original_chw, palette_k3),
                )
                for example in examples
            ]
            for name, examples in merged(galleries).items()
        },
    )


def load_networks(asked: str, image_size: int | None, image_count: int) -> Networks:
    """The networks that `--metrics` asks for, on the CPU.

    asked: ``auto``: those whose weights are there and which can take such pictures; ``all``; or names of measures with
    commas between them. image_size: pixels, None for the pictures' own. image_count: at most.
    Raises TrainerError for a name that is none and a measure that cannot be; ModelError for weights that are missing or
    other ones.
    """
    named = {name.strip() for name in asked.split(",")}
    if unknown := named - {"auto", "all", *PLAIN_MEASURES, *NETWORKS}:
        raise TrainerError(
            f"--metrics {asked}: {min(unknown)!r} is unknown: choose auto, all, or of "
            f"{', '.join([*NETWORKS, *PLAIN_MEASURES])} (the last five are always measured)"
        )
    if named & {"auto", "all"} and len(named) > 1:
        raise TrainerError(f"--metrics {asked}: auto and all stand alone")
    required = frozenset(NETWORKS) if named == {"all"} else frozenset(named & NETWORKS.keys())
    reasons = {}
    for measure, key in NETWORKS.items():
        reason = None
        if named != {"auto"} and measure not in required:
            reason = "not among --metrics"
        elif image_size is not None and image_size < SMALLEST[measure]:
            reason = f"pictures of {image_size} pixels are too small, it takes {SMALLEST[measure]} and more"
        elif measure == "rfid" and image_count < 2:
            reason = "fewer than 2 pictures have no covariance"
        elif measure not in required and not (place := weights_path(key)).is_file():
            reason = f"{WEIGHTS_FILES[key].file} is not at {place} ({WEIGHTS_FILES[key].url})"
        if reason and measure in required:
            raise TrainerError(f"{MEASURES[measure].title} cannot be measured: {reason}; leave it out of --metrics")
        if reason:
            reasons[measure] = reason
    chosen = [measure for measure in NETWORKS if measure not in reasons]
    for measure in chosen:  # before any of them is loaded
        checked_weights(NETWORKS[measure])
    return Networks(
        Inception() if "rfid" in chosen else None,
        {net: Perceptual(net=net) for net in ("vgg", "alex") if f"lpips_{net}" in chosen},
        required,
        reasons,
    )


def tell_skipped(images: Iterable[EvaluationImage]) -> list[str]:
    """What was left out of `data.EvaluationImages` in the latest pass, and why; nothing of other iterables."""
    return [
        f"{skipped.source}{'' if skipped.source.endswith(skipped.key) else f', {skipped.key}'}: {skipped.reason}"
        for skipped in getattr(images, "skipped", [])
    ]


def first_reason(skipped: list[str]) -> str:
    """Where all pictures were left out, in brackets: how many, and why the first. Empty where there was none."""
    return f" ({len(skipped)} skipped, the first: {skipped[0]})" if skipped else ""


def _jsonable(value):
    return None if isinstance(value, float) and math.isinf(value) else value
