"""Counter: how many, up and down."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Any, NamedTuple

from tapes.metrics.base import DOWN, FULL, Metric
from tapes.naming import Labels
from tapes.snapshot import CounterSeries
from tapes.sums import Number, Total

__all__ = ["Counter", "CounterState", "add_up"]


class CounterState(NamedTuple):
    """What was added and what was taken away, apart: the first never falls, whatever the second does."""

    up: Total = Total()
    down: Total = Total()

    @staticmethod
    def merge(states: Iterable[CounterState]) -> CounterState:
        """Return the sum of the counters."""
        every = list(states)
        return CounterState(
            Total.merge(state.up for state in every), Total.merge(state.down for state in every)
        )

    def series(self, labels: Labels, tick: int) -> CounterSeries:
        """Return what a reader sees."""
        up, down = self.up.value, self.down.value
        if not down:
            return CounterSeries(labels, up, up, False)
        net = Total.merge((self.up, Total(-self.down.whole, tuple(-p for p in self.down.parts))))
        return CounterSeries(labels, net.value, up, True)


class Counter(Metric):
    """Counts things, up and down.

    Example:
        >>> import tapes
        >>> registry = tapes.Registry()
        >>> registry.counter("jobs.done").increment()
        >>> registry.get_stats().jobs.done.value
        1
    """

    kind = "counter"
    __slots__ = ()

    def increment(self, n: Number = 1) -> None:
        """Add ``n``, zero or more; a negative ``n`` is a bad value: dropped, counted and logged.

        Cost: an append. Never raises, never waits.
        """
        buffer = self._buffer
        buffer.append(n)
        if len(buffer) >= FULL:
            self._fold(0.0)

    def decrement(self, n: Number = 1) -> None:
        """Take ``n`` away, zero or more; a negative ``n`` is a bad value: dropped, counted and logged.

        Cost: an append. Never raises, never waits.
        """
        buffer = self._buffer
        buffer.append((n, DOWN))
        if len(buffer) >= FULL:
            self._fold(0.0)

    def _initial(self, now: float) -> CounterState:
        return CounterState()

    def _absorb(self, values: list[Any]) -> CounterState:
        state: Any = self._state
        up, down = state
        total = add_up(up, values)
        if total is not None:
            return CounterState(total, down)
        ups: list[Any] = []
        downs: list[Any] = []
        for value in values:
            if type(value) is tuple and len(value) == 2 and value[1] is DOWN:
                downs.append(value[0])
            else:
                ups.append(value)
        return CounterState(self._added(up, ups), self._added(down, downs))

    def _added(self, total: Total, values: list[Any]) -> Total:
        added = add_up(total, values)
        return total.add(self._sift(values, least=0)) if added is None else added


def add_up(total: Total, values: list[Any]) -> Total | None:
    """Return ``total`` with ``values`` added, or ``None`` if they are not all plain numbers of 0 or more."""
    if not values:
        return total
    try:
        if values.count(1) == len(values):
            return Total(total.whole + len(values), total.parts)
        least, together = min(values), sum(values)
        if least < 0 or not isfinite(together) or not {int, float}.issuperset(map(type, values)):
            return None
    except Exception:  # whatever a stranger's number raises
        return None
    if type(together) is int:
        return Total(total.whole + together, total.parts)
    return total.add(values)
