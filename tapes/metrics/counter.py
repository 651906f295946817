"""Counter: how many, up and down."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from tapes.metrics.base import DOWN, FULL, Metric, checked_number
from tapes.metrics.origin import NOWHERE, Origin
from tapes.naming import Labels
from tapes.snapshot import CounterSeries
from tapes.sums import LARGE, Number, Total

__all__ = ["Counter", "CounterState", "add_up"]


class CounterState(NamedTuple):
    """What was added and what was taken away, apart: the first never falls, whatever the second does."""

    up: Total = Total()
    down: Total = Total()
    origin: Origin = NOWHERE

    @staticmethod
    def merge(states: Iterable[CounterState]) -> CounterState:
        """Return the sum of the counters."""
        every = list(states)
        return CounterState(
            Total.merge(state.up for state in every),
            Total.merge(state.down for state in every),
            Origin.merge(state.origin for state in every),
        )

    @property
    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return self.up == self.down == Total()

    @property
    def counted(self) -> Number:
        """What was added less what was taken away."""
        down = Total(-self.down.whole, tuple(-part for part in self.down.parts))
        return Total.merge((self.up, down)).value

    def series(self, labels: Labels, tick: int) -> CounterSeries:
        """Return what a reader sees."""
        up, down = self.up.value, self.down.value
        if not down:
            return CounterSeries(labels, up, up, False, self.origin.created)
        return CounterSeries(labels, self.counted, up, True, self.origin.created)


class Counter(Metric):
    """Counts things that happen: requests, errors, bytes sent.

    Use a gauge for a level that rises and falls, such as open connections, and a meter if you also want the
    rate. The value is what was added less what was taken away; what was added is kept too, and never falls.

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
        return CounterState(origin=Origin.now())

    def _absorb(self, values: list[Any]) -> CounterState:
        state = self._state
        up, down, origin = state
        if values.count(1) == len(values):
            return CounterState(Total(up.whole + len(values), up.parts), down, origin)
        if tuple not in map(type, values):
            return CounterState(add_up(up, values), down, origin)
        ups: list[Any] = []
        downs: list[Any] = []
        for value in values:
            if type(value) is tuple and len(value) == 2 and value[1] is DOWN:
                downs.append(value[0])
            else:
                ups.append(value)
        return CounterState(add_up(up, ups), add_up(down, downs), origin)

    def _checked(self, value: Any) -> Any:
        is_down = _is_down(value)
        given = value[0] if is_down else value
        number = checked_number(given)
        if number < 0:
            raise ValueError(f"it is less than 0; use {'increment' if is_down else 'decrement'}()")
        if not is_down:
            return number
        return value if number is given else (number, DOWN)

    def _raw(self, value: Any) -> Any:
        return value[0] if _is_down(value) else value


def _is_down(value: Any) -> bool:
    return type(value) is tuple and len(value) == 2 and value[1] is DOWN


def add_up(total: Total, values: list[Any]) -> Total:
    """Return ``total`` with ``values`` added.

    Raises:
        ValueError: If they are not all plain finite numbers of 0 or more; or what a stranger's number raises.
    """
    if not values:
        return total
    if not {int, float}.issuperset(map(type, values)) or min(values) < 0:
        raise ValueError("not all are plain numbers of 0 or more")
    together = sum(values)
    if not together < LARGE:  # or one of them is not finite
        for value in values:
            checked_number(value)
    if type(together) is int:
        return Total(total.whole + together, total.parts)
    return total.add(values)
