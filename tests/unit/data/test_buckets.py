"""Buckets: which picture goes where, and that a stream of buckets keeps every promise of a stream of one size."""

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from bucket_audit import audited_epochs, mixed_kinds
from comparing import refusal
from PIL import Image
from samples import Steps, encoded, index_of, picture, write_tar

from data.buckets import Bucket, bucket_of, bucket_sizes, check_batches, sizes_of, with_batches
from data.config import DataConfig, FilterConfig, SourceConfig
from data.errors import DataError
from data.transforms import Size

# Five shapes, of which the sources have different numbers of pictures: width, height.
SHAPES = {"square": (40, 40), "wide": (60, 32), "tall": (30, 64), "wider": (90, 28), "huge": (90, 84)}
SOURCES = {
    "few": ([{"square": 5, "wide": 3, "tall": 2, "huge": 1}], 1.0),
    "many": ([{"square": 20, "wide": 14, "tall": 7}, {"wide": 11, "wider": 9, "huge": 6}], 3.0),
    "flat": ([{"wider": 13}, {"wide": 4, "square": 4, "wider": 3}, {"tall": 8, "huge": 5}], 2.0),
}
BUCKETS = ["24x24", "16x32", "32x16", "16x40", "48x48"]
BUCKET_OF = dict(zip(SHAPES, BUCKETS, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for each source, with tars of pictures of all shapes in mixed order, and their indexes."""
    folder = tmp_path_factory.mktemp("shapes")
    for number, (name, (shards, _)) in enumerate(SOURCES.items()):
        (folder / name).mkdir()
        for shard, shapes in enumerate(shards):
            samples = [
                {"__key__": f"{name}-{shard}-{n}-{kind}", "jpg": encoded(picture(7 * n + shard, SHAPES[kind]))}
                for n, kind in mixed_kinds(shapes, number, shard)
            ]
            write_tar(folder / name / f"{shard:05d}.tar", samples)
        index_of(folder / name, folder / name / "index.safetensors")
    return folder


def sources_of(folder):
    return [SourceConfig(name=name, root=str(folder / name), weight=weight) for name, (_, weight) in SOURCES.items()]


def config(folder, **options):
    settings = {"sources": sources_of(folder), "buckets": BUCKETS, "crop": "random", "workers": 0, "lanes": 12}
    return DataConfig(**{**settings, "shuffle_block": 4, **options})


@pytest.fixture(scope="module")
def stream(folder):
    """120 global batches, read by one process, and the state after them."""
    steps = Steps(config(folder), batch=12)
    return steps.infos(120), steps.state()


@pytest.fixture
def batches(stream):
    return stream[0]


# ---------------------------------------------------------------------------------------------------------- the sizes


def test_made_sizes_have_the_same_shapes_at_each_resolution():
    sizes = sizes_of(256, 2.0)
    assert set(sizes) == {Size(352, 192), Size(288, 224), Size(256, 256), Size(224, 288), Size(192, 352)}
    assert sizes_of(512, 2.0) == [Size(2 * size.height, 2 * size.width) for size in sizes]
    assert all(abs(size.pixels / 256**2 - 1) < 0.04 for size in sizes_of(256, 4.0))
    assert sizes_of(64, 1.0) == [Size(64, 64)]


def test_batches_have_about_equal_pixels_and_divide_the_global_batch():
    sizes = bucket_sizes(DataConfig(pixels=[256, 512, 1024], max_aspect=1.0))
    assert with_batches(sizes, 64) == [
        Bucket(Size(256, 256), 64),
        Bucket(Size(512, 512), 16),
        Bucket(Size(1024, 1024), 4),
    ]
    assert [one.batch for one in with_batches([Size(8, 8), Size(8, 12), Size(16, 24)], 12)] == [12, 6, 2]


@pytest.mark.parametrize(("batch", "sizes"), [(4, [256, 1024]), (7, [256, 512])])
def test_batches_that_cannot_have_equal_pixels_are_refused(batch, sizes):
    said = refusal(DataError, check_batches, [Size(side, side) for side in sizes], batch, 1, 1)
    assert f"no divisor of trainer.global_batch_size={batch} gives its steps about the pixels of" in said


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (300, 300, "256x256"),
        (400, 600, "224x288"),  # 3:2 is nearer to 9:7 than to 11:6
        (360, 640, "192x352"),
        (2000, 2000, "512x512"),
        (600, 1100, "384x704"),
        (511, 511, "256x256"),  # 512 would need to be enlarged
        (224, 288, "224x288"),
        (900, 300, "352x192"),
    ],
)
def test_a_picture_goes_to_the_highest_resolution_that_it_covers(height, width, expected):
    sizes = bucket_sizes(DataConfig(pixels=[256, 512]))
    (bucket,), (fits,) = bucket_of(sizes, np.array([[height, width]]), 1.0)
    assert fits and str(sizes[bucket]) == expected


def test_pictures_that_cover_no_bucket_fit_none_unless_they_may_be_enlarged():
    sizes = bucket_sizes(DataConfig(pixels=[256]))
    sizes_n2 = np.array([[200, 200], [180, 340], [0, 0]])
    assert bucket_of(sizes, sizes_n2, 1.0)[1].tolist() == [False, False, False]
    bucket_n, fits_n = bucket_of(sizes, sizes_n2, 1.3)
    assert fits_n.tolist() == [True, True, False]
    assert [str(sizes[bucket]) for bucket in bucket_n[:2]] == ["256x256", "192x352"]


def test_bucket_of_agrees_with_the_rule_written_out():
    sizes = bucket_sizes(DataConfig(pixels=[64, 128, 256], max_aspect=3.0))
    sizes_n2 = np.random.default_rng(0).integers(20, 700, (500, 2))
    bucket_n, fits_n = bucket_of(sizes, sizes_n2, 1.2)
    for (height, width), bucket, fits in zip(sizes_n2.tolist(), bucket_n, fits_n, strict=True):
        kept = {}
        for size in sizes:
            if size.height <= 1.2 * height and size.width <= 1.2 * width:
                scale = max(size.height / height, size.width / width)
                kept[size] = size.pixels / (scale * height * scale * width)
        assert fits == bool(kept)
        if kept:
            kept = {size: part for size, part in kept.items() if part >= 0.9 * max(kept.values()) - 1e-9}
            most = max(size.pixels for size in kept)
            kept = {size: part for size, part in kept.items() if 1.5 * size.pixels >= most}
            assert kept[sizes[bucket]] == pytest.approx(max(kept.values()))


def test_a_bucket_with_more_pixels_does_not_take_pictures_of_another_shape():
    bucket_n, _ = bucket_of([Size(256, 256), Size(256, 512)], np.array([[512, 512], [400, 800]]), 1.0)
    assert bucket_n.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"buckets": ["384"]}, "'384' must be HEIGHTxWIDTH in pixels, 1 to 8192, such as 384x640"),
        ({"buckets": ["0x64"]}, "'0x64' must be HEIGHTxWIDTH"),
        ({"buckets": ["64x64"], "pixels": [64]}, "data.buckets and data.pixels are both given: leave one out"),
        ({"pixels": [100]}, "100 must be a multiple of 8"),
        ({"buckets": ["64x96"], "resize": "adm_center_crop"}, "adm_center_crop is defined for squares only"),
        ({"buckets": ["64x64"], "content": "tokens"}, "data.buckets is for images"),
    ],
)
def test_impossible_buckets_are_refused(settings, message):
    assert message in refusal(DataError, bucket_sizes, DataConfig(**settings))


# --------------------------------------------------------------------------------------------------------- the stream


def test_each_step_holds_one_bucket_and_each_picture_its_own(batches):
    for step in batches:
        pixels = {len(values) for _, values in step}
        (bucket,) = {BUCKET_OF[info.key.rsplit("-", 1)[1]] for info, _ in step}
        height, width = map(int, bucket.split("x"))
        assert pixels == {3 * height * width}
        assert len(step) == {"24x24": 12, "16x32": 12, "32x16": 12, "16x40": 12, "48x48": 3}[bucket]


def test_audit_of_buckets(stream):
    """Every sample once in each epoch of its source and bucket, sources by their weights, each sample equally often."""
    batches, state = stream
    assert audited_epochs(batches, state, SOURCES, BUCKET_OF, most_off=24) > 50  # up to two steps of a bucket


@pytest.mark.parametrize(("world_size", "workers"), [(1, 3), (3, 1), (3, 2), (1, 7)])
def test_global_batches_are_the_same_for_all_divisions(folder, batches, world_size, workers):
    assert Steps(config(folder, workers=workers), world_size, batch=12).infos(40) == batches[:40]


@pytest.fixture(scope="module")
def large_batches(folder):
    """9 global batches of 48 images, which more divisions divide."""
    return Steps(config(folder, lanes=48), batch=48).infos(12)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 3), (2, 2), (3, 1), (4, 2)])
def test_large_batches_are_the_same_for_all_divisions(folder, large_batches, world_size, workers):
    assert Steps(config(folder, lanes=48, workers=workers), world_size, batch=48).infos(6) == large_batches[:6]


def test_chain_of_divisions_is_bit_identical(folder, large_batches):
    taken, state = [], None
    for world_size, workers in [(4, 2), (2, 3), (6, 1)]:
        steps = Steps(config(folder, lanes=48, workers=workers), world_size, batch=48, state=state)
        taken += steps.infos(4)
        state = steps.state()
    assert taken == large_batches


def test_micro_batches_give_the_same_batches(folder, large_batches):
    assert Steps(config(folder, lanes=48), 2, micro=8, batch=48).infos(6) == large_batches[:6]


def test_resume_after_any_step_is_bit_identical(folder, batches):
    steps = Steps(config(folder), batch=12)
    for number in range(12):
        assert steps.infos(1) == [batches[number]]
        assert Steps(config(folder), batch=12, state=steps.state()).infos(1) == [batches[number + 1]]


def test_a_chain_that_does_not_divide_loses_and_repeats_nothing(folder):
    state, delivered = None, []
    for world_size, workers, batch in [(1, 2, 12), (5, 1, 40), (2, 0, 48), (3, 1, 24)]:
        settings = config(folder, workers=workers, buckets=BUCKETS[:4])
        steps = Steps(settings, world_size, batch=batch, state=state)
        delivered += steps.delivered(12)
        state = steps.state()
    counts = Counter((info.source, info.key, info.position) for info in delivered)
    assert max(counts.values()) == 1


@pytest.mark.process
def test_worker_processes_deliver_what_one_process_does(folder, batches):
    first = Steps(config(folder, workers=3), batch=12)
    taken = first.infos(15)
    second = Steps(config(folder, workers=2), batch=12, state=first.state())
    assert taken + second.infos(15) == batches[:30]


def test_sizes_come_from_the_headers_where_there_is_no_index(folder, batches, tmp_path):
    for name in SOURCES:
        (tmp_path / name).mkdir()
        for tar in (folder / name).glob("*.tar"):
            (tmp_path / name / tar.name).symlink_to(tar)
    steps = Steps(config(tmp_path), batch=12).infos(10)
    found, expected = ([[(info.key, pixels) for info, pixels in step] for step in some] for some in (steps, batches))
    assert found == expected[:10]


def test_an_index_of_before_sizes_were_kept_is_as_good_for_local_tars(folder, batches, monkeypatch):
    monkeypatch.setattr("data.index.OPTIONAL", ())
    assert Steps(config(folder), batch=12).infos(3) == batches[:3]


def test_images_of_a_folder(tmp_path):
    for number in range(12):
        picture(number, (64, 32) if number % 3 else (40, 40)).save(tmp_path / f"{number}.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # displayed with its sides swapped
    picture(50, (32, 64)).save(tmp_path / "turned.jpg", exif=rotated)
    settings = DataConfig(train=str(tmp_path), buckets=["16x16", "16x32"], workers=0, lanes=2)
    seen = {info.key: len(pixels) for step in Steps(settings, batch=2).infos(20) for info, pixels in step}
    assert seen == {f"{n}.png": 3 * 16 * (32 if n % 3 else 16) for n in range(12)} | {"turned.jpg": 3 * 16 * 32}


def test_pixels_are_those_of_the_crop_and_nothing_is_enlarged(tmp_path):
    gradient = np.tile(np.arange(120, dtype=np.uint8) * 2, (40, 1))  # x counts from left to right
    Image.fromarray(gradient).convert("RGB").save(tmp_path / "a.png")
    settings = DataConfig(train=str(tmp_path), buckets=["40x60"], workers=0, lanes=1, crop="center", flip=False)
    ((_, pixels),) = Steps(settings, batch=1).infos(1)[0]
    found = np.frombuffer(pixels, np.uint8).reshape(3, 40, 60)
    assert (found == gradient[None, :, 30:90]).all()


def test_what_no_bucket_takes_is_told(tmp_path, caplog):
    for number in range(6):
        picture(number, (40, 40) if number else (20, 20)).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    settings = DataConfig(train=str(tmp_path), buckets=["32x32"], workers=0, lanes=1)
    steps = Steps(settings, batch=1)
    with caplog.at_level(logging.WARNING):
        keys = Counter(info.key for step in steps.infos(12) for info, _ in step)
    assert set(keys) == {f"{n}.png" for n in range(1, 6)}
    assert "1 pictures are smaller than their bucket and left out" in steps.streams[0].describe(10)
    assert "bucket 32x32: 5 pictures, 100.0% of all, 1 in a step" in steps.streams[0].describe(10)
    assert "broken.png" in caplog.text  # met in its turn, and listed as everywhere


def test_pictures_that_only_xmp_turns_are_in_the_bucket_of_their_shape(tmp_path):
    xmp = b'<rdf:Description tiff:Orientation="8"/>'
    for number in range(4):
        picture(number, (32, 16)).save(tmp_path / f"turned{number}.jpg", xmp=xmp)
        picture(number, (32, 16)).save(tmp_path / f"wide{number}.jpg")
    settings = DataConfig(train=str(tmp_path), buckets=["16x32", "32x16"], workers=0, lanes=2)
    steps = Steps(settings, batch=2)
    assert "2 in a step" in steps.streams[0].describe(1) and "left out" not in steps.streams[0].describe(1)
    batches = [next(steps.streams[0]) for _ in range(8)]
    assert {(key.rstrip("0123.jpg"), *batch.values.shape[2:]) for batch in batches for key in batch.keys} == {
        ("turned", 32, 16), ("wide", 16, 32)
    }  # fmt: skip


def write_padded(path, sizes):
    """A tar of pictures of these sizes, each of which has the same number of bytes."""
    images = [encoded(picture(number, size)).ljust(4000, b"\0") for number, size in enumerate(sizes)]
    write_tar(path, [{"__key__": str(number), "jpg": image} for number, image in enumerate(images)])


@pytest.mark.parametrize("size", [(32, 64), (60, 60), (20, 20)], ids=["other shape", "larger", "too small"])
def test_a_picture_of_another_bucket_than_its_index_says_ends_the_run(tmp_path, size):
    """Without an error it would be cut to a wrong shape or left out, with or without `data.workers`."""
    (tmp_path / "tars").mkdir()
    write_padded(tmp_path / "tars/0.tar", [(64, 32)] * 4)
    index_of(tmp_path / "tars", tmp_path / "tars/index.safetensors")
    write_padded(tmp_path / "tars/0.tar", [(64, 32)] * 3 + [size])
    stream = Steps(DataConfig(train=str(tmp_path / "tars"), pixels=[32], workers=0, lanes=1), batch=1).streams[0]
    said = refusal(DataError, lambda: [next(stream) for _ in range(4)])
    assert "source train, 3 in" in said and f"its picture has {size[1]} x {size[0]} pixels" in said
    assert "it differs from its index" in said


def test_sizes_of_other_images_than_the_source_names_are_not_used(tmp_path, ibq):
    """Each key has a wide JPEG and a tall PNG."""
    wide, tall = encoded(picture(0, (64, 32))), encoded(picture(1, (32, 64)), "PNG")
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/0.tar", [{"__key__": str(n), "jpg": wide, "png": tall} for n in range(4)])
    assert ibq("shards", "check", tmp_path / "tars", "--image", "jpg", "--write-index")[0] == [0]
    for image, shape in ((["jpg"], (32, 64)), (["png"], (64, 32)), (["jpg", "png"], (32, 64))):
        source = SourceConfig(root=str(tmp_path / "tars"), image=image)
        steps = Steps(DataConfig(sources=[source], pixels=[32], workers=0, lanes=1, max_aspect=2.5), batch=1)
        (bucket,) = steps.streams[0].division.contents
        assert bucket.pictures == 4 and (bucket.bucket.size.width > bucket.bucket.size.height) == (shape[1] > shape[0])
        assert next(steps.streams[0]).keys


def test_filters_by_size_change_how_often_a_bucket_comes(tmp_path):
    for number in range(20):
        picture(number, (64, 32) if number % 2 else (48, 48)).save(tmp_path / f"{number}.png")
    one = SourceConfig(root=str(tmp_path), filters=FilterConfig(max_aspect_ratio=1.5))
    settings = DataConfig(sources=[one], buckets=["16x16", "16x32"], workers=0, lanes=2)
    assert "no picture belongs to 16x32: leave it out" in refusal(DataError, Steps, settings, batch=2)
    made = Steps(DataConfig(sources=[one], pixels=[16], workers=0, lanes=2), batch=2)
    assert {info.key for step in made.infos(20) for info, _ in step} == {f"{n}.png" for n in range(0, 20, 2)}


@pytest.mark.parametrize(
    ("options", "world_size", "message"),
    [
        (
            {"buckets": ["512x512"]},
            1,
            "none of its 11 pictures covers any bucket (512x512) and passes the filters: give smaller buckets",
        ),
        ({"buckets": ["24x24", "60x8"]}, 1, "no picture belongs to 60x8: leave it out"),
        ({}, 2, "bucket 48x48 has 3 images a step, which 2 processes x 1 micro-batches do not divide"),
    ],
)
def test_buckets_that_cannot_be_trained_are_refused(folder, options, world_size, message):
    assert message in refusal(DataError, Steps, config(folder, **options), world_size, batch=12)


def test_other_buckets_are_refused_when_resuming(folder):
    steps = Steps(config(folder), batch=12)
    steps.infos(2)
    state = steps.state()
    said = refusal(DataError, Steps, config(folder, buckets=BUCKETS[:3]), batch=12, state=state)
    assert "cannot resume: buckets was ['16x32'" in said
    said = refusal(DataError, Steps, config(folder, buckets=[]), batch=12, state=state)
    assert "and is now None; set data.buckets, data.pixels or data.max_aspect back" in said


# ------------------------------------------------------------------------------- what must not change between resumes


@pytest.fixture
def pictures(tmp_path):
    """A folder of 24 pictures, some of which are a little too small for their bucket."""
    (tmp_path / "pictures").mkdir()
    for number in range(24):
        size = [(40, 40), (64, 32), (30, 30)][number % 3]
        picture(number, size).save(tmp_path / "pictures" / f"{number:02d}.png")
    return tmp_path / "pictures"


def on_pictures(pictures, **options):
    settings = {"train": str(pictures), "buckets": ["32x32", "32x64"], "workers": 0, "lanes": 4, "shuffle_block": 2}
    return DataConfig(**{**settings, **options})


def test_a_changed_division_is_refused_when_resuming(pictures):
    """Names of buckets are equal, but the positions of their lanes would mean other samples."""
    steps = Steps(on_pictures(pictures), batch=4)
    steps.infos(3)
    said = refusal(DataError, Steps, on_pictures(pictures, max_enlargement=1.2), batch=4, state=steps.state())
    assert "bucket 32x32 had other samples of source train: set data.max_enlargement and the filters back" in said


def test_ranks_that_divide_otherwise_are_told_apart(pictures):
    one, other = (Steps(on_pictures(pictures, max_enlargement=most), batch=4).streams[0] for most in (1.0, 1.2))
    assert one.seen() != other.seen()


def test_a_file_that_cannot_be_read_now_ends_the_start(pictures, monkeypatch):
    """It would change its bucket, and with it the order of all others."""
    opened = Path.open

    def stale(path, *arguments, **options):
        if path.name == "05.png":
            raise OSError(116, "Stale file handle")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", stale)
    assert "05.png: Stale file handle" in refusal(DataError, Steps, on_pictures(pictures), batch=4)


@pytest.mark.parametrize("indexed", [True, False])
def test_quarantine_when_resuming_repeats_nothing(folder, tmp_path, indexed):
    for tar in (folder / "many").glob("*.tar"):
        (tmp_path / tar.name).symlink_to(tar)
    if indexed:
        index_of(tmp_path, tmp_path / "index.safetensors")
    settings = {"sources": [], "train": str(tmp_path), "buckets": BUCKETS[:3], "lanes": 4}
    before = Steps(config(folder, **settings), batch=4)
    first = before.delivered(6)
    after = Steps(config(folder, **settings, quarantine=["00001.tar"]), batch=4, state=before.state())
    second = after.delivered(10)
    assert all(info.key.startswith("many-0-") for info in second)
    epochs = Counter((info.key, info.position.epoch) for info in first + second)
    assert max(epochs.values()) == 1


def test_a_bucket_whose_pictures_are_all_in_quarantine_is_left_out(folder):
    """The second tar of `many` holds all of its wider pictures."""
    one = SourceConfig(name="many", root=str(folder / "many"))
    settings = config(folder, sources=[one], buckets=[], pixels=[24], quarantine=["00001.tar"], max_aspect=4.0)
    assert all(info.key.startswith("many-0-") for info in Steps(settings, batch=4).delivered(30))


def test_keys_that_are_left_out_change_how_often_a_bucket_comes(pictures, tmp_path):
    """No wide picture passes the filter. Their bucket never comes, so no lane looks for pictures that do not exist."""
    (tmp_path / "keys.txt").write_text("\n".join(f"{number:02d}.png" for number in range(0, 24, 3)))
    one = SourceConfig(root=str(pictures), filters=FilterConfig(keys=str(tmp_path / "keys.txt")))
    settings = on_pictures(pictures, train=None, sources=[one], buckets=[], pixels=[32])
    steps = Steps(settings, batch=4)
    assert {info.key for info in steps.delivered(12)} == {f"{number:02d}.png" for number in range(0, 24, 3)}
    said = refusal(DataError, Steps, on_pictures(pictures, train=None, sources=[one]), batch=4)
    assert "no picture belongs to 32x64" in said


def test_sizes_in_an_index_do_not_depend_on_captions(tmp_path):
    """Training ignores a caption that is no text, and so must the picture's bucket."""
    samples = [
        {"__key__": str(n), "png": encoded(picture(n, (64, 32)), "PNG"), "txt": "caf\xe9".encode("latin-1")}
        for n in range(4)
    ]
    write_tar(tmp_path / "a.tar", samples)
    index_of(tmp_path, tmp_path / "index.safetensors")
    settings = DataConfig(train=str(tmp_path), buckets=["32x64"], workers=0, lanes=2)
    steps = Steps(settings, batch=2)
    assert {len(pixels) for step in steps.infos(4) for _, pixels in step} == {3 * 32 * 64}


def test_lanes_that_do_not_fit_the_batch_of_a_bucket_are_refused(folder):
    said = refusal(DataError, Steps, config(folder, lanes=8, buckets=["24x24", "48x48"]), batch=24)
    assert "data.lanes=8 must be a multiple of the 6 images in a step of bucket 48x48" in said


def test_a_bucket_that_was_empty_may_get_pictures_of_a_later_source(pictures, tmp_path):
    sources = [SourceConfig(name="flat", root=str(pictures))]
    (tmp_path / "tall").mkdir()
    for number in range(8):
        picture(number, (32, 64)).save(tmp_path / "tall" / f"t{number}.png")
    settings = {"train": None, "buckets": [], "pixels": [32], "max_aspect": 3.0}
    before = Steps(on_pictures(pictures, **settings, sources=sources), batch=4)
    before.delivered(6)
    later = [*sources, SourceConfig(name="tall", root=str(tmp_path / "tall"))]
    after = Steps(on_pictures(pictures, **settings, sources=later), batch=4, state=before.state())
    assert {info.source for info in after.delivered(12)} == {"flat", "tall"}
    again = Steps(on_pictures(pictures, **settings, sources=sources), batch=4, state=after.state())
    again.delivered(3)
    assert any(key.startswith("44x24/") or "tall" in json.dumps(state) for key, state in again.state()["lanes"].items())
