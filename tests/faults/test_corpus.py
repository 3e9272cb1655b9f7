"""Every image and every tar of the corpus comes to its stated end: decoded alone, in a stream, in a run."""

import builtins
import io
import itertools
import pickle
import re
import signal
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from comparing import refusal
from faults import corpus
from faults.corpus import IMAGES, TARS, Delivered, Kind, Pixels, Refused, Skipped, Undetectable, named
from PIL import Image
from ranks import settings
from samples import Steps, index_of
from torchvision.transforms import v2

import data
from data import DataConfig, DataError, ImageError, decode
from data.index import Index
from data.prep.check import check_shards
from data.tar_reader import SampleSpan, read_members, read_plain_members, sample_spans

EPOCHS = 2
HANG_SECONDS = 20


@pytest.fixture
def no_hang():
    """Python's tarfile has read in circles; pytest.fail raises what no `except Exception` catches."""

    def stop(*_):
        pytest.fail(f"it takes more than {HANG_SECONDS} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


def share_off(found_hwc: np.ndarray, rgb_hwc: np.ndarray) -> float:
    """Share of the pixels that are off by more than 16; rows that should not be there are off."""
    rows = min(len(found_hwc), len(rgb_hwc))
    difference = np.abs(found_hwc[:rows].astype(int) - rgb_hwc[:rows]).max(-1)
    extra = found_hwc[rows:].shape[0] * found_hwc.shape[1]
    return (np.count_nonzero(difference > 16) + extra) / (found_hwc.shape[0] * found_hwc.shape[1])


def center_crop(rgb_hwc: np.ndarray) -> np.ndarray:
    image = Image.fromarray(rgb_hwc.astype(np.uint8))
    return np.asarray(v2.Compose([v2.Resize(corpus.SIDE), v2.CenterCrop(corpus.SIDE)])(image))


def assert_pixels(found_hwc: np.ndarray, rgb_hwc: np.ndarray, tolerance: int) -> None:
    assert found_hwc.shape == rgb_hwc.shape
    assert np.abs(found_hwc.astype(int) - rgb_hwc).max() <= tolerance


# ------------------------------------------------------------------------------------------------------------ images


def test_there_are_enough_kinds():
    assert len(IMAGES) + len(TARS) >= 40
    assert all(kind.name and kind.why for kind in [*IMAGES, *TARS])


@pytest.mark.parametrize("kind", IMAGES, ids=named(IMAGES))
def test_decode(kind):
    match kind.outcome:
        case Pixels(rgb_hwc, tolerance):
            assert_pixels(np.asarray(decode(kind.content)), rgb_hwc, tolerance)
        case Skipped(reason):
            said = refusal(ImageError, decode, kind.content)
            assert reason in said and "0x" not in said
        case Undetectable(rgb_hwc, least):
            assert share_off(np.asarray(decode(kind.content)), rgb_hwc) > least


class Epochs(NamedTuple):
    """What a stream gave: key -> pictures, uint8 (h, w, 3); (key, reason) -> how often it was left out."""

    pictures: dict[str, list[np.ndarray]]
    skipped: Counter[tuple[str, str]]


def read(path: Path, images: int, **changes) -> Epochs:
    """The first `images` of the training stream of a tar, in its one lane."""
    config = {"image_size": corpus.SIDE, "crop": "center", "flip": False, "workers": 0, "max_bad_fraction": 1.0}
    if "sources" not in changes:
        config["train"] = str(path)
    stream = Steps(DataConfig(**config, **changes), batch=1).streams[0]
    pictures, skipped = defaultdict(list), Counter()
    for batch in itertools.islice(stream, images):
        pictures[batch.keys[0]].append(batch.values[0].permute(1, 2, 0).numpy())
        for sample in batch.skipped:
            assert sample.source == str(path)
            skipped[sample.key, sample.reason] += 1
    return Epochs(dict(pictures), skipped)


def assert_skipped(skipped: Counter[tuple[str, str]], reasons: dict[str, str]) -> None:
    """Each once in an epoch, but in the last one, which ends with the last good image, perhaps not yet."""
    assert {key for key, _ in skipped} == reasons.keys()
    for (key, reason), times in skipped.items():
        assert reasons[key] in reason
        assert EPOCHS - 1 <= times <= EPOCHS


@pytest.fixture(scope="module")
def all_images(tmp_path_factory) -> Path:
    """One tar with all images, as k0, k1, ..., and good ones g0, g1, ... among them."""
    path = tmp_path_factory.mktemp("images") / "all.tar"
    samples = [(corpus.good(n), corpus.member(f"k{n}.{kind.suffix}", kind.content)) for n, kind in enumerate(IMAGES)]
    path.write_bytes(corpus.tar(*itertools.chain(*samples)))
    return path


@pytest.fixture(scope="module")
def epochs(all_images) -> Epochs:
    used = sum(not isinstance(kind.outcome, Skipped) for kind in IMAGES)
    return read(all_images, EPOCHS * (len(IMAGES) + used))


@pytest.mark.parametrize(("number", "kind"), list(enumerate(IMAGES)), ids=[kind.name for kind in IMAGES])
def test_in_a_stream(epochs, number, kind):
    key = f"k{number}"
    if isinstance(kind.outcome, Skipped):
        assert key not in epochs.pictures
        assert_skipped(
            Counter({(k, why): times for (k, why), times in epochs.skipped.items() if k == key}),
            {key: kind.outcome.reason},
        )
        return
    assert len(epochs.pictures[key]) == EPOCHS
    assert key not in {skipped for skipped, _ in epochs.skipped}
    if isinstance(kind.outcome, Pixels):
        for found in epochs.pictures[key]:
            assert_pixels(found, center_crop(kind.outcome.rgb_hwc), kind.outcome.tolerance)


def assert_good(pictures: dict[str, list[np.ndarray]]) -> None:
    """Of good samples only, and as they are."""
    for key, several in pictures.items():
        assert all(np.array_equal(one, corpus.picture(int(key[1:]))) for one in several)


def test_good_images_among_them_come_once_an_epoch(epochs):
    good = {f"g{number}": epochs.pictures[f"g{number}"] for number in range(len(IMAGES))}
    assert {len(several) for several in good.values()} == {EPOCHS}
    assert_good(good)


def test_an_evaluation_leaves_out_the_same(all_images):
    """And threads, which 256 pixels on their shorter side would make too large; a training crop is no other."""
    reasons = {f"k{n}": kind.outcome.reason for n, kind in enumerate(IMAGES) if isinstance(kind.outcome, Skipped)}
    reasons |= {f"k{n}": "too long and thin" for n, kind in enumerate(IMAGES) if kind.name in corpus.THREADS}
    images = data.evaluation_images(str(all_images), image_size=256)
    used = [image.key for image in images]
    assert used == [key for n in range(len(IMAGES)) for key in (f"g{n}", f"k{n}") if key not in reasons]
    assert [skipped.key for skipped in images.skipped] == sorted(reasons, key=lambda key: int(key[1:]))
    assert all(reasons[skipped.key] in skipped.reason for skipped in images.skipped)


def test_any_flipped_bit_of_a_png_is_noticed_or_does_not_matter():
    """Its chunks have checksums, which Pillow does not look at where the pixels are."""
    values = corpus.picture(0, 6, 5)
    content = corpus.png(values, 8, corpus.COLORS, (b"gAMA", bytes(4)), split=40)
    noticed = 0
    for place, bit in itertools.product(range(len(content)), range(8)):
        try:
            found = decode(corpus.flipped(content, place, bit))
        except ImageError:
            noticed += 1
        else:
            assert np.array_equal(np.asarray(found), values), (place, bit)
    assert noticed > 7 * len(content)


def test_noise_in_an_image_raises_nothing_else():
    rng = np.random.default_rng(0)
    small = [kind.content for kind in IMAGES if 0 < len(kind.content) < 20_000]
    outcomes = Counter()
    for _ in range(2000):
        content = bytearray(small[rng.integers(len(small))])
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] = rng.integers(256)
        try:
            decode(bytes(content[: rng.integers(len(content) // 2, 2 * len(content))]))
            outcomes["decoded"] += 1
        except ImageError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 200


# -------------------------------------------------------------------------------------------------------------- tars


def write(kind: Kind, folder: Path) -> Path:
    path = folder / "odd.tar"
    path.write_bytes(kind.content)
    return path


def of(outcome: type) -> list[Kind]:
    return [kind for kind in TARS if isinstance(kind.outcome, outcome)]


@pytest.mark.parametrize("kind", of(Refused), ids=named(TARS))
def test_damaged_tar_is_refused(kind, tmp_path, no_hang):
    path, whole = write(kind, tmp_path), tmp_path / "whole.tar"
    whole.write_bytes(corpus.WHOLE)
    beside_a_whole_one = DataConfig(train=[str(whole), str(path)], image_size=corpus.SIDE)
    for use in (lambda: data.scan(str(path)), lambda: data.check(beside_a_whole_one), lambda: read(path, 10)):
        said = refusal(DataError, use)
        assert str(path) in said and kind.outcome.reason in said
    (checked,) = check_shards([str(path)])
    assert checked.status == "broken"


@pytest.mark.parametrize("kind", of(Delivered), ids=named(TARS))
def test_odd_tar_is_read(kind, tmp_path, no_hang):
    path = write(kind, tmp_path)
    expected = kind.outcome.pictures
    found = read(path, EPOCHS * len(expected))
    pictures = Counter((key, one.tobytes()) for key, several in found.pictures.items() for one in several)
    assert pictures == Counter({(key, corpus.picture(number).tobytes()): EPOCHS for key, number in expected})
    assert_skipped(found.skipped, kind.outcome.skipped)
    (checked,) = check_shards([str(path)])
    assert checked.status != "broken" and checked.samples == len(expected) + len(kind.outcome.skipped)


def test_pickles_are_never_opened(tmp_path):
    """As test_odd_tar_is_read has read them; they would have left a mark."""
    (kind,) = [kind for kind in TARS if kind.name == "pickles"]
    assert len(read(write(kind, tmp_path), 3).pictures) == 3
    assert not hasattr(builtins, "ibq_unpickled")
    pickle.loads(pickle.dumps(corpus.Opened()))
    assert builtins.ibq_unpickled
    del builtins.ibq_unpickled


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{no json", "its json is damaged"),
        (b"", "its json is damaged"),
        (b'{"caption": "caf\xe9"}', "its json is damaged"),
        (b"[" * 100_000, "its json is damaged"),
        (b'["a list"]', "its json is no mapping"),
    ],
    ids=["no JSON", "empty", "no UTF-8", "a bomb", "a list"],
)
def test_json_that_is_asked_for(tmp_path, content, said):
    path = tmp_path / "odd.tar"
    sample = corpus.member("s.png", corpus.pixels(7)) + corpus.member("s.json", content)
    path.write_bytes(corpus.tar(corpus.good(0), sample, corpus.good(1)))
    found = read(path, EPOCHS * 2, sources=[data.SourceConfig(root=str(path), caption_field="caption")])
    assert found.pictures.keys() == {"g0", "g1"}
    assert_skipped(found.skipped, {"s": said})


def indexed(path: Path, sound: bytes, damaged: bytes) -> Index:
    """The index of a tar that has been damaged since."""
    path.write_bytes(sound)
    place = index_of(path.parent, path.parent / "index.safetensors")
    path.write_bytes(damaged)
    return Index(place)


@pytest.mark.parametrize(("kind", "sound"), corpus.SILENT, ids=lambda value: getattr(value, "name", ""))
def test_what_no_header_tells_the_index_does(kind, sound, tmp_path):
    path = write(kind, tmp_path)
    assert len(data.scan(str(path))) > 0
    (alone,) = check_shards([str(path)])
    assert alone.status == "ok"
    index = indexed(path, sound, kind.content)
    (compared,) = check_shards([str(path)], index=index)
    assert [problem.kind for problem in compared.problems] == ["index"]
    assert "other content (SHA-256)" in compared.problems[0].message


def test_zeroed_block_in_a_jpeg_is_delivered_wrong(tmp_path):
    (kind,) = of(Undetectable)
    found = read(write(kind, tmp_path), 3)
    assert share_off(found.pictures["s"][0], center_crop(kind.outcome.rgb_hwc)) > kind.outcome.share_off
    assert not found.skipped


@pytest.mark.parametrize("kind", [kind for kind in TARS if len(kind.content) == len(corpus.WHOLE)], ids=named(TARS))
def test_damage_behind_an_index_is_noticed_where_it_is_read(kind, tmp_path, no_hang):
    """The tar is not scanned then. Its other samples are read as before, or none."""
    path = tmp_path / "odd.tar"
    indexed(path, corpus.WHOLE, kind.content)
    try:
        found = read(path, 6)
    except DataError as error:
        assert str(path) in str(error)
        return
    assert found.skipped
    assert_good(found.pictures)


def test_noise_in_a_tar_is_noticed_or_does_not_matter(tmp_path, no_hang):
    """One flipped bit, or one zeroed block, anywhere: no sample comes wrong, and none is lost without a word."""
    rng = np.random.default_rng(1)
    outcomes = Counter()
    for number in range(300):
        place = int(rng.integers(len(corpus.WHOLE)))
        damaged = corpus.flipped(corpus.WHOLE, place, int(rng.integers(8)))
        if number % 2:
            block = place // corpus.BLOCK * corpus.BLOCK
            damaged = corpus.patched(corpus.WHOLE, block, bytes(corpus.BLOCK))
        path = tmp_path / f"{number}.tar"
        path.write_bytes(damaged)
        outcomes[outcome_of(path)] += 1
    assert outcomes.keys() == {"refused", "skipped", "whole"} and min(outcomes.values()) > 20


def test_the_fast_parser_gives_what_tarfile_gives_or_nothing():
    """Of every sample of every tar of the corpus, and of samples with noise in them."""
    rng = np.random.default_rng(2)
    fast = slow = 0
    for kind in TARS:
        try:
            found = list(sample_spans(io.BytesIO(kind.content), "a.tar"))
        except DataError:
            found = [SampleSpan("", 0, max(1, len(kind.content) // 512) * 512, ())]
        for span in found:
            whole = kind.content[span.start : span.stop]
            for noise in range(10 if len(whole) < 20_000 else 1):
                content = bytearray(whole)
                for _ in range(min(noise, len(content))):
                    content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
                plain = read_plain_members(bytes(content))
                if plain is not None:
                    assert plain == list(read_members(bytes(content))), kind.name
                fast, slow = fast + (plain is not None), slow + (plain is None)
    assert fast > 300 and slow > 100


def outcome_of(path: Path) -> str:
    try:
        found = read(path, 3)
    except DataError:
        return "refused"
    assert_good(found.pictures)
    assert len(found.pictures.keys() | {key for key, _ in found.skipped}) == 3
    return "skipped" if found.skipped else "whole"


# -------------------------------------------------------------------------------------------------------------- runs


def tar_with_bad_ones(path: Path, images: int, every: int) -> list[str]:
    """A tar in which one of so many images is bad, of a kind as different as can be; the bad ones' keys. The others are
    odd every second time, such as those with EXIF that Pillow warns of."""
    odd, bad = ([k.content for k in IMAGES if isinstance(k.outcome, outcome)] for outcome in (Pixels, Skipped))
    members, keys = [], []
    for number in range(images):
        key, content = f"g{number}", odd[number // 2 % len(odd)] if number % 2 else corpus.pixels(number)
        if number % every == 0:
            key, content = f"bad{number}", bad[number * 7 % len(bad)]
            keys.append(key)
        members.append(corpus.member(f"{key}.jpg", content))
    path.write_bytes(corpus.tar(*members))
    return keys


def test_a_run_with_a_few_bad_images_comes_to_its_end(ranks, tmp_path):
    """One in twelve (8%), below data.max_bad_fraction; 160 images in 20 steps are more than one epoch."""
    bad = tar_with_bad_ones(tmp_path / "photos.tar", 132, 12)
    run = settings({"trainer.max_steps": 20, "data.train": tmp_path / "photos.tar", "data.val": "null"})
    finished = ranks.ibq("train", "debug", f"run={tmp_path / 'run'}", *run)
    assert finished.status == 0, finished.err
    skips = re.findall(r"skipped (\S+) in (\S+): (.+)", finished.err)
    assert len(skips) >= 10 and {key for key, _, _ in skips} <= set(bad)
    assert all(source == str(tmp_path / "photos.tar") and reason for _, source, reason in skips)
    assert "more samples are skipped" in finished.err
    assert "Traceback" not in finished.err and "Warning" not in finished.err


def test_a_run_with_bad_images_only_stops_with_one_line(ranks, tmp_path):
    tar_with_bad_ones(tmp_path / "photos.tar", 200, 1)
    run = settings({"data.train": tmp_path / "photos.tar", "data.val": "null"})
    finished = ranks.ibq("train", "debug", f"run={tmp_path / 'run'}", *run)
    assert finished.status == 2, finished.err
    (line,) = finished.error_lines
    assert finished.err.endswith(line + "\n")
    assert f"in {tmp_path / 'photos.tar'}" in line and "cannot be used" in line and "ibq shards check" in line
    assert "Traceback" not in finished.err
