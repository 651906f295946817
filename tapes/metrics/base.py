"""What all metrics share: a buffer, a fold and a state.

Theory. Recording appends to a list and does nothing else: ``list.append`` is atomic, takes no lock and may be
interrupted by a signal handler or a destructor that records into the same list. *Folding* turns the buffer
into state in one batch. It takes the first n values, builds a new immutable state, and then replaces the
state and removes those n values. Whoever reads the state meanwhile holds the one before: a consistent cut.

One thread folds at a time. A recorder that finds the buffer full tries, and leaves it to the other if
someone is folding already; so recording never waits. A reader waits for another thread, a second at most. The
lock is re-entrant and a flag tells a fold that is interrupted by a signal handler of its own thread: the
handler's reads get the last complete state. A fold that finds its state replaced meanwhile does its batch
again. Nothing is logged while the lock is held, as a logging handler may itself record. A lock that a fork
left held by a thread that does not exist in the child is replaced.

What can't be recorded (NaN, infinities, things that are no numbers) is found at fold time, at the speed of a
batch: a batch that can't be absorbed as it is, is sifted value by value, and what is bad is handed to the
registry, which counts and logs it. If sifting changes nothing, the values were not at fault, and the
exception is somebody else's: a signal handler may raise anywhere, and what it raises is not ours to keep. The
batch is absorbed, and the exception goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from math import inf, isfinite
from operator import index, is_
from typing import Any, ClassVar, Protocol, cast

from tapes.clock import Clock
from tapes.errors import safe_text
from tapes.metrics.misuse import Guided, LabelsOf
from tapes.metrics.origin import with_told
from tapes.metrics.sleeping import SleepingBuffer
from tapes.naming import Labels
from tapes.snapshot import Series
from tapes.sums import LARGE, Number
from tapes.threads import RLock

__all__ = ["DOWN", "FULL", "Metric", "Owner", "State", "checked_number"]

FULL = 256
"""A buffer of this many values is folded by whoever fills it, so memory stays bounded with no reader.

