"""Fixtures for an aggregator in a process of its own, started by `RegistryAggregator`."""

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
    """Return a context manager that runs an aggregator at ``m.ipc`` in ``short_dir``."""
    return lambda: running(AGGREGATOR, cwd=short_dir)


@pytest.fixture
def aggregator(short_dir, start_aggregator):
    """The process of an aggregator at ``address``; it is terminated with the test."""
    with start_aggregator() as process:
        wait_for((short_dir / "m.ipc.read").exists, "the aggregator listens")
        yield process


@pytest.fixture
def address(short_dir, aggregator):
    """The address of a running aggregator."""
    return f"ipc://{short_dir}/m.ipc"


@pytest.fixture
def reader(address):
    """A connected registry that recorded nothing itself."""
    with connected(address) as registry:
        yield registry
