"""Index files: what is written is found again, wherever the tars have moved; a million samples cost nothing."""

import json
import os
import time

import numpy as np
import pytest
from comparing import refusal

from data import DataError, scan
from data.index import Index, SampleTable, common_root, key_hash, without_query, write_index


def table(samples: int, first: int = 0) -> SampleTable:
    """Of a tar with samples of 1 KiB, whose key hashes count from `first`."""
    starts = np.arange(samples, dtype=np.int64) * 1024
    return SampleTable(samples * 1024 + 1024, starts, starts + 1024, np.arange(first, first + samples, dtype=np.uint64))


def digest(number: int) -> str:
    return f"{number:064x}"


def written(path, names, counts=None):
    """An index of tars with these samples, at `path`."""
    tables = [table(count, 1000 * n) for n, count in enumerate(counts or range(1, len(names) + 1))]
    write_index(path, names, tables, [digest(n) for n in range(len(names))])
    return Index(path)


def test_what_is_written_is_found_again(tars):
    paths = [str(path) for path in sorted(tars.glob("*.tar"))]
    tables = [scan(path) for path in paths]
    write_index(tars / "index.safetensors", paths, tables, [digest(n) for n in range(3)])
    index = Index(tars / "index.safetensors")
    assert len(index) == 3 and index.names == [f"train-{n:06d}.tar" for n in range(3)]
    for number, (path, true) in enumerate(zip(paths, tables, strict=True)):
        found = index.table(path, "")
        assert (found.bytes, len(found)) == (os.path.getsize(path), (7, 9, 4)[number])
        for name in ("starts_n", "stops_n", "keys_n"):
            assert np.array_equal(getattr(found, name), getattr(true, name)), name
        assert index.sha256(path, "") == digest(number)
    assert index.table(paths[0], "").keys_n[3] == key_hash("0-3")
    assert index.table(str(tars / "other.tar"), "") is None and index.sha256(str(tars / "other.tar"), "") is None


def test_it_is_a_plain_safetensors_file(tmp_path):
    from safetensors.numpy import load_file

    index = written(tmp_path / "i.safetensors", ["/tars/a.tar", "/tars/sub/b.tar"])
    tensors = load_file(tmp_path / "i.safetensors")
    assert tensors["names"].tobytes() == b"a.tar\nsub/b.tar" and tensors["root"].tobytes() == b"/tars/"
    assert {
        name: (value.dtype.name, value.shape) for name, value in tensors.items() if name not in ("names", "root")
    } == {
        "bytes": ("int64", (2,)),
        "samples": ("int64", (2,)),
        "sha256": ("uint8", (2, 32)),
        "starts": ("int64", (3,)),
        "stops": ("int64", (3,)),
        "keys": ("uint64", (3,)),
    }
    for name, value in tensors.items():
        assert np.array_equal(index.tensors[name], value), name


@pytest.mark.parametrize(
    ("indexed", "asked", "root"),
    [
        ("/data/a/x.tar", "/data/a/x.tar", ""),  # where it was
        ("/data/a/x.tar", "/moved/a/x.tar", "/moved/"),  # moved, under the root that is used now
        ("/data/a/x.tar", "{here}/a/x.tar", ""),  # moved, beside the index
        ("s3://bucket/a/x.tar", "s3://bucket/a/x.tar", ""),
        ("s3://bucket/a/x.tar", "{here}/a/x.tar", ""),  # downloaded
        ("/data/a/x.tar", "https://host/set/a/x.tar?token=1#part", "https://host/set/"),  # uploaded
        ("https://host/set/a/x.tar?token=1", "https://host/set/a/x.tar?token=2", ""),  # signed again
        ("https://me:secret@host/set/a/x.tar", "https://me:other@host/set/a/x.tar", "https://me:other@host/set/"),
    ],
)
def test_a_set_that_has_moved_is_found(tmp_path, indexed, asked, root):
    index = written(tmp_path / "i.safetensors", [indexed, indexed.replace("a/x.tar", "b.tar")])
    assert index.names == ["a/x.tar", "b.tar"]
    found = index.table(asked.format(here=tmp_path), root)
    assert found is not None and len(found) == 1


def test_no_secret_is_written(tmp_path):
    written(
        tmp_path / "i.safetensors", ["https://me:secret@host/a.tar?signature=hidden", "https://me:secret@host/b.tar"]
    )
    content = (tmp_path / "i.safetensors").read_bytes()
    assert b"https://host/" in content and b"a.tar\nb.tar" in content
    assert b"secret" not in content and b"hidden" not in content and b"me:" not in content


