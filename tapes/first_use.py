"""When a registry connects: at its first use, and in a forked child not before that.

Theory. A forked child may be about to close all descriptors, or to become another program. So nothing is opened
in a fork hook. The child's metrics sleep (`tapes.metrics.sleeping`), and the first value recorded, or the first
read, connects its registry. A recording call does not wait for that: a thread of its own connects. A child that
inherited gauges with producers has values without recording any, so it connects shortly after the fork.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Callable

from tapes import threads
from tapes.endings import CONNECT, at_end

if TYPE_CHECKING:
    from tapes.registry import Registry

__all__ = ["SHORTLY_SECONDS", "FirstUse"]

SHORTLY_SECONDS = 0.1
"""Seconds after a fork until a child connects that has something to report without recording anything."""

_CANCEL_SECONDS = 0.25
"""Maximum seconds that a fork waits for a thread that is connecting."""

_log = logging.getLogger("tapes.registry")


class FirstUse:
    """Connects ``registry`` when it is first used, and wakes it when it is first recorded into.

    Attributes:
        wake: What the next value recorded into a sleeping metric calls; metrics made meanwhile sleep too.
            ``None`` if they are awake.
    """

    def __init__(self, registry: Registry) -> None:
        self.wake: Callable[[], None] | None = None
        self._registry = registry
        self._lock = threads.RLock()
        self._connects = self._has_begun = False
        self._delayed: threads.Delayed | None = None

    def connect(self) -> None:
        """Connect as ``registry.connect_when_used`` does, if it is set; waits if another thread is about to."""
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

    def sleep(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called when something is next recorded."""
        self.wake = wake
        for metric in self._registry.metrics():
            metric.sleep(self.woken)

    def woken(self) -> None:
        """Called when something is recorded into a metric that sleeps."""
        wake = self.wake
        if wake is not None:
            wake()

    def before_fork(self) -> None:
        """Called before this process forks."""
        delayed = self._delayed
        if delayed is not None and not delayed.cancel(_CANCEL_SECONDS):
            self._delayed = None

    def after_in_parent(self) -> None:
        """Called in the parent after a fork."""
        if self._delayed is not None:
            self._connect_shortly()

    def after_in_child(self, *, is_to_connect: bool) -> None:
        """Called in a forked child; if its registry ``is_to_connect``, it does when it is first used."""
        self._lock = threads.RLock()
        self._connects = self._has_begun = False
        self._delayed = None
        if not is_to_connect:
            return
        self.sleep(self._begin)
        if any(gauge.has_producer for gauge in self._registry.gauges()):
            self._connect_shortly()

    def _connect_shortly(self) -> None:
        self._delayed = threads.Delayed(self._open, SHORTLY_SECONDS, "tapes-first-use")
        self._delayed.start()

    def _begin(self) -> None:
        """Connect in a thread of its own; where none can be started, reads and ends of requests do."""
        if not self._has_begun:
            self._has_begun = True
            at_end(self._connect_at_end, CONNECT)
            if not threads.can_run():
                return
            with contextlib.suppress(RuntimeError):
                threads.Worker(self._open, "tapes-first-use", is_bare=True).start()

    def _connect_at_end(self) -> None:
        """Wait for the thread that is connecting, or connect: there is something to hand over."""
        _ = self._registry.connection

    def _open(self) -> None:
        try:
            connection = self._registry.connection
            if connection is not None:
                connection.open()
        except Exception as error:
            _log.warning("tapes can't connect this process (%s)", error)
