"""How a process notices, at no cost, that it begins to record.

Theory. A metric has one list of pending values, and recording appends to what is in ``_buffer``. As a rule
that is the same list. In a metric that *sleeps* it is a `SleepingBuffer`: an empty list whose ``append``
appends to the list of pending values, calls ``wake``, and puts that list in its own place if ``wake``
agrees. So the first value recorded wakes the metric, every later one finds a plain list, and no recording
call has anything to check.

The list of pending values stays the same one throughout. A thread that still holds the sleeping buffer, or
one that held the plain list when the metric was put to sleep, appends to that list too: no value is lost,
and a metric may be put to sleep at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["SleepingBuffer"]


class SleepingBuffer(list[Any]):
    """The buffer of a metric that sleeps; always empty.

    Args:
        metric: The metric that wakes with the first value.
        wake: Called after each value that comes here; returns whether the metric is to stay awake.
        full: How many pending values are folded.
    """

    __slots__ = ("_full", "_metric", "_pending", "_wake")

    def __init__(self, metric: Any, wake: Callable[[], bool], full: int) -> None:
        super().__init__()
        self._full = full
        self._metric = metric
        self._pending: list[Any] = metric._pending
        self._wake = wake

    def append(self, value: Any) -> None:
        """Append ``value`` to what is pending, and wake the metric, unless it is to sleep on."""
        self._pending.append(value)
        self.rouse()
        if len(self._pending) >= self._full:  # who records sees an empty list
            self._metric._fold(self._metric._clock())

    def rouse(self) -> None:
        """Wake the metric, unless it is to sleep on."""
        if self._wake() and self._metric._buffer is self:
            self._metric._buffer = self._pending
