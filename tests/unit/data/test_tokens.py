"""Token samples: their bytes, what is refused, and that the stream of them is as exact as that of images."""

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from comparing import refusal
from samples import Steps, write_tar
from tokens import FINGERPRINT

from data import (
    DataConfig,
    DataError,
    ImageError,
    SourceConfig,
    TokenHeader,
    TokenSpec,
    check,
    evaluation_tokens,
    pack_codes,
    token_header,
    unpack_codes,
)
from data.prep.check import check_shard
from data.prep.stats import count
from data.sources import open_source
from data.tokens import TokenTransform

SPEC = TokenSpec(FINGERPRINT, 300, ((2, 3),))


def codes(number: int, views: int = 2) -> np.ndarray:
    """(views, 2, 3) of 300 codes, others for each number; view v begins with the code 10 * v."""
    index_vhw = np.random.default_rng(number).integers(0, 300, (views, 2, 3))
    index_vhw[:, 0, 0] = 10 * np.arange(views)
    return index_vhw


@pytest.fixture
def tokens(tmp_path):
    """A folder of three tars of 7, 9 and 4 samples, of two views each."""
    (tmp_path / "tokens").mkdir()
    numbers = itertools.count()
    for shard, samples in enumerate((7, 9, 4)):
        made = [
            {
                "__key__": f"{shard}-{n}",
                "codes": pack_codes(codes(next(numbers)), FINGERPRINT, 300),
                "cls": b"%d" % n,
                "txt": b"a caption",
            }
            for n in range(samples)
        ]
        write_tar(tmp_path / "tokens" / f"tokens-{shard:06d}.tar", made)
    return tmp_path / "tokens"


def config(tokens, **options):
    return DataConfig(train=str(tokens), content="tokens", **{"workers": 0, "shuffle_block": 3, **options})


# --------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("vocabulary", "each"), [(2, 1), (256, 1), (257, 2), (65_536, 2), (65_537, 3), (1 << 18, 3), (1 << 24, 3)]
)
def test_codes_come_back_from_the_fewest_whole_bytes(vocabulary, each):
    index_vhw = np.random.default_rng(vocabulary).integers(0, vocabulary, (10, 3, 5))
    index_vhw[0, 0, :2] = 0, vocabulary - 1
    content = pack_codes(index_vhw, FINGERPRINT, vocabulary)
    line, _, packed = content.partition(b"\n")
    assert json.loads(line) == {"tokenizer": FINGERPRINT, "codes": vocabulary, "shape": [10, 3, 5]}
    assert b" " not in line and len(packed) == 10 * 3 * 5 * each
    assert int.from_bytes(packed[each : 2 * each], "little") == vocabulary - 1
    header, found_vhw = unpack_codes(content)
    assert header == TokenHeader(FINGERPRINT, vocabulary, 10, (3, 5))
    assert found_vhw.dtype == np.int32 and np.array_equal(found_vhw, index_vhw)
    transform = TokenTransform(TokenSpec(None, vocabulary, ((3, 5),)))
    out_t = np.zeros(15, np.int32)
    assert transform(content, random.Random(0), out=out_t) is out_t
    assert any(np.array_equal(out_t, view_hw.ravel()) for view_hw in index_vhw)


@pytest.mark.parametrize(
    ("index_vhw", "vocabulary", "message"),
    [
        (np.full((1, 2, 2), 4), 4, "from 4 to 4 do not lie in"),
        (np.full((1, 2, 2), -1), 4, "from -1"),
        (np.zeros((2, 2), int), 4, "shape (2, 2)"),
        (np.zeros((1, 0, 2), int), 4, "none of them 0"),
        (np.zeros((1, 2, 2), int), (1 << 24) + 1, "at most 16,777,216"),
    ],
)
def test_what_cannot_be_packed_is_refused(index_vhw, vocabulary, message):
    assert message in refusal(DataError, pack_codes, index_vhw, FINGERPRINT, vocabulary)


