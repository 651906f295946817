"""Histogram: how large, as a distribution."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from tapes.clock import tick_at
from tapes.metrics.base import Metric
from tapes.metrics.folding import FULL, merge_parts
from tapes.metrics.origin import NOWHERE, Origin
from tapes.naming import Labels
from tapes.sketch import EMPTY, Sketch
from tapes.snapshot import HistogramSeries
from tapes.sums import Number

__all__ = ["Histogram", "HistogramState"]


class HistogramState(NamedTuple):
    """The sketch of all values."""

    sketch: Sketch = EMPTY
    origin: Origin = NOWHERE

    @staticmethod
    def merge(states: Iterable[HistogramState]) -> HistogramState:
        return merge_parts(states)

    @property
    def is_empty(self) -> bool:
        return self.sketch.count == 0

    @property
    def counted(self) -> Number:
        return self.sketch.count

    def series(self, labels: Labels, tick: int) -> HistogramSeries:
        return HistogramSeries(labels, self.sketch.lifetime, self.sketch.recent, self.origin.created)


class Histogram(Metric):
    """Shows how values are distributed: response sizes, rows per query, batch lengths.

    Use a timer for durations, and a gauge if only the current value matters.
    Quantiles are within 0.4 % for magnitudes from 1e-30 to 1e30; whole numbers up to 256 are exact.

    Example:
        >>> import tapes
        >>> registry = tapes.Registry()
        >>> for size in range(1, 101):
        ...     registry.histogram("mail.size").update(size)
        >>> registry.get_stats().mail.size.q95
        95.0
    """

    kind = "histogram"
    __slots__ = ()

    def update(self, value: Number) -> None:
        """Add ``value``, any number that a float can hold; a bad one is dropped, counted and logged.

        Cost: an append; `Sketch.fold` for what folding adds. Never raises, never waits.
        In the recent view a value counts as of its fold.
        """
        buffer = self._buffer
        buffer.append(value)
        if len(buffer) >= FULL:
            self._fold(0.0)

    def _initial(self, now: float) -> HistogramState:
        return HistogramState(EMPTY, Origin.now())

    def _is_compacted(self) -> bool:
        compacted: bool = self._state.sketch.is_compacted
        return compacted

    def _compacted(self) -> HistogramState:
        state = self._state
        return state if state.sketch.is_compacted else HistogramState(state.sketch.compacted(), state.origin)

    def _absorb(self, state: HistogramState, values: list[Any]) -> HistogramState:
        return HistogramState(state.sketch.fold(values, tick_at(self._clock())), state.origin)
