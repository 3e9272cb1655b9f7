"""A run resumes with the data that it was trained on."""

from field.exchanged_data import folder_of, tar_of

from data.config import SourceConfig
from data.sources import open_source
from data.stream_state import differ


def identity(root) -> dict:
    return open_source(SourceConfig(root=str(root))).identity()


def test_another_tar_of_the_same_name_and_count_is_other_data(tmp_path):
    tar = tmp_path / "a.tar"
    first = identity(tar_of(tar, [b"1" * 600, b"2" * 100]))
    assert not differ(first, identity(tar_of(tar, [b"1" * 600, b"2" * 100])))
    second = identity(tar_of(tar, [b"1" * 100, b"2" * 600]))
    assert {**second, "contents": first["contents"]} == first and differ(first, second)
    former = {key: value for key, value in first.items() if key != "contents"}  # of an earlier version
    assert not differ(former, second) and differ({**former, "samples": 3}, second)
    assert not differ({**first, "contents": [None]}, second)  # in quarantine then


def test_other_names_of_the_same_count_in_a_folder_are_other_data(tmp_path):
    first = folder_of(tmp_path / "first", ["a.png", "b.png"], b"")
    same = folder_of(tmp_path / "same", ["a.png", "b.png"], b"")
    other = folder_of(tmp_path / "other", ["a.png", "c.png"], b"")
    names = identity(first)["names"]
    assert not differ(identity(first), {**identity(same), "names": names})
    assert differ(identity(first), {**identity(other), "names": names})
