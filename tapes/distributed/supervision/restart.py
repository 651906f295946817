"""Starting the aggregator of a service again, by the first worker that misses it, and finding one that moved.

A worker notices within 0.2 s that nobody listens any more. If the lock beside the socket says that whoever
held it died, and was one that workers start by themselves, it starts another one, under the lock of those who
start: of many that notice, one does. An aggregator of an older release is asked to make room, and replaced.

A private directory may go while the service lives, as when a login session ends. Its aggregator settles in
another place then, or a worker starts another one there; workers follow.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import stat
import time
from collections.abc import Callable

from tapes import forks, threads
from tapes.distributed.storage import runtime_directory
from tapes.distributed.storage.locks import is_served, is_supervised, needs_restart
from tapes.distributed.supervision.launch import launch
from tapes.distributed.transport.address import Endpoints
from tapes.distributed.transport.requests import request_hand_over
from tapes.environment import may_start

__all__ = ["Restarter", "replace"]

_LEAVING_SECONDS = 5.0
"""So long an aggregator that makes room may take to leave."""
_KEPT_SECONDS = 1.0
"""Seconds that a worker gives the parent of a killed aggregator to start another one."""
_BACK_OFF_SECONDS, _MAX_BACK_OFF_SECONDS = 0.2, 10.0

_log = logging.getLogger("tapes.distributed")


class Restarter:
    """Has the aggregator at ``endpoints`` started again when it is missed; of use to one thread."""

    def __init__(self, endpoints: Endpoints, follow: Callable[[Endpoints], None]) -> None:
        self._endpoints = endpoints
        self._follow = follow
        self._was_there = False
        self._thread: threads.NativeThread | None = None
        self._due = 0.0
        self._back_off = _BACK_OFF_SECONDS
        self._has_said = False
        self._has_waited = False

    def note_subscription(self) -> None:
        """Note that an aggregator listens."""
        self._was_there = True
        self._has_waited = False
        self._back_off = _BACK_OFF_SECONDS
        self._has_said = False

    def ensure_running(self) -> None:
        """Start another one if the one that was there has died; call it while nobody listens."""
        if time.monotonic() < self._due:
            return
        place = runtime_directory.current_place(self._endpoints)
        if place != self._endpoints and runtime_directory.has_aggregator(place):
            self._begin(lambda: self._follow(place))
        elif needs_restart(self._endpoints):
            if not self._has_waited and is_supervised(self._endpoints):  # its parent is to start the next one
                self._has_waited = True
                self._due = time.monotonic() + _KEPT_SECONDS
                return
            self._begin(lambda: _start(self._endpoints, needs_restart, "a worker that missed it"))
        elif self._was_there and runtime_directory.is_removed(self._endpoints):
            self._begin(lambda: _start_elsewhere(self._endpoints))

    def replace_older(self) -> None:
        """Replace the one that is there, as it is of an older release."""
        if self._endpoints.path is not None and time.monotonic() >= self._due:
            self._begin(lambda: _start(self._endpoints, replace, "a worker of a newer release"))

    def _begin(self, start: Callable[[], None]) -> None:
        if not may_start() or (self._thread is not None and not self._thread.join(0.0)):
            return

        def run() -> None:
            try:
                start()
            except Exception as error:
                self._back_off = min(2 * self._back_off, _MAX_BACK_OFF_SECONDS)
                if not self._has_said:
                    self._has_said = True
                    _log.warning("tapes can't start its aggregator again (it goes on trying): %s", error)

        # So that many that fail don't go on failing at once.
        self._due = time.monotonic() + self._back_off * random.uniform(1.0, 1.5)
        if not threads.can_run():
            run()
            return
        self._thread = threads.NativeThread(run, "tapes-reviver")
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = None
            run()


def replace(endpoints: Endpoints) -> bool:
    """Have an aggregator of an older release leave; return whether it did.

    Hold the lock of those who start.
    """
    if endpoints.path is None:
        return False
    will = request_hand_over(endpoints)
    deadline = time.monotonic() + _LEAVING_SECONDS
    while is_served(endpoints):
        if not will or time.monotonic() > deadline:
            return False
        threads.unpatched("time", "sleep")(0.02)  # there is nothing else to wait on
    return True


def _start(endpoints: Endpoints, is_wanted: Callable[[Endpoints], bool], reason: str) -> None:
    user = _user_of(endpoints)
    with runtime_directory.start_lock(endpoints, user, wait=False) as held:
        if held and is_wanted(endpoints):
            launch(endpoints, forks.this_process(), reason, user, wait=threads.can_run())


def _start_elsewhere(endpoints: Endpoints) -> None:
    """Start an aggregator where there is room for it, as the private directory of ``endpoints`` is gone."""
    place = runtime_directory.choose_place(endpoints, runtime_directory.User.ourselves())
    _start(place, lambda place: not is_served(place), "a worker whose directory is gone")


def _user_of(endpoints: Endpoints) -> runtime_directory.User:
    """Return whom the aggregator was run by.

    Its lock says that, but not where every user can make files.
    """
    with contextlib.suppress(OSError):
        found = os.lstat(endpoints.lock or "")
        if not os.stat(os.path.dirname(endpoints.lock or "")).st_mode & stat.S_IWOTH:
            return runtime_directory.User(found.st_uid, found.st_gid)
    return runtime_directory.User.ourselves()
