"""Judges a tokenizer's reconstructions on held-out pictures, beside two baselines that learn nothing."""

import contextlib
import itertools
import json
import math
import operator
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

import model_zoo
from data import DataConfig, EvaluationImage, EvaluationImages, evaluation_images
from trainer import TrainerError, metrics

PROTOCOL = "paper"  # trainer.metrics.image says what it is
EXAMPLE_COUNT = 8


class ReconstructingTokenizer(Protocol):
    """What is asked of a tokenizer: `model_zoo.Tokenizer`, in eval mode, and whatever else does the same."""

    downsampling_factor: int

    @property
    def config(self): ...  # with codebook_size

    def tokenize(self, images_bchw: Tensor) -> Tensor: ...

    def detokenize(self, index_bhw: Tensor) -> Tensor: ...


class Reconstruction(NamedTuple):
    """A batch of equally large pictures and what the tokenizer made of them, all of the pictures' own size."""

    keys: list[str]
    images_bchw: Tensor  # float32 in [-1, 1]
    reconstruction_bchw: Tensor  # float32, not clamped
    index_bhw: Tensor  # of the padded pictures where padding was needed


class Example(NamedTuple):
    """One picture to look at; all pictures are uint8 (3, h, w) on the CPU."""

    key: str
    psnr: float  # dB
    original_chw: Tensor
    reconstruction_chw: Tensor
    mean_color_chw: Tensor | None = None
    palette_chw: Tensor | None = None


class ImageScore(NamedTuple):
    key: str
    psnr: float
    ssim: float
    l1: float
    palette_psnr: float


@dataclass(frozen=True)
class ReconstructionReport:
    """Means over images (never over batches). PSNR in dB, its mean over the images where it is finite.

    l1: mean |x - y| on pictures in [-1, 1]. usage: distinct codes over the whole set / codebook size.
    """

    psnr: float
    ssim: float
    l1: float
    usage: float
    perplexity: float
    baseline_mean_color_psnr: float
    baseline_palette_psnr: float
    image_count: int
    token_count: int
    infinite_psnr_count: int  # images reconstructed without any error: left out of psnr
    baseline_mean_color_infinite_count: int
    baseline_palette_infinite_count: int
    codebook_size: int
    downsampling_factor: int
    protocol: str
    skipped: list[str]  # pictures left out, each with the reason
    images: list[ImageScore] = field(repr=False)
    examples: list[Example] = field(repr=False)

    def to_json(self) -> dict:
        """Plain numbers for report.json; without the pictures, and null for infinity, which JSON has not."""
        plain = {name: value for name, value in vars(self).items() if name != "examples"}
        plain["images"] = [{k: _jsonable(v) for k, v in score._asdict().items()} for score in self.images]
        return {name: _jsonable(value) for name, value in plain.items()}


def reconstruct_images(
    tokenizer: ReconstructingTokenizer,
    images: Iterable[EvaluationImage],
    *,
    batch_size: int,
    device: torch.device | str,
) -> Iterator[Reconstruction]:
    """Reconstructs pictures in order; neighbours of equal size share a batch. fp32, whatever the run trained with.

    Pictures whose sides f does not divide are padded with mid-grey, the smaller half at top and left, and the
    reconstruction is cut back. The tokenizer must be on `device`.
    """
    for _, group in itertools.groupby(images, key=lambda image: tuple(image.image_chw.shape)):
        while batch := list(itertools.islice(group, batch_size)):
            levels_bchw = torch.stack([torch.as_tensor(image.image_chw) for image in batch]).to(device)
            images_bchw = (levels_bchw.double() / 127.5 - 1).float()
            height, width = images_bchw.shape[-2:]
            pad = metrics.padding(height, width, tokenizer.downsampling_factor)
            with full_precision(images_bchw.device.type):
                index_bhw = tokenizer.tokenize(F.pad(images_bchw, (pad.left, pad.right, pad.top, pad.bottom)))
                padded_bchw = tokenizer.detokenize(index_bhw).float()
            reconstruction_bchw = padded_bchw[..., pad.top : pad.top + height, pad.left : pad.left + width]
            yield Reconstruction([image.key for image in batch], images_bchw, reconstruction_bchw, index_bhw)


