"""Time: one monotonic clock and one grid of ticks for all processes of a host.

Rates of several processes can be added exactly only if all of them tick at the same moments. The host's
monotonic clock has the same origin in every process. So its multiples of five seconds are a grid that all
processes share without any communication: tick ``k`` is the moment ``5·k``, and an event at time ``t``
belongs to the interval that tick ``floor(t / 5)`` opens.

Source: the interval is Dropwizard's (``Meter.TICK_INTERVAL``); the common grid is ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""A zero-argument callable that returns seconds and never goes backwards."""

TICK_SECONDS = 5.0

monotonic: Clock = time.monotonic

wall: Clock = time.time
"""Seconds since 1970; used only to publish when something began."""


def tick_at(now_seconds: float) -> int:
    """Return the index of the last tick at or before ``now_seconds``."""
    return int(now_seconds // TICK_SECONDS)