It is also the largest number that CPython keeps ready-made: ``len(buffer)`` of a longer one would allocate.
"""

DOWN = object()
"""In a buffer, ``(n, DOWN)`` is a step down among steps up."""

_WAIT_SECONDS = 1.0
_BATCH = 4 * FULL
"""A buffer that has grown longer, as its folder was slow, is folded in such parts."""
_OURS = (ValueError, TypeError, ArithmeticError, Warning)
"""What arithmetic with bad values raises, and what foreign numbers warn of where warnings are errors."""


class Owner(Protocol):
    """The registry that made a metric."""

    def rejected(self, metric: Metric, value: Any, why: str) -> None:
        """Count and log a value that can't be recorded."""

    def recipe(self, metric: Metric) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return a function and its arguments that give the metric in another process, for `pickle`.

        Raises:
            InvalidArgument: If there is none.
        """


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


class Metric(Guided):
    """A named series that a process records into; made by a registry.

    Thread and fork safety: recording and reading are safe from any thread, from signal handlers and from
    destructors. A forked child counts from zero, whatever its parent's threads were about; what it
    inherited is set aside, as several processes have it and it counts once.

    A copy, also a deep one, is the metric itself. A pickled metric of the default registry is the one of its
    name and labels in the process that unpickles it; a metric of another registry can't be pickled.
    """

    kind: ClassVar[str]
    _least: ClassVar[float] = -inf
    _internal = frozenset({
        "after_fork", "awaits_producer", "collect", "detach_inherited", "drain", "has_producer", "is_due",
        "is_unchanged_since", "note_failure", "note_late", "note_told", "produce", "run_producer", "sleep",
        "state", "total_state",
    })  # fmt: skip

    __slots__ = (
        "__weakref__", "_bad", "_buffer", "_clock", "_folding", "_inherited", "_lock", "_owner", "_pending",
        "_pid", "_state", "labels", "name",
    )  # fmt: skip

    def __init__(self, name: str, labels: Labels, clock: Clock, owner: Owner) -> None:
        self.name = name
        self.labels: Labels = LabelsOf(labels)
        self._clock = clock
        self._owner = owner
        self._buffer: list[Any] = []  # what recording appends to: the pending values, or what wakes first
        self._pending = self._buffer
        self._bad: list[tuple[Any, str]] = []
        self._lock = RLock()
        self._folding = False
        self._pid = os.getpid()
        self._inherited: Metric | None = None
        self._state: Any = self._initial(clock())

    def __repr__(self) -> str:
        labels = "".join(f", {name}={value!r}" for name, value in self.labels)
        return f"<tapes {self.kind} {self.name!r}{labels}>"

    def __copy__(self) -> Metric:
        return self

    def __deepcopy__(self, memo: Any) -> Metric:
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._owner.recipe(self)

    def collect(self) -> State:
        """Fold what is pending and return what this process recorded; the same object if nothing changed."""
        # Values leave the buffer only after they came to the state.
        if self._pending or self._bad or not self._is_compacted():
            self._fold(self._clock(), wait=True)
        state: State = self._state
        return state

    @property
    def state(self) -> State:
        """What `collect` returned last, or what was folded since."""
        state: State = self._state
        return state

    def total_state(self) -> State:
        """Return the state with what was inherited from processes that this one was forked from."""
        state, inherited = self.collect(), self._inherited
        if inherited is None:
            return state
        whole: State = type(state).merge((inherited.total_state(), state))
        return whole

    def detach_inherited(self) -> Metric | None:
        """Begin from zero in a forked child; return a metric of what is there now, ``None`` if nothing is.

        Folds nothing, so no number of a stranger can hold up a fork. What the other one holds counts as
        inherited here.
        """
        if not self._holds_something():
            return None
        aside = self._duplicate()
        aside._lock, aside._folding = RLock(), False
        aside._bad, aside._owner = [], _Nobody()  # the parent counts them
        self._inherited = aside
        self._buffer = self._pending = []
        self._state = self._initial(self._clock())
        return aside

    def _duplicate(self) -> Metric:
        other = object.__new__(type(self))
        for cls in type(self).__mro__:
            for slot in getattr(cls, "__slots__", ()):
                if slot != "__weakref__":
                    setattr(other, slot, getattr(self, slot))
        return other

    def _holds_something(self) -> bool:
        return bool(self._pending) or not self._state.is_empty

    def sleep(self, wake: Callable[[], bool]) -> None:
        """Have ``wake`` called when the next value is recorded; see `SleepingBuffer`."""
        self._buffer = SleepingBuffer(self, wake, FULL)

    def is_unchanged_since(self, state: State | None) -> bool:
        """Return whether ``state`` is all there is, with nothing to be folded."""
        return self._state is state and not self._pending

    def note_told(self, state: Any) -> None:
        """Note that what ``state`` of this metric counts was told to an aggregator before the present one."""
        if state is None:
            return
        lock = self._lock
        try:  # as in _fold
            lock.acquire(timeout=_WAIT_SECONDS)
            told = state.counted
            while True:
                before = self._state
                noted = with_told(before, told)
                if self._state is before:
                    self._state = noted
                    break
        finally:
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:
                pass

    def drain(self) -> State:
        """Return the state and start again from zero, in one step: every event is in one of the two.

        What was inherited is forgotten.
        """
        self._fold(self._clock(), wait=True)
        initial = self._initial(self._clock())
        lock = self._lock
        try:  # as in _fold; a fold that this call interrupts notices that its state was taken
            lock.acquire(timeout=_WAIT_SECONDS)
            state, self._state = self._state, initial
            self._inherited = None
        finally:
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:
                pass
        return cast("State", state)

    def after_fork(self) -> None:
        """Go on in a forked child: replace the lock if a thread holds it that is not there."""
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
        lock = self._lock
        # A signal handler may raise as soon as a call returns. So the lock is taken within the block that
        # releases it, and releasing what was not taken is no error.
        try:
            if not lock.acquire(False):
                if self._pid != os.getpid():  # forked by a server in C, which runs no hooks
                    self._renew_lock()
                    lock = self._lock
                if not (lock.acquire(timeout=_WAIT_SECONDS) if wait else lock.acquire(False)):
                    return
            if self._folding:
                return
            try:
                self._folding = True
                self._pid = os.getpid()
                self._fold_alone(now)
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
            self._owner.rejected(self, value, why)

    def _fold_alone(self, now: float) -> None:
        buffer = self._pending
        pending = len(buffer)
        while pending > 0:
            values = buffer[: min(pending, _BATCH)]
            taken = len(values)
            while True:
                before = self._state
                bad: list[tuple[Any, str]] = []
                interruption: BaseException | None = None
                try:
                    state = self._absorb(values)
                except BaseException as error:
                    state, bad, interruption = self._absorb_sifted(values, error)
                # Nothing may come between what follows. From CPython 3.11 on the interpreter looks for
                # signals at calls and backward jumps only, of which there are none here.
                if self._state is before and self._pending is buffer:
                    self._state = state
                    del buffer[:taken]
                    break
                if self._pending is not buffer:  # forked meanwhile, and in the child all was set aside
                    self._fold_alone(now)
                    return
            self._bad += bad
            if interruption is not None:
                raise interruption
            pending -= taken
        self._advance_tick(now)

    def _absorb_sifted(
        self, values: list[Any], error: BaseException
    ) -> tuple[Any, list[tuple[Any, str]], BaseException | None]:
        """Return the state with the good ``values``, the bad ones, and ``error`` if it is not theirs."""
        good, bad, raised = self._sift(values)
        try:
            state = self._absorb(good) if good else self._state
        except Exception:  # nobody's fault but ours: rather lose the batch than the user's request
            return self._state, [(self._raw(value), "it could not be folded") for value in values], None
        unchanged = not bad and all(map(is_, good, values))
        theirs = not unchanged and (isinstance(error, _OURS) or type(error) in raised)
        return state, bad, None if theirs else error

    def _compact(self) -> None:
        """Bring the state into the form that readers want."""
        while True:
            before = self._state
            state = self._compacted()
            if self._state is before:
                self._state = state
                return

    def _initial(self, now: float) -> Any:
        """Return the state of a metric made at ``now``."""
        raise NotImplementedError

    def _absorb(self, values: list[Any]) -> Any:
        """Return the state with ``values`` added; raises anything if one of them can't be, as it is."""
        raise NotImplementedError

    def _is_compacted(self) -> bool:
        """Return whether the state is as readers want it."""
        return True

    def _compacted(self) -> Any:
        """Return the state as readers want it."""
        return self._state

    def _advance_tick(self, now: float) -> None:
        """Note that what is recorded from here on happens at ``now`` or later."""

    def _sift(self, values: list[Any]) -> tuple[list[Any], list[tuple[Any, str]], set[type]]:
        """Return the values that can be absorbed, converted where need be, and the others with reasons.

        The third is what numbers that are not ours raised.
        """
        good: list[Any] = []
        bad: list[tuple[Any, str]] = []
        raised: set[type] = set()
        for value in values:
            ours = type(self._raw(value)) in (int, float)
            theirs: type[BaseException] = ValueError if ours else BaseException
            try:
                good.append(self._checked(value))
            except theirs as error:
                bad.append((self._raw(value), safe_text(error)))
                if not ours:
                    raised.add(type(error))
        return good, bad, raised

    def _raw(self, value: Any) -> Any:
        """Return what the user gave, of what is in the buffer."""
        return value

    def _checked(self, value: Any) -> Any:
        """Return ``value`` as it can be absorbed; itself if it can be as it is.

        Raises:
            ValueError: If it can't be recorded.
        """
        number = checked_number(value)
        if number < self._least:
            raise ValueError(f"it is less than {self._least:g}")
        return number


class _Nobody:
    """The owner of what a fork set aside: the parent counts its bad values."""

    def rejected(self, metric: Metric, value: Any, why: str) -> None:
        """Do nothing."""

    def recipe(self, metric: Metric) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        raise NotImplementedError


def checked_number(value: Any) -> Number:
    """Return ``value`` as a finite ``int`` or ``float``.

    Raises:
        ValueError: If it is NaN, infinite, too large for a float, or no number.
    """
    if type(value) in (int, float) and -LARGE < value < LARGE:  # which NaN is not
        number: Number = value
        return number
    try:
        finite = isfinite(value)
    except (TypeError, ValueError, OverflowError):
        finite = False
    if not finite:
        raise ValueError("it is not a finite number")
    try:
        return index(value)
    except TypeError:
        return float(value)
