import itertools
import json
import logging
import os
import random
import re
import shutil
import time
import timeit
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import refusal
from faults.corpus import patched
from samples import Steps, encoded, index_of, picture, pictured, write_tar, write_tars

from data import DataConfig, DataError, FilterConfig, SourceConfig, merge_states, scan
from data.index import SampleTable, write_index
from data.sampler import BySample, ByShard, DueLanes, LaneAssignment, Mixture


def config(tars, **options):
    defaults = {"image_size": 8, "workers": 0, "crop": "random_resized", "shuffle_block": 6, "max_bad_fraction": 1.0}
    return DataConfig(train=str(tars) if tars else None, **{**defaults, **options})


# ------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.3, 0.2], [7.0, 1.0, 1.0], [1.0, 0.01]])
def test_mixture_is_as_even_as_it_can_be_along_and_across_lanes(weights):
    mixture = Mixture(weights, seed=4)
    shares = np.array(weights) / sum(weights)
    for lane in range(3):
        drawn = np.array([mixture.source(lane, n) for n in range(2000)])
        for count in (50, 500, 2000):
            found = np.bincount(drawn[:count], minlength=len(weights))
            assert np.abs(found - shares * count).max() < 4, (lane, count)
    across = np.bincount([mixture.source(lane, 17) for lane in range(2000)], minlength=len(weights))
    assert np.abs(across - shares * 2000).max() < 8


@pytest.mark.parametrize("counts", [(7, 9, 4), (1,), (1000, 3, 12, 12, 40), (5,)])
@pytest.mark.parametrize("lanes", [1, 3, 8, 24, 64])
def test_chunks_hold_each_sample_once_an_epoch_and_lanes_get_the_same(counts, lanes):
    order = BySample("s", np.array(counts), seed=1)
    of_lane = Counter()
    for epoch in range(4):
        seen = Counter()
        for lane in range(lanes):
            chunk = order.chunk(lane, lanes, epoch)
            assert chunk.epoch == epoch
            for shard, first, stop in chunk.ranges:
                assert 0 <= first < stop <= counts[shard]
                seen.update((shard, n) for n in range(first, stop))
                of_lane[lane] += stop - first
        assert seen == {(shard, n): 1 for shard, count in enumerate(counts) for n in range(count)}
    assert max(of_lane.values()) - min(of_lane[lane] for lane in range(lanes)) <= 1


def test_the_order_of_shards_is_drawn_anew_for_each_epoch_and_source():
    orders = {
        tuple(one.shard for one in BySample(name, np.full(50, 2), 1).chunk(0, 1, epoch).ranges)
        for name in "ab"
        for epoch in range(3)
    }
    assert len(orders) == 6


def test_whole_shards_come_once_an_epoch():
    order = ByShard("s", 10, seed=1)
    chunks = [order.chunk(lane, 4, number) for number in range(15) for lane in range(4)]
    for epoch in range(6):
        assert sorted(chunk.ranges[0].shard for chunk in chunks if chunk.epoch == epoch) == list(range(10))


DIVISIBLE = [
    *[(24, 24, 1, 0), (24, 24, 1, 3), (24, 24, 2, 2), (24, 24, 3, 1), (24, 24, 4, 2), (24, 48, 4, 2), (24, 48, 2, 3)],
    *[(24, 48, 6, 1), (24, 48, 3, 4), (64, 8, 8, 1), (64, 8, 2, 2), (64, 8, 1, 4), (64, 8, 8, 8), (64, 8, 2, 16)],
    *[(64, 256, 8, 4), (256, 256, 64, 2), (8, 8, 1, 8), (96, 96, 4, 3), (96, 8, 4, 3)],
    *[(8, 8, 4, 4), (16, 8, 2, 3), (24, 24, 2, 5), (8, 64, 2, 3)],  # numbers of workers that divide nothing
]


def lanes_of_steps(lanes, batch, world_size, workers, steps, given=None):
    """The lanes of each global batch."""
    given = given or dict.fromkeys(range(lanes), 0)
    ranks = []
    for rank in range(world_size):
        assignment = LaneAssignment(lanes, batch, rank, world_size, workers)
        due = [DueLanes(assignment, reader, given) for reader in range(assignment.readers)]
        ranks.append([[lane for one in due for lane in one.take()] for _ in range(steps)])
        assert {len(step) for step in ranks[-1]} == {assignment.images_per_rank}
    return [[lane for rank in ranks for lane in rank[step]] for step in range(steps)]


