"""Tars of pictures with a mask beside each, which is no picture for training."""

from pathlib import Path

from samples import encoded, picture, write_tar


def write_masked_tars(folder: Path, count: int = 6) -> Path:
    """k00.jpg, k00.mask.png, k01.jpg, ...; returns the folder."""
    folder.mkdir()
    samples = []
    for n in range(count):
        samples.append(
            {"__key__": f"k{n:02d}", "jpg": encoded(picture(n)), "mask.png": encoded(picture(90 + n), "PNG")}
        )
    write_tar(folder / "a.tar", samples)
    return folder
