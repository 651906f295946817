"""How what is recorded becomes state: a buffer, and a fold that no signal, fork or thread disturbs.

Theory. Recording appends to a list and does nothing else: ``list.append`` is atomic, takes no lock and may be
interrupted by a signal handler or a destructor that records into the same list. *Folding* turns the buffer
into state in one batch. It takes the first n values, builds a new immutable state, and then replaces the
state and removes those n values. A reader meanwhile sees the state before: a consistent cut.

One thread folds at a time. A recorder that finds the buffer full tries to fold, and gives up if another
thread folds already; so recording never waits. A reader waits for that thread, a second at most. The lock is
re-entrant, and a flag shows that a signal handler interrupts a fold of its own thread: the handler's reads
get the last complete state. A fold that finds its state replaced meanwhile repeats its batch. Nothing is
logged while the lock is held, as a logging handler may itself record. In a forked child, a lock whose owner
does not exist there is replaced.

Bad values are found by the fold, not by the recording call: see `tapes.metrics.sifting`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from tapes.clock import Clock
from tapes.metrics.misuse import Guided
from tapes.metrics.sifting import absorb_sifted
from tapes.metrics.sleeping import SleepingBuffer
from tapes.naming import Labels
from tapes.snapshot import Series
from tapes.threads import RLock

S = TypeVar("S", bound=tuple[Any, ...])
T = TypeVar("T")

FULL = 256
"""A recorder that fills the buffer to this many values folds it, so memory is bounded without a reader.

It is also the largest number that CPython keeps ready-made: ``len(buffer)`` of a longer one would allocate.
"""
_MAX_BATCH = 4 * FULL
"""Maximum number of values that are folded at once, if the buffer has grown during a slow fold."""
_WAIT_SECONDS = 1.0
"""Maximum seconds to wait for a thread that folds."""


class State(Protocol):
    """The mergeable state of a metric: an immutable value."""

    @staticmethod
    def merge(states: Iterable[Any]) -> Any:
        """Return the state of all streams together; at least one is needed."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was recorded."""

    def series(self, labels: Labels, tick: int) -> Series | None:
        """Return what a reader sees as of ``tick``; ``None`` if there is nothing to see."""


def merge_parts(states: Iterable[S]) -> S:
    """Return the state whose parts are the merged parts of ``states``."""
    every = list(states)
    make: Callable[..., S] = type(every[0])
    return make(*(type(parts[0]).merge(parts) for parts in zip(*every)))


class Folding(Guided):
    """A buffer that is folded into a state; the base of `tapes.metrics.Metric`.

    Subclasses define `_initial` and `_absorb`, and may override the methods after these.
    """

    __slots__ = ("_bad", "_buffer", "_clock", "_folding", "_lock", "_pending", "_pid", "_state")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._buffer: list[Any] = []  # what recording appends to: `_pending`, or what wakes first
        self._pending = self._buffer
        self._bad: list[tuple[Any, str]] = []
        self._lock = RLock()
        self._folding = False
        self._pid = os.getpid()
        self._state: Any = self._initial(clock())

    def _initial(self, now: float) -> Any:
        """Return the state of a metric made at ``now``."""
        raise NotImplementedError

    def _absorb(self, state: Any, values: list[Any]) -> Any:
        """Return ``state`` with ``values`` added; raises anything if one of them can't be, as it is.

        If ``values`` is one number that can't be added to ``state``, it raises `ValueError`.
        """
        raise NotImplementedError

    def _is_compacted(self) -> bool:
        return True

    def _compacted(self) -> Any:
        return self._state

    def _advance_tick(self, now: float) -> None:
        """Note that what is recorded from here on happens at ``now`` or later."""

    def _raw(self, value: Any) -> Any:
        return value

    def _checked(self, value: Any) -> Any:
        """Return ``value`` as it can be absorbed, itself if it can; raises `ValueError` if it is bad."""
        raise NotImplementedError

    def _reject(self, value: Any, why: str) -> None:
        raise NotImplementedError

    def collect(self) -> State:
        """Fold what is pending and return what this process recorded; the same object if nothing changed."""
        # Values leave the buffer only after they came to the state.
        if self._pending or self._bad or not self._is_compacted():
            self._fold(self._clock(), wait=True)
        return self.state

    @property
    def state(self) -> State:
        """What `collect` returned last, or what was folded since."""
        state: State = self._state
        return state

    def is_unchanged_since(self, state: State | None) -> bool:
        """Return whether ``state`` is the present one, with nothing to be folded."""
        return self._state is state and not self._pending

    def sleep(self, wake: Callable[[], bool]) -> None:
        """Have ``wake`` called when the next value is recorded; see `SleepingBuffer`."""
        self._buffer = SleepingBuffer(self, wake, FULL)

    def after_fork(self) -> None:
        """Continue in a forked child: replace the lock if its owner does not exist here."""
        if self._lock.acquire(False):
            self._pid = os.getpid()
            self._lock.release()
        else:
            self._renew_lock()

    def _renew_lock(self) -> None:
        self._lock = RLock()
        self._folding = False
        self._pid = os.getpid()

    def _fold(self, now: float, *, wait: bool = False) -> None:
        """Fold what is pending, unless another thread does; with ``wait`` wait for that, a second at most.

        A signal handler may raise as soon as a call returns. So the lock is taken within the block that
        releases it, which ignores a lock that was not taken. A ``with`` block would be less safe: it does not
        protect its own calls of ``__enter__`` and ``__exit__``.
        """
        lock = self._lock
        try:
            if not lock.acquire(False):
                if self._pid != os.getpid():  # forked by a server in C, which runs no hooks
                    self._renew_lock()
                    lock = self._lock
                if not (lock.acquire(timeout=_WAIT_SECONDS) if wait else lock.acquire(False)):
                    return
            if self._folding:  # a signal handler interrupts a fold of this thread
                return
            try:
                self._folding = True
                self._pid = os.getpid()
                self._fold_batches(now)
                if wait:
                    self._compact()
            finally:
                self._folding = False
        finally:
            try:  # noqa: SIM105 - suppress() is a call, after which a handler may raise
                lock.release()
            except RuntimeError:
                pass
        while self._bad:
            try:
                value, why = self._bad.pop(0)
            except IndexError:  # another thread was faster
                return
            self._reject(value, why)

    def _locked(self, action: Callable[[], T]) -> T:
        """Return what ``action`` returns, which is atomic; wait for the lock first, a second at most."""
        lock = self._lock
        try:  # as in `_fold`
            lock.acquire(timeout=_WAIT_SECONDS)
            return action()
        finally:
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:
                pass

    def _fold_batches(self, now: float) -> None:
        buffer = self._pending
        pending = len(buffer)
        while pending > 0:
            values = buffer[: min(pending, _MAX_BATCH)]
            taken = len(values)
            while True:
                before = self._state
                bad: list[tuple[Any, str]] = []
                interruption: BaseException | None = None
                try:
                    state = self._absorb(before, values)
                except BaseException as error:
                    state, bad, interruption = absorb_sifted(self, before, values, error)
                # Nothing may come between the lines that follow. CPython looks for signals at calls and
                # backward jumps only, of which there are none here.
                if self._state is before and self._pending is buffer:
                    self._state = state
                    del buffer[:taken]
                    break
                if self._pending is not buffer:  # forked meanwhile, and in the child all was detached
                    self._fold_batches(now)
                    return
            if bad:
                self._bad += bad
            if interruption is not None:
                raise interruption
            pending -= taken
        self._advance_tick(now)

    def _compact(self) -> None:
        while True:
            before = self._state
            state = self._compacted()
            if self._state is before:
                self._state = state
                return
