"""Timer: how often and how long."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple

from tapes.errors import InvalidCall
from tapes.ewma import Rates
from tapes.metrics.folding import FULL, merge_parts
from tapes.metrics.meter import Ticking
from tapes.metrics.origin import NOWHERE, Origin
from tapes.metrics.timing import Timing
from tapes.naming import Labels
from tapes.sketch import EMPTY, Sketch
from tapes.snapshot import TimerSeries
from tapes.sums import Number

__all__ = ["Timer", "TimerState", "Timing"]


class TimerState(NamedTuple):
    """The sketch of all durations in seconds, and the rates of their ends."""

    sketch: Sketch
    rates: Rates
    origin: Origin = NOWHERE

    @staticmethod
    def merge(states: Iterable[TimerState]) -> TimerState:
        return merge_parts(states)

    @property
    def is_empty(self) -> bool:
        return self.sketch.count == 0

    @property
    def counted(self) -> Number:
        return self.sketch.count

    def series(self, labels: Labels, tick: int) -> TimerSeries:
        m1, m5, m15 = self.rates.read(tick)
        return TimerSeries(labels, m1, m5, m15, self.sketch.lifetime, self.sketch.recent, self.origin.created)


class Timer(Ticking):
    """Shows how long things take, in seconds, and how often they happen: requests, queries, jobs.

    Use a histogram for values that are not durations, and a meter if only the rate matters.

    Example:
        >>> import tapes
        >>> registry = tapes.Registry()
        >>> with registry.timer("page.render").time():
        ...     pass
        >>> registry.get_stats().page.render["count"]
        1
    """

    kind = "timer"
    _least = 0
    __slots__ = ()

    def time(self, function: None = None) -> Timing:
        """Return a context manager, also usable as a decorator, that records how long its block took.

        The duration is recorded when the block ends, even by an exception. A decorated function is timed for
        each call, including nested and recursive ones. Coroutines, generators and asynchronous generators are
        timed from their first step to their end: exhaustion, ``close()`` or an exception. A call that returns
        one of these, a future or another awaitable is timed until that has ended. Each block needs a
        ``time()`` of its own. ``async with`` works too.
        """
        if function is not None:
            expected, remedy = "parentheses: @timer.time()", "write @timer.time(), not @timer.time"
            raise InvalidCall("time() takes no argument", got=function, expected=expected, remedy=remedy)
        timing = Timing()
        timing._timer = self
        return timing

    def update(self, seconds: Number | timedelta) -> None:
        """Add a duration, zero or more seconds or a ``timedelta``; a bad one is dropped, counted and logged.

        Cost: a clock read and an append. Never raises, never waits.
        """
        self._record(seconds, self._clock())

    def _record(self, seconds: Number | timedelta, now: float) -> None:
        """Add a duration that ended at ``now`` on this timer's clock; for callers that have just read it."""
        if now >= self._tick_end:
            self._fold(now)
        buffer = self._buffer
        buffer.append(seconds)
        if len(buffer) >= FULL:
            self._fold(now)

    def _initial(self, now: float) -> TimerState:
        self._set_tick(now)
        return TimerState(EMPTY, Rates.started(self._tick), Origin.now())

    def _is_compacted(self) -> bool:
        compacted: bool = self._state.sketch.is_compacted
        return compacted

    def _compacted(self) -> TimerState:
        state: TimerState = self._state
        if state.sketch.is_compacted:
            return state
        return TimerState(state.sketch.compacted(), state.rates, state.origin)

    def _checked(self, value: Any) -> Any:
        return super()._checked(value.total_seconds() if isinstance(value, timedelta) else value)

    def _absorb(self, state: TimerState, values: list[Any]) -> TimerState:
        sketch = state.sketch.fold(values, self._tick, self._least)
        return TimerState(sketch, state.rates.mark(len(values), self._tick), state.origin)
