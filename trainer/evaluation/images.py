"""The images of an evaluation."""

from pathlib import Path
from typing import NamedTuple

from data.evaluation import EvaluationImages, evaluation_images
from data.transforms import RESIZES
from model_zoo.io.run_layout import run_folder
from trainer import TrainerError
from trainer.jobs.setup import data_config, decode_threads
from trainer.metrics.image import SSIM_WINDOW
from trainer.parallel import World

SIZE, RESIZE = 256, "cv2_bilinear"  # of published tokenizers on ImageNet; used if neither options nor a run say more


class ImageSource(NamedTuple):
    """One process's share of the images."""

    images: EvaluationImages
    path: str | list[str]
    image_size: int | None  # pixels, None for original sizes
    resize: str
    batch_size: int


def open_images(
    checkpoint: Path,
    images: str | list[str] | None,
    image_size: int | str | None,
    resize: str | None,
    world: World,
    batch_size: int,
) -> ImageSource:
    """Opens the images. What is None comes from the run's ``data`` section (``val``, ``val_image_size``, ``resize``);
    without a run, size and resize are those of the published ImageNet results. Raises TrainerError or DataError."""
    config = data_config(checkpoint)
    path = images if images is not None or config is None else config.val
    if path is None and config is None:
        raise TrainerError(f"{checkpoint} is not a run with a data.val: name the images with --images PATH")
    if path is None:
        raise TrainerError(f"{run_folder(checkpoint)} was trained without data.val: name the images with --images PATH")
    if resize is None:
        resize = RESIZE if config is None else config.resize
    if resize not in RESIZES:
        raise TrainerError(f"--resize {resize} is unknown: choose one of {', '.join(RESIZES)}")
    if image_size is None:
        image_size = SIZE if config is None else config.val_image_size or config.image_size
    if image_size != "original" and (not str(image_size).isdecimal() or int(image_size) < SSIM_WINDOW):
        raise TrainerError(f"--size {image_size}: give at least {SSIM_WINDOW} pixels, or 'original'")
    size = None if image_size == "original" else int(image_size)
    batch_size = 1 if size is None else batch_size
    opened = evaluation_images(
        path,
        image_size=size,
        resize=resize,
        shard=(world.rank, world.size),
        block=batch_size,
        threads=decode_threads(),
    )
    return ImageSource(opened, path, size, resize, batch_size)