def evaluate_reconstruction(
    tokenizer: ReconstructingTokenizer,
    images: Iterable[EvaluationImage],
    *,
    batch_size: int,
    device: torch.device | str,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> ReconstructionReport:
    """Scores a tokenizer (on `device`, in eval mode) by the `paper` protocol, with both baselines.

    `images` may list the pictures that it could not read in `skipped`, as `data.EvaluationImages` does. `seed` is the
    palette's. `on_progress` hears how many pictures are done, of how many (0: unknown).
    Raises TrainerError where there is no picture at all.
    """
    codebook_size, factor = tokenizer.config.codebook_size, tokenizer.downsampling_factor
    usage = metrics.CodebookUsage(codebook_size)
    baselines = metrics.ColorBaselines(factor, codebook_size, seed=seed)
    keys, psnr, ssim, l1 = [], [], [], []
    examples: list[Example] = []
    skipped: list[str] = []
    for batch in reconstruct_images(tokenizer, images, batch_size=batch_size, device=device):
        pictures = batch.images_bchw, batch.reconstruction_bchw
        if min(batch.images_bchw.shape[-2:]) < metrics.SSIM_WINDOW:
            skipped += [f"{key}: smaller than SSIM's window of 7x7 pixels" for key in batch.keys]
            continue
        keys += batch.keys
        psnr += metrics.psnr(*pictures).tolist()
        ssim += metrics.ssim(*pictures).tolist()
        l1 += metrics.l1(*pictures).tolist()
        usage.update(batch.index_bhw)
        # The baselines see the levels that PSNR sees.
        levels_bchw = metrics.to_levels(batch.images_bchw)
        baselines.update(levels_bchw)
        for i in range(min(len(batch.keys), EXAMPLE_COUNT - len(examples))):
            done = len(psnr) - len(batch.keys) + i
            reconstruction_chw = metrics.to_levels(batch.reconstruction_bchw[i]).cpu()
            examples.append(Example(keys[done], psnr[done], levels_bchw[i].cpu(), reconstruction_chw))
        if on_progress is not None:
            on_progress(len(keys), operator.length_hint(images))
    skipped += _tell_skipped(images)
    if not keys:
        raise TrainerError(
            f"no picture to evaluate ({len(skipped)} unreadable or tiny): give a folder, a tar or an image file"
        )
    palette_k3 = baselines.fit()
    palette_psnr = baselines.palette_psnr(palette_k3)
    mean_psnr = metrics.finite_mean(psnr)
    mean_color = metrics.finite_mean(baselines.mean_color_psnr())
    palette = metrics.finite_mean(palette_psnr)
    return ReconstructionReport(
        psnr=mean_psnr.mean,
        ssim=math.fsum(ssim) / len(ssim),
        l1=math.fsum(l1) / len(l1),
        usage=usage.usage(),
        perplexity=usage.perplexity(),
        baseline_mean_color_psnr=mean_color.mean,
        baseline_palette_psnr=palette.mean,
        image_count=len(keys),
        token_count=usage.token_count(),
        infinite_psnr_count=mean_psnr.infinite_count,
        baseline_mean_color_infinite_count=mean_color.infinite_count,
        baseline_palette_infinite_count=palette.infinite_count,
        codebook_size=codebook_size,
        downsampling_factor=factor,
        protocol=PROTOCOL,
        skipped=skipped,
        images=[ImageScore(*score) for score in zip(keys, psnr, ssim, l1, palette_psnr, strict=True)],
        examples=[
            example._replace(
                mean_color_chw=baselines.draw_mean_color(example.original_chw),
                palette_chw=baselines.draw_palette(example.original_chw, palette_k3),
            )
            for example in examples
        ],
    )


class EvaluatedRun(NamedTuple):
    report: ReconstructionReport
    json_path: Path
    picture_path: Path


def evaluate_run(
    run: str | Path,
    *,
    images: str | list[str] | None = None,
    image_size: int | str | None = None,
    weights: str = "ema",
    report_path: str | Path | None = None,
    batch_size: int = 16,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> EvaluatedRun:
    """Evaluates a run folder's newest checkpoint and writes report.json and, beside it, report.png with examples.

    images: default the run's `data.val`. image_size: pixels, or "original" (one picture at a time); default the run's
    `data.val_image_size`. Raises TrainerError, ModelError or DataError, each with one clear line.
    """
    run = Path(run)
    json_path = run / "report.json" if report_path is None else Path(report_path)
    if json_path.suffix != ".json":
        raise TrainerError(f"the report {json_path} must end in .json")
    if batch_size < 1:
        raise TrainerError(f"the batch size must be at least 1, not {batch_size}")
    device = choose_device(device)
    tokenizer = model_zoo.load_tokenizer(run, weights=weights).to(device)
    source = open_images(run, images, image_size)
    report = evaluate_reconstruction(
        tokenizer,
        source.images,
        batch_size=1 if source.image_size is None else batch_size,
        device=device,
        on_progress=on_progress,
    )
    manifest = {
        "run": str(run),
        "checkpoint": (run / "checkpoints" / "latest").read_text().strip(),
        "weights": weights,
        "images": source.path,
        "held_out": images is None,  # other pictures than data.val may have been trained on
        "image_size": "original" if source.image_size is None else source.image_size,
        "resize": source.resize,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
    }
    picture_path = json_path.with_suffix(".png")
    with _writing(json_path, "--report"):
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps({**report.to_json(), "manifest": manifest}, indent=1, allow_nan=False) + "\n")
        side_by_side(report.examples).save(picture_path)
    return EvaluatedRun(report, json_path, picture_path)


class WrittenReconstructions(NamedTuple):
    image_count: int
    overview_path: Path
    skipped: list[str]


def write_reconstructions(
    run: str | Path,
    *,
    images: str | list[str],
    out: str | Path,
    image_size: int | str | None = None,
    weights: str = "ema",
    batch_size: int = 16,
    device: str = "auto",
) -> WrittenReconstructions:
    """Writes OUT/<place>_<name>.png, each picture beside its reconstruction, and OUT/overview.png of the first ones.

    Arguments and errors as in `evaluate_run`.
    """
    out = Path(out)
    if batch_size < 1:
        raise TrainerError(f"the batch size must be at least 1, not {batch_size}")
    device = choose_device(device)
    tokenizer = model_zoo.load_tokenizer(run, weights=weights).to(device)
    source = open_images(run, images, image_size)
    batch_size = 1 if source.image_size is None else batch_size
    examples: list[Example] = []
    image_count = 0
    with _writing(out, "--out"):
        out.mkdir(parents=True, exist_ok=True)
    for batch in reconstruct_images(tokenizer, source.images, batch_size=batch_size, device=device):
        psnr = metrics.psnr(batch.images_bchw, batch.reconstruction_bchw).tolist()
        original_bchw = metrics.to_levels(batch.images_bchw).cpu()
        reconstruction_bchw = metrics.to_levels(batch.reconstruction_bchw).cpu()
        for example in map(Example, batch.keys, psnr, original_bchw, reconstruction_bchw):
            with _writing(out, "--out"):  # the place keeps pictures of one name in several folders apart
                pair(example).save(out / f"{image_count:05d}_{Path(example.key).stem}.png")
            image_count += 1
            if len(examples) < EXAMPLE_COUNT:
                examples.append(example)
    if not examples:
        raise TrainerError(f"no readable picture in {images}: give a folder, a tar or an image file that holds some")
    with _writing(out, "--out"):
        side_by_side(examples).save(out / "overview.png")
    return WrittenReconstructions(image_count, out / "overview.png", _tell_skipped(source.images))


class ImageSource(NamedTuple):
    images: EvaluationImages
    path: str | list[str]
    image_size: int | None  # pixels, None for the pictures' own
    resize: str


def open_images(run: str | Path, images: str | list[str] | None, image_size: int | str | None) -> ImageSource:
    """The pictures asked for, with `val`, `val_image_size` and `resize` of the run's data where nothing is asked."""
    try:
        data_config = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(Path(run) / "config.yaml").data)
    except OmegaConfBaseException as error:
        raise TrainerError(f"the data section of {run}/config.yaml: {str(error).splitlines()[0]}") from error
    path = images if images is not None else OmegaConf.to_container(data_config).get("val")
    if path is None:
        raise TrainerError(f"{run} was trained without data.val: say which pictures with --images PATH")
    size = (data_config.val_image_size or data_config.image_size) if image_size is None else image_size
    if size == "original":
        size = None
    elif not str(size).isdecimal() or int(size) < metrics.SSIM_WINDOW:
        raise TrainerError(f"--size {size} is neither a number of pixels from {metrics.SSIM_WINDOW} on nor 'original'")
    size = size if size is None else int(size)
    return ImageSource(
        evaluation_images(path, image_size=size, resize=data_config.resize), path, size, data_config.resize
    )


