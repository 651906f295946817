"""What metrics record, and what they drop."""

from __future__ import annotations

import asyncio
import decimal
import fractions
import inspect
import logging
import math
import sys
import threading

import pytest

import tapes
from tapes.metrics.folding import Folding

BAD = [math.nan, math.inf, -math.inf, "5", b"5", None, [1], 1j, 10**400, object()]


def rejected(registry: tapes.Registry) -> int:
    series = registry.snapshot().get("tapes.rejected")
    return series.value if series else 0


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: "an object" if type(bad) is object else repr(bad))
@pytest.mark.parametrize("kind", ["counter", "meter", "histogram", "timer", "gauge"])
def test_a_bad_value_is_dropped_counted_and_logged_once(registry, caplog, kind, bad):
    """A bad value raises nothing, is counted, is logged once, and does not spoil the values beside it."""
    metric = getattr(registry, kind)("m", l="x")
    record = {"counter": "increment", "meter": "mark", "gauge": "set"}.get(kind, "update")
    with caplog.at_level(logging.WARNING, "tapes"):
        for value in (2, bad, 3, bad):
            getattr(metric, record)(value)
        series = registry.snapshot().get("m", l="x")
    assert rejected(registry) == 2
    assert len(caplog.records) == 1
    assert "'m'" in caplog.text
    if kind in ("counter", "gauge"):
        assert series.value == (5 if kind == "counter" else 3)
    elif kind == "meter":
        assert series.count == 5
    else:
        assert (series.count, series.sum, series.lifetime.min) == (2, 5.0, 2.0)


class Whole:
    """A whole number of a library, which is no int but may stand for one."""

    def __index__(self):
        return 7

    def __float__(self):
        return 7.0

    def __lt__(self, other):
        return other > 7

    def __add__(self, other):
        return self

    __radd__ = __add__


@pytest.mark.parametrize("number", [True, Whole(), decimal.Decimal("2.5"), fractions.Fraction(1, 4)])
def test_whatever_is_a_number_counts(registry, number):
    """Numbers of other types than int and float count, and are recorded as one of these."""
    registry.counter("c").increment(number)
    registry.meter("m").mark(number)
    registry.histogram("h").update(number)
    registry.gauge("g").set(number)
    snapshot = registry.snapshot()
    assert snapshot.get("c").value == snapshot.get("m").count == snapshot.get("g").value == float(number)
    assert snapshot.get("h").sum == float(number)
    kind = int if hasattr(number, "__index__") else float
    assert {type(snapshot.get("c").value), type(snapshot.get("g").value)} == {kind}
    assert rejected(registry) == 0


def test_a_counter_counts_up_and_down(registry):
    """A counter's value is the difference of what was added and taken away; what was added is kept apart."""
    counter = registry.counter("c")
    counter.increment()
    counter.increment(4)
    counter.decrement()
    counter.decrement(3)
    series = registry.snapshot().get("c")
    assert (series.value, series.total, series.decremented) == (1, 5, True)
    assert type(series.value) is int


@pytest.mark.parametrize("bad", [[-1], [-0.5, -1], [math.nan], ["x", -1e300, math.inf]], ids=repr)
@pytest.mark.parametrize("good", [[], [0], [0.0, 0.25], [0.5, 2]], ids=repr)
@pytest.mark.parametrize(
    ("kind", "record"),
    [("counter", "increment"), ("counter", "decrement"), ("meter", "mark"), ("timer", "update")],
)
def test_what_is_below_zero_is_a_bad_value_and_zero_is_not(registry, kind, record, good, bad):
    """Each negative step, event or duration of a batch is one bad value; zero is none."""
    metric = getattr(registry, kind)("m")
    for _ in range(2):
        for number in (*bad, *good):
            getattr(metric, record)(number)
        series = registry.snapshot().get("m")
    assert rejected(registry) == 2 * len(bad)
    if kind == "timer":
        assert (series.count, series.sum) == (2 * len(good), 2 * sum(good))
    else:
        total = series.count if kind == "meter" else series.value
        assert total == (-2 if record == "decrement" else 2) * sum(good)


@pytest.mark.parametrize("kind", ["counter", "meter", "histogram", "timer", "gauge"])
def test_a_state_is_the_same_object_while_nothing_changes(registry, kind):
    """collect() returns the same object while nothing changes, so a worker need not send it again."""
    metric = getattr(registry, kind)("m")
    getattr(metric, {"counter": "increment", "meter": "mark", "gauge": "set"}.get(kind, "update"))(2)
    assert metric.collect() is metric.collect()


