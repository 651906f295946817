"""Gauge: how much right now."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Callable
from itertools import repeat
from math import isfinite
from operator import is_
from types import MethodType
from typing import Any, NamedTuple

from tapes.clock import Clock
from tapes.errors import InvalidArgument, safe_text
from tapes.metrics.base import DOWN, Metric, Owner
from tapes.metrics.folding import FULL, State
from tapes.metrics.gauge_state import MERGE_MODES, GaugeState, MergeMode
from tapes.metrics.sifting import checked_number
from tapes.metrics.sleeping import SleepingBuffer
from tapes.naming import Labels
from tapes.sums import LIMIT, SUM_TOO_LARGE, Number

__all__ = ["DOWN_ONE", "MERGE_MODES", "UP_ONE", "Gauge", "GaugeState", "MergeMode", "Producer", "check_gauge"]

Producer = Callable[[], Number]

_KEPT_SECONDS = 10.0
"""Seconds for which a gauge keeps its last value while its producer hangs."""
_log = logging.getLogger("tapes.registry")


def check_gauge(producer: Any, merge: Any, weak: Any) -> None:
    """Check the arguments of a gauge's maker; raises `InvalidArgument` if one is not valid."""
    if merge not in MERGE_MODES:
        raise InvalidArgument("a gauge's merge mode", got=merge, expected=" or ".join(MERGE_MODES))
    if producer is not None and not callable(producer):
        raise InvalidArgument(
            "a gauge's producer",
            got=producer,
            expected="a callable without arguments",
            remedy="use .set(value) for a plain value, keywords or labels={…} for labels, and "
            "tapes.describe(name, text) for a help text",
        )
    if not isinstance(weak, bool):
        remedy = "use labels={'weak': …} for a label"
        raise InvalidArgument("a gauge's weak=", got=weak, expected="a bool", remedy=remedy)
    if weak and producer is not None:
        try:
            weakref.ref(getattr(producer, "__self__", producer))
        except TypeError:
            expected = "a callable, or a method of an object, that can be weakly referenced"
            what = "a gauge's producer with weak=True"
            raise InvalidArgument(what, got=producer, expected=expected) from None


_UP = object()

UP_ONE, DOWN_ONE = (1, _UP, None), (1, DOWN, None)
"""Steps of one in the buffer of a gauge that was never set; adapters append them, which saves a call."""


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two producers are one; a bound method is another object each time."""
    if isinstance(one, MethodType) and isinstance(other, MethodType):
        return one.__self__ is other.__self__ and one.__func__ is other.__func__
    return one is other


class _Run(NamedTuple):
    """One run of a producer: the process that runs it, and when it began, by the gauge's clock."""

    pid: int
    start: float


class _BasedState(NamedTuple):
    """A gauge's state, and the value set last that it is based on.

    Setting replaces the value, so it needs no buffer. A step up or down has the value that it started from.
    Steps from an earlier value do not count any more.
    """

    state: GaugeState
    base: tuple[Number, float | None] | None


