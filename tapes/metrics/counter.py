"""Counter: how many things have happened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from tapes.metrics.base import DOWN, Metric
from tapes.metrics.folding import FULL, merge_parts
from tapes.metrics.origin import NOWHERE, Origin
from tapes.metrics.sifting import NEGATIVE, TOO_LARGE, TOTAL_TOO_LARGE
from tapes.naming import Labels
from tapes.snapshot import CounterSeries
from tapes.sums import LIMIT, MAX_STEP, Number, Total

__all__ = ["Counter", "CounterState", "add_ones", "add_up"]


class CounterState(NamedTuple):
    """What was added and what was taken away, apart, so that the first never falls."""

    up: Total = Total()
    down: Total = Total()
    origin: Origin = NOWHERE

    @staticmethod
    def merge(states: Iterable[CounterState]) -> CounterState:
        return merge_parts(states)

    @property
    def is_empty(self) -> bool:
        return self.up == self.down == Total()

    @property
    def counted(self) -> Number:
        down = Total(-self.down.whole, tuple(-part for part in self.down.parts))
        return Total.merge((self.up, down)).value

    def series(self, labels: Labels, tick: int) -> CounterSeries:
        up, down = self.up.value, self.down.value
        return CounterSeries(labels, self.counted if down else up, up, bool(down), self.origin.created)


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
    _least, _most = 0, MAX_STEP
    __slots__ = ()

    def increment(self, n: Number = 1) -> None:
        """Add ``n``, from 0 to 2^53; any other ``n`` is a bad value: dropped, counted and logged.

        Cost: an append. Never raises, never waits.
        """
        buffer = self._buffer
        buffer.append(n)
        if len(buffer) >= FULL:
            self._fold(0.0)

    def decrement(self, n: Number = 1) -> None:
        """Take ``n`` away, from 0 to 2^53; any other ``n`` is a bad value: dropped, counted and logged.

        Cost: an append. Never raises, never waits.
        """
        buffer = self._buffer
        buffer.append((n, DOWN))
        if len(buffer) >= FULL:
            self._fold(0.0)

    def _initial(self, now: float) -> CounterState:
        return CounterState(origin=Origin.now())

    def _absorb(self, state: CounterState, values: list[Any]) -> CounterState:
        up, down, origin = state
        if values.count(1) == len(values):
            return CounterState(add_ones(up, len(values)), down, origin)
        if tuple not in map(type, values):
            return CounterState(add_up(up, values), down, origin)
        ups = [value for value in values if not _is_down(value)]
        downs = [value[0] for value in values if _is_down(value)]
        return CounterState(add_up(up, ups), add_up(down, downs), origin)

    def _checked(self, value: Any) -> Any:
        given, is_down = self._raw(value), _is_down(value)
        try:
            number = super()._checked(given)
        except ValueError as error:
            if str(error) != NEGATIVE:
                raise
            raise ValueError(f"{NEGATIVE}; use {'increment' if is_down else 'decrement'}()") from None
        return (number, DOWN) if is_down and number is not given else value if is_down else number

    def _raw(self, value: Any) -> Any:
        return value[0] if _is_down(value) else value


def _is_down(value: Any) -> bool:
    return type(value) is tuple and len(value) == 2 and value[1] is DOWN


def add_ones(total: Total, n: int) -> Total:
    """Return ``total`` with ``n`` added; raises as `add_up`."""
    whole, parts = total
    whole += n
    return Total(whole, ()) if not parts and whole < LIMIT else _bounded(Total(whole, parts))


def add_up(total: Total, values: list[Any]) -> Total:
    """Return ``total`` with ``values`` added.

    Raises `ValueError` if they are not all plain numbers from 0 to `MAX_STEP`, or if the total would reach
    `LIMIT`; or what a foreign number raises.
    """
    if not values:
        return total
    if not {int, float}.issuperset(map(type, values)) or min(values) < 0:
        raise ValueError("not all are plain numbers of 0 or more")
    together = sum(values)
    if not together <= MAX_STEP and not all(value <= MAX_STEP for value in values):  # nor is NaN
        raise ValueError(TOO_LARGE)
    if type(together) is int:
        return _bounded(Total(total.whole + together, total.parts))
    return _bounded(total.add(values))


def _bounded(total: Total) -> Total:
    whole, parts = total
    if (whole + parts[0] if parts else whole) >= LIMIT:
        raise ValueError(TOTAL_TOO_LARGE)
    return total