def _tell_skipped(images: Iterable[EvaluationImage]) -> list[str]:
    return [
        f"{skipped.source}{'' if skipped.source.endswith(skipped.key) else f', {skipped.key}'}: {skipped.reason}"
        for skipped in getattr(images, "skipped", [])
    ]


@contextlib.contextmanager
def _writing(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainerError(f"cannot write {path}: {error.strerror}; choose another place with {option}") from error


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises TrainerError for a device that this machine has not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise TrainerError(f"--device {name} is unknown: choose auto, cpu, cuda or cuda:0")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise TrainerError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs; choose auto or cpu")
    return torch.device(name)


# Pictures to look at

_BACKGROUND, _TEXT, _FAINT = (24, 26, 31), (235, 236, 240), (160, 165, 175)


def side_by_side(examples: Sequence[Example], *, columns: int = 4, cell: int = 256) -> Image.Image:
    """A sheet of examples: bands of up to `columns` pictures; below each other original, palette, reconstruction.

    The palette's row is left out where examples have none. Small pictures are enlarged by whole factors, so that each
    pixel stays a square; large ones are shrunk to `cell` pixels.
    """
    rows = ["original_chw", "palette_chw", "reconstruction_chw"]
    rows = [name for name in rows if getattr(examples[0], name) is not None]
    bands = math.ceil(len(examples) / columns)
    columns = math.ceil(len(examples) / bands)
    gap, label = 12, 36
    band_height = len(rows) * (label + cell) + label + gap
    sheet = Image.new("RGB", (gap + columns * (cell + gap), gap + bands * band_height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(26), ImageFont.load_default(20)
    titles = {"palette_chw": "palette (one colour a token)"}
    for i, example in enumerate(examples):
        band, column = divmod(i, columns)
        left, top = gap + column * (cell + gap), gap + band * band_height
        for row, name in enumerate(rows):
            y = top + row * (label + cell)
            if column == 0:
                draw.text((gap, y), titles.get(name, name.removesuffix("_chw")), fill=_TEXT, font=font)
            picture = _fit(getattr(example, name), cell)
            sheet.paste(picture, (left + (cell - picture.width) // 2, y + label + (cell - picture.height) // 2))
        caption = _shorten(f"{_psnr_text(example.psnr)}  {Path(example.key).name}", small, cell)
        draw.text((left, top + len(rows) * (label + cell) + 4), caption, fill=_FAINT, font=small)
    return sheet


def pair(example: Example) -> Image.Image:
    """Original and reconstruction of one picture beside each other, in its own size (small ones enlarged)."""
    original, reconstruction = (
        _fit(picture_chw, max(256, *picture_chw.shape[-2:]))
        for picture_chw in (example.original_chw, example.reconstruction_chw)
    )
    gap, label = 12, 30
    sheet = Image.new("RGB", (3 * gap + 2 * original.width, original.height + label + 2 * gap), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    texts = ("original", f"reconstruction, {_psnr_text(example.psnr)}")
    for x, picture, text in zip((gap, 2 * gap + original.width), (original, reconstruction), texts, strict=True):
        draw.text((x, gap // 2), _shorten(text, font, picture.width), fill=_TEXT, font=font)
        sheet.paste(picture, (x, gap // 2 + label))
    return sheet


def _fit(image_chw: Tensor, cell: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(image_chw.permute(1, 2, 0).numpy()))
    longest = max(picture.size)
    if longest <= cell:
        factor = cell // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return picture


def _shorten(text: str, font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _psnr_text(psnr: float) -> str:
    return "exact" if math.isinf(psnr) else f"{psnr:.1f} dB"


def _jsonable(value):
    return None if isinstance(value, float) and math.isinf(value) else value


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """fp32 arithmetic without gradients, whatever training around it has switched on (autocast, TF32)."""
    matmul_precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.no_grad(),
            torch.autocast(device_type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul_precision)
