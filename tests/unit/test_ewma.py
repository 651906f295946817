"""tapes.ewma: ticks and merging."""

from __future__ import annotations

import pytest

from tapes.ewma import Rates


def test_before_the_first_tick_rates_are_zero():
    """A rate is known after a tick, not before."""
    assert Rates.started(7).mark(100, 7).read(7) == (0.0, 0.0, 0.0)


def test_the_first_tick_sets_the_rate():
    """3 events in the first 5 s are 0.6 a second, over every span."""
    assert Rates.started(0).mark(3, 0).read(1) == pytest.approx((0.6, 0.6, 0.6))


def test_an_idle_gap_costs_one_step_and_gives_the_same():
    """One advance over n ticks is n advances over one."""
    state = Rates.started(0).mark(3, 0).mark(8, 4)
    step = state
    for tick in range(5, 500):
        step = step.advance(tick)
    assert state.read(499) == pytest.approx(step.read(499), rel=1e-12)


def test_ten_idle_years_end_at_zero():
    """After ten idle years rates are zero, without an overflow or NaN."""
    assert Rates.started(0).mark(3, 0).read(63_000_000) == (0.0, 0.0, 0.0)


def test_a_clock_that_steps_back_loses_nothing():
    """Events of an earlier tick count in the newest one."""
    state = Rates.started(10).mark(3, 12).mark(2, 11)
    assert (state.tick, state.pending) == (12, 5)


def test_staggered_workers_merge_to_the_rates_of_one_meter_that_saw_all():
    """Started at different ticks, marked at different times, read together: within 1e-12."""
    events = [(0, 0, 3), (0, 1, 5), (1, 1, 7), (0, 4, 1), (2, 6, 11), (1, 9, 2)]
    one = Rates.started(0)
    workers = {worker: Rates.started(first) for worker, first in ((0, 0), (1, 1), (2, 6))}
    for worker, tick, count in events:
        one = one.mark(count, tick)
        workers[worker] = workers[worker].mark(count, tick)
    for tick in range(10, 40):
        assert Rates.merge(workers.values()).read(tick) == pytest.approx(one.read(tick), rel=1e-12)