class Gauge(Metric):
    """Shows a level that rises and falls: queue length, open connections, memory in use.

    The level is set, moved up and down, or returned by a *producer*, a function that is called at each read.
    Use a counter for things that happen.

    Example:
        >>> import tapes
        >>> registry = tapes.Registry()
        >>> registry.gauge("pool.size").set(3)
        >>> registry.gauge("queue.length", lambda: 12)
        <tapes gauge 'queue.length'>
        >>> registry.get_stats().pool.size.value, registry.get_stats().queue.length.value
        (3, 12)
    """

    kind = "gauge"
    __slots__ = ("_is_late", "_is_replaced", "_produced", "_producer", "_run", "_set", "_sleeps", "mode")

    def __init__(self, name: str, labels: Labels, clock: Clock, owner: Owner, mode: str) -> None:
        self.mode = mode
        self._producer: Callable[[], Producer | None] | None = None
        self._produced = GaugeState(None, mode, None)
        self._run: _Run | None = None  # the run of the producer that goes on
        self._set: tuple[Number, float | None] | None = None
        self._is_late = self._is_replaced = self._sleeps = False
        super().__init__(name, labels, clock, owner)

    def produce(self, producer: Producer, *, weak: bool = False) -> None:
        """Take the value from ``producer`` at every read from now on, in place of an earlier producer.

        With ``weak`` it does not keep ``producer`` alive, nor the object of a method. Once that is gone the
        gauge has no value.
        """
        before = self._producer and self._producer()
        is_same = before is not None and _is_same(before, producer)
        if before is not None and not (is_same or self._is_replaced):
            self._is_replaced = True
            with contextlib.suppress(Exception):  # a failing logging handler must not break the caller
                _log.warning(
                    "gauge %r got another producer; the newest one is used (this is logged once). "
                    "Give each its own name or labels to keep both.",
                    self.name,
                )
        if not weak:
            self._producer = lambda: producer
        elif isinstance(producer, MethodType):
            self._producer = weakref.WeakMethod(producer)
        else:
            self._producer = weakref.ref(producer)
        if not is_same:  # a run of the earlier one does not count any more
            self._run, self._is_late = None, False
        self._wake()

    def sleep(self, wake: Callable[[], bool]) -> None:
        super().sleep(wake)
        self._sleeps = True

    def _wake(self) -> None:
        if isinstance(self._buffer, SleepingBuffer):
            self._buffer.rouse()
        self._sleeps = isinstance(self._buffer, SleepingBuffer)

    @property
    def has_producer(self) -> bool:
        return self._producer is not None and self._producer() is not None

    @property
    def awaits_producer(self) -> bool:
        """Whether its producer has not run yet; false if a read has waited for it in vain."""
        return self.has_producer and self._produced.since is None and not self._is_late

    def set(self, value: Number) -> None:
        """Set the value, any number that a float can hold; a bad one is dropped, counted and logged.

        Whole numbers of 2^63 and more become floats. Cost: a comparison and a store. Never raises or waits.
        """
        if type(value) in (int, float) and -LIMIT < value < LIMIT:  # which NaN is not
            self._set = (value, self._clock() if self.mode == "last" else None)
        else:
            self._set_unusual(value)
        if self._sleeps:
            self._wake()

    def increment(self, n: Number = 1) -> None:
        """Move up by ``n``, any number that a float can hold; a bad one is dropped, counted and logged."""
        buffer = self._buffer
        buffer.append((n, _UP, self._set))
        if len(buffer) >= FULL:
            self._fold(0.0)

    def decrement(self, n: Number = 1) -> None:
        """Move down by ``n``, any number that a float can hold; a bad one is dropped, counted and logged."""
        buffer = self._buffer
        buffer.append((n, DOWN, self._set))
        if len(buffer) >= FULL:
            self._fold(0.0)

    def is_due(self, max_age_seconds: float) -> bool:
        """Return whether its producer is to run: its last value is older, and it does not run already.

        A producer that runs may itself read. The last value of one that hangs is dropped after 10 s.
        """
        if self._producer is None:
            return False
        last, run, now = self._produced, self._run, self._clock()
        if run is not None and run.pid == os.getpid():  # a forked child has no thread that runs it
            if now - run.start > _KEPT_SECONDS and last.value is not None:
                self._produced = GaugeState(None, self.mode, now)
            return False
        return last.since is None or now - last.since >= max_age_seconds

    def run_producer(self, caught: type[BaseException]) -> BaseException | None:
        """Run the producer and keep its value; return the exception that it raised, if it is a ``caught``."""
        producing, now = self._producer, self._clock()
        producer = producing and producing()
        if producer is None:
            self._produced = GaugeState(None, self.mode, None)
            return None
        run = self._run = _Run(os.getpid(), now)
        value, failure = None, None
        try:
            value = checked_number(producer())
        except caught as error:
            failure = error
        finally:
            if self._run is run:  # there is no newer producer
                self._run, self._is_late = None, False
                self._produced = GaugeState(value, self.mode, now)
        return failure

    def note_failure(self, why: str) -> None:
        self._owner.rejected(self, self._producer and self._producer(), why)

    def note_late(self, seconds: float) -> None:
        """Count and log, once for each run, that its producer has run for ``seconds``."""
        run = self._run
        if run is not None and not self._is_late:
            self._is_late = True
            self.note_failure(f"its producer has not returned within {seconds:g} s")

    def collect(self) -> GaugeState:
        """Return the value: as set and moved, or as last produced (`refresh`)."""
        if self._producer is not None:
            return self._produced
        if self._pending or self._bad or self._state.base is not self._set:
            self._fold(self._clock(), wait=True)
        return self.state

    @property
    def state(self) -> GaugeState:
        state: GaugeState = self._produced if self._producer is not None else self._state.state
        return state

    def total_state(self) -> GaugeState:
        """Return the value with what was inherited: steps start from that, setting replaces it."""
        own, inherited = self.collect(), self._inherited
        if inherited is None or self._producer is not None or self._set is not None:
            return own
        before: Any = inherited.total_state()
        return GaugeState.add((before, own))

    def detach_inherited(self) -> Metric | None:
        """Begin without a value in a forked child; return a gauge of the value, if it was ever set."""
        if self._producer is not None:
            self._produced = GaugeState(None, self.mode, None)
            self._is_late = False
            return None
        aside = super().detach_inherited()
        self._set = None
        return aside

    def note_baseline(self, state: Any) -> None:
        pass  # it is not a count

    def drain(self) -> GaugeState:
        return self.collect()  # and keep it: it is not a count

    def is_unchanged_since(self, state: State | None) -> bool:
        if self._producer is not None:
            return self._produced is state
        return self._state.state is state and not self._pending and self._is_compacted()

    def _holds_something(self) -> bool:
        return bool(self._pending) or self._set is not None or not self._state.state.is_empty

    def _set_unusual(self, value: Any) -> None:
        try:
            self._set = (checked_number(value), self._clock())
        except Exception as error:
            self._owner.rejected(self, value, safe_text(error))

    def _checked(self, value: Any) -> Any:
        given, how, base = value
        number = super()._checked(given)
        return value if number is given else (number, how, base)

    def _raw(self, value: Any) -> Any:
        return value[0]

    def _initial(self, now: float) -> _BasedState:
        return _BasedState(GaugeState(0, self.mode, None), None)

    def _is_compacted(self) -> bool:
        return self._state.base is self._set

    def _compacted(self) -> _BasedState:
        return self._absorb(self._state, [])

    def _absorb(self, state: Any, values: list[Any]) -> _BasedState:
        (value, _, since), before = state
        base = self._set  # read after the values were taken, so none of them is newer
        if base is None:
            # The steps of adapters are the same two objects, which are counted in C.
            ups, downs = (sum(map(is_, values, repeat(step))) for step in (UP_ONE, DOWN_ONE))
            if ups + downs == len(values):
                since = self._clock() if since is None and values else since
                return _BasedState(GaugeState(checked_number(value + ups - downs), self.mode, since), None)
        elif base is not before:
            value, since = base
        for number, how, its_base in values:
            if type(number) not in (int, float) or not isfinite(number):
                raise ValueError("not all are plain finite numbers")
            if its_base is base:
                try:
                    value = checked_number(value - number if how is DOWN else value + number)
                except ValueError:
                    raise ValueError(SUM_TOO_LARGE) from None
        if since is None and (values or base is not None):
            since = self._clock()
        return _BasedState(GaugeState(value, self.mode, since), base)
