"""Fixtures for pytest, found by it in every project that has tapes installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tapes.registry import Registry


@pytest.fixture
def tapes_registry() -> Iterator[Registry]:
    """The registry behind ``tapes.counter()``, with nothing recorded; bad values raise (`tapes.testing`)."""
    from tapes.testing import strict  # not before it is used: a plugin is imported by every pytest

    with strict() as registry:
        yield registry
