"""Gauge: how much right now."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from math import fsum
from types import MethodType
from typing import Any, Callable, NamedTuple

from tapes.clock import Clock
from tapes.metrics.base import FULL, Metric, Reject, checked_number
from tapes.naming import Labels
from tapes.snapshot import GaugeSeries
from tapes.sums import Number

__all__ = ["MERGE_MODES", "Gauge", "GaugeState", "Producer"]

Producer = Callable[[], Number]

MERGE_MODES = ("sum", "max", "min", "mean", "last", "each")
"""How the gauges of several processes become one: ``each`` keeps one series per worker."""

_PRODUCED_SECONDS = 1.0


class GaugeState(NamedTuple):
    """What a gauge stands at.

    Attributes:
        value: ``None`` if there is none, because its producer failed.
        mode: One of `MERGE_MODES`.
        since: When the value was set or produced, in seconds of the host's monotonic clock; ``None`` if
            it never was, so that it doesn't count as a minimum.
    """

    value: Number | None
    mode: str
    since: float | None

    @staticmethod
    def merge(states: Iterable[GaugeState]) -> GaugeState:
        """Return the gauge of all processes, as the newest state's mode says."""
        every = sorted(states, key=lambda state: -1.0 if state.since is None else state.since)
        newest = every[-1]
        values = [state.value for state in every if state.value is not None]
        told = [state.value for state in every if state.value is not None and state.since is not None]
        value: Number | None
        if not told:
            value = values[-1] if values else None
        elif newest.mode in ("max", "min"):
            value = max(told) if newest.mode == "max" else min(told)
        elif newest.mode == "mean":
            value = fsum(told) / len(told)
        elif newest.mode == "last":
            value = told[-1]
        else:
            value = sum(told) if {int}.issuperset(map(type, told)) else fsum(told)
        return GaugeState(value, newest.mode, newest.since)

    def series(self, labels: Labels, tick: int) -> GaugeSeries | None:
        """Return what a reader sees; ``None`` if the producer failed."""
        return None if self.value is None else GaugeSeries(labels, self.value)


class Gauge(Metric):
    """A value that stands at something: set, moved up and down, or produced by a callable when read.

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
    __slots__ = ("_produced", "_producer", "mode")

    def __init__(self, name: str, labels: Labels, clock: Clock, reject: Reject, mode: str) -> None:
        self.mode = mode
        self._producer: Callable[[], Producer | None] | None = None
        self._produced = GaugeState(None, mode, None)
        super().__init__(name, labels, clock, reject)

    def produce(self, producer: Producer, *, weak: bool = False) -> None:
        """Take the value from ``producer`` at every read from now on.

        Args:
            producer: A zero-argument callable that returns a finite number.
            weak: Do not keep ``producer`` alive, nor the object that it is a method of; once that is gone
                the gauge has no value.
        """
        if not weak:
            self._producer = lambda: producer
        elif isinstance(producer, MethodType):
            self._producer = weakref.WeakMethod(producer)
        else:
            self._producer = weakref.ref(producer)

    @property
    def has_producer(self) -> bool:
        """Whether the value is produced by a callable that is still there."""
        return self._producer is not None and self._producer() is not None

    def set(self, value: Number) -> None:
        """Stand at ``value``, any finite number; a bad one is dropped, counted and logged."""
        self._push((value, self._clock()))

    def increment(self, n: Number = 1) -> None:
        """Move up by ``n``, any finite number."""
        self._push(n)

    def decrement(self, n: Number = 1) -> None:
        """Move down by ``n``, any finite number."""
        try:
            self._push(-n)
        except TypeError:
            self._push(n)  # not a number: rejected when folded

    def collect(self, *, fresh: bool = True) -> GaugeState:
        """Return the value now: produced, or as set and moved.

        Args:
            fresh: Whether to run the producer in any case; if not, its last value serves for a second.
        """
        if self._producer is None:
            state = super().collect()
            assert isinstance(state, GaugeState)
            return state
        now = self._clock()
        last = self._produced
        if fresh or last.since is None or now - last.since >= _PRODUCED_SECONDS:
            self._produced = last = self._produce(now)
        return last

    def _produce(self, now: float) -> GaugeState:
        producer = self._producer and self._producer()
        if producer is None:
            return GaugeState(None, self.mode, None)
        try:
            return GaugeState(checked_number(producer()), self.mode, now)
        except Exception as error:
            self._reject(self, producer, f"its producer failed: {error!r}")
            return GaugeState(None, self.mode, now)

    def _push(self, step: Any) -> None:
        buffer = self._buffer
        buffer.append(step)
        if len(buffer) >= FULL:
            self._fold(0.0)

    def _initial(self, now: float) -> GaugeState:
        return GaugeState(0, self.mode, None)

    def _absorb(self, values: list[Any]) -> GaugeState:
        state: Any = self._state
        value, _, since = state
        for step in values:
            try:
                if type(step) is tuple:
                    value, since = checked_number(step[0]), step[1]
                else:
                    value = checked_number(value + checked_number(step))
                    since = since if since is not None else self._clock()
            except Exception as error:
                self._reject(self, step[0] if type(step) is tuple else step, str(error))
        return GaugeState(value, self.mode, since)