def test_fractions_of_a_counter_add_up_exactly(registry):
    """Ten increments of a tenth are exactly one."""
    for _ in range(10):
        registry.counter("c").increment(0.1)
    assert registry.get_stats().c.value == 1.0


def test_a_meters_events_belong_to_the_tick_of_their_mark(registry, clock):
    """Rates are the same whether a meter is read at every tick or only minutes later."""
    meter = registry.meter("m")
    meter.mark(3)
    clock.advance(5)
    assert registry.snapshot().get("m").m1 == pytest.approx(0.6)
    clock.advance(300)
    meter.mark(7)
    clock.advance(60)
    late = registry.snapshot().get("m")
    assert late.count == 10
    alpha = 1 - math.exp(-5 / 60)
    expected = 0.6 * math.exp(-6) + 7 / 5 * alpha * math.exp(-11 / 12)
    assert late.m1 == pytest.approx(expected, rel=1e-12)


def test_a_timer_times_blocks_that_raise(registry, clock):
    """The duration of a block that raises is recorded, and the exception passes through."""
    timer = registry.timer("t")

    def fail():
        clock.advance(0.25)
        raise KeyError

    with pytest.raises(KeyError), timer.time():
        fail()
    assert registry.snapshot().get("t").sum == 0.25


def test_timers_nest_and_recurse(registry, clock):
    """Each of several recursive calls has a measurement of its own."""
    timer = registry.timer("t")

    @timer.time()
    def countdown(n):
        clock.advance(1)
        if n:
            countdown(n - 1)

    countdown(2)
    assert registry.snapshot().get("t").lifetime.bins() == [(1.0, 1), (2.0, 1), (3.0, 1)]
    assert countdown.__name__ == "countdown"


def test_a_coroutine_is_timed_to_its_end(registry, clock):
    """A decorated coroutine function is timed to the end of its coroutine, not only to its creation."""

    @registry.timer("t").time()
    async def work():
        clock.advance(2)
        await asyncio.sleep(0)
        clock.advance(3)

    asyncio.run(work())
    assert registry.snapshot().get("t").sum == 5.0


def test_the_recent_mean_and_the_lifetime_sum_are_told_apart(registry, clock):
    """The mean is recent; sum and count are since the start."""
    histogram = registry.histogram("h")
    histogram.update(100)
    registry.get_stats()
    clock.advance(3600)
    histogram.update(2)
    stats = registry.get_stats().h
    assert (stats["count"], stats.sum) == (2, 102.0)
    assert stats.mean == pytest.approx(2.0)


@pytest.mark.parametrize("kind", ["counter", "histogram", "timer", "meter"])
def test_no_event_is_lost_under_threads(kind):
    """Eight threads at a switch interval of 1 µs beside a reader: exact, and every cut consistent."""
    registry = tapes.Registry()
    metric = getattr(registry, kind)("m")
    record = {"counter": "increment", "meter": "mark"}.get(kind, "update")
    each, threads = 5_000, 8
    torn = []
    done = threading.Event()

    def write():
        call = getattr(metric, record)
        for _ in range(each):
            call(2)

    def read():
        while not done.is_set():
            series = registry.snapshot().get("m")
            if kind in ("histogram", "timer"):
                bins = sum(weight for _, weight in series.lifetime.bins())
                if not bins == series.count == series.sum / 2:
                    torn.append((bins, series.count, series.sum))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        writers = [threading.Thread(target=write) for _ in range(threads)]
        reader = threading.Thread(target=read)
        for thread in (*writers, reader):
            thread.start()
        for thread in writers:
            thread.join()
        done.set()
        reader.join()
    finally:
        sys.setswitchinterval(interval)
    series = registry.snapshot().get("m")
    total = series.value if kind == "counter" else series.count
    assert total == each * threads * (2 if kind in ("counter", "meter") else 1)
    assert torn == []


def test_bad_values_under_threads_are_all_counted():
    """Eight threads record only bad values while others read: every one is counted, and nothing raises."""
    registry = tapes.Registry()
    histogram = registry.histogram("h")
    failures = []

    def write():
        try:
            for _ in range(500):
                histogram.update(math.nan)
                registry.snapshot()
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=write) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    assert rejected(registry) == 4000


