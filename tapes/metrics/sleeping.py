"""Noticing, at no cost, that a process begins to record.

Theory. A metric has one list of pending values, and recording appends to ``_buffer``. Usually that is the
same list. In a metric that *sleeps* it is a `SleepingBuffer`: an empty list whose ``append`` appends to the
list of pending values, calls ``wake``, and replaces itself by that list if ``wake`` returns true. So the
first value recorded wakes the metric, later ones go to a plain list, and no recording call checks anything.

The list of pending values is always the same one. A thread that still has the sleeping buffer, or the plain
list, appends to that list too. So no value is lost, and a metric may be put to sleep at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class SleepingBuffer(list[Any]):
    """The buffer of a metric that sleeps; always empty.

    It calls ``wake`` after each value, which returns whether the metric is to stay awake.
    """

    __slots__ = ("_full", "_metric", "_pending", "_wake")

    def __init__(self, metric: Any, wake: Callable[[], bool], full: int) -> None:
        super().__init__()
        self._full = full
        self._metric = metric
        self._pending: list[Any] = metric._pending
        self._wake = wake

    def append(self, value: Any) -> None:
        self._pending.append(value)
        self.rouse()
        if len(self._pending) >= self._full:  # the recorder sees an empty list
            self._metric._fold(self._metric._clock())

    def rouse(self) -> None:
        """Wake the metric unless it is to stay asleep."""
        if self._wake() and self._metric._buffer is self:
            self._metric._buffer = self._pending
