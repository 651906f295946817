"""How a registry takes part in a service: it has exactly one *session*, and delegates to it.

    LocalSession       answers for this process alone; a read looks for a service to join
    LazySession        connects its registry when that is next used
    ConnectedSession   publishes to an aggregator, which answers (`tapes.distributed.worker.connected`)
    LateSession        after the goodbye: flushes each value at once (`tapes.distributed.worker.late_flush`)
    MergedView         answers in the aggregator itself (`tapes.distributed.aggregator.merged_view`)

Theory of the first use. A forked child may be about to close all descriptors, or to become another program.
So a fork hook opens nothing. The metrics of the child *sleep* (`tapes.metrics.sleeping`): the first recorded
value calls `Session.woken`, and that or the first read connects. A recording call does not wait for it: a
thread connects. A child that inherited gauges with producers has values without recording any, so it
connects shortly after the fork. The master of a server is not a worker, but its threads and hooks may
record. So its metrics sleep too once it has forked a worker, and it connects if it records.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from tapes import shutdown, threads
from tapes.backoff import Backoff
from tapes.environment import is_spawned, service_address
from tapes.metrics import State
from tapes.naming import Labels
from tapes.snapshot import Snapshot

SHORTLY_SECONDS = 0.1  # seconds after a fork until a child connects that has values without recording any
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.25, 1.0  # from one look for a service to the next

Connect = Callable[[], None]
"""Connects a registry to the service that this process belongs to, if there is one; may raise."""

_log = logging.getLogger("tapes.registry")


def address_for(registry: Any) -> str:
    """Return where ``registry`` connects to: its own address or its service's; empty if none is known."""
    try:
        return getattr(registry, "socket_addr", None) or service_address()
    except Exception:  # looking at the file system can fail, and must not break a recording call
        return ""


class Session:
    """How ``registry`` takes part in a service.

    ``connect`` connects a forked child, and a process that turns out to belong to a service.
    """

    is_connected = False  # whether an aggregator answers
    is_aggregator = False  # whether this process is the one that merges what all workers publish
    is_pending = False  # whether the next use connects

    def __init__(self, registry: Any, connect: Connect | None = None) -> None:
        self.registry = registry
        self.connect = connect
        self.sleeps = False  # whether the metrics sleep: the next recorded value calls woken()
        self.flush_per_request = False  # whether adapters have to call request_ended(): no thread publishes
        self._delayed: threads.Delayed | None = None

    def resolved(self) -> Session:
        """Return the session of the registry; a lazy one connects first."""
        return self

    def resolved_for_read(self) -> Session:
        return self

    def snapshot(self) -> Snapshot:
        """Return what a reader sees; raises AggregatorUnavailable if no aggregator answers in time."""
        raise NotImplementedError

    def render(self, form: str, write: Callable[[Snapshot, str], bytes]) -> bytes:
        """Return the same in a form of `tapes.exposition.FORMS`; ``write`` writes a snapshot."""
        return write(self.snapshot(), form)

    def has_aggregator(self) -> bool:
        """Return whether the session is connected, as far as can be seen, to an aggregator that lives."""
        return False

    def stay_local(self, connect_in_master: Connect | None = None) -> None:
        """Called in the master of a server, which is not a worker; does nothing if it is connected."""

    def become_master(self, connect: Connect) -> None:
        """Called in a process that has forked a worker: ``connect`` is called if it records something."""

    def open(self) -> None:
        """Begin to publish, if that has not begun."""

    def request_ended(self, *, may_be_the_last: bool = False) -> None:
        """Publish at the end of a request, if nothing else does; the process may exit after the last one."""

    def woken(self) -> bool:
        """Called when a sleeping metric has recorded a value; return whether the metric stays awake."""
        return True

    def close(self) -> None:
        """Send the last values to the aggregator and disconnect; nothing if not connected."""

    def leave(self) -> None:
        """Do the same at the end of the process; what is recorded after that is flushed at once."""

    def published(self, series: tuple[str, Labels]) -> State | None:
        """Return the state of a series that was published last, ``None`` if none was."""
        return None

    def published_version(self) -> int:
        """Return the version of the last publication, as `tapes.forks.now_ns`; 0 if there was none."""
        return 0

    def before_fork(self) -> None:
        """Called before this process forks: nothing of the session may be under way in another thread."""
        if self._delayed is not None:
            self._delayed.pause()

    def after_in_parent(self) -> None:
        if self._delayed is not None:
            self._delayed.resume()

    def after_in_child(self) -> None:
        """Called in a forked child: gives the registry a session of the child's own, which opens nothing."""

    def _open_shortly(self) -> None:
        """Have `_open_in_thread` run soon if a gauge has a producer: its value exists without a recording."""
        if any(gauge.has_producer for gauge in self.registry.gauges()):
            self._delayed = threads.Delayed(self._open_in_thread, SHORTLY_SECONDS, "tapes-first-use")
            self._delayed.start()

    def _start_opening(self) -> None:
        """Run `_open_in_thread` in a thread; without threads the end of a request, or a read, opens."""
        if threads.can_run():
            with contextlib.suppress(RuntimeError):
                threads.NativeThread(self._open_in_thread, "tapes-first-use", is_bare=True).start()

    def _open_in_thread(self) -> None:
        try:
            self.resolved().open()
        except Exception as error:
            _log.warning("tapes can't connect this process (%s)", error)


