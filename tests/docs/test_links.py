"""Each link between the pages of the documentation leads somewhere."""

from __future__ import annotations

import re

import pytest

from tests.processes import ROOT

NAMED = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md")
PAGES = [*(ROOT / name for name in NAMED), *sorted(ROOT.glob("docs/*.md"))]
FENCES = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def anchors(text):
    """Return the anchors of a page: those of its headings, as GitHub and Sphinx make them, and named ones."""
    text = FENCES.sub("", text)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    """A link to a page that was moved, or to a heading that was renamed, is found here."""
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCES.sub("", text)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{page.name} links to {target}"