GOOD = pack_codes(codes(0), FINGERPRINT, 300)
LINE = GOOD.partition(b"\n")[0]
DAMAGED = {
    "empty": (b"", "no header"),
    "no line": (LINE, "no header"),
    "a long line": (b" " * 5000 + GOOD, "no header"),
    "no JSON": (b"\xff{" + GOOD, "damaged"),
    "nested": (b"[" * 4000 + b"\n", "damaged"),
    "another JSON": (b'{"a": 1}\n', "damaged"),
    "a list": (b"[1, 2]\n", "damaged"),
    "a shape of two": (GOOD.replace(b"[2,2,3]", b"[2,6]"), "damaged"),
    "no views": (GOOD.replace(b"[2,2,3]", b"[0,2,3]"), "damaged"),
    "true views": (GOOD.replace(b"[2,2,3]", b"[true,2,3]"), "damaged"),
    "many codes": (GOOD.replace(b":300", b":300000000"), "damaged"),
    "a huge shape": (GOOD.replace(b"[2,2,3]", b"[2,2,%d]" % 10**30), "and not"),
    "cut off": (GOOD[:-1], "23 bytes and not 24"),
    "too long": (GOOD + b"\0", "25 bytes and not 24"),
    "a code too large": (LINE + b"\n" + b"\xff\xff" * 12, "code 65,535 lies outside the 300"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_named(content, message):
    assert message in refusal(ImageError, unpack_codes, content)
    assert message in refusal(ImageError, TokenTransform(SPEC), content, random.Random(0))


# -------------------------------------------------------------------------------------------------------------- stream


def test_the_stream_is_exact_at_any_division_and_resumes(tokens):
    expected = Steps(config(tokens, lanes=8), tokens=SPEC).infos(15)  # six epochs
    assert Steps(config(tokens, lanes=8, workers=2), tokens=SPEC).infos(15) == expected
    assert Steps(config(tokens, lanes=8), tokens=SPEC, world_size=2).infos(15) == expected
    before = Steps(config(tokens, lanes=8, workers=2), tokens=SPEC)
    assert before.infos(4) == expected[:4]  # in the middle of the second epoch
    after = Steps(config(tokens, lanes=8), tokens=SPEC, world_size=2, state=before.state())
    assert after.infos(11) == expected[4:]
    keys = [info.key for step in expected for info, _ in step]
    assert Counter(keys) == dict.fromkeys(keys, 6)
    assert len(set(keys)) == 20
    for stream in (*after.streams, *before.streams):
        values_bt = next(stream).values
        assert values_bt.dtype == torch.int32 and values_bt.shape[1:] == (6,)


def test_views_are_drawn_and_differ_between_epochs(tokens):
    of_key: dict[str, set] = {}
    everything = {}
    for shard, samples in enumerate((7, 9, 4)):
        for n in range(samples):
            everything[f"{shard}-{n}"] = {tuple(view_hw.ravel().tolist()) for view_hw in codes(len(everything))}
    for info, values in itertools.chain(*Steps(config(tokens), tokens=SPEC).infos(15)):
        index_t = tuple(np.frombuffer(values, np.int32).tolist())
        assert index_t in everything[info.key] and info.label == int(info.key.split("-")[1])
        of_key.setdefault(info.key, set()).add(index_t[0])
    assert sum(len(views) == 2 for views in of_key.values()) > 15


def test_damaged_samples_are_skipped_with_their_reasons(tmp_path):
    samples = [
        {"__key__": f"bad-{n}", "codes": content or b"\n", "cls": b"1"}
        for n, (content, _) in enumerate(DAMAGED.values())
    ]
    samples += [{"__key__": f"good-{n}", "codes": pack_codes(codes(n), FINGERPRINT, 300)} for n in range(10)]
    samples += [{"__key__": "class", "codes": GOOD, "cls": b"cat"}, {"__key__": "none", "txt": b"text only"}]
    path = write_tar(tmp_path / "tokens.tar", samples)
    stream = Steps(config(path, max_bad_fraction=1.0, lanes=1), batch=1, tokens=SPEC).streams[0]
    batches = [next(stream) for _ in range(20)]
    assert Counter(batch.keys[0] for batch in batches) == {f"good-{n}": 2 for n in range(10)}
    reasons = {one.key: one.reason for batch in batches for one in batch.skipped}
    assert len(reasons) == len(DAMAGED) + 2 and "its codes have 23 bytes and not 24" in reasons.values()
    assert "'cat' is no number" in reasons["class"] and "no image (codes)" in reasons["none"]
    checked = check_shard(path)
    assert checked.counts == {"undecodable": len(DAMAGED), "no image": 1, "bad class": 1} and checked.status == "flawed"


# ------------------------------------------------------------------------------------------------------------- mistakes

OTHERS = [
    (
        TokenSpec("f" * 16, 300, ((2, 3),)),
        "holds tokens of tokenizer 0123456789abcdef, and this run expects those of ffff",
    ),
    (
        TokenSpec(FINGERPRINT, 301, ((2, 3),)),
        "holds 2 x 3 of 300 codes an image, and this run expects 2 x 3 of 301 codes",
    ),
    (
        TokenSpec(FINGERPRINT, 300, ((3, 2),)),
        "holds 2 x 3 of 300 codes an image, and this run expects 3 x 2 of 300 codes",
    ),
]


@pytest.mark.parametrize(("spec", "said"), OTHERS)
def test_other_tokens_are_refused_by_check_and_stream(tokens, spec, said):
    assert refusal(DataError, check, config(tokens), tokens=spec).startswith(f"source train {said}")
    validation = DataConfig(train=None, val=str(tokens), content="tokens")
    assert said in refusal(DataError, check, validation, train=False, tokens=spec)
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"source train, \d-\d in .*tar: the sample " + said):
            Steps(config(tokens, workers=workers), tokens=spec).take(1)


def test_what_fits_passes(tokens):
    header = token_header(config(tokens))
    assert header == TokenHeader(FINGERPRINT, 300, 2, (2, 3))
    check(config(tokens, val=str(tokens)), tokens=SPEC)
    check(config(tokens), tokens=SPEC._replace(tokenizer=None))


def test_each_source_is_compared(tokens, tmp_path):
    (tmp_path / "other").mkdir()
    write_tar(tmp_path / "other/a.tar", [{"__key__": "a", "codes": pack_codes(codes(0), "f" * 16, 300)}])
    sources = [SourceConfig(name="one", root=str(tokens)), SourceConfig(name="two", root=str(tmp_path / "other"))]
    both = DataConfig(sources=sources, content="tokens")
    assert token_header(both).tokenizer == FINGERPRINT
    assert "source two holds tokens of tokenizer ffffffffffffffff" in refusal(DataError, check, both, tokens=SPEC)


def test_images_and_tokens_are_told_apart(tokens, tars, tmp_path):
    said = "holds images, not tokens: write token shards with `ibq tokenize`, or train with data.content=images"
    for mistaken in (lambda: token_header(config(tars)), lambda: check(config(tars), tokens=SPEC)):
        assert f"source train {said}" in refusal(DataError, mistaken)
    assert said in refusal(DataError, evaluation_tokens, str(tars), SPEC)
    with pytest.raises(DataError, match=r"it holds tokens, no image: data\.content=tokens reads them"):
        Steps(DataConfig(train=str(tokens), workers=0, max_bad_in_a_row=3)).take(1)
    assert "data.content=tokens is for a run that trains on tokens" in refusal(DataError, check, config(tokens))
    with pytest.raises(DataError, match=r"unknown data\.content 'codes'"):
        check(DataConfig(train=str(tokens), content="codes"), tokens=SPEC)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"no \*.tar|neither"):
        token_header(config(empty))
    damaged = write_tar(tmp_path / "damaged.tar", [{"__key__": "a", "codes": GOOD[:-1]}])
    with pytest.raises(DataError, match=r"source train: no token sample can be read .*23 bytes and not 24"):
        token_header(config(damaged))
    tall = SourceConfig(root=str(tokens))
    tall.filters.min_side = 8
    with pytest.raises(DataError, match="min_side is for images"):
        check(DataConfig(sources=[tall], content="tokens"), tokens=SPEC)


