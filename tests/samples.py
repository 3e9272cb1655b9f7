"""Small generated pictures, tars of them, and the streams of their samples."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from data import merge_states, train_batches
from data.index import write_index
from data.prep.check import check_shards


def picture(number: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth picture, another one for each number."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    waves = [0.5 + 0.5 * np.sin(5 * x + number + 2 * c) * np.cos(4 * y + 3 * number - c) for c in range(3)]
    return Image.fromarray((255 * np.stack(waves, -1)).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pictured(keys: Iterable[str], first: int = 0, **members: bytes) -> list[dict]:
    """A sample for each key: the pictures number `first`, `first` + 1, ... and these other members."""
    return [{"__key__": key, "jpg": encoded(picture(first + n)), **members} for n, key in enumerate(keys)]


def write_tar(path: Path, samples: Iterable[dict], mtime: float = 0) -> str:
    """samples: dicts of member suffix to bytes, with __key__. mtime: a float gives each member a PAX header."""
    with TarWriter(str(path), encoder=False, mtime=mtime) as writer:
        for sample in samples:
            writer.write(sample)
    return str(path)


def write_tars(folder: Path, counts: Iterable[int], name: str = "{:05d}.tar", **members: bytes) -> Path:
    """Makes a folder of tars with so many pictures each, and these other members; keys 0-0, 0-1, ...; returns it."""
    folder.mkdir()
    first = 0
    for shard, count in enumerate(counts):
        write_tar(folder / name.format(shard), pictured((f"{shard}-{n}" for n in range(count)), first, **members))
        first += count
    return folder


def members(path: str | Path) -> dict[str, bytes]:
    """The content of a tar by name."""
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def index_of(tars: Path, place: Path) -> str:
    """Writes an index of a folder's tars; returns its path."""
    found = list(check_shards(sorted(map(str, tars.glob("*.tar")))))
    urls, tables, digests = zip(*((one.url, one.table, one.sha256) for one in found), strict=True)
    write_index(place, urls, tables, digests)
    return str(place)


class Steps:
    """All ranks' streams side by side; `states`: of the ranks, after the latest step."""

    def __init__(self, config, world_size=1, micro=None, batch=8, state=None, seed=3, tokens=None):
        micro = micro or batch // world_size
        self.micro_batches = batch // (world_size * micro)
        options = dict(global_batch_size=batch, micro_batch_size=micro, world_size=world_size, seed=seed, state=state)
        self.streams = [train_batches(config, rank=rank, tokens=tokens, **options) for rank in range(world_size)]

    def infos(self, count: int) -> list[list[tuple]]:
        """So many global batches, as lists of what is known of a sample and its pixels or codes, in order."""
        taken = []
        for _ in range(count):
            parts = [[next(stream) for _ in range(self.micro_batches)] for stream in self.streams]
            self.states = [part[-1].state for part in parts]
            taken.append(
                [
                    (info, values.numpy().tobytes())
                    for part in parts
                    for batch in part
                    for info, values in zip(batch.infos, batch.values, strict=True)
                ]
            )
        return taken

    def take(self, count: int) -> list[list[tuple]]:
        """The same with the keys alone."""
        return [[(info.key, values) for info, values in step] for step in self.infos(count)]

    def delivered(self, count: int) -> list:
        """What is known of each sample of so many global batches."""
        return [info for step in self.infos(count) for info, _ in step]

    def state(self) -> dict:
        """The merged one, through JSON as in a checkpoint."""
        return json.loads(json.dumps(merge_states(self.states)))
