"""Small generated pictures and tars; nothing is read from outside the temporary folder but scikit-image's wheel."""

import io

import numpy as np
import pytest
from PIL import Image
from webdataset.writer import TarWriter


def picture(number: int, size=(48, 40), mode="RGB") -> Image.Image:
    """A smooth picture, another one for each number."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    waves = [0.5 + 0.5 * np.sin(5 * x + number + 2 * c) * np.cos(4 * y + 3 * number - c) for c in range(3)]
    return Image.fromarray((255 * np.stack(waves, -1)).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind="JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path, samples):
    """samples: dicts of member suffix to bytes, with __key__."""
    with TarWriter(str(path), encoder=False, mtime=0.0) as writer:
        for sample in samples:
            writer.write(sample)
    return str(path)


@pytest.fixture
def make_picture():
    return picture


@pytest.fixture
def encode():
    return encoded


@pytest.fixture
def make_tar():
    return write_tar


@pytest.fixture
def tars(tmp_path):
    """Three tars with 7, 9 and 4 pictures, keys 0-0, 0-1, ..., as a folder."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard, count in enumerate((7, 9, 4)):
        samples = [
            {"__key__": f"{shard}-{n}", "jpg": encoded(picture(10 * shard + n)), "txt": b"a caption"}
            for n in range(count)
        ]
        write_tar(folder / f"train-{shard:06d}.tar", samples)
    return folder
