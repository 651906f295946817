"""Forks: which process this is, and what happens in it when a process forks.

Theory. A forked child has a copy of everything that its parent had recorded. If both published it, it would
count twice; if neither did, not at all. So a child begins from zero under an identity of its own, and keeps
what it found as a record of its *ancestor*: the ancestor's identity, its state, and the time. Every child
publishes the records of its ancestors beside its own values, and a connected ancestor publishes its own. Of
everything that is published under one identity the newest counts, once. It does not matter which of these
processes live.

Time orders the records: `now_ns` reads the host's monotonic clock, which all processes share.

Python's hooks report forks, and this is the only module that registers them. Its followers have the three
methods ``before_fork``, ``after_in_parent`` and ``after_in_child``. In a child, locks are renewed first
(`renew_in_child`), as a thread that does not exist there may have held them; then registries follow, and then
what uses registries. A server that forks in C runs no hooks, so adapters call `detect_fork` when a request
starts. The time of the fork is then the time at which the kernel started the child.

A hook opens no socket and starts no thread that does: the child may be about to close all descriptors, as
daemons and terminals do, and 0MQ aborts a process whose descriptors are closed. A child connects when it
first records or reads (`tapes.session`).
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tapes.processes import Process, process_of, program_of

_WAIT_SECONDS = 10.0  # maximum seconds that a fork waits for forks and imports of other threads


class Ancestor(NamedTuple):
    """What a process had recorded and not published when it forked."""

    identity: bytes  # the identity that it recorded under
    process: Process
    version: int  # the time of the fork, as `now_ns`
    base: int  # the version that this continues; 0 if it is everything
    metrics: list[Any]  # hold what it had recorded; no process records into them
    is_connected: bool = False  # then it publishes this itself if it lives


def now_ns() -> int:
    """Return the time, comparable with that of every process of this host."""
    return time.monotonic_ns()


def this_program() -> int:
    """Return the number of the program that this process runs; see `tapes.processes.program_of`."""
    return _here.program


def this_process() -> Process:
    """Return this process; detects a fork."""
    detect_fork()
    return _here.process


def fork_root() -> Process:
    """Return the process that imported tapes and that this one descends from by forks; maybe this one."""
    detect_fork()
    return _here.root


def register(registry: Any) -> None:
    """Have the fork hooks of ``registry`` called; a child gets the parent and `now_ns` at the fork."""
    _registries.add(registry)


def register_user(user: Any) -> None:
    """Have the hooks of a user of registries called: before theirs before a fork, and after them after it.

    In a child that is not a worker (`fork_helper`), ``user.after_in_helper()`` is called instead.
    """
    _users.add(user)


def renew_in_child(renew: Callable[[], None]) -> None:
    """Have ``renew`` called in every forked child, before anything else of this library runs there.

    It replaces locks that a thread of the parent may have held, and closes descriptors that belong to the
    parent. It runs at once, as the application may soon have descriptors with the same numbers.
    """
    _renewals.append(renew)


def detect_fork() -> None:
    """Notice a fork that no hook reported; cheap enough for every request."""
    if os.getpid() != _here.process.pid:
        _here.after_unreported_fork()


@contextlib.contextmanager
def no_fork() -> Iterator[None]:
    """Have the forks of other threads wait, 10 s at most, for the end of this block.

    A program that is being started closes a pipe. A child that is forked meanwhile would hold that pipe open,
    and the starting thread would wait for the child.
    """
    with _here.forking:
        yield


def import_module(name: str) -> Any:
    """Import a module while no thread forks.

    In a child that is forked in the middle of an import, a thread that does not exist there holds the
    module's lock. The child would wait for ever when it imports that module itself.
    """
    with no_fork():
        return importlib.import_module(name)


def fork_helper() -> int:
    """Fork a child that is not a worker: in it, and in those it forks, registries stay as they are."""
    _here.helper_thread = threading.get_ident()
    try:
        pid = os.fork()
        _here.is_worker = _here.is_worker and pid != 0
        if pid == 0:
            _each(lambda user: user.after_in_helper(), _users)
    finally:
        _here.helper_thread = 0
    return pid


class _ProcessState:
    def __init__(self) -> None:
        self.process = self.root = process_of(os.getpid())
        self.program = program_of(os.getpid())
        self.is_worker = True
        self.helper_thread = 0
        self.forking = threading.RLock()
        self._will_exec = False
        self._version = 0
        self._lock = threading.Lock()

    def before_fork(self) -> None:
        self.forking.acquire(timeout=_WAIT_SECONDS)
        self._will_exec = _is_subprocess()
        if self._matters():
            _each(lambda follower: follower.before_fork(), _users, _registries)
            self._version = now_ns()

    def after_in_parent(self) -> None:
        if self._matters():
            _each(lambda follower: follower.after_in_parent(), _registries, _users)
        self._will_exec = False
        with contextlib.suppress(RuntimeError):  # before_fork() did not get it in time
            self.forking.release()

    def after_in_child(self) -> None:
        self._begin_in_child(self._version)

    def after_unreported_fork(self) -> None:
        with self._lock:
            if os.getpid() != self.process.pid:
                # The clock of process starts counts suspended time too, and is coarser.
                started = process_of(os.getpid()).started / os.sysconf("SC_CLK_TCK")
                ago = max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started) if started else 0.0
                self._begin_in_child(now_ns() - int(ago * 1e9))

    def _begin_in_child(self, version: int) -> None:
        self._lock = threading.Lock()
        self.forking = threading.RLock()
        for renew in _renewals:
            renew()
        parent, self.process = self.process, process_of(os.getpid())
        if self._matters():
            _each(lambda follower: follower.after_in_child(parent, version), _registries, _users)

    def _matters(self) -> bool:
        """Return whether the child is a worker, or this process is one."""
        is_helper = self._will_exec or self.helper_thread == threading.get_ident()
        return self.is_worker and not is_helper


def _is_subprocess() -> bool:
    """Return whether `subprocess` forks, as it does with ``preexec_fn``, and gevent's always.

    Its child closes all descriptors and executes another program, so nothing may be opened there.
    """
    frame: Any = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") not in ("subprocess", "gevent.subprocess"):
        frame = frame.f_back
    return frame is not None


def _each(action: Callable[[Any], None], *groups: weakref.WeakSet[Any]) -> None:
    for follower in itertools.chain.from_iterable(map(list, groups)):
        try:
            action(follower)
        except Exception:  # the others follow all the same
            _log.exception("tapes: a %s could not follow a fork", type(follower).__name__)


_log = logging.getLogger("tapes.forks")
_registries: weakref.WeakSet[Any] = weakref.WeakSet()
_users: weakref.WeakSet[Any] = weakref.WeakSet()
_renewals: list[Callable[[], None]] = []
_here = _ProcessState()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_here.before_fork, after_in_parent=_here.after_in_parent, after_in_child=_here.after_in_child
    )
