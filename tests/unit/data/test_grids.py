"""Token shards with several grids: the stream of them keeps every promise, and other grids are refused at the start."""

import shutil

import numpy as np
import pytest
import torch
from bucket_audit import audited_epochs, mixed_kinds
from comparing import refusal
from samples import Steps, index_of, members, write_tar, write_tars
from tokens import FINGERPRINT

from data import DataConfig, DataError, SourceConfig, TokenSpec, check, evaluation_tokens, in_batches, pack_codes
from data.buckets import OF_TOKENS, check_batches, grid_sizes, with_batches
from data.config import FilterConfig
from data.index import Index
from data.loader import open_sources
from data.prep.stats import count
from data.sources import open_source
from data.tar_reader import TarShard
from data.tokens import unpack_codes

VOCABULARY = 300
GRIDS = {"2x4": (2, 4), "4x2": (4, 2), "4x8": (4, 8)}
SPEC = TokenSpec(FINGERPRINT, VOCABULARY, ((4, 8), (2, 4), (4, 2)))
SOURCES = {
    "few": ([{"2x4": 5, "4x2": 3, "4x8": 4}], 1.0),
    "many": ([{"2x4": 14, "4x2": 7}, {"4x2": 11, "4x8": 15}], 2.0),
}
DIVISIONS = [(1, 0), (1, 3), (2, 2), (3, 1)]  # processes, workers


def codes_of(kind: str, seed: int) -> np.ndarray:
    """(2 views, rows, columns)."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (2, *GRIDS[kind]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of token shards for each source, with all grids in mixed order, and their indexes."""
    folder = tmp_path_factory.mktemp("grids")
    for number, (name, (shards, _)) in enumerate(SOURCES.items()):
        (folder / name).mkdir()
        for shard, kinds in enumerate(shards):
            samples = [
                {
                    "__key__": f"{name}-{shard}-{n}-{kind}",
                    "codes": pack_codes(codes_of(kind, 100 * number + 30 * shard + n), FINGERPRINT, VOCABULARY),
                    "cls": b"%d" % n,
                }
                for n, kind in mixed_kinds(kinds, number, shard)
            ]
            write_tar(folder / name / f"{shard:05d}.tar", samples)
        index_of(folder / name, folder / name / "index.safetensors")
    return folder


@pytest.fixture
def without_index(folder, tmp_path):
    for name in SOURCES:
        (tmp_path / name).mkdir()
        for tar in (folder / name).glob("*.tar"):
            (tmp_path / name / tar.name).symlink_to(tar)
    return tmp_path


def config(folder, **options):
    sources = [SourceConfig(name=name, root=str(folder / name), weight=weight) for name, (_, weight) in SOURCES.items()]
    settings = {"sources": sources, "content": "tokens", "workers": 0, "lanes": 48, "shuffle_block": 4}
    return DataConfig(**{**settings, **options})


def steps_of(settings, world_size=1, **options):
    return Steps(settings, world_size, **{"batch": 48, "tokens": SPEC, **options})


@pytest.fixture(scope="module")
def stream(folder):
    """40 global batches, read by one process, and the state after them."""
    steps = steps_of(config(folder))
    return steps.infos(40), steps.state()


@pytest.fixture
def batches(stream):
    return stream[0]


