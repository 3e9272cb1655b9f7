"""`ibq reconstruct`: writes images next to their reconstructions."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from model_zoo.io.load import find_checkpoint, load_tokenizer
from trainer import TrainerError
from trainer.evaluation.images import open_images
from trainer.evaluation.reconstruction import describe_skipped, first_reason, reconstruct_images
from trainer.files import writing
from trainer.jobs.setup import choose_device
from trainer.metrics.image import psnr, to_levels
from trainer.parallel import World
from trainer.reports.image_grid import EXAMPLE_COUNT, Example, pair, side_by_side


class WrittenReconstructions(NamedTuple):
    image_count: int
    overview_path: Path
    skipped: list[str]


def write_reconstructions(
    source: str | Path,
    *,
    images: str | list[str],
    out: str | Path,
    image_size: int | str | None = None,
    resize: str | None = None,
    weights: str = "ema",
    batch_size: int = 16,
    device: str = "auto",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> WrittenReconstructions:
    """Writes OUT/<number>_<name>.png, each image next to its reconstruction, and OUT/overview.png of the first ones.

    Arguments and errors as for `trainer.evaluation.evaluate_run.evaluate_run`; one process.
    """
    out = Path(out)
    if batch_size < 1:
        raise TrainerError(f"the batch size must be at least 1, not {batch_size}")
    device = choose_device(device)
    checkpoint = find_checkpoint(Path(source))
    tokenizer = load_tokenizer(checkpoint, weights=weights).to(device)
    opened = open_images(checkpoint, images, image_size, resize, World(0, 1, device), batch_size)
    examples: list[Example] = []
    image_count = 0
    for batch in reconstruct_images(tokenizer, opened.images, batch_size=opened.batch_size, device=device):
        decibels = psnr(batch.images_bchw, batch.reconstruction_bchw).tolist()
        original_bchw = to_levels(batch.images_bchw).cpu()
        reconstruction_bchw = to_levels(batch.reconstruction_bchw).cpu()
        for example in map(Example, batch.keys, decibels, original_bchw, reconstruction_bchw):
            with writing(out):  # the number separates images of the same name in different folders
                out.mkdir(parents=True, exist_ok=True)
                pair(example).save(out / f"{image_count:05d}_{Path(example.key).stem}.png")
            image_count += 1
            if len(examples) < EXAMPLE_COUNT:
                examples.append(example)
        on_progress(image_count, len(opened.images))
    skipped = describe_skipped(opened.images)
    if not examples:
        raise TrainerError(
            f"no readable image in {images}{first_reason(skipped)}: give a folder, a tar or an image file with "
            "readable images"
        )
    with writing(out):
        side_by_side(examples).save(out / "overview.png")
    return WrittenReconstructions(image_count, out / "overview.png", skipped)