class Raiser:
    """A number whose conversions raise unusual exceptions."""

    def __float__(self):
        raise RuntimeError("detached")

    __index__ = __lt__ = __gt__ = __add__ = __radd__ = __float__

    def __repr__(self):  # without an address: tests are named the same in every process
        return "Raiser()"


@pytest.mark.parametrize("stranger", [Raiser(), (), (5,), (9, "x"), {}], ids=repr)
@pytest.mark.parametrize("kind", ["counter", "meter", "histogram", "timer", "gauge"])
def test_a_stranger_among_values_costs_only_itself(registry, kind, stranger):
    """An object that is no number, also a tuple, is the only one of its batch that does not count."""
    metric = getattr(registry, kind)("m")
    names = {"counter": "increment decrement", "meter": "mark", "gauge": "increment decrement set"}
    records = names.get(kind, "update").split()
    for _ in range(10):
        getattr(metric, records[0])(1)
    for record in records:
        getattr(metric, record)(stranger)
    series = registry.snapshot().get("m")
    assert getattr(series, "count" if kind in ("meter", "histogram", "timer") else "value") == 10
    assert rejected(registry) == len(records)


def test_extremes_stay_finite(registry, clock):
    """Sums, deviations and means of the largest numbers are finite, and fall again."""
    histogram = registry.histogram("h")
    for value in (1.7e308, -1.7e308, 1.7e308):
        histogram.update(value)
        registry.get_stats()
    assert rejected(registry) == 0
    assert all(math.isfinite(value) for value in registry.get_stats().h.values())
    clock.advance(1e7)
    histogram.update(1)
    assert registry.get_stats().h.mean == 1.0
    for value in [1e154] * 100 + [0] * 100:
        registry.histogram("wide").update(value)
    assert all(math.isfinite(value) for value in registry.get_stats().wide.values())


def test_the_recent_mean_forgets_an_outlier(registry, clock):
    """45 minutes after 1e20 was recorded, the recent mean of 1, 2 and 3 is 2."""
    histogram = registry.histogram("h")
    histogram.update(1e20)
    registry.get_stats()
    clock.advance(2700)
    for value in (1, 2, 3):
        histogram.update(value)
    assert registry.get_stats().h.mean == pytest.approx(2, rel=0.004)


@pytest.mark.parametrize("line", ["self._folding = True", "self._folding = False", "pending = len(buffer)"])
def test_a_read_that_interrupts_a_fold_anywhere_is_answered(registry, line):
    """A read that interrupts a fold, as from a signal handler, is answered before and after each step."""
    histogram = registry.histogram("h")
    histogram.update(1.0)
    lines = set()
    for function in (Folding._fold, Folding._fold_batches):
        source, first = inspect.getsourcelines(function)
        lines |= {first + n for n, text in enumerate(source) if line in text}
    assert lines
    answers = []

    def interrupt(frame, event, arg):
        if event == "line" and frame.f_lineno in lines and "metrics/folding" in frame.f_code.co_filename:
            lines.discard(frame.f_lineno)
            sys.settrace(None)
            frame.f_trace = None
            answers.append(registry.snapshot().get("h").count)
        return interrupt

    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        histogram.collect()
    finally:
        sys.settrace(before)
    assert answers in ([0], [1])
    assert registry.snapshot().get("h").count == 1


def test_recording_and_reading_inside_a_fold_do_not_deadlock(registry):
    """A number that records and reads while it is folded, as a signal handler may, blocks nothing."""
    histogram = registry.histogram("h")
    seen = []

    class Nosy:
        def __float__(self):
            histogram.update(1.0)
            seen.append(registry.snapshot().get("h").count)
            return 2.0

    histogram.update(Nosy())
    registry.snapshot()
    assert seen
    assert registry.snapshot().get("h").count >= 2


@pytest.mark.parametrize("large", [10**39, 2**1023, 1e300])
def test_a_number_beyond_the_bins_takes_no_other_with_it(registry, large):
    """A histogram counts it in the outermost bin, and what was recorded beside it where that belongs."""
    histogram = registry.histogram("h")
    for value in (3, large, 0.5):
        histogram.update(value)
    fields = registry.snapshot().get("h").fields()
    assert (fields["count"], fields["min"], fields["q50"], fields["max"]) == (3, 0.5, 3, float(large))
    assert rejected(registry) == 0
