import io
import re
import zipfile

import numpy as np
import pytest
from comparing import refusal

from data import DataError
from data.npz import Npz


def images(count: int = 10) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 6, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_shards_together_read_each_image_once_in_the_same_batches(tmp_path, save, shards):
    save(tmp_path / "x.npz", arr_0=images(), classes=np.arange(10))
    npz = Npz(tmp_path / "x.npz")
    assert (npz.count, npz.height, npz.width) == (10, 4, 6) and npz.names == ["arr_0", "classes"]
    batches = [batch for shard in range(shards) for batch in npz.batches(4, (shard, shards))]
    assert [(batch.first, len(batch.levels_bhwc)) for batch in batches] == [(0, 4), (4, 4), (8, 2)]
    assert np.array_equal(np.concatenate([batch.levels_bhwc for batch in batches]), images())
    assert np.array_equal(npz.array("classes"), np.arange(10))


def test_a_batch_is_read_and_no_more(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=images(1000))
    read = []

    class Counting(io.FileIO):
        def read(self, size=-1):
            content = super().read(size)
            read.append(len(content))
            return content

    npz = Npz(tmp_path / "x.npz")
    npz.path = Counting(tmp_path / "x.npz")  # zipfile takes a file in a path's place
    batches = npz.batches(10)
    next(batches)
    assert sum(read) < 20_000 < images(1000).nbytes


def test_without_images_there_are_the_other_arrays(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(3))
    npz = Npz(tmp_path / "x.npz")
    assert npz.count == 0 and npz.names == ["mu"] and npz.array("mu").tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "array",
    [
        images().astype(np.float32),
        images().transpose(0, 3, 1, 2),
        images()[0],
        images()[:0],
        np.asfortranarray(images()),
    ],
    ids=["float32", "channels first", "one image", "none", "by columns"],
)
def test_images_of_another_form_are_one_line(tmp_path, array):
    np.savez(tmp_path / "x.npz", arr_0=array)
    said = refusal(DataError, Npz, tmp_path / "x.npz")
    assert re.search(r"x\.npz: arr_0 is .* but images are uint8 of shape \(n, height, width, 3\)", said)


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_npz(path):
    path.write_bytes(b"no zip at all")


def shorter_member(path):
    with zipfile.ZipFile(path) as archive:
        content = archive.read("arr_0.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", content[:-5])


def no_header(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"no header")


@pytest.mark.parametrize("damage", [cut_off, no_npz, shorter_member, no_header])
def test_a_damaged_file_is_one_line(tmp_path, damage):
    np.savez(tmp_path / "x.npz", arr_0=images())
    damage(tmp_path / "x.npz")
    assert re.search(r"x\.npz .*(cut off|damaged).*write it again", refusal(DataError, Npz, tmp_path / "x.npz"))


def test_a_byte_that_changed_is_found_while_reading(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=images())
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[400] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match="Bad CRC"):
        list(Npz(tmp_path / "x.npz").batches(4))


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    assert re.search(r"cannot read .*x\.npz: No such file", refusal(DataError, Npz, tmp_path / "x.npz"))
