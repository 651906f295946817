"""An aggregator in a process of its own."""

from __future__ import annotations

import sys

import pytest

from tests.processes import connected, running, wait_for

AGGREGATOR = [
    sys.executable,
    "-c",
    "from tapes.distributed.registry import *; RegistryAggregator([], 'ipc://m.ipc').start(fork=False)",
]


@pytest.fixture
def start_aggregator(short_dir):
    """Return a context manager: an aggregator at ``m.ipc`` in ``short_dir``."""
    return lambda: running(AGGREGATOR, cwd=short_dir)


@pytest.fixture
def address(short_dir, start_aggregator):
    """Where an aggregator listens."""
    with start_aggregator():
        wait_for((short_dir / "m.ipc.read").exists, "the aggregator listens")
        yield f"ipc://{short_dir}/m.ipc"


@pytest.fixture
def reader(address):
    """A registry that recorded nothing itself."""
    with connected(address) as registry:
        yield registry