@pytest.mark.parametrize(("lanes", "batch", "world_size", "workers"), DIVISIBLE)
def test_lanes_come_in_the_same_order_for_any_readers(lanes, batch, world_size, workers):
    assert LaneAssignment(lanes, batch, 0, world_size, workers).ordered
    everyone = [LaneAssignment(lanes, batch, rank, world_size, workers) for rank in range(world_size)]
    owners = Counter(lane for one in everyone for n in range(one.readers) for lane in one.reader_lanes(n))
    assert owners == dict.fromkeys(range(lanes), 1)
    expected = lanes_of_steps(lanes, batch, 1, 0, 20)
    assert lanes_of_steps(lanes, batch, world_size, workers, 20) == expected
    # From the middle on.
    given = dict.fromkeys(range(lanes), 0) | Counter(lane for step in expected[:7] for lane in step)
    assert lanes_of_steps(lanes, batch, world_size, workers, 13, given) == expected[7:]


@pytest.mark.parametrize(("lanes", "batch", "world_size", "workers"), [(24, 40, 5, 1), (24, 42, 7, 0), (12, 22, 11, 0)])
def test_readers_that_do_not_divide_the_lanes_own_them_all_the_same(lanes, batch, world_size, workers):
    everyone = [LaneAssignment(lanes, batch, rank, world_size, workers) for rank in range(world_size)]
    assert not everyone[0].ordered
    owners = Counter(lane for one in everyone for n in range(one.readers) for lane in one.reader_lanes(n))
    assert owners == dict.fromkeys(range(lanes), 1)
    assert {len(step) for step in lanes_of_steps(lanes, batch, world_size, workers, 5)} == {batch}


def test_impossible_lane_assignments_are_errors():
    LaneAssignment(16, 8, 0, 2, 2)
    for arguments, message in [
        ((16, 8, 0, 3, 2), "not divisible by 3 processes: set it to a multiple of 3"),
        ((3, 8, 0, 4, 0), "lanes=3 are too few for 4 processes: start at most 3"),
        ((9, 8, 0, 4, 4), "too few for 4 processes x 4 workers: set data.workers=2, or start with data.lanes=8"),
        ((16, 8, 2, 2, 0), "rank 2"),
        ((16, 0, 0, 1, 0), "at least 1"),
    ]:
        assert message in refusal(DataError, LaneAssignment, *arguments)


# ----------------------------------------------------------------------------------------------------------- audits

MIXED = {"small": ([5, 2], 1.0), "middle": ([11, 8, 9], 3.0), "large": ([40, 25], 2.0)}  # 7 shards


