"""Meter: how often, as a count and as moving rates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from tapes.clock import TICK_SECONDS, tick_at
from tapes.ewma import Rates
from tapes.metrics.base import Metric
from tapes.metrics.counter import add_ones, add_up
from tapes.metrics.folding import FULL, merge_parts
from tapes.metrics.origin import NOWHERE, Origin
from tapes.naming import Labels
from tapes.snapshot import MeterSeries
from tapes.sums import MAX_STEP, Number, Total, exact_sum

__all__ = ["Meter", "MeterState", "Ticking"]


class MeterState(NamedTuple):
    """The exact count of events, and their rates."""

    count: Total  # type: ignore[assignment]  # shadows tuple.count, on purpose
    rates: Rates
    origin: Origin = NOWHERE

    @staticmethod
    def merge(states: Iterable[MeterState]) -> MeterState:
        return merge_parts(states)

    @property
    def is_empty(self) -> bool:
        return self.count == Total()

    @property
    def counted(self) -> Number:
        return self.count.value

    def series(self, labels: Labels, tick: int) -> MeterSeries:
        m1, m5, m15 = self.rates.read(tick)
        return MeterSeries(labels, self.count.value, m1, m5, m15, self.origin.created)


class Ticking(Metric):
    """A metric whose events belong to the tick in which they were recorded.

    The values in the buffer belong to ``_tick``, which ends at ``_tick_end``. The first recorder after that
    folds the buffer before it adds its own event, or counts it as of that tick if another thread folds.
    """

    __slots__ = ("_tick", "_tick_end")
    _tick: int
    _tick_end: float

    def _advance_tick(self, now: float) -> None:
        if now >= self._tick_end:
            self._set_tick(now)

    def _set_tick(self, now: float) -> None:
        self._tick = tick_at(now)
        self._tick_end = (self._tick + 1) * TICK_SECONDS


class Meter(Ticking):
    """Counts events and keeps their rates over the last 1, 5 and 15 minutes: logins, cache misses, messages.

    Rates are in events per second. Use a counter if your monitoring system computes rates itself, as
    Prometheus does, and a timer if the events have a duration.

    Source: the rates are Dropwizard's ``Meter`` to the digit, on a tick grid that all processes share.

    Example:
        >>> import tapes
        >>> registry = tapes.Registry()
        >>> registry.meter("cache.misses").mark()
        >>> registry.get_stats().cache.misses["count"]
        1
    """

    kind = "meter"
    _least, _most = 0, MAX_STEP
    __slots__ = ()

    def mark(self, n: Number = 1) -> None:
        """Count ``n`` events, from 0 to 2^53, as of now; a bad ``n`` is dropped, counted and logged.

        Cost: a clock read and an append. Never raises, never waits.
        """
        now = self._clock()
        if now >= self._tick_end:
            self._fold(now)
        buffer = self._buffer
        buffer.append(n)
        if len(buffer) >= FULL:
            self._fold(now)

    def _initial(self, now: float) -> MeterState:
        self._set_tick(now)
        return MeterState(Total(), Rates.started(self._tick), Origin.now())

    def _absorb(self, state: MeterState, values: list[Any]) -> MeterState:
        if values.count(1) == len(values):
            count = add_ones(state.count, len(values))
        else:
            count = add_up(state.count, values)
        if count.parts == state.count.parts:
            events: Number = count.whole - state.count.whole
        else:
            (events, *_) = exact_sum(values) or (0.0,)
        return MeterState(count, state.rates.mark(events, self._tick), state.origin)
