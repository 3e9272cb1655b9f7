"""Two splits of a data set of which one lacks a class, so that sorted folders shift the others (timm #957)."""

from pathlib import Path

from samples import picture


def write_splits(folder: Path) -> tuple[Path, Path]:
    """FOLDER/train with the classes bird, cat and dog, FOLDER/val with bird and dog; two pictures each."""
    for split, names in (("train", ("bird", "cat", "dog")), ("val", ("bird", "dog"))):
        for number, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for n in range(2):
                picture(10 * number + n).save(folder / split / name / f"{n}.png")
    return folder / "train", folder / "val"