@pytest.fixture(scope="module")
def mixed_tars(tmp_path_factory):
    """A folder for each source of MIXED; tests do not write into it."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, (counts, _) in MIXED.items():
        (folder / name).mkdir()
        for shard, count in enumerate(counts):
            samples = [
                {"__key__": f"{name}-{shard}-{n}", "jpg": encoded(picture(40 * shard + n)), "txt": f"{n}".encode()}
                for n in range(count)
            ]
            write_tar(folder / name / f"{shard:05d}.tar", samples)
    return folder


def sources_of(folder):
    return [SourceConfig(name=name, root=str(folder / name), weight=weight) for name, (_, weight) in MIXED.items()]


@pytest.fixture
def mixture(mixed_tars):
    return sources_of(mixed_tars)


@pytest.fixture(scope="module")
def mixture_batches(mixed_tars):
    """24 global batches, read by one process."""
    return Steps(config(None, sources=sources_of(mixed_tars), lanes=24), batch=24).infos(24)


DIVISIONS = [(1, 0), (1, 3), (2, 2), (3, 1), (4, 2)]


def test_audit_of_a_mixture(mixture_batches):
    """Other divisions give the same batches: see below."""
    delivered = [info for step in mixture_batches for info, _ in step]
    expected = {
        name: {f"{name}-{shard}-{n}" for shard, count in enumerate(counts) for n in range(count)}
        for name, (counts, _) in MIXED.items()
    }
    epochs = defaultdict(Counter)
    for info in delivered:
        epochs[info.source, info.position.epoch][info.key] += 1
    for name, keys in expected.items():
        for epoch in range(2):
            assert epochs[name, epoch] == dict.fromkeys(keys, 1), (name, epoch)
    assert all(set(counts.values()) == {1} for counts in epochs.values())
    assert all(info.caption == info.key.rsplit("-", 1)[1] for info in delivered)


@pytest.mark.parametrize(("world_size", "workers"), DIVISIONS)
def test_weights_over_20000_draws(world_size, workers):
    mixture = Mixture([weight for _, weight in MIXED.values()], seed=3)
    steps = lanes_of_steps(24, 24, world_size, workers, 834)
    given, drawn = Counter(), Counter()
    for lane in itertools.islice(itertools.chain(*steps), 20_000):
        drawn[mixture.source(lane, given[lane])] += 1
        given[lane] += 1
    for number, share in enumerate((1 / 6, 3 / 6, 2 / 6)):
        assert drawn[number] == pytest.approx(20_000 * share, rel=0.01)


@pytest.mark.parametrize(
    ("world_size", "workers"), [(1, 3), (1, 5), (2, 2), (3, 1), (4, 2), (6, 7), (8, 0), (24, 2), (12, 2)]
)
def test_global_batches_are_the_same_for_all_divisions(mixture, mixture_batches, world_size, workers):
    other = Steps(config(None, sources=mixture, lanes=24, workers=workers), world_size, batch=24).infos(12)
    assert other == mixture_batches[:12]


@pytest.mark.process
def test_worker_processes_deliver_what_one_process_does(mixture, mixture_batches):
    """Real workers, with more reads than a worker has buffers, and through a resume with other workers."""
    first = Steps(config(None, sources=mixture, lanes=24, workers=3), batch=24)
    taken = first.infos(12)
    second = Steps(config(None, sources=mixture, lanes=24, workers=2), batch=24, state=first.state())
    assert taken + second.infos(12) == mixture_batches


@pytest.fixture(scope="module")
def double_batches(mixed_tars):
    """12 global batches of two images of each lane, read by one process."""
    return Steps(config(None, sources=sources_of(mixed_tars), lanes=24), batch=48).infos(12)


@pytest.mark.parametrize("path", [[(4, 2), (2, 3), (6, 1), (3, 4)], [(1, 0), (24, 1), (2, 4), (1, 8)]])
def test_chain_of_divisions_is_bit_identical(mixture, double_batches, path):
    taken, state = [], None
    for world_size, workers in path:
        steps = Steps(config(None, sources=mixture, lanes=24, workers=workers), world_size, batch=48, state=state)
        taken += steps.infos(3)
        state = steps.state()
    assert taken == double_batches
    assert len(json.dumps(state)) < 10_000


def test_resume_after_any_step_is_bit_identical(mixture, mixture_batches):
    settings = config(None, sources=mixture, lanes=24)
    steps = Steps(settings, batch=24)
    for number in range(9):
        assert steps.infos(1) == [mixture_batches[number]]
        assert Steps(settings, batch=24, state=steps.state()).infos(1) == [mixture_batches[number + 1]]


def test_chain_that_does_not_divide_loses_and_repeats_nothing(mixture):
    state, delivered = None, []
    for world_size, workers, batch in [(3, 1, 24), (5, 1, 40), (7, 0, 42), (24, 0, 24), (11, 2, 22), (4, 2, 48)]:
        steps = Steps(config(None, sources=mixture, lanes=24, workers=workers), world_size, batch=batch, state=state)
        delivered += steps.delivered(3)
        state = steps.state()
    assert max(Counter((info.source, info.position) for info in delivered).values()) == 1
    epochs = defaultdict(set)
    for info in delivered:
        epochs[info.source, info.position.epoch].add(info.key)
    for name, (counts, _) in MIXED.items():
        done = min(places[name][0] for _, places in state["lanes"].values())  # epochs that every lane has finished
        assert done >= 2
        for epoch in range(done):
            assert len(epochs[name, epoch]) == sum(counts), (name, epoch)
    assert state["totals"] == {
        name: {"delivered": count, "skipped": 0} for name, count in Counter(info.source for info in delivered).items()
    }


def test_weights_may_change_and_sources_come_and_go(mixture):
    steps = Steps(config(None, sources=mixture, lanes=24), batch=24)
    before = {(info.source, info.position) for info in steps.delivered(2)}
    mixture[1].weight = 0.5
    later = Steps(config(None, sources=mixture[1:], lanes=24), batch=24, state=steps.state())
    after = {(info.source, info.position) for info in later.delivered(2)}
    assert {source for source, _ in after} == {"middle", "large"}
    assert not before & after


# ------------------------------------------------------------------------------------------------- one source, 3 tars


def test_each_sample_comes_once_an_epoch(tars):
    delivered = Steps(config(tars), batch=4).delivered(15)
    for epoch in range(3):
        assert Counter(info.key for info in delivered if info.position.epoch == epoch).most_common(1)[0][1] == 1
    assert Counter(info.position.epoch for info in delivered) == {0: 20, 1: 20, 2: 20}


@pytest.mark.parametrize(
    ("world_size", "micro", "workers"),
    [(1, 8, 0), (1, 2, 0), (1, 8, 2), (1, 2, 4), (2, 4, 0), (2, 2, 2), (4, 1, 0), (8, 1, 1), (2, 1, 2), (1, 4, 8)],
)
def test_global_batches_do_not_depend_on_their_division(tars, world_size, micro, workers):
    spoil(tars / "train-000001.tar", b"1-1.jpg", b"1-5.jpg")
    expected = Steps(config(tars)).take(12)
    assert Steps(config(tars, workers=workers), world_size, micro).take(12) == expected


def spoil(tar: Path, *members: bytes) -> None:
    """Overwrites these members' images with zeros."""
    content = tar.read_bytes()
    for member in members:
        content = patched(content, content.index(member) + 512, bytes(400))
    tar.write_bytes(content)


