"""What the documentation links to is there, and no number was left to be filled in."""

import re

import pytest
from ranks import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve_and_nothing_is_left_to_be_filled_in(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target
    assert not re.findall(r"\b(?:TODO|FIXME|[A-Z]+_(?:RATIO|TIME|MEMORY))\b", text)
