"""The page of the API names what is public."""

from __future__ import annotations

import re

import pytest

import tapes
from tapes import errors
from tests.processes import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text()
ERRORS = sorted(name for name in errors.__all__ if name[0].isupper())


@pytest.mark.parametrize("name", [*tapes.__all__, "DistributedRegistry"])
def test_the_page_of_the_api_names_all_that_the_package_exports(name):
    """What `import tapes` offers is public, so the page says so."""
    assert re.search(rf"\b{name}\b", PAGE)


@pytest.mark.parametrize("name", ERRORS)
def test_the_page_of_the_api_names_every_error(name):
    """A program may catch each of them."""
    assert re.search(rf"\b{name}\b", PAGE)
