"""Links, anchors and file names on the pages lead somewhere; README stays a front page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import test_architecture
from support.pages import PAGES, ROOT, prose

_FILE = re.compile(r"`((?:llmconvert|quantize|convert|validate|recipes|tests|bench|docs|examples)/[\w./-]*)`")
# Pages of results say what the code of their day was called.
_HISTORY = {"CHANGELOG.md", *(path.name for path in (ROOT / "bench" / "results").glob("2026-*.md"))}


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]+`", "", prose(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not anchor or anchor in _anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in _HISTORY], ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """``quantize/plan.py`` in the text is a file of that name."""
    for name in _FILE.findall(prose(page)):
        assert (ROOT / name).exists(), name


def test_every_page_of_results_is_in_its_index() -> None:
    folder = ROOT / "bench" / "results"
    index = (folder / "README.md").read_text()
    for path in folder.glob("2026-*.md"):
        assert f"({path.name})" in index
        assert f"| taken | {path.name[:8]}" in path.read_text(), path.name


def test_the_readme_is_read_in_two_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250


def test_contributing_gives_the_order_of_imports() -> None:
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    assert f"`{' ← '.join(test_architecture.ORDER)}`" in text
