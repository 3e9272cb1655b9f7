import itertools
import json
import logging
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data import DataConfig, DataError, merge_states, train_batches
from data.stream import Division, Order


def config(tars, **options):
    defaults = {"image_size": 8, "workers": 0, "crop": "random_resized", "shuffle_block": 6}
    return DataConfig(train=str(tars), **{**defaults, **options})


class Steps:
    """All ranks' streams side by side: `take(n)` gives n global batches as lists of (key, pixels), in order."""

    def __init__(self, config, world_size=1, micro=None, batch=8, state=None, seed=3):
        micro = micro or batch // world_size
        self.micro_batches = batch // (world_size * micro)
        self.streams = [
            train_batches(
                config,
                global_batch_size=batch,
                micro_batch_size=micro,
                rank=rank,
                world_size=world_size,
                seed=seed,
                state=state,
            )
            for rank in range(world_size)
        ]

    def take(self, count):
        taken = []
        for _ in range(count):
            parts = [[next(stream) for _ in range(self.micro_batches)] for stream in self.streams]
            self.states = [part[-1].state for part in parts]
            taken.append(
                [
                    (key, image.numpy().tobytes())
                    for part in parts
                    for batch in part
                    for key, image in zip(batch.keys, batch.images_bchw, strict=True)
                ]
            )
        return taken

    def state(self):
        return json.loads(json.dumps(merge_states(self.states)))


def test_order_has_each_sample_once_an_epoch_and_mixes_blocks():
    order = Order(np.array([7, 9, 4]), 6, 1)
    epochs = [[order.place(20 * epoch + n) for n in range(20)] for epoch in range(3)]
    everything = {(s, i) for s, count in enumerate((7, 9, 4)) for i in range(count)}
    for epoch, places in enumerate(epochs):
        assert {place.epoch for place in places} == {epoch}
        assert {(place.shard, place.index) for place in places} == everything
    assert len({tuple((place.shard, place.index) for place in places) for places in epochs}) == 3


def test_each_sample_comes_once_an_epoch(tars):
    keys = [key for step in Steps(config(tars), batch=4).take(15) for key, _ in step]
    for epoch in range(3):
        assert len(set(keys[20 * epoch : 20 * (epoch + 1)])) == 20


@pytest.mark.parametrize(
    ("world_size", "micro", "workers"),
    [(1, 8, 0), (1, 2, 0), (1, 8, 2), (1, 2, 4), (2, 4, 0), (2, 2, 2), (4, 1, 0), (8, 1, 1), (2, 4, 3)],
)
def test_global_batches_do_not_depend_on_their_division(tars, world_size, micro, workers):
    (tars / "train-000001.tar").write_bytes(_spoil(tars / "train-000001.tar", (b"1-1.jpg", b"1-5.jpg")))
    expected = Steps(config(tars)).take(12)
    assert Steps(config(tars, workers=workers), world_size, micro).take(12) == expected


def _spoil(path: Path, members) -> bytes:
    """The tar with these members' images overwritten by zeros."""
    content = bytearray(path.read_bytes())
    for member in members:
        start = content.index(member) + 512
        content[start : start + 400] = bytes(400)
    return bytes(content)


def test_seed_and_lanes_are_what_it_depends_on(tars):
    torch.manual_seed(0), random.seed(0)
    first = Steps(config(tars)).take(5)
    torch.manual_seed(1), random.seed(1)
    assert Steps(config(tars)).take(5) == first
    assert Steps(config(tars), seed=4).take(5) != first
    assert [Counter(k for k, _ in step) for step in Steps(config(tars, lanes=16)).take(5)] == [
        Counter(k for k, _ in step) for step in first
    ]  # lanes matter only once a sample is skipped


