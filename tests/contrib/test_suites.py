"""The adapters are transparent: the frameworks' own test suites pass with them."""

from __future__ import annotations

import os

import pytest

from tests.contrib import suites

# The others take longer, and these show most of what they show.
NAMES = list(suites.SUITES) if os.environ.get("TAPES_ALL_SUITES") else ["flask", "starlette"]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", NAMES)
def test_no_test_of_a_framework_fails_because_of_the_adapter(name, short_dir):
    """Each test of a framework that passes without the adapter passes with it around every application."""
    try:
        compared = suites.compare(name, short_dir)
    except suites.Unavailable as error:
        if os.environ.get("TAPES_REQUIRE_REAL"):
            raise
        pytest.skip(str(error))
    print(compared)
    assert not compared.worse, compared.output[-10000:]
    assert not compared.faults
