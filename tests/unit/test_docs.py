"""What the documentation links to is there, and no number was left to be filled in."""

import re

import pytest
from ranks import ROOT

TESTS = re.compile(r"`([\w/]+\.py)`")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve_and_nothing_is_left_to_be_filled_in(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target
    assert not re.findall(r"\b(?:TODO|FIXME|[A-Z]+_(?:RATIO|TIME|MEMORY))\b", text)


@pytest.mark.parametrize("page", [ROOT / "docs/data.md", ROOT / "docs/scaling.md"], ids=lambda page: page.stem)
def test_tables_of_faults_name_files_of_tests_that_exist(page):
    there = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/*.py")]
    named = [
        name for row in re.findall(r"^\|.*\.py` \|$", page.read_text("utf-8"), re.M) for name in TESTS.findall(row)
    ]
    assert len(named) > 20
    assert not [name for name in named if not any(path.endswith(f"/{name}") or path == name for path in there)]


def test_other_quantizers_have_one_name():
    """Baselines, in what users read. Former entries of changelog and log stay, and so does the table `rivals`."""
    code = [path for package in ("data", "model_zoo", "tools", "trainer") for path in (ROOT / package).rglob("*.py")]
    recipes = list((ROOT / "model_zoo/recipes").rglob("*.yaml"))
    pages = [page for page in PAGES if page.name != "LOG.md"]
    assert code and recipes
    texts = {path: re.sub("`rivals`|ablate rivals", "", path.read_text("utf-8")) for path in code + recipes + pages}
    assert not [path for path, text in texts.items() if re.search(r"\brivals?\b", text, re.I)]
