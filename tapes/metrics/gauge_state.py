"""The state of a gauge, and how the gauges of several workers become one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from tapes.naming import Labels
from tapes.snapshot import GaugeSeries
from tapes.sums import Number, Total

MergeMode = Literal["sum", "max", "min", "mean", "last", "each"]


def _sum(values: list[Number]) -> Number:
    return Total().add(values).value


_MERGED: dict[str, Callable[[list[Number]], Number]] = {
    "sum": _sum,
    "max": max,
    "min": min,
    "mean": lambda values: _sum(values) / len(values),
    "last": lambda values: values[-1],
    "each": _sum,
}
"""What becomes of the values of all workers, of which the newest comes last.

``sum``, ``max``, ``min``, ``mean``: the sum, maximum, minimum and mean over live workers. An exited worker
contributes nothing.
``last``: the value that was set last. It stays after the worker that set it has exited, until another worker
sets one.
``each``: one series for each live worker, labelled ``worker``. The series of an exited worker goes. Several
gauges of one worker are added.
"""
MERGE_MODES = tuple(_MERGED)


class GaugeState(NamedTuple):
    """The value of a gauge, and when it was set.

    Attributes:
        value: ``None`` if there is none, because its producer failed.
        since: When the value was set or produced, by the host's monotonic clock; ``None`` if it never was, so
            that it doesn't count as a minimum. In mode ``last`` the newest value outlives its worker.
    """

    value: Number | None
    mode: str
    since: float | None

    @staticmethod
    def merge(states: Iterable[GaugeState]) -> GaugeState:
        """Return the gauge of all workers, by the mode of the newest state."""
        every = sorted(states, key=_age_key)
        newest = every[-1]
        values = [state.value for state in every if state.value is not None]
        was_set = [state.value for state in every if state.value is not None and state.since is not None]
        if was_set:
            return GaugeState(_MERGED[newest.mode](was_set), newest.mode, newest.since)
        return GaugeState(values[-1] if values else None, newest.mode, newest.since)

    @staticmethod
    def add(states: Iterable[GaugeState]) -> GaugeState:
        """Return the sum of gauges, whatever their mode, as of the newest."""
        every = list(states)
        newest = max(every, key=_age_key)
        values = [state.value for state in every if state.value is not None]
        return GaugeState(_sum(values) if values else None, newest.mode, newest.since)

    @property
    def is_empty(self) -> bool:
        return self.since is None

    def series(self, labels: Labels, tick: int) -> GaugeSeries | None:
        return None if self.value is None else GaugeSeries(labels, self.value)


def _age_key(state: GaugeState) -> float:
    """Order states by when they were set; those that never were come first."""
    return -1.0 if state.since is None else state.since