def test_a_quarantined_first_shard_is_passed_over(tokens):
    (tokens / "tokens-000000.tar").write_bytes(b"")
    passed = config(tokens, quarantine=["tokens-000000.tar"])
    assert token_header(passed).vocabulary == 300
    check(passed, tokens=SPEC)


# ----------------------------------------------------------------------------------------------- evaluation, statistics


def test_evaluation_gives_each_sample_once_over_three_shards(tokens):
    whole = list(evaluation_tokens(str(tokens), SPEC))
    assert [one.index for one in whole] == list(range(20))
    for one in whole:
        assert one.index_t.dtype == torch.int64 and one.index_t.tolist() == codes(one.index)[0].ravel().tolist()
        assert one.label == int(one.key.split("-")[1])
    parts = [evaluation_tokens(str(tokens), SPEC, shard=(rank, 3)) for rank in range(3)]
    assert [len(part) for part in parts] == [7, 7, 6]
    together = sorted((one for part in parts for one in part), key=lambda one: one.index)
    assert [(one.key, one.index_t.tolist()) for one in together] == [(one.key, one.index_t.tolist()) for one in whole]


def test_evaluation_lists_what_it_leaves_out_and_refuses_other_tokens(tmp_path):
    samples = [{"__key__": "a", "codes": GOOD}, {"__key__": "b", "codes": GOOD[:-1]}]
    found = evaluation_tokens(write_tar(tmp_path / "a.tar", samples), SPEC)
    for _ in range(2):
        assert [(one.key, one.label) for one in found] == [("a", None)]
        assert [(one.key, one.reason) for one in found.skipped] == [("b", "its codes have 23 bytes and not 24")]
    samples[1]["codes"] = pack_codes(codes(0), "f" * 16, 300)
    with pytest.raises(DataError, match="b holds tokens of tokenizer ffffffffffffffff"):
        list(evaluation_tokens(write_tar(tmp_path / "b.tar", samples), SPEC))


def test_statistics_tell_of_tokens_and_classes(tokens):
    counted = count(open_source(SourceConfig(root=str(tokens))))
    assert counted.tokens == {TokenHeader(FINGERPRINT, 300, 2, (2, 3)): 20} and not counted.formats
    assert counted.classes[0] == 3 and counted.lengths == {9: 20}
    assert counted.record()["tokens"] == [
        {"tokenizer": FINGERPRINT, "vocabulary": 300, "views": 2, "grid": (2, 3), "samples": 20}
    ]
    assert [histogram.name for histogram in counted.histograms()] == ["captions", "classes"]
