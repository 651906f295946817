"""Forks: which process this is, and what the processes before it had counted when they forked.

Theory. A forked child has a copy of everything that its parent had recorded. Were both to tell it, it would
count twice; were neither, not at all. So at a fork a child begins from zero under an identity of its own, and
keeps what it found as a record of its *ancestor*: the ancestor's identity, what it stood at, and when. Every
child tells its ancestors' records beside its own, and so does the ancestor if it speaks for itself; of all
that is told under one identity the newest counts, once. Nothing has to be known of who lives.

Time orders the records: `now_ns` reads the host's monotonic clock in nanoseconds, which all processes share.

Python's hooks report forks, and this is the one module that registers them. In a child, locks are renewed
first (`renew_in_child`), as a thread that is not there may have held them; then registries and reporters
follow. A server that forks in C runs no hooks, so adapters call `detect_fork` when a request starts. The
time of the fork is then the time at which the kernel started the child.

A hook opens no socket and starts no thread that does: the child may be about to close all descriptors, as
daemons and terminals do, and 0MQ aborts a process whose descriptors are closed. A child connects when it
first records or reads.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tapes.processes import Process, process_of, program_of

__all__ = [
    "CONNECTED",
    "Ancestor",
    "connected_parent",
    "detect_fork",
    "fork_flag",
    "fork_helper",
    "fork_root",
    "hand_down",
    "import_module",
    "is_uwsgi_master",
    "no_fork",
    "now_ns",
    "register",
    "register_user",
    "renew_in_child",
    "this_process",
    "this_program",
    "when_uwsgi_forks",
]  # fmt: skip


_WAIT_SECONDS = 10.0
"""Maximum seconds that a fork waits for forks and imports of other threads."""
_WIPE_ON_FORK = 18  # Linux's MADV_WIPEONFORK

CONNECTED = "TAPES_CONNECTED"
"""The variable that tells processes that this one spawns where its registries are connected."""


class Ancestor(NamedTuple):
    """What a process had recorded when it forked, as far as it had not told it itself.

    Attributes:
        identity: Under which it recorded.
        process: Which one it is.
        version: When, as `now_ns`.
        base: The version that this continues; 0 if it is everything.
        metrics: Metrics that hold it; nobody records into them.
        speaks: Whether it was connected, so that it publishes this itself if it lives.
    """

    identity: bytes
    process: Process
    version: int
    base: int
    metrics: list[Any]
    speaks: bool = False


def now_ns() -> int:
    """Return the time, comparable with that of every process of this host."""
    return time.monotonic_ns()


def this_program() -> int:
    """Return the number of the program that this process runs."""
    return _here.program


def this_process() -> Process:
    """Return this process; notices a fork, as `detect_fork`."""
    detect_fork()
    return _here.process


def fork_root() -> Process:
    """Return the process that this one descends from by forks, and that imported tapes; maybe this one."""
    detect_fork()
    return _here.origin


def connected_parent() -> list[str]:
    """Return where the process that forked or spawned this one has its registries connected.

    The address of its default registry comes first; empty if that was not connected.
    """
    multiprocessing: Any = sys.modules.get("multiprocessing.process")
    inherited = getattr(multiprocessing and multiprocessing.current_process(), "_config", {})
    pid, *addresses = (inherited.get(CONNECTED) or os.environ.get(CONNECTED, "")).split("\n")
    return [] if pid == str(os.getpid()) else addresses


def hand_down(addresses: list[str]) -> None:
    """Report to the processes that this one will start where its registries are connected, if any is.

    By the environment, and to children of multiprocessing with what they inherit of their parent: the fork
    server that makes them may have been started before, with an older environment.
    """
    text = "\n".join([str(os.getpid()), *addresses]) if addresses else ""
    if text:
        os.environ[CONNECTED] = text
    else:
        os.environ.pop(CONNECTED, None)
    multiprocessing: Any = sys.modules.get("multiprocessing.process")
    getattr(multiprocessing and multiprocessing.current_process(), "_config", {})[CONNECTED] = text


def register(registry: Any) -> None:
    """Have the three fork hooks of ``registry`` called.

    Before the fork, in the child, and in the parent after it.
    """
    _registries.add(registry)


def register_user(user: Any) -> None:
    """Have the same called of what uses registries: it holds still before they do, and goes on after them.

    And ``user.after_in_helper()`` in a child that is no worker.
    """
    _users.add(user)


def renew_in_child(renew: Callable[[], None]) -> None:
    """Have ``renew`` called in every forked child, before anything else of this library runs there.

    It replaces locks that a thread of the parent may have held, and closes descriptors that belong to the
    parent. It runs at once, while their numbers are still theirs: later they may be the application's.
    """
    _renewals.append(renew)


def detect_fork() -> None:
    """Notice a fork of which no hook told; cheap enough for every request."""
    if os.getpid() != _here.process.pid:
        _here.noticed_late()


def is_uwsgi_master() -> bool:
    """Return whether this is uWSGI before it forks its workers: in C, so no thread may run meanwhile."""
    uwsgi: Any = sys.modules.get("uwsgi")
    return uwsgi is not None and not uwsgi.worker_id()


def when_uwsgi_forks(action: Callable[[], None]) -> None:
    """Have uWSGI's workers `detect_fork`, and call ``action``, when they are forked."""
    uwsgi: Any = sys.modules.get("uwsgi")
    before = getattr(uwsgi, "post_fork_hook", None)

    def hook() -> None:
        detect_fork()
        action()
        if before is not None:
            before()

    uwsgi.post_fork_hook = hook


