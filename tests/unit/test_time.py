"""Long silences, and clocks that do what clocks should not."""

from __future__ import annotations

import math

import pytest

import tapes
from tapes.testing import ManualClock

DAY = 86_400
YEAR = 365 * DAY


def recorded(registry):
    """One of each kind, with something in it."""
    registry.counter("c").increment(3)
    registry.meter("m").mark(300)
    registry.gauge("g").set(7)
    for value in (1, 2, 3):
        registry.histogram("h").update(value)
        registry.timer("t").update(value)
    return registry


@pytest.mark.parametrize("silence", [DAY, 10 * YEAR])
def test_after_a_long_silence_what_was_last_known_stands_and_rates_are_zero(registry, clock, silence):
    """After a long time without events distributions keep their last values, and rates are zero."""
    before = recorded(registry).get_stats()
    clock.advance(silence)
    stats = registry.get_stats()
    assert stats.h == before.h
    assert (stats.t.q50, stats.t.mean, stats.t["count"], stats.t.sum) == (2.0, 2.0, 3, 6.0)
    assert (stats.c.value, stats.g.value, stats.m["count"]) == (3, 7, 300)
    for rate in (stats.m.m1, stats.m.m5, stats.m.m15, stats.t.m1):
        assert 0.0 <= rate < 1e-30


def test_after_ten_idle_years_the_next_event_counts_as_any_other(registry, clock):
    """After ten idle years the next event is recorded as usual, without a loop over ticks or an old rate."""
    recorded(registry).get_stats()
    clock.advance(10 * YEAR)
    registry.meter("m").mark(300)
    registry.histogram("h").update(50)
    clock.advance(5)
    stats = registry.get_stats()
    assert stats.m["count"] == 600
    assert stats.m.m1 == pytest.approx(300 / 5 * (1 - math.exp(-5 / 60)), rel=1e-12)
    assert (stats.h.mean, stats.h.min, stats.h.max, stats.h.q50) == (50.0, 50.0, 50.0, 50.0)
    assert (stats.h["count"], stats.h.sum) == (4, 56.0)


@pytest.mark.parametrize("jump", [-3.0, -DAY, -1e9, DAY, 1e12])
def test_a_clock_that_jumps_loses_no_event(jump):
    """If the clock jumps back or ahead, counts and sums are exact and rates finite and not negative."""
    times = [1e6, 1e6 + jump, 1e6 + 7, 1e6 + jump / 2, 1e6 + 20]
    now = [times[0]]
    registry = tapes.Registry(clock=lambda: now[0])
    for number, moment in enumerate(times, 1):
        now[0] = moment
        registry.meter("m").mark(10)
        registry.histogram("h").update(number)
        registry.timer("t").update(number)
        with registry.timer("t").time():
            pass
        stats = registry.get_stats()
        assert stats.m["count"] == 10 * number
        assert stats.h.sum == sum(range(number + 1))
        assert stats.t["count"] == 2 * number
        for rate in (stats.m.m1, stats.m.m5, stats.m.m15, stats.t.m1):
            assert 0.0 <= rate <= 10 * number
        assert 1.0 <= stats.h.q50 <= number


def test_events_belong_to_their_tick_on_the_clocks_own_grid():
    """Meters made at different moments tick at the same multiples of five seconds."""
    clock = ManualClock(1002.0)
    registry = tapes.Registry(clock=clock)
    early = registry.meter("early")
    early.mark(10)
    clock.advance(2.5)  # 1004.5
    registry.meter("late").mark(10)
    assert registry.get_stats().early.m1 == registry.get_stats().late.m1 == 0.0
    clock.advance(0.5)  # 1005.0
    assert registry.get_stats().early.m1 == registry.get_stats().late.m1 == 2.0