def test_seed_and_lanes_are_what_it_depends_on(tars):
    torch.manual_seed(0), random.seed(0)
    first = Steps(config(tars)).take(5)
    torch.manual_seed(1), random.seed(1)
    assert Steps(config(tars)).take(5) == first
    assert Steps(config(tars), seed=4).take(5) != first
    assert Steps(config(tars, lanes=16)).take(5) != first


@pytest.mark.process
def test_global_random_state_is_left_alone(tars):
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    Steps(config(tars, workers=1)).take(2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize("path", [[(1, 8, 0), (2, 2, 2), (4, 1, 0)], [(2, 4, 2), (1, 4, 1), (8, 1, 0)]])
def test_resume_is_bit_identical_where_samples_are_skipped(tars, path):
    spoil(tars / "train-000000.tar", b"0-0.jpg", b"0-3.jpg", b"0-4.jpg")
    expected = Steps(config(tars)).take(21)
    taken, state = [], None
    for world_size, micro, workers in path:
        steps = Steps(config(tars, workers=workers), world_size, micro, state=state)
        taken += steps.take(7)
        state = steps.state()
    assert taken == expected
    assert state["totals"]["train"]["delivered"] == 8 * 21
    assert state["totals"]["train"]["skipped"] > 10


def test_state_within_a_step_begins_that_step_again(tars):
    stream = Steps(config(tars), micro=2).streams[0]
    batches = list(itertools.islice(stream, 7))
    assert [batch.state["steps"] for batch in batches] == [0, 0, 0, 1, 1, 1, 1]
    again = Steps(config(tars), micro=2, state=batches[5].state).streams[0]
    assert next(again).keys == batches[4].keys


def test_bad_images_are_skipped_and_named(tars, caplog):
    spoil(tars / "train-000002.tar", b"2-2.jpg")
    with caplog.at_level(logging.WARNING):
        batches = list(itertools.islice(Steps(config(tars), batch=4).streams[0], 20))
    assert "2-2" not in {key for batch in batches for key in batch.keys}
    skipped = [skip for batch in batches for skip in batch.skipped]
    assert len(skipped) == batches[-1].state["totals"]["train"]["skipped"] >= 3
    assert {(Path(skip.source).name, skip.key) for skip in skipped} == {("train-000002.tar", "2-2")}
    assert "skipped 2-2 in" in caplog.text
    assert all(len(batch.keys) == 4 for batch in batches)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_data_without_any_readable_image_ends_in_one_line(tmp_path, workers):
    path = write_tar(tmp_path / "bad.tar", [{"__key__": f"bad{n}", "jpg": b"no image"} for n in range(3)])
    said = refusal(DataError, next, Steps(config(path, workers=workers)).streams[0])
    assert re.search(r"in a row cannot be used, last bad\d in .*bad\.tar", said)


def test_too_large_a_part_of_bad_images_ends_the_stream(tmp_path):
    good = encoded(picture(1))
    samples = [{"__key__": f"k{n}", "jpg": b"no image" if n % 5 == 0 else good} for n in range(100)]
    path = write_tar(tmp_path / "a.tar", samples)
    assert len(Steps(config(path, max_bad_fraction=0.3)).take(20)) == 20
    with pytest.raises(DataError, match=r"2\d of the latest \d+ samples cannot be used.*max_bad_fraction=0.1; last k"):
        Steps(config(path, max_bad_fraction=0.1)).take(50)


def test_fewer_samples_than_lanes(tmp_path):
    path = write_tar(tmp_path / "a.tar", pictured(f"k{n}" for n in range(5)))
    steps = Steps(config(path, lanes=32), world_size=2, batch=16).take(10)
    assert Counter(key for step in steps for key, _ in step) == {f"k{n}": 32 for n in range(5)}


def test_states_that_do_not_fit_are_errors(tars):
    steps = Steps(config(tars), world_size=2)
    steps.take(2)
    old = steps.states
    assert "ranks [1] of 2: merge" in refusal(DataError, Steps, config(tars), state=old[1])
    merged = steps.state()
    steps.take(1)
    assert "differ in steps" in refusal(DataError, merge_states, [old[0], steps.states[1]])
    assert "seed was 3 and is now 5" in refusal(DataError, Steps, config(tars), state=merged, seed=5)
    assert "lanes was 8 and is now 16" in refusal(DataError, Steps, config(tars, lanes=16), state=merged)
    assert "of another version" in refusal(DataError, Steps, config(tars), state={"step": 3})
    (tars / "train-000002.tar").unlink()
    with pytest.raises(DataError, match="source train was 3 shards with 20 samples and is now 2 shards"):
        Steps(config(tars), state=merged)


# ----------------------------------------------------------------------------------------------- quarantine, filters


def shards_of(infos):
    """By the keys, which begin with a shard's number."""
    return {info.key.split("-")[0] for info in infos}


def test_shards_in_quarantine_are_passed_over_and_the_checkpoint_remembers(tars):
    steps = Steps(config(tars))
    steps.infos(1)
    (tars / "train-000001.tar").write_bytes(b"something else")
    broken = config(tars, quarantine=["train-000001.tar"])
    assert "no whole, uncompressed tar" in refusal(DataError, Steps, config(tars))
    assert shards_of(Steps(broken).delivered(4)) == {"0", "2"}  # a new run: nothing is known of it
    later = Steps(broken, state=steps.state())  # and in the old one it is passed over
    assert shards_of(later.delivered(4)) == {"0", "2"}
    assert later.state()["quarantine"] == ["train-000001.tar"]
    assert shards_of(Steps(config(tars), state=later.state()).delivered(2)) == {"0", "2"}


def test_all_shards_in_quarantine_is_an_error(tars):
    with pytest.raises(DataError, match="every shard is in quarantine"):
        Steps(config(tars, quarantine=[f"train-{n:06d}.tar" for n in range(3)]))


def test_filters_leave_out_and_are_counted_apart(tmp_path):
    def sample(n, size=(48, 40), **scores):
        return {"__key__": f"k{n}", "jpg": encoded(picture(n, size)), "json": json.dumps(scores).encode()}

    path = write_tar(
        tmp_path / "a.tar",
        [
            sample(0, punsafe=0.1, pwatermark=0.2, AESTHETIC_SCORE=6.0),
            sample(1, punsafe=0.9, pwatermark=0.2, AESTHETIC_SCORE=6.0),
            sample(2, punsafe=0.1, pwatermark=0.2, AESTHETIC_SCORE=4.9),
            sample(3, pwatermark=0.2, AESTHETIC_SCORE=6.0),
            sample(4, size=(48, 20), punsafe=0.1, pwatermark=0.2, AESTHETIC_SCORE=6.0),
            sample(5, size=(120, 40), punsafe=0.1, pwatermark=0.2, AESTHETIC_SCORE=6.0),
            sample(6, punsafe=0.1, pwatermark=0.2, AESTHETIC_SCORE=6.0),
            sample(7, punsafe="no number", pwatermark=0.2, AESTHETIC_SCORE=6.0),
        ],
    )
    (tmp_path / "denied.txt").write_text("k6\nk\n")
    filters = FilterConfig(
        min_side=40, max_aspect_ratio=2, max_nsfw=0.5, min_aesthetic=5.0, not_keys=str(tmp_path / "denied.txt")
    )
    source = SourceConfig(name="laion-aesthetics-v2", root=path, filters=filters)
    steps = Steps(config(None, sources=[source]))
    assert {key for step in steps.take(4) for key, _ in step} == {"k0"}
    totals = steps.state()["totals"]["laion-aesthetics-v2"]
    assert (totals["delivered"], totals["skipped"]) == (32, 0)
    filtered = {name: count for name, count in totals.items() if name.startswith("filtered/")}
    assert filtered.keys() == {
        f"filtered/{name}" for name in ("nsfw", "aesthetic", "min_side", "max_aspect_ratio", "not_keys")
    }
    assert min(filtered.values()) > 10
    impossible = SourceConfig(name="x", root=path, filters=FilterConfig(min_side=400))
    with pytest.raises(DataError, match=r"samples in a row do not pass its filters.*loosen"):
        Steps(config(None, sources=[impossible])).take(1)
    with pytest.raises(DataError, match="no JSON field is known for similarity"):
        Steps(config(None, sources=[SourceConfig(name="x", root=path, filters=FilterConfig(min_similarity=0.3))]))


def test_lists_of_keys_match_exactly(tars, tmp_path):
    (tmp_path / "keys.txt").write_text("0-1\n2-2\n1\n")
    source = SourceConfig(root=str(tars), filters=FilterConfig(keys=str(tmp_path / "keys.txt")))
    steps = Steps(config(None, sources=[source]))
    assert {key for step in steps.take(3) for key, _ in step} == {"0-1", "2-2"}


def test_sources_that_do_not_fit_are_errors(tars):
    for sources, message in [
        ([SourceConfig(name="a", root=str(tars)), SourceConfig(name="a", root=str(tars))], "two sources are called a"),
        ([SourceConfig(name="a", root=str(tars), weight=0)], "weight=0 must be positive"),
        ([SourceConfig(name="a")], "the sources a have no root: give data.root=FOLDER"),
        ([SourceConfig(name="a", root="pipe:cat x.tar")], "data.allow_pipes=true"),
        ([SourceConfig(name="a", root="ftp://host/x.tar")], "an address of http, https, s3, gs"),
    ]:
        assert message in refusal(DataError, Steps, config(None, sources=sources))
    assert "both given" in refusal(DataError, Steps, config(tars, sources=[SourceConfig(root=str(tars))]))


def test_bad_ones_with_filtered_ones_between_them_are_not_in_a_row(tmp_path):
    samples = pictured(["good"])
    samples += [{"__key__": f"bad{n}", "jpg": b"no image"} for n in range(8)]
    samples += [{"__key__": f"small{n}", "jpg": encoded(picture(2, (8, 8)))} for n in range(60)]
    path = write_tar(tmp_path / "a.tar", samples)
    source = SourceConfig(root=path, filters=FilterConfig(min_side=20))
    settings = {"sources": [source], "max_bad_in_a_row": 6, "shuffle_block": 100, "lanes": 1}
    assert {key for step in Steps(config(None, **settings), batch=1).take(6) for key, _ in step} == {"good"}


def test_a_source_that_comes_back_must_be_the_same(mixed_tars, tmp_path):
    shutil.copytree(mixed_tars, tmp_path, dirs_exist_ok=True)
    mixture = sources_of(tmp_path)
    first = Steps(config(None, sources=mixture, lanes=24), batch=24)
    before = {(info.source, info.position) for info in first.delivered(3)}
    without = Steps(config(None, sources=mixture[:2], lanes=24), batch=24, state=first.state())
    without.infos(2)
    again = Steps(config(None, sources=mixture, lanes=24), batch=24, state=without.state())
    after = {(info.source, info.position) for info in again.delivered(3)}
    assert not {one for one in before & after if one[0] == "large"}
    write_tar(tmp_path / "large" / "00000.tar", pictured(["x"]))
    said = refusal(DataError, Steps, config(None, sources=mixture, lanes=24), batch=24, state=without.state())
    assert "source large was 2 shards with 65 samples and is now 2 shards with 26 samples" in said


def test_quarantine_that_matches_nothing_is_said(tars, caplog):
    with caplog.at_level(logging.WARNING):
        Steps(config(tars, quarantine=["train-000009.tar"]))
    assert "data.quarantine names train-000009.tar, which is not one of the shards" in caplog.text


def test_fields_and_likeness_of_sources_of_ones_own(tmp_path):
    samples = [
        {"__key__": f"k{n}", "jpg": encoded(picture(n)), "json": json.dumps({"score": n, "punsafe": n}).encode()}
        for n in range(10)
    ]
    path = write_tar(tmp_path / "a.tar", samples)
    own = SourceConfig(name="own", root=path, fields={"aesthetic": "score"}, filters=FilterConfig(min_aesthetic=6.0))
    like = SourceConfig(name="like", root=path, like="laion-aesthetics-v2", filters=FilterConfig(max_nsfw=2.0))
    delivered = Steps(config(None, sources=[own, like])).delivered(6)
    assert {info.key for info in delivered if info.source == "own"} == {"k6", "k7", "k8", "k9"}
    assert {info.key for info in delivered if info.source == "like"} == {"k0", "k1", "k2"}


@pytest.fixture
def many(tmp_path, monkeypatch):
    """40 tars of 3 samples: more than are scanned before the run."""
    monkeypatch.setattr("data.sources.MOST_SCANNED", 30)
    return write_tars(tmp_path / "many", [3] * 40)


def test_many_tars_without_an_index_go_on_by_shard_with_one(many):
    expected = Steps(config(many, lanes=24, workers=0), batch=24).infos(14)
    steps = Steps(config(many, lanes=24), world_size=2, batch=24)
    assert steps.infos(5) == expected[:5]
    state = steps.state()
    index_of(many, many / "index.safetensors")
    later = Steps(config(many, lanes=24, workers=3), world_size=2, batch=24, state=state)
    assert later.infos(9) == expected[5:]
    counts = Counter((info.position.epoch, info.key) for step in expected for info, _ in step)
    assert set(counts.values()) == {1}
    # A shard that breaks is passed over, and the mode stays.
    (many / "00007.tar").write_bytes(b"broken")
    (many / "index.safetensors").unlink()
    broken = Steps(config(many, lanes=24, quarantine=[f"0000{n}.tar" for n in range(4, 9)]), batch=24, state=state)
    assert not shards_of(broken.delivered(8)) & set("45678")


def test_a_million_samples_open_and_resume_in_less_than_two_seconds(tmp_path):
    """1,000 tars of 1,000 samples by their index; the tars themselves need not be there for that."""
    paths = [str(tmp_path / f"{shard:05d}.tar") for shard in range(1000)]
    for path in paths:
        Path(path).touch()
        os.truncate(path, 20_490_240)
    starts = np.arange(1000, dtype=np.int64) * 20_480
    tables = [
        SampleTable(20_490_240, starts, starts + 20_480, np.arange(1000, dtype=np.uint64) + n) for n in range(1000)
    ]
    write_index(tmp_path / "index.safetensors", paths, tables, ["00" * 32] * 1000)
    began = time.process_time()
    stream = Steps(config(tmp_path, lanes=256), batch=256).streams[0]
    opened = time.process_time() - began
    assert stream.sources[0].samples == 1_000_000
    lanes = {str(lane): [4000 * 3, {"train": [3, 56]}] for lane in range(256)}
    state = {**stream.step_state, "lanes": lanes, "steps": 12_000, "totals": {}}
    began = time.process_time()
    resumed = Steps(config(tmp_path, lanes=256), batch=256, state=state).streams[0]
    for lane in range(256):
        resumed.parts[0].reader._cursor(lane, 0)._next_window()
    assert opened < 2
    assert time.process_time() - began < 2


def test_a_stream_does_not_grow_slower_with_the_number_of_shards(tmp_path):
    """5,000 links to one tar, by their index: what a sample costs must not depend on them."""
    write_tar(tmp_path / "one.tar", pictured(f"k{n}" for n in range(20)))
    table = scan(str(tmp_path / "one.tar"))
    took = {}
    for shards in (10, 5000):
        folder = tmp_path / f"{shards}"
        folder.mkdir()
        paths = [str(folder / f"{shard:05d}.tar") for shard in range(shards)]
        for path in paths:
            os.link(tmp_path / "one.tar", path)
        write_index(folder / "index.safetensors", paths, [table] * shards, ["00" * 32] * shards)
        steps = Steps(config(folder, lanes=8), batch=32)
        steps.take(3)
        took[shards] = min(
            timeit.repeat(lambda steps=steps: steps.take(1), timer=time.process_time, number=1, repeat=8)
        )
    assert took[5000] < 2 * took[10]
