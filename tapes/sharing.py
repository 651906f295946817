"""Work that several callers share, and how many of them are served at once.

`Shared`: if many request the same thing at the same time, it is made once for all of them. An answer must
contain everything that was recorded before the request. So requests that come while an answer is being made
can't have that one; they share the next.

`Pressure`: how many readers a process answers at once, and for how much of its time.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

from tapes.errors import AggregatorUnavailable
from tapes.threads import RLock, unpatched

T = TypeVar("T")


class _Call(Generic[T]):
    """One call of the function, for all callers that wait for it."""

    def __init__(self) -> None:
        self.leader = _me()
        self.ended: Any = unpatched("_thread", "allocate_lock")()
        self.ended.acquire()
        self.result: T | None = None
        self.error: BaseException | None = None

    def wait(self, seconds: float) -> bool:
        has_ended: bool = self.ended.acquire(timeout=seconds)
        if has_ended:
            self.ended.release()
        return has_ended


class Shared(Generic[T]):
    """Calls of functions that threads share; safe from any thread and from signal handlers.

    A caller waits for another one ``seconds`` at most.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = RLock()
        self._running: dict[Hashable, _Call[T]] = {}
        self._next: dict[Hashable, _Call[T]] = {}

    def call(self, key: Hashable, function: Callable[[], T]) -> T:
        """Return what a call of ``function`` returns that began after this one.

        Functions of one ``key`` are exchangeable. Raises `AggregatorUnavailable` if the call of another
        caller takes too long, and what ``function`` raises.
        """
        with self._lock:
            running, call = self._running.get(key), self._next.get(key)
            leads = call is None
            is_interrupted = any(one is not None and one.leader == _me() for one in (running, call))
            if call is None and not is_interrupted:
                call = self._next[key] = _Call()
        if call is None or is_interrupted:  # a signal handler has interrupted what the others wait for
            return function()
        if leads:
            self._lead(key, call, running, function)
        else:
            self._wait_for(key, call)
        if call.error is None:
            return call.result  # type: ignore[return-value]
        if leads:
            raise call.error
        if not isinstance(call.error, Exception):  # the thread that led was ended, and that alone
            return self.call(key, function)
        raise _copy(call.error)

    def _lead(
        self, key: Hashable, call: _Call[T], running: _Call[T] | None, function: Callable[[], T]
    ) -> None:
        try:
            if running is not None:
                self._wait_for(key, running)
            with self._lock:
                self._forget(key, call)  # later callers need another one
                self._running[key] = call
            call.result = function()
        except BaseException as error:
            call.error = error
        finally:
            with self._lock:
                self._forget(key, call)
            call.ended.release()

    def _wait_for(self, key: Hashable, call: _Call[T]) -> None:
        """Wait for the end of a call of another thread; one that hangs does not block later callers."""
        if not call.wait(self._seconds):
            with self._lock:
                self._forget(key, call)
            raise AggregatorUnavailable(
                f"too many readers: the metrics could not be collected within {self._seconds:g} s",
                remedy="ask again",
            )

    def _forget(self, key: Hashable, call: _Call[T]) -> None:
        for place in (self._running, self._next):
            if place.get(key) is call:
                del place[key]


def _copy(error: Exception) -> Exception:
    """Return an error for one more thread, with a traceback of its own where it can be copied."""
    try:
        return copy.copy(error)
    except Exception:
        return error


def _me() -> int:
    ident: int = unpatched("_thread", "get_ident")()
    return ident


class Pressure:
    """How many readers are answered at once, and for how much time.

    Reading a large service takes time, and a burst of readers must not take all of it from requests. Slow
    reads use up an allowance of seconds, which grows again while there are none. Once it is used up, one
    reader at a time is answered, otherwise up to ``most``.
    """

    _QUICK_SECONDS = 0.05
    """Seconds of each read that are free."""
    _ALLOWANCE_SECONDS = 0.8
    _PACE = 0.5
    """Seconds that the allowance grows in a second without a reader."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self.reset()

    def reset(self) -> None:
        """Forget all readers: a forked child has none of the threads that answer them."""
        self._lock = RLock()
        self._readers = 0
        self._allowance = self._ALLOWANCE_SECONDS
        self._counted_to = self._clock()

    @contextlib.contextmanager
    def reader(self) -> Iterator[None]:
        """Answer a reader in the block; raises `AggregatorUnavailable` if there are too many."""
        start = self._enter()
        try:
            yield
        finally:
            self._leave(start)

    def _enter(self) -> float:
        with self._lock:
            now = self._clock()
            if not self._readers:
                regained = (now - self._counted_to) * self._PACE
                self._allowance = min(self._allowance + regained, self._ALLOWANCE_SECONDS)
                self._counted_to = now
            if self._readers >= (self._most if self._allowance > 0 else 1):
                raise AggregatorUnavailable(
                    f"this process answers {self._readers} readers already", remedy="ask again in a second"
                )
            self._readers += 1
            return now

    def _leave(self, start: float) -> None:
        with self._lock:
            now = self._clock()
            slow = now - start - self._QUICK_SECONDS
            if slow > 0:  # what several readers share is counted once
                self._allowance -= min(slow, now - self._counted_to)
                self._counted_to = now
            self._readers -= 1
            if not self._readers:
                self._allowance = max(self._allowance, -self._ALLOWANCE_SECONDS)
                self._counted_to = now