def test_each_step_has_one_grid_and_about_equal_codes(folder, batches):
    steps = steps_of(config(folder), 2)
    for step in batches[:20]:
        (kind,) = {info.key.rsplit("-", 1)[1] for info, _ in step}
        assert len(step) == {"2x4": 48, "4x2": 48, "4x8": 12}[kind]
        for stream in steps.streams:
            batch = next(stream)
            assert batch.grid == GRIDS[kind] and batch.values.dtype == torch.int32
            assert batch.values.shape == (len(step) // 2, GRIDS[kind][0] * GRIDS[kind][1])


def test_codes_are_those_of_a_view_of_the_sample(folder, batches):
    stored = {}
    for path in folder.glob("*/*.tar"):
        for name, content in members(path).items():
            if name.endswith(".codes"):
                stored[name.removesuffix(".codes")] = unpack_codes(content)[1]
    seen = {}
    for info, values in (one for step in batches for one in step):
        views = [view_hw.astype(np.int32).tobytes() for view_hw in stored[info.key]]
        seen.setdefault(info.key, set()).add(views.index(values))
    assert seen.keys() == stored.keys() and sum(len(views) == 2 for views in seen.values()) > 50


def test_audit_of_grids(stream):
    """Every sample once in each epoch of its source and grid, sources by their weights, each sample equally often."""
    batches, state = stream
    assert audited_epochs(batches, state, SOURCES, {kind: kind for kind in GRIDS}, most_off=96) > 30


@pytest.mark.parametrize(("world_size", "workers"), DIVISIONS)
def test_global_batches_are_the_same_for_all_divisions(folder, batches, world_size, workers):
    assert steps_of(config(folder, workers=workers), world_size).infos(12) == batches[:12]


def test_micro_batches_give_the_same_batches(folder, batches):
    assert steps_of(config(folder), 2, micro=12).infos(8) == batches[:8]


def test_chain_of_divisions_is_bit_identical(folder, batches):
    taken, state = [], None
    for world_size, workers in [(4, 2), (2, 3), (6, 1)]:
        steps = steps_of(config(folder, workers=workers), world_size, state=state)
        taken += steps.infos(6)
        state = steps.state()
    assert taken == batches[:18]


def test_a_chain_that_does_not_divide_loses_and_repeats_nothing(folder):
    state, delivered = None, []
    for world_size, workers, batch in [(1, 2, 48), (5, 1, 40), (3, 0, 24)]:
        steps = steps_of(config(folder, workers=workers), world_size, batch=batch, state=state)
        delivered += steps.delivered(8)
        state = steps.state()
    places = [(info.source, info.key, info.position) for info in delivered]
    assert len(set(places)) == len(places)


def test_grids_come_from_the_headers_where_there_is_no_index(without_index, batches):
    assert [[(info.key, codes) for info, codes in step] for step in steps_of(config(without_index)).infos(8)] == [
        [(info.key, codes) for info, codes in step] for step in batches[:8]
    ]


def test_the_order_in_which_grids_are_named_changes_no_batch_but_must_stay(folder, stream):
    """A model has a row of a table for each grid: in another order, a resumed run would exchange them."""
    batches, state = stream
    tokens = SPEC._replace(grids=SPEC.grids[::-1])
    assert steps_of(config(folder), tokens=tokens).infos(3) == batches[:3]
    said = refusal(DataError, steps_of, config(folder), tokens=tokens, state=state)
    assert "cannot resume: grids was ['4x8', '2x4', '4x2'] and is now ['4x2', '2x4', '4x8']; set model.grids" in said


def test_the_start_says_what_each_grid_has(folder):
    said = steps_of(config(folder)).streams[0].describe(10)
    assert "grid 4x8: 19 samples" in said and "12 in a step" in said


def test_an_index_holds_grids_and_statistics_count_them(folder):
    index = Index(folder / "many" / "index.safetensors")
    shard = TarShard(str(folder / "many" / "00000.tar"), index.table(str(folder / "many" / "00000.tar"), ""))
    grids = [list(unpack_codes(shard.read(n).members["codes"])[0].grid) for n in range(len(shard))]
    assert index.tensors["sizes"][: len(shard)].tolist() == grids
    counted = count(open_source(SourceConfig(root=str(folder / "many"))))
    (grids,) = [histogram for histogram in counted.histograms() if histogram.name == "grids"]
    assert grids.bins == {"2x4": 14, "4x2": 18, "4x8": 15} and "model.grids=[2x4,4x2,4x8]" in grids.title


def test_a_sample_with_an_image_and_codes_has_no_size_in_the_index(tmp_path):
    """One size could only be right for one of the two kinds of readers."""
    write_tars(tmp_path / "tars", (3,), codes=pack_codes(codes_of("2x4", 0), FINGERPRINT, VOCABULARY))
    assert "sizes" not in Index(index_of(tmp_path / "tars", tmp_path / "index.safetensors")).tensors


def test_batches_have_about_equal_codes():
    sizes = grid_sizes([(24, 40), (32, 32), (16, 16), (32, 32)])
    assert [(one.name, one.batch) for one in with_batches(sizes, 64)] == [("16x16", 64), ("24x40", 16), ("32x32", 16)]
    said = refusal(DataError, check_batches, sizes, 2, 1, 1, OF_TOKENS)
    assert "grid 24x40: no divisor of trainer.global_batch_size=2 gives its steps about the codes of 2 x 16x16" in said
    said = refusal(DataError, check_batches, sizes, 8, 4, 1, OF_TOKENS)
    assert "grid 24x40 has 2 images a step, which 4 processes x 1 micro-batches do not divide" in said


def test_evaluation_tells_the_grid_of_each_sample(folder):
    found = list(evaluation_tokens(str(folder / "many"), SPEC))
    assert len(found) == 47
    for one in found:
        assert one.grid == GRIDS[one.key.rsplit("-", 1)[1]] and len(one.index_t) == one.grid[0] * one.grid[1]


def test_batches_of_evaluation_have_one_grid(folder):
    found = list(evaluation_tokens(str(folder / "many"), SPEC))
    batches = list(in_batches(found, 4, lambda one: one.grid))
    assert all(len({one.grid for one in batch}) == 1 for batch in batches)
    assert sorted(len(batch) for batch in batches) == [2, 2, 3] + [4] * 10  # of 14, 18 and 15 samples
    for grid in SPEC.grids:
        keys = [one.key for batch in batches for one in batch if one.grid == grid]
        assert keys == [one.key for one in found if one.grid == grid]
    alone = [one for one in found if one.grid == (2, 4)]
    assert list(in_batches(alone, 4, lambda one: one.grid)) == [alone[n : n + 4] for n in range(0, 14, 4)]


# ------------------------------------------------------------------------------------------------------------- mistakes

ONE_GRID = SPEC._replace(grids=((2, 4),))
NAMED = (
    "holds the grids 4x2 (18 samples), 4x8 (15 samples), 2x4 (14 samples), and this run expects 2x4: set "
    "'model.grids=[2x4,4x2,4x8]' (model.grid is one of them), or write other token shards with `ibq tokenize`"
)


def test_grids_that_the_run_does_not_expect_are_named_at_the_start(folder, without_index):
    kind = SPEC._replace(grids=((2, 4), (4, 2)))
    named = NAMED.replace("expects 2x4", "expects 2x4, 4x2")
    for tokens, said in ((kind, named), (ONE_GRID, NAMED)):
        settings = DataConfig(train=str(folder / "many"), content="tokens")
        assert refusal(DataError, check, settings, tokens=tokens) == f"source train {said}"
        settings = DataConfig(train=None, val=str(folder / "many"), content="tokens")
        assert said in refusal(DataError, check, settings, train=False, tokens=tokens)
    settings = DataConfig(train=str(without_index / "many"), content="tokens", workers=0)
    assert refusal(DataError, Steps, settings, tokens=kind) == f"source train {named}"


def test_one_other_grid_is_named_for_model_grid(tmp_path):
    write_tar(tmp_path / "a.tar", [{"__key__": "a", "codes": pack_codes(codes_of("4x8", 0), FINGERPRINT, VOCABULARY)}])
    index_of(tmp_path, tmp_path / "index.safetensors")
    said = refusal(DataError, check, DataConfig(train=str(tmp_path), content="tokens"), tokens=ONE_GRID)
    assert "holds the grid 4x8 (1 sample), and this run expects 2x4: set 'model.grid=[4,8]', or write other" in said


def test_many_grids_are_not_all_named(tmp_path):
    samples = [
        {"__key__": f"{n}", "codes": pack_codes(np.zeros((1, 1, 1 + n), int), FINGERPRINT, VOCABULARY)}
        for n in range(12)
    ]
    write_tar(tmp_path / "a.tar", samples)
    index_of(tmp_path, tmp_path / "index.safetensors")
    settings = DataConfig(train=str(tmp_path), content="tokens")
    said = refusal(DataError, check, settings, tokens=SPEC._replace(grids=((1, 1),)))
    assert "4 other grids, and this run expects 1x1: write other token shards" in said


def test_tars_in_quarantine_may_have_any_grid(folder):
    tokens = SPEC._replace(grids=((2, 4), (4, 2)))
    settings = DataConfig(
        train=str(folder / "many"), content="tokens", quarantine=["00001.tar"], workers=0, lanes=2, shuffle_block=4
    )
    check(settings, tokens=tokens)
    assert all("-0-" in info.key for info in Steps(settings, batch=2, tokens=tokens).delivered(8))


def test_grids_that_no_sample_has_are_named_at_the_start(folder):
    """A model that is trained further may know more grids than its data have."""
    steps = steps_of(config(folder), tokens=SPEC._replace(grids=(*SPEC.grids, (4, 4))))
    assert "grid 4x4: no samples, so it is not trained" in steps.streams[0].describe(10)
    assert {info.key.rsplit("-", 1)[1] for info in steps.delivered(12)} == {"2x4", "4x2", "4x8"}


def test_filters_that_leave_nothing_are_refused(folder, tmp_path):
    (tmp_path / "keys.txt").write_text("none\n")
    one = SourceConfig(root=str(folder / "many"), filters=FilterConfig(keys=str(tmp_path / "keys.txt")))
    said = refusal(DataError, steps_of, config(folder, sources=[one]))
    assert "none of its 47 samples passes the filters: loosen them" in said


def test_images_and_sources_without_sizes_are_named(folder, tmp_path):
    write_tars(tmp_path / "images", (3,))
    index_of(tmp_path / "images", tmp_path / "images" / "index.safetensors")
    said = refusal(DataError, steps_of, config(folder, sources=[], train=str(tmp_path / "images"), lanes=48))
    assert "holds images, not tokens" in said
    piped = config(folder, sources=[], train=f"pipe:cat {folder / 'few' / '00000.tar'}", allow_pipes=True, lanes=1)
    said = refusal(DataError, steps_of, piped, batch=4)
    assert "several model.grids need the grid of every sample, and the output of a command has no index" in said


def test_other_grids_or_samples_are_refused_when_resuming(folder, without_index):
    steps = steps_of(config(folder))
    steps.infos(2)
    state = steps.state()
    train = config(folder, sources=[], train=str(without_index / "few"))
    one = Steps(train, batch=48, tokens=SPEC)
    one.infos(1)
    assert "cannot resume: grids was ['4x8', '2x4', '4x2'] and is now None; set model.grids back" in refusal(
        DataError, steps_of, config(folder), tokens=ONE_GRID, state=state
    )
    before, other = one.state(), {"2x4": "4x2", "4x2": "2x4", "4x8": "4x8"}
    (without_index / "few" / "00000.tar").unlink()
    samples = [  # the same keys at the same places, but two grids have changed places
        {
            "__key__": f"few-0-{n}-{kind}",
            "codes": pack_codes(codes_of(other[kind], n), FINGERPRINT, VOCABULARY),
            "cls": b"%d" % n,
        }
        for n, kind in mixed_kinds(SOURCES["few"][0][0], 0, 0)
    ]
    write_tar(without_index / "few" / "00000.tar", samples)
    said = refusal(DataError, Steps, train, batch=48, tokens=SPEC, state=before)
    assert "grid 2x4 had other samples of source train: set the filters back, and give the same token shards" in said


def test_damaged_codes_are_met_in_their_turn(folder, tmp_path):
    shutil.copytree(folder / "few", tmp_path / "few")
    (tmp_path / "few" / "index.safetensors").unlink()
    samples = [{"__key__": "bad", "codes": b"no codes"}, {"__key__": "cut", "codes": b"{}\n"}]
    write_tar(tmp_path / "few" / "00001.tar", samples)
    settings = DataConfig(train=str(tmp_path / "few"), content="tokens", workers=0, lanes=2, shuffle_block=4)
    for indexed in (False, True):
        if indexed:
            index_of(tmp_path / "few", tmp_path / "few" / "index.safetensors")
        stream = Steps(settings, batch=4, tokens=SPEC).streams[0]
        skipped = [one.key for _ in range(20) for one in next(stream).skipped]
        assert {"bad", "cut"} == set(skipped)


def test_one_grid_is_no_division(folder, tmp_path):
    """Its batches, state and identity are those of runs of before several grids."""
    samples = [{"__key__": f"{n}", "codes": pack_codes(codes_of("2x4", n), FINGERPRINT, VOCABULARY)} for n in range(6)]
    write_tar(tmp_path / "a.tar", samples)
    settings = DataConfig(train=str(tmp_path), content="tokens", workers=0, lanes=2)
    steps = Steps(settings, batch=2, tokens=ONE_GRID)
    steps.infos(2)
    assert steps.streams[0].division is None and set(steps.state()["lanes"]) == {"0", "1"}
    assert not {"grids", "buckets", "division"} & steps.state()["stream"].keys()
    assert open_sources(settings)[0].numbers is None
