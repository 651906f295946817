"""tapes.session: the one session of a registry, and what replaces it."""

from __future__ import annotations

import threading

import pytest

import tapes
from tapes.session import LazySession, LocalSession, Session
from tests.processes import wait_for


class Connected(Session):
    """A session that is connected, and counts how often it was opened."""

    is_connected = True

    def __init__(self, registry):
        super().__init__(registry)
        self.opened = threading.Event()

    def open(self):
        self.opened.set()

    def snapshot(self):
        return "the service"


def connecting(registry, calls=None):
    """Return what connects ``registry``, and notes each call."""

    def connect():
        if calls is not None:
            calls.append(1)
        registry.use(Connected(registry))

    return connect


@pytest.fixture
def somewhere(monkeypatch, short_dir):
    """An address in the environment."""
    monkeypatch.setenv("TAPES_ADDR", f"ipc://{short_dir}/m.ipc")


@pytest.fixture
def nowhere(monkeypatch):
    """No address in the environment, and no service around."""
    monkeypatch.delenv("TAPES_ADDR", raising=False)
    monkeypatch.setattr("tapes.session.service_address", lambda: "")


@pytest.mark.parametrize("use", ["make", "read", "resolve"])
def test_a_lazy_session_connects_once_with_the_first_use(use):
    """The first metric, the first read and the first look for the session connect, once."""
    registry, made = tapes.Registry(), []
    registry.use(LazySession(registry, None, lambda: made.append(1)))
    uses = {
        "make": lambda: registry.counter("c"),
        "read": registry.get_stats,
        "resolve": registry.session.resolved,
    }
    for _ in range(2):
        uses[use]()
    assert made == [1]


def test_a_read_of_a_local_session_looks_for_a_service_until_it_finds_one(registry):
    """Each read looks; once the registry is connected, its session answers."""
    calls = []
    registry.use(LocalSession(registry, lambda: calls.append(1), looks=True))
    assert registry.get_stats() == {}
    assert registry.get_stats() == {}
    assert calls == [1, 1]
    registry.session.connect = connecting(registry)
    assert registry.snapshot() == "the service"


def test_a_closed_registry_does_not_look_for_a_service(registry):
    """After close() a read answers for this process alone."""
    registry.use(LazySession(registry, connecting(registry)))
    registry.session.close()
    registry.counter("c").increment()
    assert registry.get_stats().c.value == 1


def test_a_connection_that_fails_is_raised_once_by_the_use_that_is_pending(registry):
    """The error reaches the caller; the next metric is made without another attempt."""
    attempts = []

    def connect():
        attempts.append(1)
        raise tapes.TapesError("no")

    registry.use(LazySession(registry, None, connect))
    with pytest.raises(tapes.TapesError):
        registry.counter("c")
    registry.counter("c").increment()
    assert attempts == [1]


def test_a_sleeping_session_connects_in_a_thread_with_the_first_recorded_value(registry, somewhere):
    """Making a metric does not connect; recording does, without waiting for it."""
    calls = []
    registry.use(LazySession(registry, connecting(registry, calls), sleeps=True))
    counter = registry.counter("c")
    assert not calls
    counter.increment()
    counter.increment()
    wait_for(lambda: registry.session.is_connected, "the session is connected")
    wait_for(registry.session.opened.is_set, "it is open")
    assert (calls, counter.collect().counted) == ([1], 2)


def test_a_sleeping_session_without_a_service_sleeps_on(registry, nowhere):
    """Values are counted, and the next ones look for a service again."""
    calls = []
    registry.use(LazySession(registry, connecting(registry, calls), sleeps=True))
    counter = registry.counter("c")
    counter.increment()
    assert registry.session.sleeps
    assert (calls, counter.collect().counted) == ([], 1)


def test_the_master_of_a_server_connects_when_it_records_after_a_fork(registry, somewhere):
    """Before the first fork, and as long as it records nothing, it does not connect."""
    calls = []
    registry.use(LocalSession(registry, connect_in_master=connecting(registry, calls)))
    counter = registry.counter("c")
    counter.increment()
    registry.after_in_parent()
    registry.counter("made.later")
    assert not calls
    counter.increment()
    wait_for(lambda: registry.session.is_connected, "the session is connected")
    assert (calls, counter.collect().counted) == ([1], 2)


@pytest.mark.parametrize("session", [LocalSession, LazySession])
def test_a_child_connects_when_it_is_first_used(registry, session):
    """A fork hook opens nothing: the child has a lazy session, whose metrics sleep."""
    calls = []
    registry.use(session(registry, connecting(registry, calls)))
    registry.session.after_in_child()
    assert isinstance(registry.session, LazySession)
    assert registry.session.sleeps
    assert not calls
    assert registry.snapshot() == "the service"


def test_a_child_of_a_local_registry_is_local(registry):
    """Without a way to connect, the child has a session like its parent's, and nothing sleeps."""
    registry.session.after_in_child()
    assert type(registry.session) is LocalSession
    assert not registry.session.sleeps


def test_the_flush_at_the_end_of_requests_outlasts_the_session(registry):
    """What adapters have to do holds for the process, whichever session it has."""
    registry.session.flush_per_request = True
    registry.use(Connected(registry))
    assert registry.session.flush_per_request


def test_a_master_that_forks_often_looks_for_its_service_once(registry, nowhere, monkeypatch):
    """Further forks make no further thread and no further exit action."""
    actions = []
    monkeypatch.setattr("tapes.session.shutdown.register", lambda action, phase: actions.append(action))
    registry.use(LocalSession(registry, connect_in_master=connecting(registry)))
    counter = registry.counter("c")
    registry.after_in_parent()
    session = registry.session
    for _ in range(10):
        counter.increment()
        registry.before_fork()
        registry.after_in_parent()
    assert registry.session is session
    assert len(set(actions)) == 1


def test_a_connected_registry_stays_connected_in_the_master_of_a_server(registry):
    """Importing the configuration of gunicorn does not drop a session that is connected."""
    session = Connected(registry)
    registry.use(session)
    session.stay_local()
    assert registry.session is session
