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


def test_a_module_has_a_list_of_exports_if_it_is_public():
    """`__all__` marks the modules that the page names; every other module is private."""
    named = {name.rpartition(".")[0] for name in re.findall(r"auto(?:class|function):: (tapes[\w.]+)", PAGE)}
    named |= set(re.findall(r"automodule:: (tapes[\w.]+)", PAGE)) | {"tapes", "tapes.metrics"}
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "tapes").rglob("*.py")
        if re.search(r"^__all__\b", path.read_text(), re.MULTILINE)
    }
    assert modules == named - {"tapes.pytest_plugin"}  # which offers a fixture
