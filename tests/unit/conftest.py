"""Fixtures of the unit tests."""

from __future__ import annotations

import pytest

from tapes import forks
from tapes.distributed.aggregator.handler import Handler
from tapes.distributed.aggregator.lifetime import Lifetime
from tapes.distributed.transport.address import resolve


@pytest.fixture
def make_handler(short_dir):
    """Make a handler of an aggregator at the same address as the last one."""

    def make(lifetime=None, **configured):
        made = Handler(
            resolve(f"ipc://{short_dir}/m.ipc"), lifetime or Lifetime.joined(forks.this_process()), configured
        )
        kept.append(made)
        return made

    kept = []
    yield make
    for one in kept:
        one.journal.remove()
