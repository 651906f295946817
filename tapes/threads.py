"""Locks and threads of the operating system, also where gevent has put its own in their place.

The publisher's thread and the application's greenlets share locks that are held for a computation and never
over a wait. That needs real ones: a greenlet's lock would switch to the hub of whichever thread asks.
"""

from __future__ import annotations

import importlib
import sys
import threading
from typing import Any, Callable, TypeVar

__all__ = ["RLock", "Worker", "aside", "beside_the_loop", "can_be_relied_on", "is_ours", "is_patched", "real"]

T = TypeVar("T")


def is_patched() -> bool:
    """Return whether gevent has replaced threads in this process."""
    monkey: Any = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def real(module: str, name: str) -> Any:
    """Return ``name`` of the standard ``module`` as it was before gevent patched it, if it did."""
    monkey: Any = sys.modules.get("gevent.monkey")
    if monkey is not None:
        return monkey.get_original(module, name)
    return getattr(importlib.import_module(module), name)


def aside(function: Callable[[], T]) -> T:
    """Return what ``function`` returns; its waiting holds up no greenlet."""
    if not is_patched():
        return function()
    gevent: Any = importlib.import_module("gevent")
    result: T = gevent.get_hub().threadpool.apply(function)
    return result


async def beside_the_loop(function: Callable[[], T]) -> T:
    """Return what ``function`` returns; it runs in a thread, and the event loop goes on."""
    anyio: Any = sys.modules.get("anyio")
    if anyio is None:
        asyncio: Any = importlib.import_module("asyncio")
        result: T = await asyncio.get_running_loop().run_in_executor(None, function)
    else:  # it knows which loop this is; the application's own threads are not taken
        run: Any = importlib.import_module("anyio.to_thread")
        result = await run.run_sync(function, limiter=anyio.CapacityLimiter(1))
    return result


def RLock() -> threading.RLock:  # noqa: N802 - it stands for the class
    """Return a new re-entrant lock between threads."""
    lock: threading.RLock = real("_thread", "RLock")()
    return lock


_ours: set[int] = set()


def is_ours() -> bool:
    """Return whether it is a `Worker` that asks, which gevent knows nothing of."""
    return real("_thread", "get_ident")() in _ours


class Worker:
    """A daemon thread of the operating system that runs ``target``."""

    def __init__(self, target: Callable[[], None], name: str) -> None:
        self._target = target
        self._ident = 0
        self._thread: threading.Thread | None = None
        self._ended: Any = real("_thread", "allocate_lock")()
        if not is_patched():
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start it.

        Raises:
            RuntimeError: If no thread can be started here.
        """
        self._ended.acquire()
        try:
            if self._thread is not None:
                self._thread.start()
            else:
                real("_thread", "start_new_thread")(self._run, ())
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
        """Return whether it is the one that asks."""
        ident: int = real("_thread", "get_ident")()
        return self._ident == ident

    def _run(self) -> None:
        self._ident = real("_thread", "get_ident")()
        _ours.add(self._ident)
        try:
            self._target()
        finally:
            _ours.discard(self._ident)
            self._ident = 0
            self._ended.release()


def can_be_relied_on() -> bool:
    """Return whether a thread of ours runs here, and a hook at the end of the process does.

    uWSGI stops threads between requests without ``enable-threads``; with several ``threads`` it runs no hook
    at the end of a worker of which one thread is in a request.
    """
    uwsgi: Any = sys.modules.get("uwsgi")
    options = {name.decode() if isinstance(name, bytes) else name for name in getattr(uwsgi, "opt", ())}
    return uwsgi is None or ("enable-threads" in options and "threads" not in options)
