"""Locks and threads of the operating system, even where gevent or eventlet has replaced them.

The publisher's thread and the application's greenlets share locks, which are held during a computation and
never during a wait. These must be locks of the operating system: a greenlet's lock would switch to the hub of
the calling thread.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tapes import under_uwsgi
from tapes.backoff import Backoff

T = TypeVar("T")

_PAUSE_SECONDS = 0.25  # maximum seconds that `Delayed.pause` waits
_native: set[int] = set()  # the idents of all threads that are a `NativeThread`


def is_patched() -> bool:
    """Return whether gevent or eventlet has replaced threads in this process."""
    monkey: Any = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        return True
    return _is_patched_by_eventlet()


def _is_patched_by_eventlet() -> bool:
    patcher: Any = sys.modules.get("eventlet.patcher")
    return patcher is not None and bool(patcher.is_monkey_patched("thread"))


def unpatched(module: str, name: str) -> Any:
    """Return ``name`` of the standard ``module`` as it was before gevent or eventlet patched it."""
    monkey: Any = sys.modules.get("gevent.monkey")
    if monkey is not None:
        return monkey.get_original(module, name)
    patcher: Any = sys.modules.get("eventlet.patcher")
    if patcher is not None:
        return getattr(patcher.original(module), name)
    return getattr(importlib.import_module(module), name)


def run_in_hub_pool(function: Callable[[], T]) -> T:
    """Return what ``function`` returns; while it waits, greenlets run on."""
    if not is_patched() or in_native_thread():
        return function()
    if _is_patched_by_eventlet():
        return _beside_eventlet(function)
    gevent: Any = importlib.import_module("gevent")
    result: T = gevent.get_hub().threadpool.apply(function)
    return result


def _beside_eventlet(function: Callable[[], T]) -> T:
    """Return what ``function`` returns in a thread; eventlet's own pool does not survive a fork."""
    hubs: Any = importlib.import_module("eventlet.hubs")
    results: list[T] = []
    errors: list[BaseException] = []
    receiver, sender = os.pipe()

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)
        finally:
            os.close(sender)

    try:
        try:
            NativeThread(run, "tapes-aside").start()
        except RuntimeError:
            os.close(sender)
            raise
        hubs.trampoline(receiver, read=True)
    finally:
        os.close(receiver)
    if errors:
        raise errors[0]
    return results[0]


def in_greenlets(calls: Sequence[Callable[[], object]], seconds: float) -> None:
    """Run ``calls``, each in a greenlet of this thread, and wait for them for ``seconds`` at most.

    Only where `is_patched`. What runs longer goes on.
    """
    if _is_patched_by_eventlet():
        eventlet: Any = importlib.import_module("eventlet")
        running = [eventlet.spawn(call) for call in calls]
        with eventlet.Timeout(seconds, False):
            for greenlet in running:
                greenlet.wait()
    else:
        gevent: Any = importlib.import_module("gevent")
        gevent.joinall([gevent.spawn(call) for call in calls], timeout=seconds)


async def run_in_thread(function: Callable[[], T]) -> T:
    """Return what ``function`` returns in a thread; the event loop runs on."""
    anyio: Any = sys.modules.get("anyio")
    if anyio is None:
        asyncio: Any = importlib.import_module("asyncio")
        result: T = await asyncio.get_running_loop().run_in_executor(None, function)
    else:  # anyio knows which loop this is; a limiter of its own takes no thread of the application
        run: Any = importlib.import_module("anyio.to_thread")
        result = await run.run_sync(function, limiter=anyio.CapacityLimiter(1))
    return result


def RLock() -> threading.RLock:  # noqa: N802 - it stands for the class
    """Return a new re-entrant lock between threads."""
    lock: threading.RLock = unpatched("_thread", "RLock")()
    return lock


