"""Bounds at the door: numbers that are too large are dropped, counted and logged, as NaN is."""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tapes
from tapes.errors import BadValue
from tapes.metrics.folding import FULL
from tapes.sums import Total
from tapes.testing import ManualClock, strict

MAX = sys.float_info.max
STEP = 2**53
STEPS = [("counter", "increment"), ("counter", "decrement"), ("meter", "mark")]


def rejected(registry):
    registry.snapshot()  # finds what is bad
    series = registry.snapshot().get("tapes.rejected")
    return series.value if series else 0


def total(registry, name="m"):
    """Return what was added to a counter or a meter, in magnitude."""
    series = registry.snapshot().get(name)
    return abs(series.count if hasattr(series, "m1") else series.value)


def recorder(registry, kind, method, name="m"):
    return getattr(getattr(registry, kind)(name), method)


class Whole:
    """A whole number of another library."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value

    def __float__(self):
        return float(self.value)

    def __repr__(self):
        return f"Whole({self.value})"


@pytest.mark.parametrize("of_type", [int, float, Fraction, Decimal, Whole])
@pytest.mark.parametrize(("kind", "method"), STEPS)
def test_a_step_is_at_most_2_to_the_53(registry, kind, method, of_type):
    """A step or mark of 2^53 counts; any larger one is dropped and counted, whatever its type."""
    record = recorder(registry, kind, method)
    record(of_type(STEP))
    assert (total(registry), rejected(registry)) == (STEP, 0)
    for step in (STEP + 2, 2 * STEP, 2**63, 2**70, 10**300):
        record(of_type(step))
    assert (total(registry), rejected(registry)) == (STEP, 5)


@pytest.mark.parametrize(
    "too_large", [STEP + 1, Fraction(2 * STEP + 1, 2) + 1, Decimal(STEP) + 2, 10**400, 1e308, MAX]
)
@pytest.mark.parametrize(("kind", "method"), STEPS)
def test_a_step_that_is_too_large_takes_no_other_with_it(registry, caplog, kind, method, too_large):
    """The steps of its batch count, and the log says what was got and why it was dropped."""
    record = recorder(registry, kind, method)
    for step in (3, too_large, 4, too_large, 0.5):
        record(step)
    assert (total(registry), rejected(registry)) == (7.5, 2)
    (logged,) = caplog.records
    assert (
        f"for 'm': it is {'not a finite number' if too_large == 10**400 else 'more than 2^53'}"
        in logged.getMessage()
    )


@pytest.mark.parametrize(("kind", "method"), STEPS)
def test_a_total_reaches_2_to_the_63_by_no_number_of_steps(registry, kind, method):
    """1,023 steps of 2^53 count, and one of 2^53 - 1; then not even a step of 1 does, but 0 does."""
    record = recorder(registry, kind, method)
    for _ in range(1023):
        record(STEP)
    record(STEP - 1)
    assert (total(registry), rejected(registry)) == (2**63 - 1, 0)
    for _ in range(2 * FULL + 5):
        record(1)
    record(0)
    assert total(registry) == 2**63 - 1
    assert rejected(registry) == 2 * FULL + 5


@pytest.mark.parametrize(("kind", "method"), STEPS)
def test_what_still_fits_beside_a_step_that_does_not_counts(registry, caplog, kind, method):
    """In one batch, a step that would take the total to 2^63 is dropped, and smaller ones after it count."""
    record = recorder(registry, kind, method)
    for _ in range(1023):
        record(STEP)
    registry.snapshot()
    for step in (STEP, STEP - 10, 10, 9, 1):
        record(step)
    assert total(registry) == 2**63 - 1
    assert rejected(registry) == 3
    (logged,) = caplog.records
    assert "the total would reach 2^63" in logged.getMessage()


@pytest.mark.parametrize(("kind", "method"), STEPS)
def test_a_total_of_floats_stays_below_2_to_the_63(registry, kind, method):
    """Fractions count towards the bound, and the total that is shown is below it."""
    record = recorder(registry, kind, method)
    for _ in range(2000):
        record(float(STEP))
        record(0.5)
    assert 2**63 - 2 * STEP < total(registry) < 2**63
    assert rejected(registry) == 2000 - 1023


def test_increments_and_decrements_have_a_bound_each(registry):
    """A counter that went up and down by nearly 2^63 each still counts one more of either."""
    counter = registry.counter("m")
    for _ in range(1023):
        counter.increment(STEP)
        counter.decrement(STEP)
    counter.increment(5)
    counter.decrement(3)
    series = registry.snapshot().get("m")
    assert (series.value, series.total) == (2, 1023 * STEP + 5)
    assert rejected(registry) == 0


@pytest.mark.parametrize(("kind", "least"), [("histogram", -MAX), ("timer", 0.0)])
def test_a_distribution_takes_any_finite_float_whose_sum_is_one(registry, kind, least):
    """The largest float of either sign, also as a whole number; what would take the sum beyond is dropped."""
    update = recorder(registry, kind, "update")
    for value in (1.0, MAX, int(MAX), 1e308, 10**308, 2.0):
        update(value)
    series = registry.snapshot().get("m")
    assert (series.count, series.sum, series.lifetime.max) == (3, MAX, MAX)
    assert rejected(registry) == 3
    if least < 0:
        for value in (-MAX, -MAX, -1e308):
            update(value)
        series = registry.snapshot().get("m")
        assert (series.count, series.sum, series.lifetime.min) == (5, 3.0 - MAX, -MAX)
        assert rejected(registry) == 4


@pytest.mark.parametrize("kind", ["histogram", "timer"])
def test_twice_1e308_are_one_value_of_a_distribution(kind):
    """The second one is dropped and counted, in one batch or in two, and reads stay finite."""
    for reads_between in (False, True):
        registry = tapes.Registry()
        update = recorder(registry, kind, "update")
        update(1e308)
        if reads_between:
            registry.snapshot()
        update(1e308)
        fields = registry.snapshot().get("m").fields()
        assert (fields["count"], fields["sum"]) == (1, 1e308)
        assert all(math.isfinite(number) for number in fields.values())
        assert rejected(registry) == 1


@pytest.mark.parametrize(
    "value", [MAX, -MAX, 2**63, -(2**63), 10**300, Fraction(10**300), Decimal("-1e300"), STEP + 1]
)
def test_a_gauge_is_set_to_any_finite_double(registry, value):
    """A gauge has no other bound; whole numbers beyond 2^63 become floats."""
    gauge = registry.gauge("m")
    gauge.set(value)
    shown = registry.snapshot().get("m").value
    assert shown == (value if value == STEP + 1 else float(value))
    assert type(shown) is (int if value == STEP + 1 else float)
    assert rejected(registry) == 0


@pytest.mark.parametrize("step", [MAX, 10**308, Decimal("1e308")])
def test_a_gauge_moves_by_any_finite_double_to_another_one(registry, caplog, step):
    """A step that would take it beyond the range of floats is dropped, and those beside it count."""
    gauge = registry.gauge("m")
    gauge.set(MAX)
    gauge.decrement(step)
    assert registry.snapshot().get("m").value == MAX - float(step)
    gauge.set(MAX)
    for move in (gauge.increment, gauge.decrement, gauge.increment):
        move(step)
    assert registry.snapshot().get("m").value == MAX
    assert rejected(registry) == 1
    assert "the sum would be beyond the range of floats" in caplog.text


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), Fraction(10**400), Decimal("1e400"), math.inf, -math.inf, math.nan]
)
@pytest.mark.parametrize(
    ("kind", "method"),
    [*STEPS, ("histogram", "update"), ("timer", "update"), ("gauge", "set"), ("gauge", "increment")],
)
def test_a_magnitude_that_no_float_holds_is_a_bad_value(registry, caplog, kind, method, value):
    """Of every kind, of every type of number, and of either sign."""
    record = recorder(registry, kind, method)
    record(value)
    record(2)
    assert rejected(registry) == 1
    assert "it is not a finite number" in caplog.text
    assert "2" in str(registry.snapshot().get("m").fields())


@pytest.mark.parametrize(
    ("kind", "method", "values", "expected"),
    [
        ("counter", "increment", [STEP + 1], "got 9007199254740993, expected 2^53 at most"),
        ("meter", "mark", [1e300], "got 1e+300, expected 2^53 at most"),
        ("counter", "increment", [STEP] * 1024, "got 9007199254740992, expected a total below 2^63"),
        ("histogram", "update", [1e308, 1e308], "got 1e+308, expected a sum within the range of floats"),
        ("gauge", "increment", [MAX, MAX], "expected a sum within the range of floats"),
    ],
)
def test_in_a_strict_block_the_call_that_is_too_much_raises(kind, method, values, expected):
    """The calls before it count, and the error says what was got and what was expected."""
    with strict(tapes.Registry()) as registry:
        record = recorder(registry, kind, method)
        for value in values[:-1]:
            record(value)
        with pytest.raises(BadValue) as caught:
            record(values[-1])
        assert expected in str(caught.value)


def test_a_series_at_its_bound_is_logged_once(registry, caplog):
    """However many steps are dropped, by its step or by its total."""
    with caplog.at_level(logging.WARNING, "tapes"):
        for _ in range(1030):
            registry.counter("m").increment(STEP)
            registry.counter("m").increment(STEP + 1)
        assert rejected(registry) == 1030 + 7
    assert len(caplog.records) == 1


def test_threads_at_a_bound_lose_nothing_that_fits():
    """Eight threads take a counter to 2^63 - 1: each step counts or is counted as dropped."""
    registry = tapes.Registry()
    counter = registry.counter("m")

    def count():
        for _ in range(400):
            counter.increment(STEP - 1)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dropped = rejected(registry)
    assert total(registry) == (3200 - dropped) * (STEP - 1) == (2**63 - 1) // (STEP - 1) * (STEP - 1)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers here")
def test_a_signal_handler_at_a_bound_loses_nothing_that_fits():
    """A handler records too large steps into the counter that is being recorded, folded or read just now."""
    registry = tapes.Registry()
    counter = registry.counter("m")
    handled = []

    def handler(*_):
        counter.increment(2 * STEP)
        counter.increment(1)
        handled.append(1)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        recorded = 0
        while len(handled) < 50:
            for _ in range(100):
                counter.increment(2)
            recorded += 200
            registry.snapshot()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert total(registry) == recorded + len(handled)
    assert rejected(registry) == len(handled)


steps = st.one_of(
    st.integers(-2, 2**54),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([STEP, STEP + 1, STEP - 1, 10**400, 0, 1]),
    st.fractions(0, 2**54),
).filter(lambda step: step != 1 or type(step) is int)  # a batch of nothing but ones is counted as whole


@given(st.lists(steps, max_size=60), st.integers(0, 1023), st.booleans())
def test_each_step_counts_or_is_counted_as_dropped(recorded, start, reads):
    """A counter has exactly the sum of the steps that fit one after the other, however they are batched."""
    registry = tapes.Registry(clock=ManualClock(1000.0))
    counter = registry.counter("m")
    for _ in range(start):
        counter.increment(STEP)
    registry.snapshot()
    expected, dropped = Total(start * STEP), 0
    for step in recorded:
        counter.increment(step)
        if reads:
            registry.snapshot()
        try:
            number = int(step) if isinstance(step, int) else float(step)
            if not 0 <= number <= STEP:
                raise ValueError
        except (ValueError, OverflowError):
            dropped += 1
            continue
        after = expected.add([number])
        if after.value < 2**63:
            expected = after
        else:
            dropped += 1
    assert total(registry) == expected.value
    assert rejected(registry) == dropped


@given(st.lists(st.floats(-MAX, MAX), max_size=40))
def test_a_histogram_of_any_floats_stays_finite(recorded):
    """Each value counts or is counted as dropped, and every field is a finite number."""
    registry = tapes.Registry(clock=ManualClock(1000.0))
    for value in recorded:
        registry.histogram("m").update(value)
    registry.histogram("m")
    fields = registry.snapshot().get("m").fields()
    assert all(math.isfinite(number) for number in fields.values())
    assert fields["count"] + rejected(registry) == len(recorded)
