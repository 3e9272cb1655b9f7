"""Each kind of damage is found and named, what is whole is not accused, and every byte is read once."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import signal
import tarfile

import numpy as np
import pytest
from faults.corpus import SIZE, flipped, member, patched, tar, with_header
from samples import encoded, index_of, picture, pictured, write_tar
from serving import Server

from data import DataError, scan
from data.index import Index, write_index
from data.parallel import in_processes
from data.prep import check as checking
from data.prep.check import check_shard, check_shards, find_duplicates, missing_shards
from data.storage import Timeouts

# -------------------------------------------------------------------------------------------------------------- damage


def header(content: bytes, name: str) -> int:
    """The byte where a member begins."""
    return content.index(name.encode() + b"\0")


# Six samples part/0 to part/5, each jpg and txt. A time with a fraction is in PAX headers.
CONTENTS = [("jpg", encoded(picture(3))), ("txt", b"a caption")]
WHOLE = tar(
    *(
        member(f"part/{n}.{suffix}", content, tarfile.PAX_FORMAT, mtime=0.5)
        for n in range(6)
        for suffix, content in CONTENTS
    )
)
AT = header(WHOLE, "part/3.jpg")
LAST = header(WHOLE, "part/5.txt")

# Name -> (kind and message of the problem that is to be found, damaged tar).
DAMAGES = {
    "cut between members": ("truncated", f"ends at byte {AT:,}, between two members", WHOLE[:AT]),
    "cut in a header": ("truncated", "ends at byte .*, inside a header", WHOLE[: AT + 200]),
    "cut in the first header": ("truncated", "ends at byte 200, inside a header", WHOLE[:200]),
    "cut in an image": ("truncated", r"inside part/3\.jpg \([\d,]+ bytes from byte", WHOLE[: AT + 900]),
    "cut in padding": ("truncated", r"inside part/5\.txt \(9 bytes from byte", WHOLE[: LAST + 600]),
    "cut in a PAX header": ("truncated", "ends at byte .*, inside a header", WHOLE[: AT - 1]),
    "cut before the end mark": ("truncated", "without an end mark", WHOLE[: LAST + 1024]),
    "flipped bit": ("corrupt", rf"the header at byte {AT:,} is damaged \(bad checksum\)$", patched(WHOLE, AT, b"\xff")),
    "flipped first bit": ("corrupt", "byte 0 is damaged .* or it is no tar$", patched(WHOLE, 0, b"\xff")),
    "claims 8 GiB": ("corrupt", "claims 8,589,934,591 bytes", with_header(WHOLE, AT, SIZE, b"77777777777\0")),
    "zeroed header": ("corrupt", f"512 zero bytes at byte {AT:,}, but more members", patched(WHOLE, AT, bytes(512))),
    "zeroed page": ("corrupt", f"zero bytes at byte {AT:,}, but more members", patched(WHOLE, AT, bytes(4096))),
    "zeroed start": ("corrupt", "512 zero bytes at byte 0, but more members", patched(WHOLE, 0, bytes(512))),
    "zeroed last header": ("corrupt", r"the header at byte [\d,]+ is zeroed", patched(WHOLE, LAST, bytes(512))),
    "all zeros": ("empty", "no sample", bytes(len(WHOLE))),
    "garbage behind": ("corrupt", "7 bytes of something else behind its end", WHOLE + b"garbage"),
    "two tars": ("corrupt", "but more members .* or several tars in one file", WHOLE + WHOLE),
    "gzip": ("corrupt", "no tar: it is compressed with gzip: unpack it", gzip.compress(WHOLE)),
    "bzip2": ("corrupt", "no tar: it is compressed with bzip2", bz2.compress(WHOLE)),
    "xz": ("corrupt", "no tar: it is compressed with xz", lzma.compress(WHOLE)),
    "zip": ("corrupt", "no tar: it is a zip file", b"PK\x03\x04" + WHOLE),
    "text": ("corrupt", "byte 0 is damaged .* or it is no tar", b"this is no tar at all\n" * 100),
    "web page": ("corrupt", "no tar: it is a web page", b"<html>404 Not Found</html>"),
    "git lfs": ("corrupt", "no tar: it is a Git LFS pointer", b"version https://git-lfs.github"),
    "0 bytes": ("empty", "^0 bytes$", b""),
}


@pytest.mark.parametrize(("kind", "message", "content"), DAMAGES.values(), ids=DAMAGES)
def test_each_damage_is_named(tmp_path, kind, message, content):
    path = tmp_path / "damaged.tar"
    path.write_bytes(content)
    checked = check_shard(str(path))
    (problem,) = checked.problems
    assert problem.kind == kind
    assert re.search(message, problem.message), problem.message
    assert "\n" not in problem.message
    assert checked.status == "broken" and checked.table is None
    assert (checked.bytes, checked.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    with pytest.raises(DataError):  # so that training does not begin with it either
        scan(str(path))


def test_samples_before_the_damage_are_counted(tmp_path):
    (tmp_path / "cut.tar").write_bytes(WHOLE[: header(WHOLE, "part/3.txt") + 100])
    checked = check_shard(str(tmp_path / "cut.tar"))
    assert checked.samples == 3 and checked.key(2) == "part/2"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_whole_tar_is_ok_whatever_else_is_in_it(tmp_path, format):
    """Long and Unicode names, folders, links, files that are no samples, one block of zeros at its end."""
    path = tmp_path / "a.tar"
    long = "folder/" * 12 + "x" * 60 if format == tarfile.USTAR_FORMAT else "long" * 60
    members = [
        member("folder", form=format, type=tarfile.DIRTYPE),
        member("folder/link", form=format, type=tarfile.SYMTYPE, linkname="elsewhere"),
    ]
    if format == tarfile.PAX_FORMAT:
        members.insert(0, tarfile.TarInfo.create_pax_global_header({"comment": "made by hand"}))
    for name in ("README", "a.jpg", "a.txt", "猫.jpg", f"{long}.jpg"):
        content = b"a caption" if name == "a.txt" else encoded(picture(len(name)))
        members.append(member(name, content, format))
    path.write_bytes(tar(*members, end=bytes(512)))
    checked = check_shard(str(path), decode_images=True)
    assert (checked.status, checked.problems) == ("ok", [])
    assert [checked.key(n) for n in range(checked.samples)] == ["a", "猫", long]
    table = scan(str(path))
    for name in ("starts_n", "stops_n", "keys_n"):
        assert np.array_equal(getattr(checked.table, name), getattr(table, name)), name


# ------------------------------------------------------------------------------------------------------------- samples


def test_bad_samples_are_named_in_a_tar_that_can_be_read(tmp_path):
    image = encoded(picture(0, (200, 200)))
    samples = [
        {"__key__": "good", "jpg": image},
        {"__key__": "caption-only", "txt": b"a"},
        {"__key__": "cut", "jpg": image[:2000]},
        {"__key__": "fake", "png": b"no image"},
        {"__key__": "../up", "jpg": image},
        {"__key__": "twice", "jpg": image},
        {"__key__": "twice", "jpg": image, "txt": b"b"},
    ]
    path = write_tar(tmp_path / "a.tar", samples)
    plain, decoded = check_shard(path), check_shard(path, decode_images=True)
    assert [(one.kind, one.sample, one.key) for one in plain.problems] == [
        ("no image", 1, "caption-only"),
        ("bad key", 4, "../up"),
        ("duplicate key", 5, "twice"),
    ]
    assert "two members are called twice.jpg" in plain.problems[2].message
    assert plain.status == decoded.status == "flawed"
    assert len(plain.table) == plain.samples == 6
    new = [one for one in decoded.problems if one not in plain.problems]
    assert [(one.kind, one.sample, one.key) for one in new] == [("undecodable", 2, "cut"), ("undecodable", 3, "fake")]
    assert "truncated" in new[0].message and "no JPEG, PNG or WebP image" in new[1].message


def test_a_tar_without_any_image_is_broken(tmp_path):
    checked = check_shard(write_tar(tmp_path / "a.tar", [{"__key__": str(n), "txt": b"a"} for n in range(3)]))
    said = [("empty", "no image and no tokens in any of its 3 samples")]
    assert [(one.kind, one.message) for one in checked.problems] == said
    assert checked.status == "broken" and checked.counts == {"empty": 1}


def test_of_many_problems_the_first_are_named_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "NAMED_SAMPLES", 4)
    samples = [{"__key__": f"{n:02}", "txt": b"a"} for n in range(30)] + pictured(["x"])
    checked = check_shard(write_tar(tmp_path / "a.tar", samples))
    assert [one.key for one in checked.problems] == ["00", "01", "02", "03"]
    assert checked.counts == {"no image": 30}


def test_the_record_is_json_even_of_odd_names(tmp_path):
    path = tmp_path / "a.tar"
    no_utf_8 = member("caf\udce9.txt", b"a", tarfile.GNU_FORMAT)
    path.write_bytes(tar(no_utf_8, member("b.jpg", encoded(picture(0)))))
    record = json.loads(json.dumps(check_shard(str(path)).record()))
    assert list(record) == ["shard", "status", "samples", "bytes", "sha256", "counts", "problems"]
    assert record["shard"] == str(path) and record["status"] == "flawed" and record["samples"] == 2
    assert record["bytes"] == path.stat().st_size
    assert record["problems"] == [
        {"kind": "no image", "message": "caf\udce9: no image among its members: txt", "sample": 0, "key": "caf\udce9"}
    ]


# ---------------------------------------------------------------------------------------------------------- all shards


def test_copies_and_doubled_keys_name_both_places(tmp_path):
    def shard(name, keys):
        return write_tar(tmp_path / name, [{"__key__": key, "jpg": encoded(picture(len(name)))} for key in keys])

    paths = [
        shard("a.tar", ["k0", "k1", "k2", "k1"]),
        shard("bb.tar", ["k9", "k2", "k0"]),
        shard("ccc.tar", [f"n{n}" for n in range(9)]),
        shard("dddd.tar", [f"n{n}" for n in range(9)]),
    ]
    (tmp_path / "copy.tar").write_bytes((tmp_path / "bb.tar").read_bytes())
    found = list(check_shards([*paths, str(tmp_path / "copy.tar")]))
    assert all(checked.status == "ok" for checked in found)
    find_duplicates(found)
    a, b, c, d, copy = found
    assert [(one.kind, one.message, one.sample, one.key) for one in a.problems] == [
        ("duplicate key", "k1 is also the key of sample 1", 3, "k1")
    ]
    assert [(one.message, one.sample) for one in b.problems] == [
        (f"k2 is also the key of sample 2 of {paths[0]}", 1),
        (f"k0 is also the key of sample 0 of {paths[0]}", 2),
    ]
    assert not c.problems
    assert [one.sample for one in d.problems] == [0, 1, 2, 3, 4] and d.counts == {"duplicate key": 9}
    assert [(one.kind, one.message) for one in copy.problems] == [("duplicate shard", f"the same bytes as {paths[1]}")]
    assert {checked.status for checked in (a, b, d, copy)} == {"flawed"}


def test_a_million_keys_are_compared_without_a_python_object_for_each(tmp_path):
    """100 shards of 10,000 samples, of which two samples have the same key."""
    keys = np.random.default_rng(0).permutation(1_000_000).astype(np.uint64)
    keys[777_777] = keys[123_456]
    found = []
    for number in range(100):
        table = checking.SampleTable(
            1, np.zeros(10_000, np.int64), np.zeros(10_000, np.int64), keys[number * 10_000 :][:10_000]
        )
        names = b"".join(b"%d\0" % (number * 10_000 + n) for n in range(10_000)) if number == 77 else b""
        packed = checking.zlib.compress(names)
        found.append(checking.Checked(f"{number}.tar", 1, f"{number:064x}", 10_000, table, packed))
    find_duplicates(found)
    (problem,) = [one for checked in found for one in checked.problems]
    assert problem.message == "777777 is also the key of sample 3456 of 12.tar"
    assert found[77].problems == [problem]


@pytest.fixture
def indexed(tars):
    """The folder `tars` with an index of its three tars."""
    index_of(tars, tars / "index.safetensors")
    return tars


def compared(folder, *names):
    index = Index(folder / "index.safetensors")
    found = list(check_shards([str(folder / name) for name in names], index=index))
    return found + missing_shards(found, index)


def test_shards_as_their_index_tells_are_ok(indexed):
    found = compared(indexed, *(f"train-{n:06d}.tar" for n in range(3)))
    assert [checked.status for checked in found] == ["ok"] * 3


def test_what_differs_from_the_index_is_said(indexed):
    paths = [indexed / f"train-{n:06d}.tar" for n in range(3)]
    content = paths[0].read_bytes()
    at = content.index(b"\xff\xda", header(content, "0-3.jpg")) + 100  # in the pixels of an image
    paths[0].write_bytes(flipped(content, at))
    write_tar(paths[1], pictured(f"new-{n}" for n in range(3)))
    paths[2].rename(indexed / "other.tar")
    first, second, other, missing = compared(indexed, paths[0].name, paths[1].name, "other.tar")
    place = indexed / "index.safetensors"
    assert [(one.kind, one.message) for one in first.problems] == [
        ("index", f"not as in the index {place}: other content (SHA-256)")
    ]
    (problem,) = second.problems
    assert re.search(r"[\d,]+ bytes and not [\d,]+, 3 samples and not 9, other content", problem.message)
    assert [(one.kind, one.message) for one in other.problems] == [("index", f"not in the index {place}")]
    assert [(one.kind, missing.status, missing.url) for one in missing.problems] == [
        ("missing", "broken", str(paths[2]))
    ]


def test_other_keys_and_positions_are_told_apart(indexed):
    path = indexed / "train-000002.tar"
    content = path.read_bytes()
    index = Index(indexed / "index.safetensors")
    table, digest = index.table(str(path), ""), index.sha256(str(path), "")
    wrong = [
        (table.__class__(table.bytes, table.starts_n, table.stops_n, table.keys_n[::-1]), "other keys"),
        (table.__class__(table.bytes, table.starts_n + 512, table.stops_n, table.keys_n), "samples at other positions"),
    ]
    for other, message in wrong:
        write_index(indexed / "index.safetensors", [str(path)], [other], [digest])
        (checked,) = compared(indexed, path.name)
        assert [one.message.split(": ")[1] for one in checked.problems] == [message]
    assert path.read_bytes() == content


# ------------------------------------------------------------------------------------------------------------- reading


def test_remote_tars_are_read_once_and_like_local_ones(tars):
    paths = sorted(tars.glob("*.tar"))
    with Server(folder=tars) as server:
        found = list(check_shards([server.url(f"/{path.name}") for path in paths], decode_images=True))
        for path, checked in zip(paths, found, strict=True):
            local = check_shard(str(path))
            assert (checked.status, checked.samples, checked.sha256) == ("ok", local.samples, local.sha256)
            assert np.array_equal(checked.table.starts_n, local.table.starts_n)
        for path in paths:  # in pieces that follow each other, but for one byte that tells the size
            asked = [request.range for request in server.requests if request.path == f"/{path.name}"]
            assert asked == ["bytes=0-0", f"bytes=0-{path.stat().st_size - 1}"]


def test_a_remote_damage_is_named(tars):
    content = (tars / "train-000001.tar").read_bytes()
    at = header(content, "1-4.jpg")
    with Server({"/cut.tar": content[: at + 700]}) as server:
        checked = check_shard(server.url("/cut.tar", user="name:secret"))
    assert [one.kind for one in checked.problems] == ["truncated"] and "inside 1-4.jpg" in checked.problems[0].message
    assert "secret" not in json.dumps(checked.record())


def test_what_cannot_be_read_is_a_problem_and_not_the_end(tars, tmp_path):
    (tmp_path / "folder.tar").mkdir()
    with Server(folder=tars) as server:
        server.fault("/train-000001.tar", status=403)
        urls = [server.url(f"/train-{n:06d}.tar") for n in range(4)]
        found = list(check_shards([*urls, str(tmp_path / "none.tar"), str(tmp_path / "folder.tar")]))
    assert [checked.status for checked in found] == ["ok", "broken", "ok", "broken", "broken", "broken"]
    problems = [checked.problems[0] for checked in found if checked.problems]
    assert {one.kind for one in problems} == {"unreadable"}
    assert "HTTP 403" in problems[0].message and "HTTP 404" in problems[1].message
    assert "No such file" in problems[2].message and "nor tars under" in problems[3].message
    assert all(checked.sha256 is None for checked in found if checked.problems)


def test_a_store_that_breaks_off_is_unreadable_and_not_damaged(tars):
    with Server(folder=tars) as server:
        server.fault("/train-000000.tar", times=1)  # as it should, for the size
        server.fault("/train-000000.tar", cut_after_bytes=5000)
        checked = check_shard(server.url("/train-000000.tar"), timeouts=Timeouts(0.5, 0.5))
    assert [one.kind for one in checked.problems] == ["unreadable"]


def test_memory_holds_no_more_than_a_sample_and_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "RANGE_BYTES", 4096)
    monkeypatch.setattr("data.tar_reader.RANGE_BYTES", 4096)
    image = encoded(picture(0, (100, 100)))
    path = write_tar(tmp_path / "a.tar", [{"__key__": f"{n}", "jpg": image} for n in range(200)])
    most = 0
    fill = checking._Hashed._fill

    def measured(self, stop):
        nonlocal most
        fill(self, stop)
        most = max(most, len(self.content))

    monkeypatch.setattr(checking._Hashed, "_fill", measured)
    assert check_shard(path).status == "ok"
    assert len(image) < most < 2 * (len(image) + 1024) + 2 * 4096 + 10240


@pytest.mark.process
def test_processes_give_what_one_gives_in_order(tars):
    paths = [str(path) for path in sorted(tars.glob("*.tar"))] * 3
    one, three = (list(check_shards(paths, jobs=jobs)) for jobs in (1, 3))
    assert [checked.record() for checked in one] == [checked.record() for checked in three]


@pytest.mark.process
def test_a_killed_process_is_told():
    with pytest.raises(DataError, match=r"a process was killed.*--jobs 1"):
        list(in_processes(lambda value: os.kill(os.getpid(), signal.SIGKILL), range(4), 2))