def fork_flag() -> Any:
    """Return a byte (index 0) that is zero until this process sets it, and again in each of its children.

    It notices forks in C too, at the cost of reading memory: `os.getpid` is a system call, which costs a
    request as much as recording it.

    Theory: the kernel gives a child zeros for pages that are advised so (MADV_WIPEONFORK, Linux 4.14).
    """
    if sys.implementation.name == "pypy":  # which itself ends where the advice is refused
        return _PidMark()
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        page.madvise(_WIPE_ON_FORK)
    except (AttributeError, OSError, ValueError):
        return _PidMark()
    return page


class _PidMark:
    """The same where the system has no such pages."""

    def __init__(self) -> None:
        self._pid = 0

    def __getitem__(self, index: int) -> int:
        return self._pid == os.getpid()

    def __setitem__(self, index: int, value: int) -> None:
        self._pid = os.getpid() if value else 0


@contextlib.contextmanager
def no_fork() -> Iterator[None]:
    """Have the forks of other threads wait, 10 s at most, for the end of this block.

    A child that is forked while a program is being started holds the pipe whose end says that it was, so that
    who starts it would wait for the child.
    """
    with _here.forking:
        yield


def import_module(name: str) -> Any:
    """Import a module while no thread forks.

    A child that is forked in the middle of an import finds the module's lock held by a thread that is not
    there, and would wait for it for ever when it imports that module itself.
    """
    with no_fork():
        return importlib.import_module(name)


def fork_helper() -> int:
    """Fork a child that is no worker: in it, and in those it forks, registries stay as they are."""
    _here.quiet_thread = threading.get_ident()
    try:
        pid = os.fork()
        _here.is_worker = _here.is_worker and pid != 0
        if pid == 0:
            _each(lambda one: one.after_in_helper(), _users)
    finally:
        _here.quiet_thread = 0
    return pid


class _Here:
    """What is known of this process."""

    def __init__(self) -> None:
        self.process = self.origin = process_of(os.getpid())
        self.program = program_of(os.getpid())
        self.is_worker = True
        self.quiet_thread = 0
        self._becomes_another = False
        self._version = 0
        self._lock = threading.Lock()
        self.forking = threading.RLock()

    def before(self) -> None:
        self.forking.acquire(timeout=_WAIT_SECONDS)
        self._becomes_another = _becomes_another_program()
        if self._matters():
            _each(lambda one: one.before_fork(), _users, _registries)
            self._version = now_ns()

    def in_parent(self) -> None:
        if self._matters():
            _each(lambda one: one.after_in_parent(), _registries, _users)
        self._becomes_another = False
        with contextlib.suppress(RuntimeError):  # it took too long to get it
            self.forking.release()

    def in_child(self) -> None:
        self._change(self._version)

    def noticed_late(self) -> None:
        lock = self._lock
        with lock:
            if os.getpid() != self.process.pid:
                # The clock of process starts counts suspended time too, and is coarser.
                started = process_of(os.getpid()).started / os.sysconf("SC_CLK_TCK")
                ago = max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started) if started else 0.0
                self._change(now_ns() - int(ago * 1e9))

    def _change(self, version: int) -> None:
        self._lock = threading.Lock()
        self.forking = threading.RLock()
        for renew in _renewals:
            renew()
        parent, self.process = self.process, process_of(os.getpid())
        if self._matters():
            _each(lambda one: one.after_in_child(parent, version), _registries, _users)

    def _matters(self) -> bool:
        is_quiet = self._becomes_another or self.quiet_thread == threading.get_ident()
        return self.is_worker and not is_quiet


def _becomes_another_program() -> bool:
    """Return whether it is `subprocess` that forks, as it does with ``preexec_fn``, and gevent's always.

    Its child closes all descriptors and executes another program: what is opened there for a worker would end
    it, as 0MQ aborts a process whose descriptors are closed.
    """
    frame: Any = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") not in ("subprocess", "gevent.subprocess"):
        frame = frame.f_back
    return frame is not None


def _each(action: Callable[[Any], None], *groups: weakref.WeakSet[Any]) -> None:
    for one in itertools.chain.from_iterable(map(list, groups)):
        try:
            action(one)
        except Exception:  # one of them must not keep the others from it
            _log.exception("tapes: a %s could not follow a fork", type(one).__name__)


_log = logging.getLogger("tapes.forks")
_registries: weakref.WeakSet[Any] = weakref.WeakSet()
_users: weakref.WeakSet[Any] = weakref.WeakSet()
_renewals: list[Callable[[], None]] = []
_here = _Here()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_here.before, after_in_parent=_here.in_parent, after_in_child=_here.in_child)