def test_global_random_state_is_left_alone(tars):
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    Steps(config(tars, workers=1)).take(2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize("path", [[(1, 8, 0), (2, 2, 2), (4, 1, 0)], [(2, 4, 2), (1, 4, 1), (8, 1, 0)]])
def test_resume_is_bit_identical_at_any_division(tars, path):
    (tars / "train-000000.tar").write_bytes(_spoil(tars / "train-000000.tar", (b"0-0.jpg", b"0-3.jpg", b"0-4.jpg")))
    expected = Steps(config(tars)).take(33)
    taken, state = [], None
    for world_size, micro, workers in path:
        steps = Steps(config(tars, workers=workers), world_size, micro, state=state)
        taken += steps.take(11)
        state = steps.state()
    assert taken == expected
    assert sum(state["skips"].values()) > 10


def test_state_within_a_step_begins_that_step_again(tars):
    stream = Steps(config(tars), micro=2).streams[0]
    batches = list(itertools.islice(stream, 7))
    assert [batch.state["step"] for batch in batches] == [0, 0, 0, 1, 1, 1, 1]
    again = Steps(config(tars), micro=2, state=batches[5].state).streams[0]
    assert next(again).keys == batches[4].keys


def test_bad_images_are_skipped_and_named(tars, caplog):
    (tars / "train-000002.tar").write_bytes(_spoil(tars / "train-000002.tar", (b"2-2.jpg",)))
    with caplog.at_level(logging.WARNING):
        batches = list(itertools.islice(Steps(config(tars), batch=4).streams[0], 20))
    assert "2-2" not in {key for batch in batches for key in batch.keys}
    skipped = [skip for batch in batches for skip in batch.skipped]
    assert len(skipped) == sum(batches[-1].state["skips"].values()) >= 3
    assert {(Path(skip.source).name, skip.key) for skip in skipped} == {("train-000002.tar", "2-2")}
    assert caplog.text.count("skipped 2-2 in") == 1
    assert all(len(batch.keys) == 4 for batch in batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_without_any_readable_image_ends_in_one_line(tmp_path, make_tar, workers):
    path = make_tar(tmp_path / "bad.tar", [{"__key__": f"bad{n}", "jpg": b"no image"} for n in range(3)])
    with pytest.raises(DataError, match=r"in a row cannot be used, last bad\d in .*bad\.tar") as error:
        next(Steps(config(path, workers=workers)).streams[0])
    assert "\n" not in str(error.value)


def test_fewer_samples_than_lanes(tmp_path, make_tar, make_picture, encode):
    path = make_tar(tmp_path / "a.tar", [{"__key__": f"k{n}", "jpg": encode(make_picture(n))} for n in range(5)])
    steps = Steps(config(path, lanes=64), world_size=2, batch=16).take(5)
    assert Counter(key for step in steps for key, _ in step) == {f"k{n}": 16 for n in range(5)}


def test_divisions_that_do_not_fit_are_errors(tars):
    good = {"global_batch_size": 8, "micro_batch_size": 2, "rank": 0, "world_size": 2, "lanes": 16}
    Division(**good)
    for change, message in [
        ({"world_size": 3}, "not divisible by 3 processes x micro-batch size 2: set it to a multiple of 6"),
        ({"micro_batch_size": 3}, "multiple of 6"),
        ({"lanes": 12}, "lanes=12 must be a multiple of the global batch size 8: use 16"),
        ({"lanes": 3}, "use 8"),
        ({"micro_batch_size": 0}, "at least 1"),
        ({"rank": 2}, "rank 2"),
    ]:
        with pytest.raises(DataError, match=message):
            Division(**{**good, **change})
    with pytest.raises(DataError, match="workers"):
        Steps(config(tars, workers=-1))


def test_workers_that_do_not_deal_evenly_are_reduced_with_a_warning(tars, caplog):
    assert [Division(8, 8, 0, 1, 64).usable_workers(n) for n in (0, 1, 3, 8, 100)] == [0, 1, 2, 8, 8]
    assert Division(12, 4, 0, 1, 96).usable_workers(6) == 6
    with caplog.at_level(logging.WARNING):
        Steps(config(tars, workers=3))
    assert "data.workers=3: 2 are used" in caplog.text


def test_states_that_do_not_fit_are_errors(tars):
    steps = Steps(config(tars), world_size=2)
    steps.take(2)
    old = steps.states
    with pytest.raises(DataError, match=r"ranks \[1\] of 2: merge"):
        Steps(config(tars), state=old[1])
    merged = steps.state()
    steps.take(1)
    with pytest.raises(DataError, match="differ in step"):
        merge_states([old[0], steps.states[1]])
    with pytest.raises(DataError, match="seed was 3 and is now 5"):
        Steps(config(tars), state=merged, seed=5)
    with pytest.raises(DataError, match="lanes was 64 and is now 8"):
        Steps(config(tars, lanes=8), state=merged)
    (tars / "train-000002.tar").unlink()
    with pytest.raises(DataError, match="shards was 3 tars, 20 samples"):
        Steps(config(tars), state=merged)