def test_the_common_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert common_root(["a/b/x.tar", "a/c/y.tar"]) == f"{tmp_path}/a/"
    assert common_root(["a/b/x.tar"]) == f"{tmp_path}/a/b/"
    assert common_root(["a/part-1/x.tar", "a/part-2/y.tar"]) == f"{tmp_path}/a/"  # whole names, not letters
    assert common_root(["/x.tar", "/a/y.tar"]) == "/"
    assert common_root(["s3://bucket/a/x.tar", "s3://bucket/b/y.tar"]) == "s3://bucket/"
    assert common_root(["https://host/a/x.tar?path=/b/c#d"]) == "https://host/a/"
    assert common_root(["s3://bucket/x.tar", "/a/y.tar"]) == ""
    assert common_root([]) == ""
    assert without_query("./x#1?.tar") == f"{tmp_path}/x#1?.tar"  # which local names may hold


def test_odd_names(tmp_path):
    names = ["/tars/with space.tar", "/tars/caf\udce9.tar", "/tars/猫.tar", "/tars/#1?.tar"]
    index = written(tmp_path / "i.safetensors", names)
    assert [len(index.table(name, "")) for name in names] == [1, 2, 3, 4]
    said = refusal(DataError, written, tmp_path / "other.safetensors", ["/tars/a\nb.tar"])
    assert "contains a line break: rename it" in said
    assert not (tmp_path / "other.safetensors").exists()


def test_a_failure_leaves_the_former_index_whole(tmp_path, monkeypatch):
    place = tmp_path / "i.safetensors"
    written(place, ["/tars/a.tar"])
    before = place.read_bytes()

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DataError, match=r"cannot write the index .*No space left on device; choose another file"):
        written(place, ["/tars/a.tar", "/tars/b.tar"])
    assert place.read_bytes() == before and os.listdir(tmp_path) == [place.name]
    with pytest.raises(DataError, match=r"cannot write the index .*No such file"):
        written(tmp_path / "nowhere" / "i.safetensors", ["/tars/a.tar"])


def test_what_is_no_index_or_damaged_is_said(tmp_path):
    place = tmp_path / "i.safetensors"
    written(place, ["/tars/a.tar", "/tars/b.tar"], counts=(500, 500))
    content = place.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])

    def with_header(change):
        changed = json.loads(json.dumps(header))
        change(changed)
        text = json.dumps(changed).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    cases = {
        b"": "is not an index",
        b"text": "is not an index",
        b"text " * 1000: "is not an index",
        content[: 8 + length // 2]: "is not an index",
        content[: len(content) // 2]: "is cut off: copy it again",
        content[:8] + content[8 : 8 + length].replace(b"{", b"[") + content[8 + length :]: "is not an index",
        content[:8] + bytes(length) + content[8 + length :]: "is not an index",
        with_header(lambda h: h.pop("keys")): "is not an index",
        with_header(lambda h: h["keys"].update(dtype="F64")): "is not an index",
        with_header(lambda h: h["keys"].update(shape=[7])): "is not an index",
        with_header(lambda h: h["keys"].update(data_offsets=[-8, 8])): "is not an index",
        with_header(lambda h: h.update(keys=[1])): "is not an index",
        with_header(lambda h: h.update(stops={**h["starts"], "shape": [1], "data_offsets": [0, 8]})): "is damaged",
        with_header(lambda h: h.update(sha256={"dtype": "U8", "shape": [32], "data_offsets": [0, 32]})): "is damaged",
        with_header(lambda h: h.update(bytes=h["starts"])): "is damaged",
        with_header(lambda h: h.update(samples=h["bytes"])): "is damaged",
    }
    for number, (damaged, message) in enumerate(cases.items()):
        place.write_bytes(damaged)
        said = refusal(DataError, Index, place)
        assert message in said and place.name in said, number
    with pytest.raises(DataError, match=r"cannot read the index .*No such file"):
        Index(tmp_path / "none.safetensors")


def anonymous_bytes() -> int:
    """Memory of this process that is no mapped file."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon:"))


def test_a_million_samples_are_mapped_and_not_read(tmp_path):
    """24 MB of arrays over 100 tars: opened and looked into in an instant, and never taken into memory."""
    place = tmp_path / "index.safetensors"
    names = [f"/tars/train-{n:06d}.tar" for n in range(100)]
    write_index(place, names, [table(10_000, 10_000 * n) for n in range(100)], [digest(n) for n in range(100)])
    assert place.stat().st_size > 24_000_000
    Index(place)  # so that nothing is imported while it is measured
    before, start = anonymous_bytes(), time.perf_counter()
    index = Index(place)
    found = index.table("/moved/train-000077.tar", "/moved/")
    seconds, grown = time.perf_counter() - start, anonymous_bytes() - before
    assert len(found) == 10_000 and found.keys_n[5] == 770_005 and found.starts_n[5] == 5 * 1024
    assert seconds < 2, f"{seconds:.3f} s"
    assert grown < 4_000_000, f"{grown:,} bytes"
    for name in ("starts", "stops", "keys"):
        assert np.shares_memory(getattr(found, f"{name}_n"), index.tensors[name]), name
        base = index.tensors[name]
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap), name
    total = sum(int(keys[0]) for keys in (index.table(name, "").keys_n for name in names))
    assert total == sum(range(0, 1_000_000, 10_000))
