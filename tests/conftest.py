"""Fixtures and settings of all tests."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

import tapes
from tapes.testing import ManualClock
from tests.processes import Home, wait_for

# No deadlines: the machine may be busy. In CI the examples are the same every time.
hypothesis.settings.register_profile(
    "tapes",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tapes")


def pytest_configure(config: pytest.Config) -> None:
    """Allow forks in processes of pytest-xdist, and restore the default handling of SIGINT and SIGQUIT.

    pytest-xdist has a thread of its own, and Python warns of a fork beside a thread. A shell lets background
    commands ignore SIGINT and SIGQUIT, which the services of the tests would inherit.
    """
    for number in (signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if "PYTEST_XDIST_WORKER" in os.environ:
        config.addinivalue_line("filterwarnings", "ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def clock() -> ManualClock:
    """A manual clock that stands at the boundary of a tick."""
    return ManualClock(1000.0)


@pytest.fixture
def registry(clock: ManualClock) -> tapes.Registry:
    """A registry with a manual clock."""
    return tapes.Registry(clock=clock)


@pytest.fixture
def short_dir() -> Iterator[pathlib.Path]:
    """An empty directory whose path is short enough for a socket; it is removed at the end."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="tt", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def home(short_dir: pathlib.Path, request: pytest.FixtureRequest) -> Iterator[Home]:
    """The directories of a service; after the test no process and no file of it is left.

    In a test that runs alone nothing is left within 4 s, as tapes promises.
    """
    home = Home(short_dir)
    yield home
    wait_for(home.nothing_left, "nothing is left", 4 if request.node.get_closest_marker("alone") else 30)


@pytest.fixture(autouse=True)
def _no_address_is_left() -> Iterator[None]:
    """Fail if a test leaves TAPES_ADDR in the environment, because later tests would join that service."""
    yield
    left = os.environ.pop("TAPES_ADDR", None)
    assert left is None, f"TAPES_ADDR is left: {left}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose ``needs`` are not installed; fail it if TAPES_REQUIRE_REAL is set."""
    for marker in item.iter_markers("needs"):
        missing = [command for command in marker.args if shutil.which(command) is None]
        if missing and os.environ.get("TAPES_REQUIRE_REAL"):
            pytest.fail(f"required, but not installed: {', '.join(missing)}")
        if missing:
            pytest.skip(f"not installed: {', '.join(missing)}")
