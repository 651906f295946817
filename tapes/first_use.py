"""When a registry connects: at its first use, and in a forked child not before that.

Theory. A forked child may be about to close all descriptors, or to become another program. So nothing is
opened in a fork hook. The child's metrics sleep (`tapes.metrics.sleeping`), and the first value recorded, or
the first read, connects its registry. A recording call does not wait for that: a thread of its own connects.
A child that inherited gauges with producers has values without recording any, so it connects shortly after
the fork.

The master of a server is no worker, but a thread or a hook of its own may record. So its metrics sleep too
once it has forked a worker, and it connects if it records.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from tapes import shutdown, threads
from tapes.environment import is_spawned, service_address

__all__ = ["SHORTLY_SECONDS", "FirstUse"]

SHORTLY_SECONDS = 0.1
"""Seconds after a fork until a child connects that has something to report without recording anything."""

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.25, 1.0
"""Seconds from one look for a service to the next; doubled each time."""

_log = logging.getLogger("tapes.registry")


class FirstUse:
    """Connects ``registry`` when it is first used, and wakes it when it is first recorded into.

    Attributes:
        wake: What the next value recorded into a sleeping metric calls; metrics made meanwhile sleep too.
            ``None`` if they are awake.
        connect_master: What connects ``registry`` in a process that forks a server's workers, if it records
            something after that; ``None`` in any other process.
    """

    def __init__(self, registry: Any) -> None:
        self._registry = registry
        self._reset()

    def _reset(self) -> None:
        self.wake: Callable[[], bool] | None = None
        self.connect_master: Callable[[], None] | None = None
        self._lock = threads.RLock()
        self._connects = self._has_begun = False
        self._look_at = 0.0
        self._delayed = self._new_delayed(self._open, SHORTLY_SECONDS)

    def connect(self) -> None:
        """Connect as ``registry.connect_when_used`` does, if it is set, or wait for a thread that does."""
        with self._lock:
            connect = self._registry.connect_when_used
            if connect is None or self._connects:  # a signal handler of this thread, or what it connects with
                return
            self._connects = True
            try:
                connect()
            finally:
                self._connects = False
                self._registry.connect_when_used = None

    def sleep(self, wake: Callable[[], bool]) -> None:
        """Have ``wake`` called when something is next recorded; it returns whether to stay awake."""
        self.wake = wake
        for metric in self._registry.metrics():
            metric.sleep(self.woken)

    def woken(self) -> bool:
        """Called when something is recorded into a metric that sleeps; returns whether to stay awake."""
        wake = self.wake
        return True if wake is None else wake()

    def before_fork(self) -> None:
        """Called before this process forks."""
        self._delayed.pause()

    def after_in_parent(self) -> None:
        """Called in the parent after a fork."""
        self._delayed.resume()
        self.wait_in_master()

    def wait_in_master(self) -> None:
        """Connect by ``connect_master`` when something is next recorded, if that is set."""
        if self.connect_master is not None and self.wake is None and self._registry._connection is None:
            self._has_begun = False
            self.wait()

    def after_in_child(self, *, is_to_connect: bool) -> None:
        """Called in a forked child; if its registry ``is_to_connect``, it does when it is first used."""
        self._reset()
        if is_to_connect:
            self.wait()
            if self._has_somewhere() and any(gauge.has_producer for gauge in self._registry.gauges()):
                self._delayed.start()

    def wait(self) -> None:
        """Connect when something is next recorded, or once there is a service to connect to."""
        self.sleep(self._begin)

    def _new_delayed(self, action: Callable[[], None], seconds: float) -> threads.Delayed:
        return threads.Delayed(action, seconds, "tapes-first-use")

    def _begin(self) -> bool:
        """Called when something is recorded: connect in a thread, if there is a service.

        Without one, a child of multiprocessing and a master look for it in a thread. Any other child sleeps
        on, and the next values look: it may be a server that forks in C, where no thread may run. Returns
        whether to wake.
        """
        if self._has_begun:
            return True
        now = time.monotonic()
        if now < self._look_at:
            return False
        shutdown.register(self._connect_at_end, shutdown.Phase.CONNECT)
        if not self._has_somewhere():
            self._look_at = now + _LAST_PAUSE_SECONDS
            self._has_begun = threads.can_run() and (is_spawned() or self.connect_master is not None)
            if self._has_begun:
                self._look_later(_FIRST_PAUSE_SECONDS)
            return self._has_begun
        self._has_begun = True
        self.wake = None
        if threads.can_run():  # otherwise the end of a request, or a read, connects
            with contextlib.suppress(RuntimeError):
                threads.NativeThread(self._open, "tapes-first-use", is_bare=True).start()
        return True

    def _look_later(self, seconds: float) -> None:
        """Look for a service later: it may come, as when a pool was made before its parent joined."""

        def look() -> None:
            if self._has_somewhere():
                self._open()
            else:
                self._look_later(min(2 * seconds, _LAST_PAUSE_SECONDS))

        self._delayed = self._new_delayed(look, seconds)
        self._delayed.start()

    def address(self) -> str:
        """Return where the registry is to connect: its own address or its service's; empty if none yet."""
        return getattr(self._registry, "socket_addr", None) or service_address()

    def _has_somewhere(self) -> bool:
        try:
            return self._registry._connection is not None or bool(self.address())
        except Exception:  # looking at the file system can fail, and must not break a recording call
            return False

    def _connect_at_end(self) -> None:
        """Wait for the thread that is connecting, or connect now: there is something to hand over."""
        registry = self._registry
        if registry._connection is None:
            registry.connect_when_used = (
                registry.connect_when_used or self.connect_master or registry.connect_in_children
            )
        _ = registry.connection

    def _open(self) -> None:
        try:
            self._connect_at_end()
            connection = self._registry.connection
            if connection is not None:
                connection.open()
        except Exception as error:
            _log.warning("tapes can't connect this process (%s)", error)