class LocalSession(Session):
    """Answers for this process alone.

    Args:
        looks: Whether a read looks for a service that this process belongs to, by ``connect``.
        connect_in_master: Connects this process if it records something after it has forked a worker.
    """

    def __init__(
        self, registry: Any, connect: Connect | None = None, *,
        looks: bool = False, connect_in_master: Connect | None = None,
    ) -> None:  # fmt: skip
        super().__init__(registry, connect)
        self._looks = looks
        self._connect_in_master = connect_in_master

    def stay_local(self, connect_in_master: Connect | None = None) -> None:
        looks, connect = self.connect is not None, connect_in_master
        self.registry.use(LocalSession(self.registry, self.connect, looks=looks, connect_in_master=connect))

    def become_master(self, connect: Connect) -> None:
        if self.registry.session is self:
            self.registry.use(_MasterSession(self.registry, self.connect, connect))

    def resolved_for_read(self) -> Session:
        session = self.resolved()
        if session is self and self._looks and self.connect is not None:
            self.connect()
        return self.registry.session  # type: ignore[no-any-return]

    def snapshot(self) -> Snapshot:
        snapshot: Snapshot = self.registry.local_snapshot()
        return snapshot

    def close(self) -> None:
        self.registry.use(LocalSession(self.registry, self.connect))

    def after_in_parent(self) -> None:
        super().after_in_parent()
        if self._connect_in_master is not None:
            self.become_master(self._connect_in_master)

    def after_in_child(self) -> None:
        if self.connect is None:
            self.registry.use(LocalSession(self.registry))
        else:
            child = LazySession(self.registry, self.connect, sleeps=True)
            self.registry.use(child)
            if self.registry.lineage.ancestors:  # which this process may be the last one to publish
                shutdown.register(child._connect_now, shutdown.Phase.CONNECT)
            if address_for(self.registry):
                child._open_shortly()


class LazySession(LocalSession):
    """Connects its registry when that is next used, by ``connect_when_used`` or else by ``connect``.

    Args:
        is_pending: Whether the next use by an adapter, and the next metric that is made, connects. Reads and
            recording connect in any case.
        sleeps: Whether the metrics sleep; then making a metric does not connect.
    """

    def __init__(
        self, registry: Any, connect: Connect | None, connect_when_used: Connect | None = None, *,
        is_pending: bool = True, sleeps: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(registry, connect, looks=True)
        self.sleeps = sleeps
        self.is_pending = is_pending
        self._connect_when_used = connect_when_used or connect
        self._lock = threads.RLock()
        self._is_connecting = self._has_begun = self._searches = False
        self._look_at = 0.0

    def resolved(self) -> Session:
        """Connect if that is pending, or wait for a thread that does; return the session of the registry."""
        if self.is_pending:
            with self._lock:
                # A signal handler of this thread, or what it connects with, may use the registry too.
                if self.is_pending and not self._is_connecting:
                    assert self._connect_when_used is not None
                    self._is_connecting = True
                    try:
                        self._connect_when_used()
                    finally:
                        self._is_connecting = self.is_pending = False
        return self.registry.session  # type: ignore[no-any-return]

    def woken(self) -> bool:
        """Connect in a thread, if there is a service; return whether the metric stays awake.

        Without a service, a child of multiprocessing and a master look for it in a thread. Any other child
        sleeps on, and the next values look: a server may have forked it in C, where no thread may run.
        """
        now = time.monotonic()
        if self._has_begun:
            return True
        if now < self._look_at:
            return False
        shutdown.register(self._connect_now, shutdown.Phase.CONNECT)
        if not address_for(self.registry):
            self._look_at = now + _MAX_PAUSE_SECONDS
            self._has_begun = (self._searches or is_spawned()) and threads.can_run()
            if self._has_begun:
                self._look_later(Backoff(_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS))
            return self._has_begun
        self._has_begun = True
        self.sleeps = False
        self._start_opening()
        return True

    def close(self) -> None:
        if self._has_begun:  # a value was recorded
            self._connect_now()
        if self.registry.session is self:
            super().close()
        else:
            self.registry.session.close()

    def after_in_child(self) -> None:
        if self.connect is None and self.is_pending:
            self.registry.use(LazySession(self.registry, None, self._connect_when_used))
        else:
            super().after_in_child()

    def _look_later(self, pauses: Backoff) -> None:
        """Look for a service later: a pool may have been made before its parent joined."""

        def look() -> None:
            if address_for(self.registry):
                self._open_in_thread()
            else:
                self._look_later(pauses)

        self._delayed = threads.Delayed(look, pauses.next(), "tapes-first-use")
        self._delayed.start()

    def _connect_now(self) -> None:
        """Wait for the thread that is connecting, or connect: there is something to publish."""
        if self.registry.session is self:
            self.is_pending = True
            self.resolved()

    def _open_in_thread(self) -> None:
        if self.registry.session is self:
            self.is_pending = True
        super()._open_in_thread()


class _MasterSession(LazySession):
    """Connects the master of a server, which has forked a worker, if it records something."""

    def __init__(self, registry: Any, connect: Connect | None, connect_in_master: Connect) -> None:
        super().__init__(registry, connect, connect_in_master, is_pending=False, sleeps=True)
        self._searches = True

    def become_master(self, connect: Connect) -> None:
        self._connect_when_used = connect
        if self.registry.session is self and not (self.sleeps or self._is_connecting):
            self._has_begun, self.sleeps = False, True  # an attempt to connect that has failed is made again
            self.registry.use(self)

    def after_in_parent(self) -> None:
        super().after_in_parent()
        assert self._connect_when_used is not None
        self.become_master(self._connect_when_used)
