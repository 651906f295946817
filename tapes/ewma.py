"""Exponentially weighted rates that can be added.

Theory. Dropwizard's EWMA ticks every 5 s; a tick moves the rate towards the events per second since the
last tick, ``r += α·(c/5 - r)`` with ``α = 1 - e^(-5/60/m)`` for m minutes, except that the first tick sets
``r = c/5``. That exception makes the rule non-linear: the rates of two workers do not add up to the rate of
one that saw both streams. So the exception is kept apart. A state has the *linear* EWMA from zero, ``L``,
the first tick ``f`` after the meter was made, and that tick's count ``c₀``. The first tick's rule gives
``c₀/5`` where the linear one gives ``α·c₀/5``; the difference ``(1-α)·c₀/5`` then decays like everything
else. Hence at tick ``n``

    rate(n) = L(n) + (1-α)^(n - f + 1) · c₀ / 5

is Dropwizard's number to the digit. Over many states ``L`` is a sum, and a single meter that had seen all
streams would have been made with the first of them: only states with the earliest ``f`` add their ``c₀``.
All processes of a host tick on one grid (`tapes.clock`), so nothing else has to agree.

The common grid has a price. The first tick may come sooner than 5 s after the meter was made, and its count
is still taken for that of 5 s. So a rate may begin too low; the error fades as the average does.

Between ticks nothing happens. A state has its tick and the events ``pending`` since then. Advancing by n
ticks is one tick and a power, however long the gap.

Source: Dropwizard metrics, ``EWMA`` and ``Meter``; UNIX load averages before them.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import exp
from typing import NamedTuple

from tapes.clock import TICK_SECONDS

MINUTES = (1, 5, 15)
_KEEP_EXPONENTS = tuple(-TICK_SECONDS / 60.0 / minutes for minutes in MINUTES)


class Rates(NamedTuple):
    """The mergeable state of the three moving rates; see the module for its theory.

    Attributes:
        tick, pending: The last tick that was applied, and the events since.
        linear: The linear EWMA from zero over 1, 5 and 15 minutes, in events per second.
        first, first_count: The first tick after the meter was made, and its events; 0 before it.
    """

    tick: int
    pending: float
    linear: tuple[float, ...]
    first: int
    first_count: float

    @classmethod
    def started(cls, tick: int) -> Rates:
        """Return the state of a meter made in the interval that ``tick`` opened."""
        return cls(tick, 0.0, (0.0, 0.0, 0.0), tick + 1, 0.0)

    def mark(self, events: float, tick: int) -> Rates:
        """Return the state with ``events`` added in the interval that ``tick`` opened."""
        now = self.advance(tick)
        return Rates(now.tick, now.pending + events, now.linear, now.first, now.first_count)

    def advance(self, tick: int) -> Rates:
        """Return the state as of ``tick``; itself if ``tick`` is not later."""
        idle = tick - self.tick - 1
        if idle < 0:
            return self
        per_second = self.pending / TICK_SECONDS
        linear = []
        for rate, keep in zip(self.linear, _KEEP_EXPONENTS):
            rate += (1.0 - exp(keep)) * (per_second - rate)
            linear.append(rate * exp(keep * idle))
        first_count = self.pending if self.tick + 1 == self.first else self.first_count
        return Rates(tick, 0.0, tuple(linear), self.first, first_count)

    def read(self, tick: int) -> tuple[float, ...]:
        """Return the rates over 1, 5 and 15 minutes as of ``tick``, in events per second."""
        now = self.advance(tick)
        since_first = now.tick - now.first
        if since_first < 0:
            return (0.0, 0.0, 0.0)
        head = now.first_count / TICK_SECONDS
        return tuple(
            rate + exp(keep * (since_first + 1)) * head for rate, keep in zip(now.linear, _KEEP_EXPONENTS)
        )

    @staticmethod
    def merge(states: Iterable[Rates]) -> Rates:
        """Return the state of one meter that saw all streams; at least one is needed."""
        every = list(states)
        tick = max(state.tick for state in every)
        every = [state.advance(tick) for state in every]
        first = min(state.first for state in every)
        return Rates(
            tick,
            sum(state.pending for state in every),
            tuple(map(sum, zip(*(state.linear for state in every)))),
            first,
            sum(state.first_count for state in every if state.first == first),
        )
