"""Where a service of the tests here runs."""

from __future__ import annotations

import pytest

from tests.processes import Home, wait_for


@pytest.fixture
def home(short_dir):
    """Where a service runs; nothing of it is left within 4 s."""
    home = Home(short_dir)
    yield home
    wait_for(home.nothing_left, "nothing is left", 4)
