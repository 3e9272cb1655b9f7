"""Which members of a tar form a sample."""

import pytest

from data.grouping import grouped
from data.sources import Layout


def keys(names: str, **layout) -> dict[str, list[str]]:
    """The samples of these members, in order: key -> suffixes."""
    groups = list(grouped(((name, None) for name in names.split()), Layout(**layout).suffixes))
    found = {key: [suffix for suffix, _ in members] for key, members in groups}
    assert len(found) == len(groups)
    return found


@pytest.mark.parametrize(
    ("names", "samples"),
    [
        ("a.jpg a.txt b.PNG", {"a": ["jpg", "txt"], "b": ["png"]}),
        ("IMG.0.png IMG.0.txt IMG.1.png", {"IMG.0": ["png", "txt"], "IMG.1": ["png"]}),
        ("IMG.png IMG.1.png", {"IMG": ["png"], "IMG.1": ["png"]}),
        ("v1.2/a.b.jpg v1.2/a.b.cls", {"v1.2/a.b": ["jpg", "cls"]}),
        ("a.jpeg.jpg a.json b.jpg.jpg", {"a": ["jpeg.jpg", "json"], "b": ["jpg.jpg"]}),  # as in LAION's tars
        ("a.1.codes a.1.cls a.2.codes", {"a.1": ["codes", "cls"], "a.2": ["codes"]}),
        ("a.jpg a.depth.npy a.txt", {"a": ["jpg", "depth.npy", "txt"]}),
        ("a.depth.npy a.jpg", {"a": ["depth.npy", "jpg"]}),
        ("a.0.npy a.0.jpg a.1.npy a.1.jpg", {"a.0": ["npy", "jpg"], "a.1": ["npy", "jpg"]}),
        ("a.0.npy a.1.npy a.1.jpg", {"a.0": ["npy"], "a.1": ["npy", "jpg"]}),
        ("a.npy b.npy", {"a": ["npy"], "b": ["npy"]}),
        ("a.jpg a.1.gif", {"a": ["jpg"], "a.1": ["gif"]}),  # a picture that is not read does not hide behind another
        ("README .hidden.jpg a/._b.jpg __meta.json__ __meta__/x.json a.jpg", {"a": ["jpg"]}),
        (
            "__bg__/0.txt __bg__/0.jpg __bg__/1.gif c/0.jpg",
            {"__bg__/0": ["txt", "jpg"], "__bg__/1": ["gif"], "c/0": ["jpg"]},
        ),
    ],
)
def test_a_key_ends_where_a_known_suffix_begins(names, samples):
    assert keys(names) == samples


def test_a_source_that_names_its_images_has_other_pictures_as_members():
    names = "a.jpg a.mask.png a.txt b.jpg b.mask.png"
    assert keys(names, image=("jpg",)) == {"a": ["jpg", "mask.png", "txt"], "b": ["jpg", "mask.png"]}
    assert keys("a.1.rgb.png a.1.txt", image=("rgb.png",)) == {"a.1": ["rgb.png", "txt"]}
