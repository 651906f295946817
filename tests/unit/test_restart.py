"""tapes.distributed.supervision.restart: the first worker that notices it restarts a dead aggregator."""

from __future__ import annotations

import itertools
import logging
from types import SimpleNamespace

import pytest

from tapes.distributed.storage.locks import Lock
from tapes.distributed.supervision import restart
from tapes.distributed.supervision.restart import Restarter
from tapes.distributed.transport.address import resolve
from tapes.errors import AggregatorUnavailable


@pytest.fixture
def endpoints(short_dir):
    return resolve(f"ipc://{short_dir}/m.ipc")


@pytest.fixture
def clock(monkeypatch):
    """The module's clock, which the test moves; attempts run in the calling thread without a random share."""
    made = SimpleNamespace(now=100.0, monotonic=lambda: made.now)
    monkeypatch.setattr(restart, "time", made)
    monkeypatch.setattr(restart.random, "uniform", lambda low, high: low)
    monkeypatch.setattr(restart.threads, "can_run", lambda: False)
    return made


@pytest.fixture
def starts(clock, monkeypatch):
    """The times at which an aggregator is started; each start fails."""

    def launch(*_, **__):
        made.append(clock.now)
        raise AggregatorUnavailable("it can't be started")

    made: list[float] = []
    monkeypatch.setattr(restart, "launch", launch)
    return made


def crash(endpoints, **options):
    """Leave the lock file of a killed aggregator."""
    lock = Lock(endpoints, restartable=True, **options)
    lock.acquire()
    lock.close()


def run(restarter, clock, seconds):
    for _ in range(int(seconds * 8)):
        restarter.ensure_running()
        clock.now += 0.125


def test_an_aggregator_that_lives_or_has_exited_is_not_restarted(endpoints, starts, clock):
    """Only a lock file without a holder is the sign of a crash."""
    restarter = Restarter(endpoints, lambda place: None)
    run(restarter, clock, 2)
    lock = Lock(endpoints, restartable=True)
    lock.acquire()
    run(restarter, clock, 2)
    lock.release()
    run(restarter, clock, 2)
    assert starts == []


def test_an_aggregator_that_its_own_program_started_is_not_restarted(endpoints, starts, clock):
    """Workers restart an aggregator only if its lock file says so."""
    lock = Lock(endpoints)
    lock.acquire()
    lock.close()
    run(Restarter(endpoints, lambda place: None), clock, 2)
    assert starts == []


def test_attempts_that_fail_become_rarer_and_are_logged_once(endpoints, starts, clock, caplog):
    """Pauses double up to 10 s, and begin again when an aggregator subscribes; so does the log."""
    crash(endpoints)
    restarter = Restarter(endpoints, lambda place: None)
    with caplog.at_level(logging.WARNING):
        run(restarter, clock, 40)
        assert starts[:3] == [100.0, 100.25, 100.75]
        assert max(late - early for early, late in itertools.pairwise(starts)) <= 10.125
        assert len(caplog.messages) == 1
        restarter.note_subscription()
        starts.clear()
        clock.now = 200.0
        run(restarter, clock, 1)
    assert starts == [200.0, 200.25, 200.75]
    assert len(caplog.messages) == 2


def test_the_parent_of_a_killed_aggregator_restarts_it_first(endpoints, starts, clock):
    """A worker waits 1 s if the aggregator had a supervisor."""
    crash(endpoints, supervised=True)
    run(Restarter(endpoints, lambda place: None), clock, 1.5)
    assert starts[0] == 101.0


def test_TAPES_AUTOSTART_forbids_restarts(endpoints, starts, clock, monkeypatch):
    """With TAPES_AUTOSTART=0 a worker starts no aggregator."""
    monkeypatch.setenv("TAPES_AUTOSTART", "0")
    crash(endpoints)
    run(Restarter(endpoints, lambda place: None), clock, 2)
    assert starts == []