class Monitor:
    """A re-entrant lock between threads, and waiting for a condition that it guards.

    It polls the condition: a thread can't notify a greenlet of eventlet that waits in another thread.
    """

    def __init__(self) -> None:
        self._lock = RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait_for(self, condition: Callable[[], object], seconds: float) -> bool:
        """Wait until ``condition`` holds; return whether it does. The lock is free meanwhile."""
        lock: Any = self._lock
        deadline, pauses = time.monotonic() + seconds, Backoff(0.0005, 0.01)  # seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            state = lock._release_save()
            try:
                time.sleep(pauses.next())  # of a greenlet too
            finally:
                lock._acquire_restore(state)
        return True


def in_native_thread() -> bool:
    """Return whether the calling thread is a `NativeThread`, which gevent does not know."""
    return unpatched("_thread", "get_ident")() in _native


class NativeThread:
    """A daemon thread of the operating system that runs ``target``.

    `threading` does not know one that ``is_bare``: starting it takes no lock, so a signal handler may.
    """

    def __init__(self, target: Callable[[], None], name: str, *, is_bare: bool = False) -> None:
        self._target = target
        self._ident = 0
        self._thread: threading.Thread | None = None
        self._ended: Any = unpatched("_thread", "allocate_lock")()
        if not (is_bare or is_patched()):
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start it; raises RuntimeError if no thread can be started here."""
        self._ended.acquire()
        try:
            if self._thread is not None:
                self._thread.start()
            else:
                unpatched("_thread", "start_new_thread")(self._run, ())
        except RuntimeError:
            self._ended.release()
            raise

    def join(self, timeout_seconds: float) -> bool:
        """Wait until it has ended; return whether it has."""
        if not self._ended.acquire(timeout=timeout_seconds):
            return False
        self._ended.release()
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join(timeout_seconds)
        return True

    def is_me(self) -> bool:
        """Return whether it is the calling thread."""
        return bool(self._ident == unpatched("_thread", "get_ident")())

    def _run(self) -> None:
        self._ident = unpatched("_thread", "get_ident")()
        _native.add(self._ident)
        try:
            self._target()
        finally:
            _native.discard(self._ident)
            self._ident = 0
            self._ended.release()


class Delayed:
    """Calls ``action`` in a thread, ``seconds`` after its start; a fork can pause it until then.

    It takes no lock that another thread may hold. A forked child needs one of its own.
    """

    def __init__(self, action: Callable[[], None], seconds: float, name: str) -> None:
        self._action, self._seconds, self._name = action, seconds, name
        self._worker: NativeThread | None = None
        self._cancelled: Any = None
        self._waits = False

    def start(self) -> None:
        """Begin to wait; does nothing if no thread can be started."""
        self._cancelled = unpatched("_thread", "allocate_lock")()
        self._cancelled.acquire()
        self._worker = NativeThread(self._run, self._name, is_bare=True)
        self._waits = True
        with contextlib.suppress(RuntimeError):
            self._worker.start()

    def pause(self) -> None:
        """End the thread if it still waits; it may take 0.25 s if ``action`` has just begun."""
        if self._waits and self._worker is not None:
            with contextlib.suppress(RuntimeError):
                self._cancelled.release()
            self._worker.join(_PAUSE_SECONDS)

    def resume(self) -> None:
        """Begin to wait again, if it was paused."""
        if self._waits:
            self.start()

    def _run(self) -> None:
        if not self._cancelled.acquire(timeout=self._seconds):
            self._waits = False
            self._action()


def can_run() -> bool:
    """Return whether threads run here; uWSGI without ``enable-threads`` stops them between requests."""
    options = under_uwsgi.options()
    return options is None or not options.isdisjoint({"enable-threads", "threads"})


def ends_with_a_hook() -> bool:
    """Return whether a hook runs when this process exits in an orderly way.

    With several ``threads``, uWSGI runs no hook in a worker while one of its threads is in a request.
    """
    options = under_uwsgi.options()
    return options is None or "threads" not in options
