"""Restarting a dead aggregator by the first worker that notices it, and finding one that has moved.

A worker notices within 0.2 s that no aggregator subscribes any more. It reads the lock file beside the
socket. If that names a dead aggregator that workers may restart, it starts another one, under the start lock:
of many workers that notice, one does. A worker also replaces an aggregator of an older release.

A private directory may be removed while the service lives, as when a login session ends. Then its aggregator
moves to another place, or a worker starts another one there, and the workers follow.
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
from tapes.backoff import Backoff
from tapes.distributed.storage import runtime_directory
from tapes.distributed.storage.locks import is_served, is_supervised, needs_restart
from tapes.distributed.storage.start_lock import start_lock
from tapes.distributed.supervision.launch import launch
from tapes.distributed.transport.address import Endpoints
from tapes.distributed.transport.requests import request_hand_over
from tapes.environment import may_start
from tapes.once import OnceLogger

_EXIT_SECONDS = 5.0  # maximum time that an aggregator takes to exit after it has agreed to hand over
_SUPERVISED_SECONDS = 1.0  # time to wait for the parent of a killed aggregator to start another one
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.2, 10.0

_log = logging.getLogger("tapes.distributed")


class Restarter:
    """Restarts the aggregator of a service, or calls ``follow`` if it has moved; for use by one thread."""

    def __init__(self, endpoints: Endpoints, follow: Callable[[Endpoints], None]) -> None:
        self._endpoints = endpoints
        self._follow = follow
        self._was_there = self._has_waited = False
        self._thread: threads.NativeThread | None = None
        self._due = 0.0
        self._backoff = Backoff(_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS)
        self._pause = self._backoff.next()
        self._once = OnceLogger(_log)

    def note_subscription(self) -> None:
        self._was_there = True
        self._has_waited = False
        self._backoff.reset()
        self._pause = self._backoff.next()
        self._once.forget("start")

    def ensure_running(self) -> None:
        """Start another aggregator if the last one has died; call it again while none subscribes."""
        if time.monotonic() < self._due:
            return
        place = runtime_directory.current_place(self._endpoints)
        if place != self._endpoints and runtime_directory.has_aggregator(place):
            self._begin(lambda: self._follow(place))
        elif needs_restart(self._endpoints):
            if not self._has_waited and is_supervised(self._endpoints):
                self._has_waited = True
                self._due = time.monotonic() + _SUPERVISED_SECONDS
                return
            self._begin(lambda: _start(self._endpoints, needs_restart, "a worker whose aggregator died"))
        elif self._was_there and runtime_directory.is_removed(self._endpoints):
            self._begin(lambda: _start_elsewhere(self._endpoints))

    def replace_older(self) -> None:
        """Replace the aggregator, which is of an older release."""
        if self._endpoints.path is not None and time.monotonic() >= self._due:
            self._begin(lambda: _start(self._endpoints, replace, "a worker of a newer release"))

    def _begin(self, start: Callable[[], None]) -> None:
        """Call ``start`` in a thread, unless the thread of the last call still runs."""
        if not may_start() or (self._thread is not None and not self._thread.join(0.0)):
            return

        def run() -> None:
            try:
                start()
            except Exception as error:
                self._pause = self._backoff.next()
                message = "tapes can't start its aggregator again (it keeps trying): %s"
                self._once.warning("start", message, error)

        # A random share, so that workers whose attempts fail don't all try again at once.
        self._due = time.monotonic() + self._pause * random.uniform(1.0, 1.5)
        if threads.can_run():
            self._thread = threads.NativeThread(run, "tapes-restarter")
            try:
                self._thread.start()
                return
            except RuntimeError:
                self._thread = None
        run()


def replace(endpoints: Endpoints) -> bool:
    """Have an aggregator of an older release exit; return whether it did; the caller holds the start lock."""
    if endpoints.path is None:
        return False
    hands_over = request_hand_over(endpoints)
    deadline = time.monotonic() + _EXIT_SECONDS
    while is_served(endpoints):
        if not hands_over or time.monotonic() > deadline:
            return False
        threads.unpatched("time", "sleep")(0.02)  # the lock of another process can only be polled
    return True


def _start(endpoints: Endpoints, is_needed: Callable[[Endpoints], bool], reason: str) -> None:
    user = _user_of(endpoints)
    with start_lock(endpoints, user, wait=False) as held:
        if held and is_needed(endpoints):
            launch(endpoints, forks.this_process(), reason, user, wait=threads.can_run())


def _start_elsewhere(endpoints: Endpoints) -> None:
    place = runtime_directory.choose_place(endpoints, runtime_directory.User.ourselves())
    _start(place, lambda place: not is_served(place), "a worker whose directory is gone")


def _user_of(endpoints: Endpoints) -> runtime_directory.User:
    # The last aggregator's user owns its lock file; that is no evidence where all users can create files.
    with contextlib.suppress(OSError):
        found = os.lstat(endpoints.lock or "")
        if not os.stat(os.path.dirname(endpoints.lock or "")).st_mode & stat.S_IWOTH:
            return runtime_directory.User(found.st_uid, found.st_gid)
    return runtime_directory.User.ourselves()
