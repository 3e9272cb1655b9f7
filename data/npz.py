"""Images in ADM's form, an .npz whose `arr_0` is uint8 (n, height, width, 3), read a batch at a time: 50,000 images of
256 x 256 are 9.8 GB."""

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.errors import DataError

IMAGES = "arr_0"
FORM = "uint8 of shape (n, height, width, 3)"


class Placed(NamedTuple):
    """Images of consecutive places from ``first`` on, uint8 (b, height, width, 3)."""

    first: int
    levels_bhwc: np.ndarray


class Npz:
    """The images and other arrays of an .npz. Raises DataError, one line, for what is none, is damaged, or holds images
    in another form.

    count: of the images, 0 where there are none; height and width in pixels.
    """

    def __init__(self, path: Path):
        self.path = path
        self.count = self.height = self.width = 0
        with self._reading(), zipfile.ZipFile(path) as archive:
            self.names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            if IMAGES not in self.names:
                return
            with archive.open(f"{IMAGES}.npy") as member:
                self.count, self.height, self.width, _ = self._read_header(member)
                stored = archive.getinfo(f"{IMAGES}.npy").file_size - member.tell()
        if stored != self.count * self._image_bytes:
            raise DataError(f"{path} is damaged: {IMAGES} is shorter than its header says; write it again")

    def batches(self, batch_size: int, shard: tuple[int, int] = (0, 1)) -> Iterator[Placed]:
        """The images in order, in batches, which are the same whatever the shard (index, count): a shard has some of
        them that follow one another."""
        batches = -(-self.count // batch_size)
        first, stop = (batches * part // shard[1] * batch_size for part in (shard[0], shard[0] + 1))
        with self._reading(), zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as member:
            self._read_header(member)
            member.seek(member.tell() + first * self._image_bytes)
            for place in range(first, min(stop, self.count), batch_size):
                size = min(batch_size, self.count - place)
                levels = np.frombuffer(member.read(size * self._image_bytes), np.uint8)
                yield Placed(place, levels.reshape(size, self.height, self.width, 3))

    def array(self, name: str) -> np.ndarray:
        """One of the other arrays, whole."""
        with self._reading(), np.load(self.path, allow_pickle=False) as arrays:
            return arrays[name]

    @property
    def _image_bytes(self) -> int:
        return self.height * self.width * 3

    def _read_header(self, member) -> tuple[int, ...]:
        """The shape of the images; the member then stands at their first byte."""
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_columns, dtype = read_header[np.lib.format.read_magic(member)](member)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape or by_columns:
            raise DataError(f"{self.path}: {IMAGES} is {dtype} of shape {shape}, but images are {FORM}")
        return shape

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror or error}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
            raise DataError(
                f"{self.path} is no .npz, or was cut off or damaged ({str(error).splitlines()[0]}): write it again"
            ) from error
