"""The eight sources of web images as one recipe: where each lies, what is missing, and what a sample holds."""

import json
from collections import Counter

import pytest
from comparing import refusal
from field.web_sources import NAMES, make_web_sources
from samples import Steps

from data.config import DataConfig, SourceConfig
from data.errors import DataError
from data.source_configs import source_configs
from trainer.recipes import load_recipe


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """All eight, in the layouts in which they are published."""
    return make_web_sources(tmp_path_factory.mktemp("web"))


def config(root, recipe="ibq_262144_pretrain", **changes):
    settings = load_recipe(recipe, [f"data.root={root}"]).data
    for key, value in {"image_size": 16, "workers": 0, "lanes": 8, **changes}.items():
        setattr(settings, key, value)
    for source in settings.sources:
        source.filters.min_side = 20
    return settings


def test_the_recipe_reads_all_sources_by_their_weights(web):
    settings = config(web)
    steps = Steps(settings, batch=8)
    infos = steps.delivered(200)
    counts = Counter(info.source for info in infos)
    assert set(counts) == set(NAMES)
    total = sum(source.weight for source in settings.sources)
    for source in settings.sources:
        assert counts[source.name] / len(infos) == pytest.approx(source.weight / total, abs=0.005)
    assert all(info.caption == f"a caption of {info.source}" for info in infos)
    assert not any("small" in info.key for info in infos)  # the filter by size
    assert steps.state()["totals"]["cc3m"]["filtered/min_side"] > 0


@pytest.mark.parametrize("recipe", ["ibq_16384_pretrain", "ibq_262144_general", "ibq_262144_quality"])
def test_the_other_recipes_read_theirs(web, recipe):
    settings = config(web, recipe)
    names = {source.name for source in settings.sources}
    assert len(names) == (8 if recipe == "ibq_16384_pretrain" else 4)
    assert {info.source for info in Steps(settings, batch=8).delivered(20)} == names


def test_the_two_stages_are_the_mixture(web):
    parts = [config(web, recipe).sources for recipe in ("ibq_262144_general", "ibq_262144_quality")]
    weights = {source.name: source.weight for part in parts for source in part}
    assert weights == {source.name: source.weight for source in config(web).sources}


def test_missing_sources_are_named_together(tmp_path):
    make_web_sources(tmp_path, NAMES[:5])
    (tmp_path / NAMES[6]).mkdir()  # empty
    said = refusal(DataError, source_configs, config(tmp_path))
    assert f"lacks 3 of 8 sources: {', '.join(sorted(NAMES[5:], key=order))}: download them" in said
    assert "`ibq shards sources" in said and "data.missing=skip" in said


def order(name: str) -> int:
    """The place of a source in the recipe."""
    return [source.name for source in load_recipe("ibq_262144_pretrain", []).data.sources].index(name)


def test_missing_sources_can_be_skipped(tmp_path, caplog):
    make_web_sources(tmp_path, NAMES[:2])
    settings = config(tmp_path, missing="skip")
    steps = Steps(settings, batch=8)
    assert {info.source for info in steps.delivered(10)} == set(NAMES[:2])
    assert "data.missing=skip: without" in caplog.text and NAMES[2] in caplog.text


def test_a_skipped_source_that_arrives_later_is_read_from_its_beginning(tmp_path):
    make_web_sources(tmp_path, NAMES[:2])
    before = Steps(config(tmp_path, missing="skip"), batch=8)
    before.delivered(5)
    make_web_sources(tmp_path, NAMES[2:3])
    source_configs.__globals__["_is_there"].cache_clear()  # as in a new process
    after = Steps(config(tmp_path, missing="skip"), batch=8, state=before.state())
    assert {info.source for info in after.delivered(20)} == set(NAMES[:3])


def test_nothing_there_is_refused_even_if_missing_ones_are_skipped(tmp_path):
    said = refusal(DataError, source_configs, config(tmp_path, missing="skip"))
    assert "lacks 8 of 8 sources" in said and "data.missing" not in said


def test_the_folder_of_one_source_as_root_is_refused_with_the_folder_that_holds_it(tmp_path):
    make_web_sources(tmp_path, NAMES[:1])
    said = refusal(DataError, source_configs, config(tmp_path / NAMES[0]))
    assert said.endswith(f"data.root={tmp_path}")


def test_other_images_replace_sources_that_nobody_has_placed(web):
    settings = config(web)
    settings.root, settings.train = None, str(web / "cc3m")
    assert source_configs(settings).found == [SourceConfig(root=str(web / "cc3m"))]


def test_a_source_with_a_root_stays_there(web, tmp_path):
    sources = [SourceConfig(name="cc3m"), SourceConfig(name="own", root="elsewhere")]
    settings = DataConfig(root=str(web), sources=sources)
    assert [source.root for source in source_configs(settings).found] == [f"{web}/cc3m", "elsewhere"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": [SourceConfig(name="cc3m")]}, "the sources cc3m have no root: give data.root=FOLDER"),
        ({"root": "/data"}, "data.root has no effect: no source of data.sources is without its own root"),
        ({"root": "/data", "train": "tars"}, "data.train and data.root are both given"),
        ({"train": "a", "sources": [SourceConfig(root="b")]}, "data.train and data.sources are both given"),
        ({"train": "a", "missing": "ignore"}, "unknown data.missing 'ignore': choose one of refuse, skip"),
    ],
)
def test_contradictions_are_refused(settings, message):
    assert message in refusal(DataError, source_configs, DataConfig(**settings))


def test_captions_come_from_the_published_field(web):
    """LAION-COCO's own caption is in the json, not in the txt, which holds the alternative text of the web page."""
    sample = json.loads((web / "laion-coco.json").read_text())
    assert sample["top_caption"] == "a caption of laion-coco" and sample["caption"] != sample["top_caption"]
